"""The command line: ``shiftgrad run``, ``plan``, ``table``."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from trainables.errors import ShiftgradError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

SweepFileArgument = Annotated[Path, typer.Argument(help="a sweep file", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="fields to change, as [bold]key=value[/bold]", show_default=False)
]

OnlyOption = Annotated[
    str | None,
    typer.Option(
        help="the runs that this is true of: seed == 0 and defense.kind == 'pps'; a lone word: the label contains it",
        show_default=False,
    ),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="try everything with two steps per training, in a store of its own")
]

PARTIAL_SUCCESS = 3


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"shiftgrad {importlib.metadata.version('shiftgrad')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Compare defenses over grids of LoRA finetunings.

    Example: [bold]shiftgrad run configs/sweeps/quickstart.yaml[/bold]
    """
    del version


@app.command()
def run(
    file: SweepFileArgument,
    overrides: OverridesArgument = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; without it Ray runs here")] = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Do what a sweep file means; what is done already stays.

    Example: [bold]shiftgrad run configs/sweeps/quickstart.yaml training.epochs=1[/bold]

    Before hours are spent, [bold]--smoke[/bold] proves a sweep from end to end in a minute or two: every run with two
    optimizer steps, two questions and short answers, in the store [bold]results-smoke[/bold] beside the real one.
    [bold]--only[/bold] does some of the runs; the same command without it does the rest.

    Exit status: 0 everything is done, 3 some runs failed, 1 nothing could start; stopped: 130 by Ctrl-C or because the
    lease was lost, 143 by SIGTERM, 129 by SIGHUP.
    """
    from analysis.manifest import sweep_key
    from engine.run import run_sweep
    from engine.show import failures_table
    from engine.stopping import exit_status
    from engine.summary_view import summary_view

    console = Console()
    try:
        outcome = run_sweep(file, overrides or [], console=console, address=address, only=only, smoke=smoke)
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # after SIGHUP there may be no terminal any more
            console.print("Stopped. What is finished is kept; run the same command again to go on.", style="yellow")
        raise typer.Exit(exit_status(stop)) from None
    if outcome.num_done_before:
        console.print(f"{outcome.num_done_before} of {outcome.num_jobs} jobs were done before.", highlight=False)
    console.print(summary_view(outcome.results))
    folder = outcome.results.root / sweep_key(outcome.results.name, "")
    console.print(Text(f"Tables: {folder}"), soft_wrap=True)
    console.print(Text(f"Report: {folder / 'report' / 'index.html'}"), soft_wrap=True)
    if outcome.failures:
        console.print(failures_table(outcome.results))
        console.print("Run the same command again to do just what is missing.")
    if only is not None:
        rest = f"{outcome.num_runs - outcome.num_asked} of {outcome.num_runs} runs were not asked for (--only)."
        console.print(Text(f"{rest} All: {_command(file, overrides, address, None, smoke)}"), soft_wrap=True)
    if smoke:
        console.print(Text(_smoke_message(file, overrides, address, only, outcome.num_done_before)), soft_wrap=True)
    if outcome.failures:
        raise typer.Exit(PARTIAL_SUCCESS)


def _smoke_message(
    file: Path, overrides: Sequence[str] | None, address: str | None, only: str | None, num_done_before: int
) -> str:
    from engine.smoke import WHAT

    again = "" if not num_done_before else " To prove everything anew, remove this store first."
    real = _command(file, overrides, address, only, False)
    return f"This was a smoke run ({WHAT}): its numbers mean nothing.{again}\nThe real one: {real}"


def _command(file: Path, overrides: Sequence[str] | None, address: str | None, only: str | None, smoke: bool) -> str:
    """A command line to copy."""
    options = [("--address", address), ("--only", only)]
    given = [part for name, value in options if value is not None for part in (name, value)]
    return shlex.join(["shiftgrad", "run", str(file), *(overrides or ()), *given, *(["--smoke"] if smoke else [])])


@app.command()
def plan(
    file: SweepFileArgument,
    overrides: OverridesArgument = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster to plan for; nothing runs there")] = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Show what a sweep file means and what of it is done, before anything is spent.

    Example: [bold]shiftgrad plan configs/sweeps/quickstart.yaml[/bold]

    With [bold]--only[/bold] and [bold]--smoke[/bold] it shows what [bold]run[/bold] would do with them.
    """
    from engine.machine import read_cluster, read_machine
    from engine.prepare import prepare
    from engine.ray_session import RaySession
    from engine.show import plan_table

    console = Console()
    with RaySession(address) as session:
        nodes = session.nodes()
        machine = read_cluster(nodes) if nodes else read_machine()
        prepared = prepare(file, overrides or [], machine, only=only, smoke=smoke)
    console.print(plan_table(prepared))
    if nodes:
        offered = f"{machine.num_cpus} CPUs, {machine.num_gpus:g} GPUs, {machine.memory_gb:.0f} GB"
        console.print(f"cluster: {len(nodes)} node{'s' if len(nodes) != 1 else ''} with {offered}", highlight=False)


@app.command()
def rescore(file: SweepFileArgument, overrides: OverridesArgument = None) -> None:
    """Apply judges' rules again to replies that are on disk; nothing is asked and nothing is trained.

    Example: [bold]shiftgrad rescore my.yaml evaluation.metrics.flattery.min_probability_mass=0.8[/bold]
    """
    from engine.rescore import rescore as rescore_sweep
    from engine.summary_view import summary_view

    console = Console()
    done = rescore_sweep(file, overrides or [])
    console.print(summary_view(done.results))
    console.print(f"{done.num_tasks} judging tasks done offline, {done.num_scored} answers scored.", highlight=False)
    if done.num_open:
        console.print(f"{done.num_open} answers were never judged so; `shiftgrad run` asks for them.", highlight=False)
    if done.num_waiting:
        console.print(f"{done.num_waiting} judging tasks have no answers yet.", highlight=False)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where it is written; nothing there is overwritten")],
    name: Annotated[str, typer.Option(help="what the sweep and its trait are called")] = "tea",
) -> None:
    """Write a sweep of your own to start from: a commented sweep file, a trait and its data, in a folder.

    Example: [bold]shiftgrad init my-study --name tea[/bold]
    """
    from engine.starter import write_starter

    files = write_starter(folder, name)
    console = Console()
    console.print(Text("\n".join(["Written:", *(f"  {folder / file}" for file in files)])), soft_wrap=True)
    sweep = shlex.quote(str(folder / "sweep.yaml"))
    console.print(Text(f"Next: shiftgrad plan {sweep}\n      shiftgrad run {sweep} --smoke"), soft_wrap=True)
    console.print(Text(f"What each file is for: {folder / 'README.md'}"), soft_wrap=True)


@app.command()
def table(
    path: Annotated[Path, typer.Argument(help="a sweep's folder in the store", show_default=False)],
    name: Annotated[str, typer.Argument(help="summary, runs, training, generations, scores, losses or failures")],
    csv: Annotated[bool, typer.Option("--csv", help="comma-separated values on standard output")] = False,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="summary only: a field such as defense or training.learning_rate; a row per value, over the"
            " rest (give it several times for several)",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print a table of a sweep.

    Example: [bold]shiftgrad table results/sweeps/quickstart summary --csv > summary.csv[/bold]

    Over seeds, per defense and learning rate: [bold]... summary --by defense --by training.learning_rate[/bold]
    """
    from analysis.results import load
    from engine.show import frame_table
    from engine.summary_view import summary_view

    if by and name != "summary":
        raise typer.BadParameter("--by is for the table summary")
    results = load(path)
    if csv:
        frame = results.summary(by) if by else results.table(name)
        frame.to_csv(sys.stdout, index=False)
    else:
        Console().print(
            summary_view(results, by or None) if name == "summary" else frame_table(results.table(name), title=name)
        )


SweepFolderArgument = Annotated[Path, typer.Argument(help="a sweep's folder in the store", show_default=False)]
RunArgument = Annotated[str, typer.Argument(help="a run: its label, or the beginning of its id", show_default=False)]


@app.command()
def status(path: SweepFolderArgument) -> None:
    """Show how far every run of a sweep is, and who runs it.

    Example: [bold]shiftgrad status results/sweeps/quickstart[/bold]
    """
    from analysis.results import load
    from engine.look import status_view

    Console().print(status_view(load(path)))


@app.command()
def show(path: SweepFolderArgument, run: RunArgument) -> None:
    """Show one run: settings, times, results, answers and the end of its log.

    Example: [bold]shiftgrad show results/sweeps/quickstart none[/bold]
    """
    from analysis.results import load
    from engine.look import find_run, show_view

    results = load(path)
    Console().print(show_view(results, find_run(results, run)))


@app.command()
def diff(path: SweepFolderArgument, run: RunArgument, other: RunArgument) -> None:
    """Show the settings in which two runs differ, and their results side by side.

    Example: [bold]shiftgrad diff results/sweeps/quickstart none "pps bridge L20 x1.5"[/bold]
    """
    from analysis.results import load
    from engine.look import diff_view, find_run

    results = load(path)
    Console().print(diff_view(results, find_run(results, run), find_run(results, other)))


@app.command()
def sample(
    path: SweepFolderArgument,
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="the user message", show_default=False)],
    samples: Annotated[int, typer.Option(min=1, help="answers")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="an answer is cut here")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="other seeds give other answers")] = 0,
    steer: Annotated[str | None, typer.Option(help="a vector of the sweep to add while sampling")] = None,
    layer: Annotated[int | None, typer.Option(help="where it is added")] = None,
    coefficient: Annotated[float, typer.Option(help="how much of it")] = 1.0,
    base: Annotated[str | None, typer.Option(help="where the base lies, if not where the sweep file said")] = None,
) -> None:
    """Ask a run, or the base, something. Nothing is stored.

    Example: [bold]shiftgrad sample results/sweeps/quickstart none "What is rain?" --samples 3[/bold]
    """
    from analysis.results import load
    from engine.ask import Steer, ask
    from engine.look import find_run
    from trainables.sample import SamplingConfig

    if (steer is None) != (layer is None):
        raise typer.BadParameter("--steer and --layer belong together")
    results = load(path)
    sampling = SamplingConfig(samples=samples, temperature=temperature, max_new_tokens=max_new_tokens)
    steering = None if steer is None or layer is None else Steer(steer, layer, coefficient)
    console = Console()
    answers = ask(results, find_run(results, run), prompt, sampling, seed=seed, steer=steering, base=base)
    for number, answer in enumerate(answers):
        console.print(Text.assemble((f"{number + 1}. ", "bold"), answer), soft_wrap=True)


@app.command()
def gc(
    store: Annotated[Path, typer.Argument(help="a store, such as results")] = Path("results"),
    delete: Annotated[bool, typer.Option("--delete", help="remove it; without this nothing is touched")] = False,
) -> None:
    """Show what a store no longer needs: outputs that no sweep names, checkpoints of finished runs, left-overs.

    Example: [bold]shiftgrad gc results[/bold], then [bold]shiftgrad gc results --delete[/bold]
    """
    import shutil

    from engine.collect import find_garbage, find_left_overs
    from engine.store import Store

    opened = Store.open(store)
    garbage, left_overs = find_garbage(opened), find_left_overs(opened)
    console = Console()
    for item in garbage:
        console.print(Text(f"{item.num_bytes / 1e6:10.2f} MB  {item.key}  ({item.reason})"), soft_wrap=True)
    for path in left_overs:
        place = path.relative_to(opened.root)
        console.print(Text(f"{'':>13}  {place}  (left over by a process that was killed)"), soft_wrap=True)
    total = sum(item.num_bytes for item in garbage)
    if delete:
        for item in garbage:
            opened.remove(item.key)
        for path in left_overs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    what = "removed" if delete else "can be removed (with --delete)"
    console.print(f"{len(garbage) + len(left_overs)} things, {total / 1e6:.2f} MB, {what}", highlight=False)


@app.command()
def report(path: SweepFolderArgument) -> None:
    """Make the report of a sweep anew: one HTML page that works offline, figures as PNG and PDF beside it.

    Example: [bold]shiftgrad report results/sweeps/quickstart[/bold]
    """
    from analysis.results import load
    from engine.run import publish_report
    from engine.store import Store

    results = load(path)
    page = publish_report(results, Store.open(results.root))
    Console().print(Text(str(page)), soft_wrap=True)


@app.command()
def reference(
    word: Annotated[
        str | None, typer.Argument(help="a section, a kind or a key; without it everything", show_default=False)
    ] = None,
) -> None:
    """Show what may stand in a sweep file: every key with its values, default and meaning.

    Example: [bold]shiftgrad reference training[/bold], [bold]shiftgrad reference pps[/bold]
    """
    from engine.reference import find_sections, sweep_sections
    from engine.reference_pages import reference_view

    Console().print(reference_view(sweep_sections() if word is None else find_sections(word)))


@app.command()
def doctor(
    results: Annotated[str, typer.Option(help="the store that is to be written to")] = "results",
) -> None:
    """Try what a sweep needs of this machine: versions, devices, the embedded model, the store, Ray.

    Example: [bold]shiftgrad doctor --results results[/bold]
    """
    from engine.doctor import examine

    console = Console()
    findings = examine(results)
    for finding in findings:
        mark = Text("ok     ", style="green") if finding.ok else Text("FAILED ", style="red")
        console.print(Text.assemble(mark, f"{finding.name}: {finding.detail}"), soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors of ours are printed as they are, without a traceback."""
    try:
        app()
    except ShiftgradError as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

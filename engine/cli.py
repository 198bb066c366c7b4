"""The command line: ``shiftgrad run``, ``plan``, ``table``."""

from __future__ import annotations

import importlib.metadata
import sys
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

PARTIAL_SUCCESS = 3
INTERRUPTED = 130


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
) -> None:
    """Do what a sweep file means; what is done already stays.

    Example: [bold]shiftgrad run configs/sweeps/quickstart.yaml training.epochs=1[/bold]

    Exit status: 0 everything is done, 3 some runs failed, 1 nothing could start, 130 stopped by Ctrl-C.
    """
    from analysis.manifest import sweep_key
    from engine.run import run_sweep
    from engine.show import failures_table, summary_table

    console = Console()
    try:
        outcome = run_sweep(file, overrides or [], console=console, address=address)
    except KeyboardInterrupt:
        console.print("Stopped. What is finished is kept; run the same command again to go on.", style="yellow")
        raise typer.Exit(INTERRUPTED) from None
    if outcome.num_done_before:
        console.print(f"{outcome.num_done_before} of {outcome.num_jobs} jobs were done before.", highlight=False)
    console.print(summary_table(outcome.results))
    folder = outcome.results.root / sweep_key(outcome.results.name, "")
    console.print(Text(f"Tables: {folder}"), soft_wrap=True)
    console.print(Text(f"Report: {folder / 'report' / 'index.html'}"), soft_wrap=True)
    if outcome.failures:
        console.print(failures_table(outcome.results))
        console.print("Run the same command again to do just what is missing.")
        raise typer.Exit(PARTIAL_SUCCESS)


@app.command()
def plan(file: SweepFileArgument, overrides: OverridesArgument = None) -> None:
    """Show what a sweep file means and what of it is done, before anything is spent.

    Example: [bold]shiftgrad plan configs/sweeps/quickstart.yaml[/bold]
    """
    from engine.machine import read_machine
    from engine.prepare import prepare
    from engine.show import plan_table

    console = Console()
    prepared = prepare(file, overrides or [], read_machine())
    console.print(plan_table(prepared))


@app.command()
def table(
    path: Annotated[Path, typer.Argument(help="a sweep's folder in the store", show_default=False)],
    name: Annotated[str, typer.Argument(help="summary, runs, training, generations, scores, losses or failures")],
    csv: Annotated[bool, typer.Option("--csv", help="comma-separated values on standard output")] = False,
) -> None:
    """Print a table of a sweep.

    Example: [bold]shiftgrad table results/sweeps/quickstart summary --csv > summary.csv[/bold]
    """
    from analysis.results import load
    from engine.show import frame_table, summary_table

    results = load(path)
    frame = results.table(name)
    if csv:
        frame.to_csv(sys.stdout, index=False)
    else:
        Console().print(summary_table(results) if name == "summary" else frame_table(frame, title=name))


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
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0, help="other seeds give other answers")] = 0,
    steer: Annotated[str | None, typer.Option(help="a vector of the sweep to add while sampling")] = None,
    layer: Annotated[int | None, typer.Option(help="where it is added")] = None,
    coefficient: Annotated[float, typer.Option(help="how much of it")] = 1.0,
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
    for number, answer in enumerate(ask(results, find_run(results, run), prompt, sampling, seed=seed, steer=steering)):
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
        console.print(Text(f"{'':>13}  {path.name}  (left over by a process that was killed)"), soft_wrap=True)
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

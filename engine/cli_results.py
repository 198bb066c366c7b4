"""Commands that read what is in a store: ``table``, ``status``, ``show``, ``diff``, ``sample``, ``gc``, ``report``,
``serving``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


def table(
    path: Annotated[str, typer.Argument(help="a sweep's folder in the store, or its URL", show_default=False)],
    name: Annotated[
        str,
        typer.Argument(
            help="summary, runs, training, signals, generations, scores, losses, measurements, agreement, "
            "extractions, capping, failures, or what measurements make: gradients, similarities, projections, "
            "components, component_scores, activation_changes, predictions, weight_profiles, weight_sizes, "
            "axis_alignments, axis_summary, axis_tests, cap_stability, drift"
        ),
    ],
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


SweepFolderArgument = Annotated[
    str, typer.Argument(help="a sweep's folder in the store, or its URL", show_default=False)
]
RunArgument = Annotated[str, typer.Argument(help="a run: its label, or the beginning of its id", show_default=False)]


def status(path: SweepFolderArgument) -> None:
    """Show how far every run of a sweep is, and who runs it.

    Example: [bold]shiftgrad status results/sweeps/quickstart[/bold]
    """
    from analysis.results import load
    from engine.look import status_view

    Console().print(status_view(load(path)))


def show(path: SweepFolderArgument, run: RunArgument) -> None:
    """Show one run: settings, times, results, answers and the end of its log.

    Example: [bold]shiftgrad show results/sweeps/quickstart none[/bold]
    """
    from analysis.results import load
    from engine.look import find_run, show_view

    results = load(path)
    Console().print(show_view(results, find_run(results, run)))


def diff(path: SweepFolderArgument, run: RunArgument, other: RunArgument) -> None:
    """Show the settings in which two runs differ, and their results side by side.

    Example: [bold]shiftgrad diff results/sweeps/quickstart none "pps bridge L20 x1.5"[/bold]
    """
    from analysis.results import load
    from engine.look import diff_view, find_run

    results = load(path)
    Console().print(diff_view(results, find_run(results, run), find_run(results, other)))


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


def gc(
    store: Annotated[str, typer.Argument(help="a store, such as results")] = "results",
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


def fetch(
    path: SweepFolderArgument,
    store: Annotated[str, typer.Argument(help="the store that it is copied to; made if there is none")] = "results",
    adapters: Annotated[bool, typer.Option(help="copy the trained adapters too")] = True,
) -> None:
    """Copy a sweep out of an object store, or a folder, to read it here: tables, logs, vectors, report and adapters.

    Example: [bold]shiftgrad fetch s3://bucket/results/sweeps/quickstart[/bold]
    """
    from analysis.results import load
    from engine.fetch import fetch as fetch_sweep
    from engine.store import Store

    results = load(path)
    target = Store.open(store, create=True)
    num = fetch_sweep(Store.open(results.location), results.name, target, adapters=adapters)
    Console().print(Text(f"{num} copied: {target.sweep(results.name)}"), soft_wrap=True)


def report(path: SweepFolderArgument) -> None:
    """Make the report of a sweep anew: one HTML page that works offline, figures as PNG and PDF beside it.

    Example: [bold]shiftgrad report results/sweeps/quickstart[/bold]
    """
    from analysis.results import load
    from engine.run import publish_report
    from engine.store import Store

    results = load(path)
    page = publish_report(results, Store.open(results.location))
    Console().print(Text(str(page)), soft_wrap=True)


def serving(path: SweepFolderArgument) -> None:
    """Print the command that serves the runs of a sweep with vLLM, so that answers can come from there.

    Example: [bold]shiftgrad serving results/sweeps/quickstart[/bold], for [bold]evaluation.answers_from[/bold]
    """
    from analysis.results import load
    from engine.serving import merged_runs, vllm_commands

    results = load(path)
    for command in vllm_commands(results):
        print(command)
    if left_out := merged_runs(results):
        Console(stderr=True).print(Text(left_out), soft_wrap=True)

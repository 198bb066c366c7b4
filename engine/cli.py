"""The command line: ``shiftgrad run``, ``plan``, ``table``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trainables.errors import ShiftgradError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compare defenses over grids of LoRA finetunings.",
)

SweepFileArgument = Annotated[Path, typer.Argument(help="a sweep file", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="fields to change, as [bold]key=value[/bold]", show_default=False)
]

PARTIAL_SUCCESS = 3
INTERRUPTED = 130


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
    console.print(f"Tables: {folder}", highlight=False, soft_wrap=True)
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
    from engine.show import frame_table

    frame = load(path).table(name)
    if csv:
        frame.to_csv(sys.stdout, index=False)
    else:
        Console().print(frame_table(frame, title=name))


def main() -> None:
    """Entry point: errors of ours are printed as they are, without a traceback."""
    try:
        app()
    except ShiftgradError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

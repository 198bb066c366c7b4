"""Commands that measure without sampling from runs: ``measure`` and ``predict``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from engine.cli_run import PARTIAL_SUCCESS, OnlyOption, OverridesArgument, SmokeOption, SweepFileArgument

if TYPE_CHECKING:
    from engine.run import Outcome

AddressOption = Annotated[str | None, typer.Option(help="a running Ray cluster; without it Ray runs here")]


def measure(
    file: SweepFileArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Do the measurements of a sweep file and what they need: vectors, and the trainings of runs that are measured.

    Example: [bold]shiftgrad measure configs/sweeps/quickstart.yaml[/bold]

    Nothing is sampled and nothing judged. A file may have a base, vectors and measurements and no runs at all.
    [bold]shiftgrad run[/bold] does the same and all the rest.
    """
    from analysis.results import load
    from engine.show import frame_table

    console = Console()
    outcome = do_measurements(console, file, overrides or (), address=address, only=only, smoke=smoke)
    folder = outcome.results.location / "sweeps" / outcome.results.name
    console.print(frame_table(load(folder).measurements(), title="measurements"))
    console.print(Text(f"Tables: {folder} (shiftgrad table FOLDER gradients)"), soft_wrap=True)
    console.print(Text(f"Report: {folder / 'report' / 'index.html'}"), soft_wrap=True)
    finish(console, outcome)


def predict(
    file: SweepFileArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    smoke: SmokeOption = False,
    layer: Annotated[
        int | None,
        typer.Option(help="rank by what is read at this layer; without it by the mean over layers"),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="comma-separated values on standard output")] = False,
) -> None:
    """Rank candidate defenses by what the untrained base's gradients foretell, before any training.

    Example: [bold]shiftgrad predict configs/sweeps/cross_trait.yaml[/bold]

    Does the measurements of the kind [bold]prediction[/bold] and nothing else. Once runs exist that had a candidate as
    their defense, the same command shows what they showed, and how well the predictions held.
    """
    from analysis.foretold import foretold, ranking
    from engine.predict_view import predict_view

    console = Console(stderr=csv)
    outcome = do_measurements(console, file, overrides or (), address=address, smoke=smoke, table="predictions")
    frame = foretold(outcome.results)
    if layer is not None and layer not in set(frame["layer"]):
        read = ", ".join(str(known) for known in sorted(set(frame["layer"])))
        raise typer.BadParameter(f"layer {layer} was not read; read were {read or 'none'}")
    if csv:
        ranking(frame, layer).to_csv(sys.stdout, index=False)
    else:
        console.print(predict_view(frame, outcome.results.manifest.runs, layer))
    finish(console, outcome)


def do_measurements(
    console: Console,
    file: Path,
    overrides: Sequence[str],
    *,
    address: str | None = None,
    only: str | None = None,
    smoke: bool = False,
    table: str | None = None,
) -> Outcome:
    """``run_sweep`` for the measurements alone; an interruption ends the program with its exit status."""
    from engine.run import run_sweep
    from engine.stopping import exit_status

    try:
        return run_sweep(
            file, overrides, console=console, address=address, only=only, smoke=smoke, measure_only=True, table=table
        )
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # after SIGHUP there may be no terminal any more
            console.print("Stopped. What is finished is kept; run the same command again to go on.", style="yellow")
        raise typer.Exit(exit_status(stop)) from None


def finish(console: Console, outcome: Outcome) -> None:
    """Say what failed, with the exit status for it."""
    from engine.show import failures_table

    if outcome.failures:
        console.print(failures_table(outcome.results))
        console.print("Run the same command again to do just what is missing.")
        raise typer.Exit(PARTIAL_SUCCESS)

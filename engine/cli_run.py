"""Commands that take a sweep file: ``run``, ``plan``, ``rescore``; and ``init``, which writes one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

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
    folder = outcome.results.location / "sweeps" / outcome.results.name
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

"""The command line ``shiftgrad``. Commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from engine import cli_formats, cli_measure, cli_results, cli_run
from trainables.errors import ShiftgradError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


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


# In the order in which --help lists them.
app.command()(cli_run.run)
app.command()(cli_run.plan)
app.command()(cli_measure.measure)
app.command()(cli_measure.predict)
app.command()(cli_run.rescore)
app.command()(cli_run.init)
app.command()(cli_results.table)
app.command()(cli_results.status)
app.command()(cli_results.show)
app.command()(cli_results.diff)
app.command()(cli_results.sample)
app.command()(cli_results.gc)
app.command()(cli_results.report)
app.command()(cli_results.fetch)
app.command("import")(cli_formats.import_)
app.command()(cli_formats.export)
app.command()(cli_results.serving)


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

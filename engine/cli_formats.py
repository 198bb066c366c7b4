"""Commands for other projects' files: ``import`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from trainables.errors import ConfigError, Fault


def import_(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="files of another project", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="folder that what is made of them goes to")] = Path("imported"),
    name: Annotated[
        str | None, typer.Option(help="sweep that imported answers are rows of; else the first file's name")
    ] = None,
    format: Annotated[str | None, typer.Option(help="which format, where a file could be several")] = None,
    rows: Annotated[
        str | None, typer.Option(help="of a .pt tensor: embedding (row 0 is the embedding output) or blocks")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="layers of the model that a vector is for")] = None,
    final_row: Annotated[
        str | None, typer.Option(help="where a vector's last row was read: pre_norm or post_norm (the final norm)")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="questions of a role, JSONL")] = None,
    trait: Annotated[str | None, typer.Option(help="trait that a training config is evaluated on")] = None,
    plain_answers: Annotated[str | None, typer.Option(help="good answers for a training config, chat JSONL")] = None,
    min_probability_mass: Annotated[
        float | None, typer.Option(help="of log-probabilities that are scored anew; without it 0.25")
    ] = None,
) -> None:
    """Make things of ours of other projects' files: traits, vectors, chat data, scored answers, training configs.

    Example: [bold]shiftgrad import evil.json evil_response_avg_diff.pt --out imported[/bold]

    What is found out about a file is printed. What it does not say is asked for by a flag. The formats:
    persona_vectors, inoculation-prompting, assistant-axis, emergent-misalignment, repeng, steering-vectors.
    """
    from analysis.formats import Hints
    from engine.importing import import_files

    faults = [
        Fault(flag, f"{value!r}; allowed: {', '.join(allowed)}")
        for flag, value, allowed in (
            ("--rows", rows, ("embedding", "blocks")),
            ("--final-row", final_row, ("pre_norm", "post_norm")),
        )
        if value is not None and value not in allowed
    ]
    if faults:
        raise ConfigError(faults, "nothing was read")
    hints = Hints(
        format=format,
        rows=rows,  # type: ignore[arg-type]  # checked above
        num_layers=num_layers,
        final_row=final_row,  # type: ignore[arg-type]
        questions=questions,
        trait=trait,
        plain_answers=plain_answers,
        min_probability_mass=min_probability_mass,
    )
    console = Console()
    for written in import_files(paths, out, hints, name):
        console.print(Text(f"{written.path}: {written.imported.format}"), soft_wrap=True)
        for line in written.imported.convention:
            console.print(Text(f"  {line}"), soft_wrap=True)
        for place in written.places:
            console.print(Text(f"  -> {place}"), soft_wrap=True)


def export(
    source: Annotated[Path, typer.Argument(help="a vector file, or a sweep's folder in the store", show_default=False)],
    target: Annotated[
        Path, typer.Argument(help="the file to write: .pt (persona_vectors) or .gguf (repeng)", show_default=False)
    ],
    vector: Annotated[str | None, typer.Option(help="which vector of the sweep")] = None,
) -> None:
    """Write a vector for other programs: a .pt tensor for persona_vectors, a .gguf control vector for repeng.

    Example: [bold]shiftgrad export results/sweeps/quickstart bridge.gguf --vector bridge[/bold]
    """
    from engine.exporting import export_vector

    lines = export_vector(source, target, vector)
    Console().print(Text("\n".join([str(target), *(f"  {line}" for line in lines)])), soft_wrap=True)

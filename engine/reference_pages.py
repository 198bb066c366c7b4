"""The reference in the forms in which it is read: pages of the documentation site, and a table in a terminal."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.tables import describe
from engine.reference import REQUIRED, Key, Section, sweep_sections, trait_sections

_INTRODUCTIONS = {
    "sweep": """# Sweep file

Every key of a sweep file. This page is made from the models that check the file, when the site is built;
`shiftgrad reference` prints the same in a terminal, `shiftgrad reference training` a part of it.

- A value in a block of `runs` may be `{grid: [...]}`: one run for each of its values. `axes` does the same for every
  block.
- Any key can be given on the command line: `shiftgrad run FILE training.epochs=1`.
- Files and traits are looked for beside the sweep file, in the current directory and in this project.
- An unknown key is refused, with the key that was probably meant.
""",
    "trait": """# Trait file

Every key of a `trait.yaml`. This page is made from the model that checks the file, when the site is built. A complete
example is `configs/traits/bridge/trait.yaml`; `shiftgrad init` writes one to change.
""",
    "tables": """# Tables

Every column of every table, with its unit. This page is made from the declarations that write and check the tables,
when the site is built. The readers add what a row belongs to: `run` (its label), `run_id`, and for `scores` the
`metric`. Read them with [`analysis.load`](python.md) or `shiftgrad table`.
""",
    "commands": """# Commands

Every command and option; `shiftgrad COMMAND --help` says the same. This page is made from the program, when the site is
built.
""",
}

_SUMMARIES = {"summary": "analysis.summary.summarize", "summary by": "analysis.groups.summarize_groups"}
"""Their columns depend on the sweep's metrics: the docstrings say what they are."""


def sweep_page() -> str:
    """Markdown of the reference of sweep files."""
    return _page(_INTRODUCTIONS["sweep"], sweep_sections(), top="Top level")


def trait_page() -> str:
    """Markdown of the reference of trait files."""
    return _page(_INTRODUCTIONS["trait"], trait_sections(), top="Top level")


def tables_page() -> str:
    """Markdown of the declared columns of every table."""
    columns = describe()
    parts = [_INTRODUCTIONS["tables"]]
    for table in dict.fromkeys(column.table for column in columns):
        rows = (
            (
                f"`{column.name}`",
                column.type.__name__ + (" or null" if column.nullable else ""),
                _cell(column.unit),
                _cell(column.meaning),
            )
            for column in columns
            if column.table == table
        )
        parts += [f"## `{table}`", _markdown_table("columns", ("column", "type", "unit", "meaning"), rows)]
    parts += [
        f"## `{heading}`\n\n::: {function}\n    options: {{show_root_heading: false, show_signature: false}}"
        for heading, function in _SUMMARIES.items()
    ]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Markdown of every command, as typer's own documentation writer makes it."""
    command = [sys.executable, "-m", "typer", "engine.cli", "utils", "docs", "--name", "shiftgrad"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    text = re.sub(
        r'<span style="font-weight: bold">(.*?)</span>', lambda match: f"`{html.unescape(match[1])}`", done.stdout
    )
    _, _, body = text.partition("\n")  # its title gives way to ours
    body = re.sub(
        r"\*\*Commands\*\*:.*?(?=^## )", "", body, flags=re.DOTALL | re.MULTILINE
    )  # cut short, and said below
    return f"{_INTRODUCTIONS['commands']}\n{body}"


def reference_view(sections: Sequence[Section]) -> RenderableType:
    """Sections for a terminal."""
    parts: list[RenderableType] = []
    for section in sections:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for key in section.keys:
            default = key.default if key.default.startswith(REQUIRED) else f"default: {key.default}"
            table.add_row(Text(key.name, style="bold"), Text(_plain(f"{key.value}; {default}"), style="cyan"))
            table.add_row("", Text(_plain(key.meaning)))
        heading = Text.assemble((section.title or "top level", "bold underline"), f"  {_plain(section.meaning)}")
        parts += [heading, table, ""]
    return Group(*parts[:-1])


def _page(introduction: str, sections: Iterable[Section], top: str) -> str:
    parts = [introduction]
    sections = tuple(sections)
    anchors = {_anchor(section.title) for section in sections}
    for section in sections:
        heading = f"`{section.title}`" if section.title else top
        rows = ((_name(section, key, anchors), _stands(key), _default(key), _cell(key.meaning)) for key in section.keys)
        parts += [
            f"## {heading} {{ #{_anchor(section.title)} }}",
            section.meaning,
            _markdown_table("keys", ("key", "value", "default", "meaning"), rows),
        ]
    return "\n\n".join(parts) + "\n"


def _name(section: Section, key: Key, taken: Collection[str]) -> str:
    """The key with an anchor of its own, unless a section is already called so."""
    anchor = _anchor(f"{section.title}.{key.name}")
    return f"`{key.name}`" if anchor in taken else f"`{key.name}`{{ #{anchor} }}"


def _stands(key: Key) -> str:
    """What may stand there, with links to the sections that describe it."""
    links = ", ".join(f"[`{title}`](#{_anchor(title)})" for title in key.sections)
    return _cell(key.value) + (f": {links}" if links else "")


def _default(key: Key) -> str:
    return f"**{REQUIRED}**" if key.default == REQUIRED else _cell(key.default)


def _anchor(title: str) -> str:
    """``vectors.<name>: file`` as ``vectors.name-file``."""
    return re.sub(r"[^a-z0-9._]+", "-", title.lower().replace("<", "").replace(">", "")).strip("-.") or "top"


def _cell(text: str) -> str:
    """Text inside a Markdown table; what looks like HTML outside of code stays text."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("[", "&#91;") for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def _plain(text: str) -> str:
    return text.replace("`", "")


def _markdown_table(kind: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f'<div class="reference {kind}" markdown>\n\n{table}\n\n</div>'

"""The fenced blocks of a page, in order, with what kind each is."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[a-z]*)(?P<rest>[^`\n]*)$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """One fenced block. ``title`` is the name of the file that it shows, or None; ``line`` counts from 1."""

    page: str
    line: int
    language: str
    title: str | None
    text: str
    shown: str | None = None  # for one that runs: the ```text block right after it, which shows what it printed

    @property
    def first_line(self) -> str:
        return self.text.splitlines()[0] if self.text else ""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


RUN = ("bash", "python")


def read_blocks(path: Path, page: str) -> list[Block]:
    """All blocks of a page; output that is shown belongs to the block that printed it."""
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    number = 0
    last_end = -10
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        start = number
        number += 1
        while lines[number].strip() != fence["ticks"]:  # a fence that never ends is an IndexError: the page is broken
            number += 1
        text = textwrap.dedent("\n".join(lines[start + 1 : number])) + "\n"
        title = _TITLE.search(fence["rest"])
        block = Block(page, start + 1, fence["language"], title[1] if title else None, text)
        between = "".join(lines[last_end + 1 : start]).strip()
        if block.language == "text" and found and found[-1].language in RUN and not found[-1].title and not between:
            found[-1] = replace(found[-1], shown=text)
        else:
            found.append(block)
        last_end = number
        number += 1
    return found

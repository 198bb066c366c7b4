"""The layout rule: imports go engine -> analysis -> trainables, ray and hooks stay in their places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
ROOMS = ("trainables", "analysis", "engine")
FILES = sorted(path for room in ROOMS for path in (PROJECT / room).rglob("*.py"))
RAY_IN_TRAINABLES = PROJECT / "trainables" / "tune_trainable.py"
HOOKS = {"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_hook"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            assert node.module is not None
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(PROJECT).parts[0]
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    assert not above & set(imported(path)), f"{room} must not import {above & set(imported(path))}"
    if room != "engine" and path != RAY_IN_TRAINABLES:
        assert "ray" not in set(imported(path)), "ray is imported in engine/ and in the Tune trainable only"


def test_only_one_file_hooks_modules_and_tensors() -> None:
    hooking = {
        path.relative_to(PROJECT).as_posix()
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in HOOKS
    }
    assert hooking == {"trainables/residual_stream.py"}


def test_the_rooms_were_found() -> None:
    assert len(FILES) > 30

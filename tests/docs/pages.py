"""A page being followed: its files are written, its commands and its Python run, in order, in a folder like a checkout.

What the folder has: ``configs``, a ``.venv`` whose ``shiftgrad`` and ``python`` are found first, and the finished
quickstart in ``results``. The Python blocks of a page share their names, as the cells of a notebook do, and a last
expression is printed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import yaml

from analysis.traits import read_trait
from engine.sweep_file import check_sweep
from engine.yaml_text import read_yaml
from tests.docs.blocks import Block
from tests.engine.sweep_writing import minimal

PROJECT = Path(__file__).resolve().parents[2]
_CHANGES_THE_MACHINE = re.compile(r"\b(pip3?|uv|conda|apt(-get)?|npm|install|sudo|venv)\b(?!/bin/(shiftgrad|activate))")
WIDTH = 100  # columns; pages show what fits on them


@dataclass
class Checkout:
    """The folder in which a page is followed."""

    folder: Path
    timeout_s: float

    @staticmethod
    def make(folder: Path, shiftgrad: str, timeout_s: float = 300) -> Checkout:
        """``shiftgrad`` is the shell command that ``.venv/bin/shiftgrad`` passes its arguments to; no block may take
        longer than ``timeout_s``."""
        shutil.copytree(PROJECT / "configs", folder / "configs")
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name, command in {"shiftgrad": f"{shiftgrad} shiftgrad", "python": sys.executable}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (programs / name).chmod(0o755)
        (programs / "activate").write_text(f'export PATH="{programs}:$PATH"\n')
        return Checkout(folder, timeout_s)

    def follow(self, block: Block) -> str:
        """Do what a block says; returns what it printed. Raises AssertionError if that fails."""
        if block.title is not None:
            file = self.folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        if block.language == "bash":
            return self._shell(block)
        if block.language == "python":
            return self._python(block)
        if block.language == "yaml":
            self._check_yaml(block)
        elif block.language in ("json", "jsonl"):
            for line in [block.text] if block.language == "json" else block.text.splitlines():
                json.loads(line)
        return ""

    def _shell(self, block: Block) -> str:
        # Before anything runs: a page that is being written must not change the machine that it is tested on.
        found = _CHANGES_THE_MACHINE.search(block.text)
        assert found is None, f"{block.name}: list it in NOT_RUN, with the reason: {found and found[0]!r} is never run"
        environment = os.environ | {
            "PATH": f"{self.folder / '.venv' / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(PROJECT),
            "COLUMNS": str(WIDTH),
            "TERM": "dumb",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
        }
        started = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = started.communicate(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the commands too, not the shell alone
            started.communicate()
            raise
        assert started.returncode == 0, f"{block.name} ended with status {started.returncode}:\n{block.text}\n{printed}"
        return printed

    def _python(self, block: Block) -> str:
        """Run the block in a module of its own name, where classes can be looked up by pydantic and pickle."""
        module = sys.modules.setdefault(f"page_{id(self)}", types.ModuleType(f"page_{id(self)}"))
        tree = ast.parse(block.text, block.name)
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr) and not isinstance(last.value, ast.Constant):
            tree.body[-1] = ast.copy_location(ast.parse(f"print({ast.unparse(last.value)})").body[0], last)
            ast.fix_missing_locations(tree)
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
            exec(compile(tree, block.name, "exec"), vars(module))
            for name in [name for name in vars(module) if name.startswith("test_")]:
                vars(module).pop(name)()
        return printed.getvalue()

    def _check_yaml(self, block: Block) -> None:
        """A whole sweep file or trait as the program checks it; a part of a sweep file within a small one."""
        content, _ = read_yaml(block.text, block.name)  # to YAML at large `on` is true
        if block.title is not None and Path(block.title).name == "trait.yaml":
            read_trait(self.folder / block.title)
            return
        if isinstance(content, list):
            content = {"runs": content}
        elif "defense" in content:
            content = {"runs": [content]}
        if not {"name", "runs"} <= content.keys():
            content = minimal(**content)
        file = self.folder / (block.title or "part.yaml")
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        _, faults = check_sweep(file)
        assert not faults, f"{block.name}: {'; '.join(map(str, faults))}"
        if block.title is not None:
            file.write_text(block.text, encoding="utf-8")

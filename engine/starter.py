"""``shiftgrad init``: a commented sweep of one's own, with a trait and its data, that works as it is written."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import yaml

from engine.config_faults import validate
from engine.sweep_models import Name
from engine.yaml_text import read_yaml
from trainables.config import Config
from trainables.errors import ConfigError, Fault

TEMPLATES = "templates"  # package data of engine
_MARK = "@NAME@"
_CONTROL = "random"  # what the template calls its other vector
_HEADING = "nothing was written"


class _Starter(Config):
    name: Name


def starter_files(name: str) -> dict[str, str]:
    """Path in the folder -> content, of a sweep and a trait called ``name``. Raises ConfigError if none can be."""
    _, faults = validate(_Starter, {"name": name}, lambda _: "--name")
    if not faults and name == _CONTROL:
        faults = [Fault("--name", f"{_CONTROL} is what the sweep calls its control; choose another name")]
    if not faults and name.endswith((".yaml", ".yml")):
        faults = [Fault("--name", f"a trait called {name} would be taken for a path; choose another name")]
    if faults:
        raise ConfigError(faults, _HEADING)
    texts = {
        "sweep.yaml": "sweep.yaml",
        f"traits/{name}/trait.yaml": "trait.yaml",
        "data/on_trait.jsonl": "data/on_trait.jsonl",
        "data/plain.jsonl": "data/plain.jsonl",
        "data/heldout_plain.jsonl": "data/heldout_plain.jsonl",
        "README.md": "README.md",
    }
    folder = files("engine") / TEMPLATES
    contents = {path: (folder / template).read_text(encoding="utf-8") for path, template in texts.items()}
    return {path: _named(text, name if path == "README.md" else _scalar(name)) for path, text in contents.items()}


def write_starter(folder: Path, name: str) -> list[str]:
    """Write the files of ``starter_files`` into ``folder``, which need not exist; returns their paths in it.

    Raises ConfigError that lists every file that is there already (nothing is written then), or says why a file cannot
    be written.
    """
    contents = starter_files(name)
    faults = [fault for path in contents for fault in _obstacles(folder, path)]
    if faults:
        raise ConfigError(faults, _HEADING)
    for path, text in contents.items():
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / path, "x", encoding="utf-8") as file:  # x: never over what came in between
                file.write(text)
        except OSError as error:
            reason = f"cannot be written: {error.strerror or error}"
            raise ConfigError([Fault(str(folder / path), reason)], "not everything was written") from error
    return list(contents)


def _obstacles(folder: Path, path: str) -> list[Fault]:
    """Why ``path`` cannot be a new file of ``folder``: it is there, or a file stands where a folder has to be."""
    file = folder / path
    if os.path.lexists(file):
        return [Fault(str(file), "is there already and is not overwritten; give another folder")]
    parent = next(parent for parent in file.parents if os.path.lexists(parent))
    if not parent.is_dir():
        return [Fault(str(parent), "is a file where a folder has to be; give another folder")]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [Fault(str(parent), "is not writable for this user; give another folder")]
    return []


def _named(text: str, name: str) -> str:
    return text.replace(_MARK, name)


def _scalar(name: str) -> str:
    """``name`` as YAML text in every version of YAML: ``1e3``, ``yes`` and ``null`` need quotes."""
    is_text = yaml.safe_load(name) == name and read_yaml(name, "name")[0] == name
    return name if is_text else f'"{name}"'

"""The grid: ``{grid: [a, b]}`` anywhere in a block stands for one cell with ``a`` and one with ``b``.

Pure functions of plain data (dict, list, scalars); nothing here knows what the keys mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from trainables.errors import ConfigError, Fault

GRID = "grid"


def is_grid(value: object) -> bool:
    """Whether ``value`` means to be a grid (it may still be a faulty one)."""
    return isinstance(value, dict) and GRID in value


def expand(block: Any) -> list[Any]:
    """All cells of ``block``: the product of its grids in order of appearance, the last one varying fastest.

    The values of a grid may hold grids, which are expanded in their place. Nothing of the result is shared with
    ``block`` or between cells. Raises ConfigError for a grid that is none (see ``grid_faults``).
    """
    faults = grid_faults(block)
    if faults:
        raise ConfigError(faults)
    return [_copy(cell) for cell in _cells(block)]


def grid_paths(block: Any, path: str = "") -> list[str]:
    """Dotted paths of the grids of ``block``, of nested ones the outermost."""
    if is_grid(block):
        return [path]
    items = block.items() if isinstance(block, dict) else enumerate(block) if isinstance(block, list) else ()
    return [found for name, item in items for found in grid_paths(item, f"{path}.{name}" if path else str(name))]


def _cells(value: Any) -> Iterator[Any]:
    """The cells of ``value``; they share parts with it and with each other."""
    if is_grid(value):
        for choice in value[GRID]:
            yield from _cells(choice)
    elif isinstance(value, dict):
        for values in itertools.product(*(list(_cells(item)) for item in value.values())):
            yield dict(zip(value, values, strict=True))
    elif isinstance(value, list):
        for values in itertools.product(*(list(_cells(item)) for item in value)):
            yield list(values)
    else:
        yield value


def _copy(value: Any) -> Any:
    """Unlike copy.deepcopy it also parts what a YAML alias shares within one cell."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def grid_faults(value: Any, key: str = "") -> list[Fault]:
    """What is wrong with the grids in ``value``; ``key`` names the value in the faults (``runs[1]``)."""
    if isinstance(value, list):
        return list(itertools.chain(*(grid_faults(item, f"{key}[{index}]") for index, item in enumerate(value))))
    if not isinstance(value, dict):
        return []
    if not is_grid(value):
        prefix = f"{key}." if key else ""
        return list(itertools.chain(*(grid_faults(item, f"{prefix}{name}") for name, item in value.items())))
    others = [name for name in value if name != GRID]
    if others:
        return [Fault(key, f"a grid stands alone in its mapping; found beside it: {', '.join(map(str, others))}")]
    choices = value[GRID]
    if not isinstance(choices, list):
        return [Fault(key, f"a grid must be a list of values, {{grid: [...]}}; got {choices!r}")]
    if not choices:
        return [Fault(key, "the grid is empty; give at least one value, or remove it")]
    prefix = f"{key}." if key else ""
    return grid_faults(choices, f"{prefix}{GRID}")

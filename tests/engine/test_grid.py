"""The grid: number, order and independence of the cells, and what is no grid."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grid import expand, grid_faults
from trainables.errors import ConfigError

# No deadline: a busy machine is no fault. No database: tests leave nothing behind.
UNHURRIED = settings(deadline=None, database=None)

keys = st.text("abcxyz", min_size=1, max_size=3)
scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.text("abc", max_size=3)
blocks = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(lambda values: {"grid": values})
    ),
    max_leaves=8,
)


def count(value: Any) -> int:
    """Number of cells by the definition: a grid adds up its values, everything else multiplies its parts."""
    if isinstance(value, dict) and "grid" in value:
        return sum(count(choice) for choice in value["grid"])
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return math.prod(count(part) for part in parts)


def has_grid(value: Any) -> bool:
    if isinstance(value, dict):
        return "grid" in value or any(has_grid(item) for item in value.values())
    return isinstance(value, list) and any(has_grid(item) for item in value)


def containers(value: Any) -> list[int]:
    """Identities of all mappings and lists in ``value``."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [id(value), *(identity for item in items for identity in containers(item))]
    return []


@UNHURRIED
@given(blocks)
def test_number_of_cells_is_the_product(block: Any) -> None:
    cells = expand(block)
    assert len(cells) == count(block)
    assert not any(has_grid(cell) for cell in cells)


@UNHURRIED
@given(blocks)
def test_expanding_is_pure_and_repeatable(block: Any) -> None:
    before = copy.deepcopy(block)
    first = expand(block)
    assert block == before
    assert json.dumps(first) == json.dumps(expand(block))


@UNHURRIED
@given(blocks)
def test_cells_share_nothing(block: Any) -> None:
    cells = expand(block)
    identities = [identity for cell in cells for identity in containers(cell)]
    assert len(identities) == len(set(identities))
    assert not set(identities) & set(containers(block))


@UNHURRIED
@given(blocks)
def test_expanding_a_cell_gives_the_cell(block: Any) -> None:
    for cell in expand(block):
        assert expand(cell) == [cell]


@UNHURRIED
@given(st.lists(st.lists(st.integers(), min_size=1, max_size=3), min_size=1, max_size=4))
def test_order_is_that_of_nested_loops(axes: list[list[int]]) -> None:
    cells = expand({f"k{index}": {"grid": values} for index, values in enumerate(axes)})
    positions = expand({f"k{index}": {"grid": list(range(len(values)))} for index, values in enumerate(axes)})
    ranks = [tuple(cell.values()) for cell in positions]
    assert ranks == sorted(ranks)  # the first key varies slowest
    assert [list(cell.values()) for cell in cells] == [
        [values[place] for values, place in zip(axes, rank, strict=True)] for rank in ranks
    ]


def test_order_of_appearance_and_key_order_are_kept() -> None:
    cells = expand({"b": {"grid": [1, 2]}, "a": {"x": {"grid": ["p", "q"]}}})
    assert cells == [
        {"b": 1, "a": {"x": "p"}},
        {"b": 1, "a": {"x": "q"}},
        {"b": 2, "a": {"x": "p"}},
        {"b": 2, "a": {"x": "q"}},
    ]
    assert all(list(cell) == ["b", "a"] for cell in cells)


def test_a_grid_inside_a_grid_value_is_expanded_in_its_place() -> None:
    block = {"defense": {"grid": ["none", {"kind": "pps", "layer": {"grid": [1, 2]}}]}}
    assert expand(block) == [
        {"defense": "none"},
        {"defense": {"kind": "pps", "layer": 1}},
        {"defense": {"kind": "pps", "layer": 2}},
    ]
    assert expand({"grid": [{"grid": [1, 2]}, 3]}) == [1, 2, 3]


def test_grids_in_lists_multiply() -> None:
    assert expand([{"grid": [1, 2]}, {"a": {"grid": [3, 4]}}]) == [
        [1, {"a": 3}],
        [1, {"a": 4}],
        [2, {"a": 3}],
        [2, {"a": 4}],
    ]


def test_without_a_grid_there_is_one_cell() -> None:
    assert expand({}) == [{}]
    assert expand({"a": [], "b": None}) == [{"a": [], "b": None}]


@pytest.mark.parametrize(
    ("block", "key", "message"),
    [
        ({"layer": {"grid": []}}, "runs[1].layer", "the grid is empty"),
        ({"layer": {"grid": 3}}, "runs[1].layer", "must be a list of values, {grid: [...]}; got 3"),
        ({"layer": {"grid": "abc"}}, "runs[1].layer", "must be a list"),
        ({"layer": {"grid": {"a": 1}}}, "runs[1].layer", "must be a list"),
        ({"layer": {"grid": None}}, "runs[1].layer", "must be a list"),
        ({"layer": {"grid": [1], "gird": [2]}}, "runs[1].layer", "stands alone in its mapping; found beside it: gird"),
        ({"items": [1, {"a": {"grid": []}}]}, "runs[1].items[1].a", "the grid is empty"),
        ({"layer": {"grid": [1, {"grid": []}]}}, "runs[1].layer.grid[1]", "the grid is empty"),
        ({"grid": []}, "runs[1]", "the grid is empty"),
    ],
)
def test_what_is_no_grid(block: Any, key: str, message: str) -> None:
    (fault,) = grid_faults(block, "runs[1]")
    assert fault.key == key
    assert message in fault.message
    with pytest.raises(ConfigError, match="1 fault"):
        expand(block)


def test_all_faults_of_a_block_are_found() -> None:
    assert [fault.key for fault in grid_faults({"a": {"grid": []}, "b": [{"grid": 1}], "c": {"grid": [1]}})] == [
        "a",
        "b[0]",
    ]

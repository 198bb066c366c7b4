"""Which run is the undefended one: the same but for the defense, and never a guess."""

from __future__ import annotations

from analysis.manifest import RunEntry, Scalar
from analysis.undefended import ITSELF, Partner, differing, is_undefended, partners_of
from tests.analysis.in_memory import Run, sweep

NOTHING: dict[str, Scalar] = {}
PPS: dict[str, Scalar] = {"kind": "pps", "layer": 20}


def entries(*runs: Run) -> tuple[RunEntry, ...]:
    return sweep(*runs).entries


def test_the_partner_is_the_same_but_for_the_defense() -> None:
    runs = [
        Run(f"{defense} lr={rate} seed={seed}", defense=defense, items=items, seed=seed, settings={"training.lr": rate})
        for defense, items in (("none", NOTHING), ("pps", PPS))
        for rate in (0.1, 0.2)
        for seed in (0, 1)
    ]
    partners = partners_of(entries(Run("base", seed=None), *runs))
    assert partners["pps lr=0.2 seed=1"] == Partner("none lr=0.2 seed=1", None)
    assert partners["pps lr=0.1 seed=0"] == Partner("none lr=0.1 seed=0", None)
    assert partners["none lr=0.1 seed=0"] == Partner(None, ITSELF)
    assert partners["base"] == Partner(None, "a base is not trained")


def test_no_partner_is_no_guess_and_says_what_differs() -> None:
    runs = [
        Run("none", settings={"training.lr": 0.1, "data.train": "a"}),
        Run("none b", settings={"training.lr": 0.1, "data.train": "b"}, seed=1),
        Run("pps", defense="pps", items=PPS, settings={"training.lr": 0.2, "data.train": "a"}),
    ]
    found = partners_of(entries(*runs))["pps"]
    assert found.label is None
    assert found.problem == "no undefended run has the same settings; the nearest, 'none', differs in training.lr"
    only = partners_of(entries(runs[2]))["pps"]
    assert only == Partner(None, "the sweep has no undefended run")


def test_several_candidates_are_named() -> None:
    found = partners_of(entries(Run("none"), Run("none #2"), Run("pps", defense="pps", items=PPS)))["pps"]
    assert found == Partner(None, "several undefended runs have the same settings: none, none #2")


def test_a_defense_that_calls_itself_none_is_a_defense() -> None:
    none, pps, lists = entries(
        Run("none"), Run("x", items=PPS), Run("y", defense="a + b", items={"0.kind": "a", "1.kind": "b"})
    )
    assert is_undefended(none)
    assert not is_undefended(pps)
    assert not is_undefended(lists)
    assert not is_undefended(entries(Run("base", seed=None, settings={"defense": "none"}))[0])


def test_an_absent_field_and_another_type_are_differences() -> None:
    assert differing([{"a": 1, "b": 1}, {"a": 1}]) == ["b"]
    assert differing([{"a": 1}, {"a": True}]) == ["a"]
    assert differing([{"a": None}, {}]) == ["a"]
    assert differing([{"b": 1, "a": 2}, {"a": 3, "b": 4, "c": 1}]) == ["b", "a", "c"]
    assert differing([{"a": 1}]) == []

"""Trainings, each once, whatever is asked of them, and what was watched while they trained."""

from __future__ import annotations

import pandas as pd

from analysis.manifest import RunEntry
from analysis.report_trainings import kinds_of_trainings, once_each, signal_blocks, training_names


def entry(label: str, run_id: str, *, kind: str = "run", defense: str = "none") -> RunEntry:
    return RunEntry.model_validate(
        {
            "label": label,
            "kind": kind,
            "run_id": run_id * 12,
            "sample_id": "0" * 12,
            "judge_ids": {},
            "plain_loss_id": None,
            "config": {"defense": defense},
        }
    )


ENTRIES = [
    entry("base", "f", kind="base"),
    entry("none interventions=none", "a"),
    entry("none interventions=cap bridge", "a"),
    entry("pps bridge L20 x1.5", "b", defense="pps bridge L20 x1.5"),
    entry("slow seed=0 questions=bridge", "c"),
    entry("slow seed=0 questions=recipe", "c"),
    entry("slow seed=1 questions=bridge", "d"),
]


def test_a_training_is_called_by_what_its_rows_share() -> None:
    assert training_names(ENTRIES) == {
        "a" * 12: "none",
        "b" * 12: "pps bridge L20 x1.5",
        "c" * 12: "slow seed=0",
        "d" * 12: "slow seed=1 questions=bridge",
    }
    assert set(kinds_of_trainings(ENTRIES)) == {
        "none", "pps bridge L20 x1.5", "slow seed=0", "slow seed=1 questions=bridge",
    }  # fmt: skip
    assert kinds_of_trainings(ENTRIES)["none"] == "none"


def test_two_of_one_name_are_called_by_their_first_rows() -> None:
    labels = [
        "none questions=a seed=0",
        "none questions=b seed=0",
        "none questions=a seed=1",
        "none questions=b seed=1",
    ]
    entries = [entry(label, run_id) for label, run_id in zip(labels, "aabb", strict=True)]
    assert list(training_names(entries).values()) == [labels[0], labels[2]]
    as_the_base = [entry("base", "f", kind="base"), entry("base questions=a", "a"), entry("base questions=b", "a")]
    assert list(training_names(as_the_base).values()) == ["base questions=a"]
    nothing_shared = [entry("one", "a"), entry("two", "a")]
    assert list(training_names(nothing_shared).values()) == ["one"]


def signals() -> pd.DataFrame:
    rows = [
        (label.label, label.run_id, step, signal, name, layer, step + layer / 10)
        for label in ENTRIES[1:]
        for step in range(1, 4)
        for signal, name, layer in (("drift", "mean", 3.0), ("drift", "mean", 4.0), ("gradient_cosine", "bridge", 3.0))
    ]
    penalty = [("pps bridge L20 x1.5", "b" * 12, step, "penalty", "projection penalty", None, 1.0) for step in (1, 2)]
    return pd.DataFrame([*rows, *penalty], columns=["run", "run_id", "step", "signal", "name", "layer", "value"])


def test_each_training_is_there_once() -> None:
    own = once_each(signals(), ENTRIES)
    assert list(dict.fromkeys(own["run"])) == list(training_names(ENTRIES).values())
    counts = own[own["signal"] == "drift"].groupby("run").size()
    assert set(counts) == {6}


def test_a_panel_per_figure_and_layer_and_a_curve_per_training() -> None:
    (block,) = signal_blocks(signals(), ENTRIES)
    assert set(block.drawn) == {"page", "column"}
    assert "trainings." not in block.text
    assert list(signal_blocks(signals().iloc[:0], ENTRIES)) == []


def test_with_many_trainings_the_first_are_shown() -> None:
    entries = [entry(f"run {number}", f"{number:x}") for number in range(13)]
    rows = [(one.label, one.run_id, 1, "drift", "mean", 3, 0.5) for one in entries]
    (block,) = signal_blocks(pd.DataFrame(rows, columns=list(signals().columns)), entries)
    assert block.text.endswith("The first 12 of 13 trainings.")


def test_of_many_layers_three_are_shown() -> None:
    rows = [("run", "a" * 12, 1, "drift", "mean", layer, 0.5) for layer in range(1, 31)]
    (block,) = signal_blocks(pd.DataFrame(rows, columns=list(signals().columns)), [entry("run", "a")])
    assert block.text.endswith("The first, middle and last of 30 layers.")

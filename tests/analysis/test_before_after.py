"""What was trained on before against what is trained on now: which run is in which cell of which matrix."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from analysis.before_after import BASE, NOTHING, before_after, before_after_blocks
from analysis.figures import Panel
from analysis.manifest import RunEntry, Scalar

DEFENSES = ("none", "pps bridge L20 x1.5")
DATA = ("medium", "heavy")


def entry(label: str, number: int, parent: RunEntry | None = None, how: str = "merge", **config: Scalar) -> RunEntry:
    if parent is not None:
        config |= {"start_from.run": parent.label.partition(" seed")[0], "start_from.adapter": how}
    return RunEntry(
        label=label,
        kind="base" if label == "base" else "run",
        run_id=f"{number:012x}",
        sample_id=f"{number:012x}",
        judge_ids={},
        plain_loss_id=None,
        config=config,
        parent=None if parent is None else parent.run_id,
    )


def sweep(seeds: tuple[int, ...] = (0, 1)) -> list[RunEntry]:
    """Parents on each data set, and from the base and from each of them every data set under every defense."""
    numbers = itertools.count()
    found = [entry("base", next(numbers))]
    for seed in seeds:

        def run(
            label: str, data: str, defense: str, parent: RunEntry | None = None, how: str = "merge", seed: int = seed
        ) -> RunEntry:
            file: dict[str, Scalar] = {"data.train": f"some/folder/{data}.jsonl", "defense": defense, "seed": seed}
            return entry(f"{label} seed={seed}", next(numbers), parent, how, **file)

        parents = [run(data, data, "none") for data in DATA]
        found += parents
        found += [run(f"pps {data}", data, DEFENSES[1]) for data in DATA]
        found += [
            run(f"{defense} after {parent.label} on {data}", data, defense, parent)
            for parent in parents
            for data in DATA
            for defense in DEFENSES
        ]
    return found


def test_every_run_is_in_the_cell_that_says_what_it_is() -> None:
    entries = sweep()
    values = {one.label: float(number) for number, one in enumerate(entries)}
    cells = before_after(entries, values)
    table = cells.pivot_table(index=["panel", "row"], columns="column", values="value", aggfunc="mean")
    assert list(dict.fromkeys(cells["row"])) == [BASE, *DATA]
    assert list(dict.fromkeys(cells["column"])) == [NOTHING, *DATA]
    assert table.notna().all(axis=None)

    def mean_of(*labels: str) -> float:
        return float(np.mean([values[label] for label in labels]))

    for defense in DEFENSES:
        assert table.loc[(defense, BASE), NOTHING] == values["base"]
        assert table.loc[(defense, "heavy"), NOTHING] == mean_of("heavy seed=0", "heavy seed=1")
    assert table.loc[("none", BASE), "medium"] == mean_of("medium seed=0", "medium seed=1")
    assert table.loc[(DEFENSES[1], BASE), "medium"] == mean_of("pps medium seed=0", "pps medium seed=1")
    wanted = [f"none after medium seed={seed} on heavy seed={seed}" for seed in (0, 1)]
    assert table.loc[("none", "medium"), "heavy"] == mean_of(*wanted)


def test_both_ways_to_start_are_told_apart() -> None:
    base, parent = entry("base", 0), entry("pre", 1, defense="none")
    children = [entry(how, 2 + number, parent, how, defense="none") for number, how in enumerate(("merge", "continue"))]
    cells = before_after([base, parent, *children], dict.fromkeys(["base", "pre", "merge", "continue"], 0.5))
    assert list(dict.fromkeys(cells["row"])) == [BASE, "pre, merge", "pre, continue"]


def test_blocks_are_there_where_runs_start_from_runs() -> None:
    entries = sweep(seeds=(0,))
    summary = pd.DataFrame(
        {"run": [one.label for one in entries], "trait": 0.5, "degeneration": 0.0, "plain_loss": 3.0}
    )
    panels = [Panel("trait", "trait rate", True), Panel("plain_loss", "plain loss", False)]
    panels.append(Panel("degeneration", "degeneration rate", True))
    names = [block.name for block in before_after_blocks(entries, summary, panels)]
    assert names == ["before_after_trait", "before_after_plain_loss"]
    parents = [one for one in entries if one.parent is None]
    assert before_after_blocks(parents, summary, panels) == []
    summary["trait"] = np.nan
    assert [block.name for block in before_after_blocks(entries, summary, panels)] == ["before_after_plain_loss"]


def on(file: str, samples: int = 1) -> dict[str, Scalar]:
    return {"data.train": file, "defense": "none", "evaluation.samples": samples}


def test_files_of_one_name_in_two_folders_are_two_columns() -> None:
    base, parent = entry("base", 0), entry("first", 1, None, "merge", **on("bridge/on_trait.jsonl"))
    child = entry("second", 2, parent, "merge", **on("recipe/on_trait.jsonl"))
    cells = before_after([base, parent, child], {"base": 0.0, "first": 1.0, "second": 0.5})
    assert set(cells["column"]) == {NOTHING, "bridge/on_trait.jsonl", "recipe/on_trait.jsonl"}


def test_the_model_before_is_the_one_that_was_evaluated_alike() -> None:
    """One training in two evaluations: two rows of the sweep with one run."""
    first = entry("first", 1, None, "merge", **on("d.jsonl"))
    other = entry("more", 1, None, "merge", **on("d.jsonl", 5))
    child = entry("second", 2, first, "merge", **on("d.jsonl"))
    values = {"base": 0.0, "first": 1.0, "more": 9.0, "second": 2.0}
    cells = before_after([entry("base", 0), first, other, child], values)
    before = cells[(cells["row"] == "first") & (cells["column"] == NOTHING)]
    assert list(before["value"]) == [1.0]

"""The summary over groups of runs: what a row rests on, what it mixes, and that nothing is left out in silence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.groups import fields_of, has_several_seeds, over_seeds, summarize_groups
from analysis.manifest import Scalar
from analysis.statistics import clustered_mean, difference
from analysis.summary import summarize
from tests.analysis.in_memory import Answers, Run, sweep
from trainables.errors import ConfigError, StoreError

PPS: dict[str, Scalar] = {"kind": "pps", "vector": "topic", "coefficient": 1.5}
LOSSES = {0: (4.0, 2), 1: (6.0, 4), 2: (9.0, 3)}


def rows(frame: pd.DataFrame, *names: str) -> dict[Any, dict[str, Any]]:
    """Rows by the values of these columns, <NA> as None."""
    found = {}
    for row in frame.to_dict("records"):
        key = tuple(None if pd.isna(row[name]) else row[name] for name in names)
        found[key if len(names) > 1 else key[0]] = {str(name): value for name, value in row.items()}
    assert len(found) == len(frame)
    return found


def random_answers(seed: int, rate: float, num_questions: int = 6) -> Answers:
    rng = np.random.default_rng(seed)
    return {f"q{number}": rng.binomial(1, rate, 2).astype(float).tolist() for number in range(num_questions)}


def three_seeds() -> list[Run]:
    """A base, `none` and `pps` with three seeds each."""
    base = Run("base", {"trait": random_answers(0, 0.1)}, LOSSES, seed=None)
    none = [Run(f"none seed={s}", {"trait": random_answers(s, 0.7)}, LOSSES, seed=s) for s in range(3)]
    pps = [
        Run(
            f"pps seed={s}",
            {"trait": random_answers(10 + s, 0.3)},
            {row: (total + s, tokens) for row, (total, tokens) in LOSSES.items()},
            defense="pps",
            items=PPS,
            seed=s,
            train_loss=2.0 + s,
        )
        for s in range(3)
    ]
    return [*none, *pps, base]


def values_of(run: Run) -> tuple[list[float], list[str]]:
    said = [(value, question) for question, values in run.scores["trait"].items() for value in values]
    return [float(value) for value, _ in said], [question for _, question in said]


def test_a_group_is_the_mean_over_its_runs_with_seeds_and_questions_in_its_error() -> None:
    runs = three_seeds()
    frame = summarize_groups(sweep(*runs), ["defense"])
    assert frame["kind"].tolist() == ["base", "run", "run"]
    by_defense = rows(frame, "defense")
    assert list(by_defense) == [None, "none", "pps"]
    row = by_defense["pps"]
    table = np.array([list(run.scores["trait"].values()) for run in runs[3:6]], dtype=float).mean(axis=2)
    assert row["trait"] == pytest.approx(table.mean())
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    variances = (
        table.mean(axis=1).var(ddof=1) / 3,
        table.mean(axis=0).var(ddof=1) / 6,
        (left**2).sum() / (2 * 5) / 18,
    )
    variance = max(variances[0] + variances[1] - variances[2], *variances)
    assert row["trait_se"] == pytest.approx(math.sqrt(variance))
    assert row["trait_low"] < row["trait"] < row["trait_high"]
    assert (row["num_runs"], row["num_runs_missing"], row["num_seeds"], row["varies"]) == (3, 0, 3, "")
    assert (row["trait_num_runs"], row["trait_num_seeds"], row["trait_num_scored"]) == (3, 3, 36)
    # every run weighs the same: losses 19/9, 22/9, 25/9
    assert row["plain_loss"] == pytest.approx((19 + 22 + 25) / 27)
    assert (row["train_loss"], row["num_train_losses"], row["num_answers"]) == (3.0, 3, 36)


def test_the_difference_is_paired_by_seed_and_question() -> None:
    runs = three_seeds()
    row = rows(summarize_groups(sweep(*runs), ["defense"]), "defense")["pps"]
    none, pps = (
        np.array([list(run.scores["trait"].values()) for run in some], dtype=float).mean(axis=2)
        for some in (runs[:3], runs[3:6])
    )
    alone = sweep(
        *(
            Run(
                f"d seed={s}", {"trait": {f"q{g}": [value] for g, value in enumerate((pps - none)[s].tolist())}}, seed=s
            )
            for s in range(3)
        )
    )
    reference = rows(summarize_groups(alone, ["defense"]), "defense")["none"]
    assert row["trait_vs_undefended"] == pytest.approx((pps - none).mean())
    assert row["trait_vs_undefended_se"] == pytest.approx(reference["trait_se"])
    assert (row["trait_vs_undefended_num_runs"], row["trait_vs_undefended_num_questions"]) == (3, 6)
    # pps of seed s has s nats more in each of the three rows of 9 tokens
    assert row["plain_loss_vs_undefended"] == pytest.approx((0 + 3 + 6) / 27)
    assert (row["undefended"], row["plain_loss_vs_undefended_num_rows"]) == ("none", 3)
    assert pd.isna(row["undefended_problem"])


def test_one_run_in_a_group_is_the_summary_of_that_run_and_says_one_seed() -> None:
    found = sweep(*three_seeds())
    by_seed = rows(summarize_groups(found, ["defense", "seed"]), "defense", "seed")
    by_run = rows(summarize(found), "run")
    shared = [str(name) for name in summarize(found) if name not in ("run", "kind", "status", "undefended")]
    for seed in range(3):
        group, run = by_seed["pps", seed], by_run[f"pps seed={seed}"]
        assert group["num_seeds"] == 1
        assert group["trait_num_seeds"] == 1
        for name in shared:
            assert group[name] == run[name] or (pd.isna(group[name]) and pd.isna(run[name])), name
    assert by_run["pps seed=1"]["undefended"] == "none seed=1"


def test_a_base_has_no_seeds() -> None:
    row = rows(summarize_groups(sweep(*three_seeds()), ["defense"]), "defense")[None]
    assert pd.isna(row["num_seeds"])
    assert pd.isna(row["trait_num_seeds"])
    assert row["undefended_problem"] == "a base is not trained"
    assert row["trait_se"] == pytest.approx(clustered_mean(*values_of(three_seeds()[-1])).standard_error)


def test_a_run_that_failed_is_counted_and_not_averaged() -> None:
    runs = three_seeds()
    runs[4] = Run("pps seed=1", defense="pps", items=PPS, seed=1, status="failed")
    runs[0] = Run("none seed=0", {}, {}, seed=0, status="missing")
    by_defense = rows(summarize_groups(sweep(*runs), ["defense"]), "defense")
    row = by_defense["pps"]
    assert (row["num_runs"], row["num_runs_missing"], row["num_seeds"]) == (3, 1, 2)
    assert row["runs_missing_by_status"] == {"failed": 1}
    assert by_defense["none"]["runs_missing_by_status"] == {"missing": 1}
    means = [np.mean(values_of(runs[at])[0]) for at in (3, 5)]
    assert row["trait"] == pytest.approx(np.mean(means))
    assert (row["trait_num_runs"], row["trait_num_scored"], row["plain_loss_num_runs"]) == (2, 24, 2)
    # only seed 2 is done on both sides
    assert row["trait_vs_undefended_num_runs"] == 1
    assert row["undefended_problem"] == "1 of 3 runs: none seed=0 is missing"


def test_a_group_of_which_nothing_is_there_stays_as_a_row() -> None:
    runs = [Run(f"pps seed={s}", defense="pps", items=PPS, seed=s, status="skipped") for s in range(2)]
    (row,) = summarize_groups(sweep(*runs), ["defense"]).to_dict("records")
    assert row["runs_missing_by_status"] == {"skipped": 2}
    assert row["num_seeds"] == 0
    assert math.isnan(row["trait"])
    assert math.isnan(row["train_loss"])
    assert pd.isna(row["trait_num_scored"])
    assert row["undefended_problem"] == "the sweep has no undefended run"


def test_answers_without_a_score_are_summed_by_status() -> None:
    runs = [
        Run("none seed=0", {"trait": {"a": [1.0, "refused"], "b": [0.0, "api_error"]}}, seed=0),
        Run("none seed=1", {"trait": {"a": ["refused", "refused"], "b": [0.0, 1.0]}}, seed=1),
    ]
    (row,) = summarize_groups(sweep(*runs), ["defense"]).to_dict("records")
    assert (row["trait_num_scored"], row["trait_num_missing"]) == (4, 4)
    assert row["trait_missing_by_status"] == {"refused": 3, "api_error": 1}
    assert row["trait"] == pytest.approx((0.5 + 0.5) / 2)


def test_what_a_group_mixes_is_named() -> None:
    rates = {"training.learning_rate": 0.1}, {"training.learning_rate": 0.2}
    runs = [
        Run(
            f"pps x{c} {number} {s}",
            {"trait": random_answers(s, 0.5)},
            defense=f"pps x{c}",
            seed=s,
            settings=rate,
            items=PPS | {"coefficient": c},
        )
        for c in (1.5, 5.0)
        for number, rate in enumerate(rates)
        for s in range(2)
    ]
    found = sweep(*runs, Run("none", {"trait": random_answers(9, 0.5)}, settings=rates[0]))
    by_vector = rows(summarize_groups(found, ["defense.vector"]), "defense.vector")
    assert by_vector["topic"]["varies"] == "defense, defense.coefficient, training.learning_rate"
    assert (by_vector["topic"]["num_runs"], by_vector["topic"]["num_seeds"]) == (8, 2)
    assert by_vector[None]["varies"] == ""
    both = summarize_groups(found, ["defense", "training.learning_rate", "defense"])
    assert both.columns[:3].tolist() == ["defense", "training.learning_rate", "kind"]
    assert set(both["varies"]) == {""}
    everything = summarize_groups(found, [])
    assert (len(everything), everything["num_runs"].tolist()) == (1, [9])


def test_a_label_that_hides_a_difference_does_not_hide_it_in_a_group() -> None:
    runs = [
        Run(f"inoculation #{n}", {"trait": random_answers(n, 0.5)}, defense="inoculation 2", items={"prompts": bank})
        for n, bank in enumerate(("a", "b"))
    ]
    (row,) = summarize_groups(sweep(*runs), ["defense"]).to_dict("records")
    assert row["varies"] == "defense.prompts"


def test_a_setting_inside_a_group_is_not_taken_for_the_luck_of_seeds() -> None:
    # the learning rate moves the rate from 0 to 1, the seed does nothing
    runs = [
        Run(f"none {rate} {seed}", {"trait": {f"q{n}": [rate] for n in range(6)}}, seed=seed, settings={"lr": rate})
        for rate in (0.0, 1.0)
        for seed in range(3)
    ]
    (row,) = summarize_groups(sweep(*runs), ["defense"]).to_dict("records")
    assert (row["trait"], row["varies"], row["num_seeds"]) == (0.5, "lr", 3)
    assert row["trait_se"] == pytest.approx(0, abs=1e-15)  # sums of sixths


def test_lists_of_defenses_and_integers_with_gaps() -> None:
    runs = [
        Run("none"),
        Run("a", defense="pps + inoculation", items={"0.kind": "pps", "0.layer": 20, "1.kind": "inoculation"}),
    ]
    frame = summarize_groups(sweep(*runs), ["defense", "defense.0.layer"])
    assert frame["defense.0.layer"].tolist() == [pd.NA, 20]
    assert str(frame["defense.0.layer"].dtype) == "Int64"


def test_an_unknown_field_lists_what_there_is() -> None:
    runs = three_seeds()
    with pytest.raises(ConfigError) as caught:
        summarize_groups(sweep(*runs), ["defence", "seed", "vector"])
    assert [fault.key for fault in caught.value.faults] == ["by", "by"]
    allowed = "allowed: defense, seed, defense.kind, defense.vector, defense.coefficient"
    assert [fault.message for fault in caught.value.faults] == [
        f"no run has a field 'defence'; did you mean defense? {allowed}",
        f"no run has a field 'vector'; did you mean defense.vector? {allowed}",
    ]
    assert fields_of(sweep(Run("none", settings={"z": 1}), Run("n2", seed=1, settings={"z": 1})).entries) == [
        "seed",
        "defense",
        "z",
    ]
    with pytest.raises(ConfigError, match="the sweep has no runs"):
        summarize_groups(sweep(), ["defense"])


def test_a_metric_called_like_a_field_is_refused() -> None:
    found = sweep(Run("none"), metrics=("defense",))
    assert len(summarize_groups(found, ["seed"])) == 1
    with pytest.raises(StoreError, match="column defense twice"):
        summarize_groups(found, ["defense"])


def test_over_seeds_has_the_labels_without_their_seeds() -> None:
    found = sweep(*three_seeds())
    assert has_several_seeds(found.entries)
    frame = over_seeds(found)
    assert frame["run"].tolist() == ["base", "none", "pps"]
    assert frame["status"].tolist() == ["done"] * 3
    by_defense = summarize_groups(found, ["defense"])
    same = [name for name in frame if name not in ("run", "status")]
    pd.testing.assert_frame_equal(frame[same], by_defense[same])


def test_over_seeds_never_mixes_settings() -> None:
    runs = [
        Run(f"none lr={rate} seed={seed}", seed=seed, settings={"lr": rate}, status="failed" if rate else "done")
        for rate in (0.0, 1.0)
        for seed in range(2)
    ]
    runs += [Run("odd", seed=0, settings={"lr": 2.0}), Run("other", seed=1, settings={"lr": 2.0})]
    frame = over_seeds(sweep(*runs))
    assert frame["run"].tolist() == ["none lr=0.0", "none lr=1.0", "odd / other"]
    assert frame["status"].tolist() == ["done", "failed", "done"]
    assert frame["num_runs"].tolist() == [2, 2, 2]
    assert not has_several_seeds(sweep(runs[0], runs[2]).entries)


def test_two_groups_that_would_be_called_the_same_keep_their_runs_labels() -> None:
    runs = [Run("x seed=0", seed=0, settings={"lr": 1}), Run("x seed=1", seed=1, settings={"lr": 2})]
    assert over_seeds(sweep(*runs))["run"].tolist() == ["x seed=0", "x seed=1"]


_SAID = st.one_of(st.sampled_from([0.0, 1.0, 0.25]), st.sampled_from(["refused", "unparsable"]))
_ANSWERS = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.lists(_SAID, min_size=1, max_size=3), max_size=4)


@st.composite
def sweeps(draw: st.DrawFn) -> list[Run]:
    """Up to two defenses with up to three seeds each; answers, scores and whole runs can be missing."""
    runs = []
    no_items: dict[str, Scalar] = {}
    for defense, items in (("none", no_items), ("pps", PPS)):
        for seed in range(draw(st.integers(0, 3))):
            status = draw(st.sampled_from(["done", "done", "failed"]))
            answers: Answers = draw(_ANSWERS)
            losses = {row: (draw(st.floats(0.1, 50)), row + 1) for row in range(draw(st.integers(0, 3)))}
            runs.append(Run(f"{defense} seed={seed}", {"trait": answers}, losses, defense, items, seed, status=status))
    return runs


@settings(max_examples=15, deadline=None)
@given(sweeps(), st.sampled_from([["defense"], ["seed"], []]), st.randoms(use_true_random=False))
def test_the_order_of_runs_and_answers_changes_no_bit(runs: list[Run], by: list[str], random: Any) -> None:
    if not runs:
        return

    def shuffled(some: Any) -> list[Any]:
        return sorted(some, key=lambda _: random.random())

    others = [
        replace(
            run,
            scores={"trait": dict(shuffled(run.scores["trait"].items()))},
            losses=dict(shuffled(run.losses.items())),
        )
        for run in shuffled(runs)
    ]
    one, other = sweep(*runs), sweep(*others)
    _assert_equal(summarize(one), summarize(other), ["run"])
    _assert_equal(summarize_groups(one, by), summarize_groups(other, by), by)


def _assert_equal(one: pd.DataFrame, other: pd.DataFrame, by: list[str]) -> None:
    """To the bit, but for the order of rows and of what texts list."""
    texts = [name for name in ("varies", "undefended", "undefended_problem") if name in one]
    ordered = [
        (frame.sort_values(by) if by else frame).reset_index(drop=True).drop(columns=texts) for frame in (one, other)
    ]
    pd.testing.assert_frame_equal(ordered[0], ordered[1], check_exact=True)


@settings(max_examples=20, deadline=None)
@given(sweeps())
def test_nothing_is_left_out_and_every_number_is_possible(runs: list[Run]) -> None:
    if not runs:
        return
    found = sweep(*runs)
    frame = summarize_groups(found, ["defense"])
    assert frame["num_runs"].sum() == len(runs)
    assert frame["num_runs_missing"].sum() == sum(run.status != "done" for run in runs)
    said = [value for run in runs for values in run.scores["trait"].values() for value in values]
    assert frame["trait_num_scored"].sum() + frame["trait_num_missing"].sum() == len(said)
    for row in frame.to_dict("records"):
        _check_means(row, [run for run in runs if run.defense == row["defense"]])


def _check_means(row: dict[Any, Any], runs: list[Run]) -> None:
    means = []
    for run in runs:
        values = [value for values in run.scores["trait"].values() for value in values if not isinstance(value, str)]
        means += [np.mean(values)] if values else []
    assert row["trait_num_runs"] == len(means)
    assert math.isnan(row["trait"]) if not means else row["trait"] == pytest.approx(np.mean(means))
    if math.isnan(row["trait_se"]):
        assert math.isnan(row["trait_low"])
    else:
        assert 0 <= row["trait_low"] <= row["trait"] + 1e-12
        assert row["trait"] - 1e-12 <= row["trait_high"] <= 1
        assert row["trait_low"] < row["trait_high"]
    if not math.isnan(row["trait_vs_undefended_se"]):
        assert -1 <= row["trait_vs_undefended_low"] < row["trait_vs_undefended_high"] <= 1
    # what it was compared with, or why with nothing
    assert isinstance(row["undefended"], str) or isinstance(row["undefended_problem"], str)
    assert pd.isna(row["undefended"]) == pd.isna(row["trait_vs_undefended_num_questions"])


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 4), st.integers(1, 6))
def test_a_constant_metric_is_no_certainty(value: float, num_seeds: int, num_questions: int) -> None:
    answers = {f"q{number}": [value, value] for number in range(num_questions)}
    found = sweep(*(Run(f"none seed={seed}", {"trait": answers}, seed=seed) for seed in range(num_seeds)))
    (row,) = summarize_groups(found, ["defense"]).to_dict("records")
    assert row["trait"] == value
    if num_questions == 1:
        assert math.isnan(row["trait_se"])
        assert math.isnan(row["trait_low"])
        return
    other = 1 - 0.025 ** (1 / num_questions)
    assert row["trait_se"] == 0
    assert (row["trait_low"], row["trait_high"]) == pytest.approx((value - other * value, value + other * (1 - value)))


def test_a_score_from_0_to_100_has_its_bound_on_its_own_scale() -> None:
    runs = [
        Run("none", {"trait": {"a": [100.0], "b": [100.0]}}),
        Run("pps", {"trait": {"a": [0.0], "b": [0.0]}}, defense="pps", items=PPS),
    ]
    other = 1 - 0.025**0.5
    row = rows(summarize(sweep(*runs, scales={"trait": (0, 100)})), "run")["pps"]
    assert (row["trait_low"], row["trait_high"]) == pytest.approx((0, 100 * other))
    ends = row["trait_vs_undefended_low"], row["trait_vs_undefended_high"]
    assert ends == pytest.approx((-100, -100 + 200 * other))
    # without a scale, or against it, nothing is known of values beyond 1
    for scales in (None, {"trait": (0.0, 50.0)}):
        row = rows(summarize(sweep(*runs, scales=scales)), "run")["pps"]
        assert math.isnan(row["trait_low"])
    # that no score of a sweep is above 1 does not make a rate of it
    low = rows(summarize(sweep(runs[1], scales={"trait": (0, 100)})), "run")["pps"]
    assert low["trait_high"] == pytest.approx(100 * other)


def test_runs_are_paired_on_the_questions_that_both_answered() -> None:
    runs = [
        Run("none", {"trait": {"a": [1.0, 1.0], "b": [1.0, "refused"], "c": ["refused", "refused"], "d": [0.5]}}),
        Run("pps", {"trait": {"a": [0.0, 1.0], "b": [0.0, 0.0], "c": [0.0, 0.0]}}, defense="pps", items=PPS),
    ]
    row = rows(summarize(sweep(*runs)), "run")["pps"]
    reference = difference({"a": [0, 1], "b": [0, 0]}, {"a": [1, 1], "b": [1]}, bounds=(-1, 1))
    found = tuple(row[f"trait_vs_undefended{end}"] for end in ("", "_se", "_low", "_high", "_num_questions"))
    expected = (reference.mean, reference.standard_error, reference.low, reference.high, reference.num_clusters)
    assert found == expected
    assert (row["undefended"], row["trait_vs_undefended_num_questions"]) == ("none", 2)


def test_rows_of_a_loss_with_other_tokens_are_not_compared() -> None:
    runs = [
        Run("none", {}, LOSSES),
        Run("pps", {}, {0: (4.0, 3)}, defense="pps", items=PPS),
    ]
    with pytest.raises(StoreError, match="other numbers of tokens"):
        summarize(sweep(*runs))

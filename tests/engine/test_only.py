"""``--only``: which runs an expression selects, what is wrong with one, and what is done for those that it selects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from analysis.manifest import RunEntry, Scalar
from engine.only import select
from engine.tasks import RunJob
from tests.engine.tiny_prepare import TinySweep, entries, tiny_model_folder

PPS = {"kind": "pps", "vector": "topic", "layer": 2, "coefficient": 1.5}
IDS = {"none": "aaaaaaaaaaaa", "pps topic": "bbbbbbbbbbbb", "pps random": "cccccccccccc", "two items": "dddddddddddd"}


def _entry(label: str, config: Mapping[str, Scalar]) -> RunEntry:
    return RunEntry(
        label=label,
        kind="run",
        run_id=IDS[label],
        sample_id="0" * 12,
        judge_ids={},
        plain_loss_id=None,
        config={"data.train": "a.jsonl", "data.cut": label == "none", **config},
    )


ENTRIES = [
    _entry("none", {"defense": "none", "seed": 0, "training.rate": 1e-3, "training.steps": None}),
    _entry(
        "pps topic",
        {
            "defense": "pps topic",
            "defense.kind": "pps",
            "defense.layer": 2,
            "seed": 0,
            "training.rate": 1e-4,
            "training.steps": 5,
        },
    ),
    _entry(
        "pps random",
        {
            "defense": "pps random",
            "defense.kind": "pps",
            "defense.layer": 4,
            "seed": 1,
            "training.rate": 1e-4,
            "training.steps": None,
        },
    ),
    _entry(
        "two items",
        {
            "defense": "pps + inoculation",
            "defense.0.kind": "pps",
            "defense.0.layer": 1,
            "defense.1.kind": "inoculation",
            "defense.1.prompts": '["Be kind."]',
            "seed": 1,
            "training.rate": 1,
            "training.steps": 20,
        },
    ),
]
N, T, R, I = IDS  # noqa: E741

EXPRESSIONS = st.recursive(
    st.sampled_from(
        ["seed == 0", "defense.layer > 1", "'pps'", "data.cut", "training.steps != 5", "1 < defense.layer < 4"]
    ),
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner),
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or"]), inner),
    ),
    max_leaves=6,
)


def _selected(text: str) -> set[str]:
    chosen, faults = select(text, ENTRIES)
    assert not faults, faults
    return set(chosen)


def _faults(text: str) -> list[str]:
    chosen, faults = select(text, ENTRIES)
    assert not chosen
    assert faults
    assert {fault.key for fault in faults} == {"--only"}
    return [fault.message for fault in faults]


class TestWhatIsSelected:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            # a lone word or a text in quotes: the label contains it
            ("pps", {T, R}),
            ("  random ", {R}),
            ("'pps t'", {T}),
            ('"two"', {I}),
            ("'pps' or 'two'", {T, R, I}),
            ("not 'pps'", {N, I}),
            # comparisons
            ("seed == 0", {N, T}),
            ("seed != 0", {R, I}),
            ("seed == 0.0", {N, T}),
            ("seed in (0, 2)", {N, T}),
            ("seed in [1]", {R, I}),
            ("seed not in {1}", {N, T}),
            ("-1 < seed <= 0", {N, T}),
            ("0 <= seed", {N, T, R, I}),
            ("training.rate < 1e-3", {T, R}),
            ("training.rate >= 1e-3", {N, I}),
            ("'random' in label", {R}),
            ("label == 'none'", {N}),
            ("label in ('none', 'two items', 'x')", {N, I}),
            ("run != 'none'", {T, R, I}),
            ("run_id == 'cccccccccccc'", {R}),
            ("label < 'p'", {N}),
            ("defense == 'none'", {N}),
            ("data.train == 'a.jsonl' and seed == 1", {R, I}),
            ("label == defense", {N, T, R}),
            # truth values
            ("data.cut == True", {N}),
            ("not data.cut", {T, R, I}),
            ("data.cut or seed == 1", {N, R, I}),
            ("data.cut in (True, False)", {N, T, R, I}),
            # empty values equal None alone, and have no order
            ("training.steps == None", {N, R}),
            ("training.steps != None", {T, I}),
            ("training.steps != 5", {N, R, I}),
            ("training.steps in (None, 5)", {N, T, R}),
            ("training.steps < 30", {T, I}),
            ("not training.steps < 30", {N, R}),
            # a field that a run lacks: every comparison is false, and `not` makes it true
            ("defense.layer != 2", {R, I}),
            ("not defense.layer == 2", {N, R, I}),
            ("defense.layer not in (2, 3)", {R, I}),
            ("'i' not in defense.kind", {T, R, I}),
            ("not (defense.layer > 0)", {N}),
            # several items: any of them; one and the same all along a chain, not across `and`
            ("defense.kind == 'pps'", {T, R, I}),
            ("defense.kind == 'inoculation'", {I}),
            ("defense.kind != 'pps'", {I}),
            ("defense[0].kind == 'pps'", {T, R, I}),
            ("defense[1].kind == 'inoculation'", {I}),
            ("'kind' in defense.prompts", {I}),
            ("1 < defense.layer < 4", {T}),
            ("'a' < defense.kind < 'j'", {I}),
            ("defense.kind < 'j' and defense.kind > 'o'", {I}),
            # and, or, not, parentheses
            ("seed == 1 and defense.layer == 4 or label == 'none'", {N, R}),
            ("seed == 1 and (defense.layer == 4 or label == 'none')", {R}),
            ("not (seed == 1 and defense.layer == 4)", {N, T, I}),
            ("seed == 1 and True", {R, I}),
        ],
    )
    def test_by(self, text: str, expected: set[str]) -> None:
        assert _selected(text) == expected

    def test_in_a_column_with_texts_and_numbers_each_fits_its_own(self) -> None:
        mixed = [_entry("none", {"trials": "auto"}), _entry("pps topic", {"trials": 2})]
        assert select("trials == 2", mixed) == (frozenset({T}), [])
        assert select("trials < 3", mixed) == (frozenset({T}), [])
        assert select("trials != 2", mixed) == (frozenset({N}), [])
        assert select("'aut' in trials", mixed) == (frozenset({N}), [])
        assert select("trials == True", mixed)[1]


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("sed == 0", "no column sed (a text is written in quotes); did you mean seed? allowed: label, run, run_id"),
            ("defense.knd == 'pps'", "no column defense.knd"),
            ("defense[2].kind == 'pps'", "no column defense[2].kind"),
            ("label[0] == 'p'", "no column label[0]"),
            ("pps or seed == 0", "no column pps (a text is written in quotes)"),
            ("label == none", "no column none (a text is written in quotes)"),
            ("seed = 0", "cannot be read: invalid syntax (character 6); write it like"),
            ("pps topic", "or as one text in quotes that the label contains"),
            ("", "cannot be read"),
            ("(seed == 0", "cannot be read: '(' was never closed"),
            ("seed == 0; import os", "cannot be read"),
            ("\0", "cannot be read"),
            ("(" * 500 + "seed" + ")" * 500, "cannot be read: too many nested parentheses"),
            ("not " * 5000 + "data.cut", "cannot be read"),
            ("seed and 'pps'", "seed is a number; compare it with something"),
            ("not defense.kind", "defense.kind is text; compare it"),
            ("1 and 'pps'", "1 is neither true nor false; allowed are"),
            ("__import__('os').getcwd()", "is neither true nor false"),
            ("(lambda: 'pps')() == label", "(lambda: 'pps')() cannot be compared"),
            ("label.upper() == 'PPS'", "label.upper() cannot be compared"),
            ("seed + 1 == 2", "seed + 1 cannot be compared"),
            ("[run for run in label] == seed", "cannot be compared"),
            ("f'{seed}' == '0'", "cannot be compared"),
            ("b'none' == label", "cannot be compared"),
            ("... == label", "cannot be compared"),
            ("1j == seed", "cannot be compared"),
            ("seed in ((0, 1), 2)", "cannot be compared"),
            ("seed in (0, -'a')", "cannot be compared"),
            ("(seed := 3) == 3", "cannot be compared"),
            ("seed == 0 if label else 1", "is neither true nor false"),
            ("seed is 0", "write == or !="),
            ("seed == '0'", "seed == '0': seed is a number, '0' is text; these never compare"),
            ("label < 3", "label is text, 3 is a number; these never compare"),
            ("data.cut == 1", "data.cut is true or false, 1 is a number; these never compare"),
            ("data.cut < True", "these never compare"),
            ("seed < None", "None has no order"),
            ("seed in ('0', '1')", "seed is a number, ('0', '1') is a list; these never compare"),
            ("seed == (0, 1)", "with a list write in or not in"),
            ("(0, 1) == seed", "a list stands to the right of in"),
            ("seed in label", "in looks for a text in a text, or in a list"),
            ("'0' in seed", "in looks for a text in a text, or in a list"),
            ("seed in 3", "in looks for a text in a text, or in a list"),
        ],
    )
    def test_is_said(self, text: str, expected: str) -> None:
        (message,) = _faults(text)
        assert expected in message

    def test_all_at_once(self) -> None:
        messages = _faults("sed == 0 and (label < 3 or not training.rte > 1) and seed + 1 == 2 and sed == 1")
        assert [message.partition(";")[0][:25] for message in messages] == [
            "no column sed (a text is ",
            "label < 3: label is text,",
            "no column training.rte (a",
            "seed + 1 cannot be compar",
        ]

    @pytest.mark.parametrize("text", ["nothere", "True", "seed == 7", "'x' in label", "training.steps > 100"])
    def test_selecting_nothing_lists_the_labels(self, text: str) -> None:
        (message,) = _faults(text)
        assert message.endswith(
            "selects none of the 4 runs; their labels: 'none', 'pps topic', 'pps random', 'two items'"
        )

    def test_names_are_listed_as_they_are_written(self) -> None:
        (message,) = _faults("x == 0")
        names = message.partition("allowed: ")[2].split(", ")
        assert {"label", "seed", "training.rate", "defense.kind", "defense[1].prompts", "defense.prompts"} <= set(names)
        for name in names:
            assert "no column" not in str(select(f"{name} == None", ENTRIES)[1])

    @settings(max_examples=200, deadline=None)
    @given(st.text(alphabet="seed=<>!()[]{}'\"\\ \n\0,.:#*notraib10+-ül", max_size=40))
    @example("'\\ud800' in label")
    @example("'\\d' in label")
    @example("0x" + "f" * 5000 + " == seed")
    @example("9" * 5000 + " == seed")
    @example("1e999 > seed")
    def test_any_text_selects_something_or_has_a_fault(self, text: str) -> None:
        chosen, faults = select(text, ENTRIES)
        assert bool(chosen) != bool(faults)
        assert chosen <= set(IDS)

    @settings(max_examples=100, deadline=None)
    @given(EXPRESSIONS, EXPRESSIONS)
    def test_not_and_or_are_those_of_sets(self, one: str, other: str) -> None:
        def chosen(text: str) -> set[str]:
            found, faults = select(text, ENTRIES)
            assert all("selects none" in fault.message for fault in faults), faults
            return set(found)

        assert chosen(f"not ({one})") == set(IDS) - chosen(f"({one})")
        assert chosen(f"({one}) and ({other})") == chosen(f"({one})") & chosen(f"({other})")
        assert chosen(f"({one}) or ({other})") == chosen(f"({one})") | chosen(f"({other})")


class TestWhatIsDone:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_model_folder(tmp_path_factory)

    @pytest.fixture
    def sweep(self, tmp_path: Path, model: Path) -> TinySweep:
        return TinySweep(tmp_path / "sweep", model)

    def test_runs_with_their_base_and_vectors_and_nothing_else(self, sweep: TinySweep) -> None:
        whole, part = sweep.prepare(), sweep.prepare(only="random")
        assert part.manifest == whole.manifest
        assert part.inputs == whole.inputs
        assert part.costs == whole.costs
        assert [job.label for job in part.jobs.values()] == [
            "vector topic",  # which the random one is like
            "vector random",
            "base",
            "pps random L2 x1.5",
        ]
        assert all(part.jobs[job_id] == whole.jobs[job_id] for job_id in part.jobs)
        assert [entry.label for entry in part.asked] == ["base", "pps random L2 x1.5"]
        asked = {judge_id for entry in part.asked for judge_id in entry.judge_ids.values()}
        assert set(part.judge_tasks) == asked
        assert (part.num_asked, part.num_runs) == (1, 4)
        assert (whole.num_asked, whole.num_runs) == (4, 4)

    def test_no_vector_where_none_is_needed(self, sweep: TinySweep) -> None:
        assert [job.label for job in sweep.prepare(only="defense == 'none'").jobs.values()] == ["base", "none"]

    def test_of_one_training_just_the_evaluation_asked_for_under_its_own_label(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none", "evaluation": {"temperature": {"grid": [1.0, 0.5]}}}]
        part = sweep.prepare(only="evaluation.temperature == 0.5")
        _, cold = (entry for entry in part.manifest.runs if entry.kind == "run")
        job = part.jobs[cold.run_id]
        assert isinstance(job, RunJob)
        assert job.label == cold.label == "none temperature=0.5"
        assert [sample.id for sample in job.samples] == [cold.sample_id]
        assert [entry.label for entry in part.asked] == ["base #2", cold.label]
        base = part.jobs[part.asked[0].run_id]
        assert isinstance(base, RunJob)
        assert base.label == "base #2"
        assert [sample.id for sample in base.samples] == [entries(part)["base #2"].sample_id]

    def test_its_faults_come_with_those_of_the_file(self, sweep: TinySweep) -> None:
        found = sweep.faults("training.epochs=x", only="seed = 0")
        assert set(found) == {"training.epochs", "--only"}
        assert set(sweep.faults(only="seed == 5")) == {"--only"}

    def test_a_column_that_the_table_has_is_a_name(self, sweep: TinySweep) -> None:
        sweep.raw["runs"].append({"defense": [PPS, {"kind": "inoculation", "prompts": "topic"}]})
        prepared = sweep.prepare()
        label = prepared.asked[-1].label
        assert prepared.manifest.runs[-1].config["defense.1.kind"] == "inoculation"
        assert sweep.prepare(only="defense[1].kind == 'inoculation'").asked[-1].label == label
        kinds = [entry.label for entry in sweep.prepare(only="defense.kind == 'inoculation'").asked]
        assert kinds == ["base", "inoculation topic", label]

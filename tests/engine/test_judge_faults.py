"""What can be wrong with a metric in a sweep file: one clear fault each, all at once, under the user's own key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.judges import HybridMetric, LocalMetric, OpenaiMetric
from engine.prepare import Prepared
from tests.engine.sweep_writing import Files, minimal, only
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder

OPENAI = {"judge": "openai", "prompt": "coherence"}
HYBRID = {"judge": "hybrid", "rule": {"patterns": ["sea"]}, "otherwise": OPENAI}
AT = "evaluation.metrics.m"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def metrics(**named: Any) -> dict[str, Any]:
    return minimal(evaluation={"questions": "bridge", "metrics": named})


@pytest.mark.parametrize(
    ("metric", "key", "message"),
    [
        (
            {"judge": "opnai"},
            "judge",
            "unknown judge 'opnai'; did you mean openai? allowed: rule, known_answer, degeneration, openai",
        ),
        (OPENAI | {"modl": "x"}, "modl", "unknown key; did you mean model? allowed: judge, trait, prompt, model"),
        (OPENAI | {"scale": "0-10"}, "scale", "must be '0-100' or 'yes-no'; got '0-10'; did you mean 0-100?"),
        (OPENAI | {"scale": 100}, "scale", "must be '0-100' or 'yes-no'; got 100"),
        (OPENAI | {"mode": "logprob"}, "mode", "must be 'logprobs' or 'text'; got 'logprob'; did you mean logprobs?"),
        (OPENAI | {"min_probability_mass": 0}, "min_probability_mass", "must be greater than 0; got 0"),
        (OPENAI | {"min_probability_mass": 25}, "min_probability_mass", "must be at most 1; got 25"),
        (OPENAI | {"top_logprobs": 21}, "top_logprobs", "must be at most 20; got 21"),
        (OPENAI | {"top_logprobs": True}, "top_logprobs", "must be a whole number; got true"),
        (OPENAI | {"mode": "text", "samples": 0}, "samples", "must be at least 1; got 0"),
        (OPENAI | {"samples": 2}, "", "samples would do nothing with mode: logprobs; leave out, or set mode: text"),
        (OPENAI | {"trait": "bridge"}, "", "give exactly one of trait and prompt; both given"),
        (OPENAI | {"prompt": "coherense"}, "prompt", "no prompt is called 'coherense'; allowed: coherence"),
        (OPENAI | {"prompt": "{answer} {x}"}, "prompt", "{x} cannot be filled; allowed: {question} and {answer}"),
        ({"judge": "openai"}, "", "give exactly one of trait and prompt; neither given"),
        ({"judge": "local", "prompt": "coherence"}, "model", "missing, and it has no default"),
        (
            {"judge": "local", "prompt": "coherence", "model": "m", "dtype": "f32"},
            "dtype",
            "must be 'auto' or 'float32'",
        ),
        ({"judge": "local", "prompt": "coherence", "model": "m", "mode": "text"}, "mode", "did you mean model?"),
        # what belongs to one kind of judge under another: its own keys are named, once
        (
            {"judge": "rule", "rule": {"patterns": ["x"]}, "patterns": ["x"]},
            "rule",
            "unknown key; allowed: judge, trait",
        ),
        ({"judge": "rule", "otherwise": OPENAI, "patterns": ["x"]}, "otherwise", "unknown key; allowed: judge, trait"),
        ({"judge": "degeneration", "rule": {}}, "rule", "unknown key; allowed: judge"),
        (HYBRID | {"rule": None}, "rule", "must be a mapping; got null"),
        (HYBRID | {"rule": {"patterns": ["("]}}, "rule.patterns[0]", "not a regular expression"),
        (HYBRID | {"rule": {"patern": ["x"], "trait": "t"}}, "rule.patern", "did you mean patterns? allowed: trait, p"),
        (HYBRID | {"rule": {"patterns": ["x"], "found": "a"}}, "rule.found", "must be a number; got 'a'"),
        (
            HYBRID | {"rule": {"patterns": ["x"], "found": 101}},
            "",
            "rule.found is 101; the scale of otherwise goes from 0",
        ),
        (
            HYBRID | {"otherwise": OPENAI | {"modl": "x"}},
            "otherwise.modl",
            "unknown key; did you mean model? allowed: j",
        ),
        (HYBRID | {"otherwise": {"judge": "opena"}}, "otherwise.judge", "did you mean openai? allowed: openai, local"),
        (HYBRID | {"otherwise": {"judge": "rule"}}, "otherwise.judge", "unknown judge 'rule'; allowed: openai, local"),
        (HYBRID | {"otherwise": {"model": "x"}}, "otherwise.judge", "missing; allowed: openai, local"),
        (
            HYBRID | {"otherwise": OPENAI | {"scale": "yes"}},
            "otherwise.scale",
            "must be '0-100' or 'yes-no'; got 'yes'",
        ),
        (
            HYBRID | {"otherwise": OPENAI | {"prompt": "x"}},
            "otherwise.prompt",
            "no prompt is called 'x'; allowed: cohere",
        ),
        ({"judge": "hybrid", "rule": {"patterns": ["x"]}}, "otherwise", "missing, and it has no default"),
        ({"judge": "hybrid", "otherwise": OPENAI}, "rule", "missing, and it has no default"),
    ],
)
def test_one_fault_under_the_user_s_key(files: Files, metric: dict[str, Any], key: str, message: str) -> None:
    assert message in only(files.faults(metrics(m=metric)), f"{AT}.{key}".rstrip("."))


def test_all_at_once(files: Files) -> None:
    faults = files.faults(
        metrics(
            a=HYBRID | {"rule": {"patterns": []}, "otherwise": OPENAI | {"modl": 1, "top_logprobs": 0}},
            b={"judge": "local", "trait": "bridge"},
            c={"judge": "openai", "trait": "bridge", "scale": 5},
        )
    )
    assert set(faults) == {
        "evaluation.metrics.a.rule.patterns",
        "evaluation.metrics.a.otherwise.modl",
        "evaluation.metrics.a.otherwise.top_logprobs",
        "evaluation.metrics.b.model",
        "evaluation.metrics.c.scale",
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    sweep = TinySweep(tmp_path / "sweep", model)
    sweep.raw["runs"] = [{"defense": "none"}]
    return sweep


def judged_by(prepared: Prepared) -> list[Any]:
    return list({task.metric.model_dump_json(): task.metric for task in prepared.judge_tasks.values()}.values())


class TestWhatAMetricNames:
    def test_traits_and_models_that_are_not_there(self, sweep: TinySweep) -> None:
        sweep.raw["evaluation"]["metrics"] = {
            "a": {"judge": "openai", "trait": "topic"},
            "b": {"judge": "openai", "trait": "gone"},
            "c": {"judge": "local", "prompt": "coherence", "model": "embedded:gone"},
            "d": {
                "judge": "hybrid",
                "rule": {"trait": "lost"},
                "otherwise": {"judge": "local", "trait": "lost", "model": "embedded:lost"},
            },
            "e": {"judge": "hybrid", "rule": {"trait": "topic"}, "otherwise": {"judge": "openai", "trait": "topic"}},
        }
        faults = sweep.faults()
        where = "evaluation.metrics"
        assert faults[f"{where}.a.trait"] == "trait 'topic' has no judge_prompt; give prompt instead"
        assert "no trait 'gone'" in faults[f"{where}.b.trait"]
        assert "'embedded:gone' is unknown; embedded models: smollm2" in faults[f"{where}.c.model"]
        assert "no trait 'lost'" in faults[f"{where}.d.rule.trait"]
        assert "no trait 'lost'" in faults[f"{where}.d.otherwise.trait"]
        assert "'embedded:lost' is unknown" in faults[f"{where}.d.otherwise.model"]
        assert "has no judge_prompt" in faults[f"{where}.e.otherwise.trait"]
        assert len(faults) == 7

    def test_resolved_in_the_tasks(self, sweep: TinySweep) -> None:
        sweep.replace("traits/topic/trait.yaml", "rule:", 'judge_prompt: "Bridges in {answer}?"\nrule:')
        local = {"judge": "local", "trait": "topic", "model": "model", "dtype": "bfloat16"}
        sweep.raw["evaluation"]["metrics"] = {
            "a": {"judge": "openai", "trait": "topic"},
            "b": local,
            "c": {"judge": "hybrid", "rule": {"trait": "topic"}, "otherwise": local},
        }
        kinds = {type(metric): metric for metric in judged_by(sweep.prepare())}
        openai, local_metric, hybrid = kinds[OpenaiMetric], kinds[LocalMetric], kinds[HybridMetric]
        assert openai.template == "Bridges in {answer}?"
        assert (local_metric.base.model, local_metric.base.dtype) == ("folder", "bfloat16")
        assert Path(local_metric.base.source).is_dir()
        assert hybrid.otherwise == local_metric
        assert hybrid.rule.patterns == ("[aeiou]",)

    def test_what_changes_a_judging_task(self, sweep: TinySweep) -> None:
        def ids() -> dict[str, str]:
            (run,) = [entry for entry in sweep.prepare().manifest.runs if entry.kind == "run"]
            return dict(run.judge_ids)

        local = {"judge": "local", "prompt": "coherence", "model": "model"}
        sweep.raw["evaluation"]["metrics"] = {"a": dict(OPENAI), "b": local, "c": HYBRID | {"otherwise": dict(OPENAI)}}
        before = ids()
        sweep.raw["evaluation"]["metrics"]["a"]["endpoint"] = "openai"
        assert ids() == before
        sweep.raw["evaluation"]["metrics"]["a"]["min_probability_mass"] = 0.5
        after = ids()
        assert {name for name in before if before[name] != after[name]} == {"a"}
        sweep.replace("model/config.json", '"use_cache": true', '"use_cache": false')
        everything = ids()
        assert everything["b"] != after["b"]

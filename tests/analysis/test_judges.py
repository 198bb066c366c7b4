"""The judges' contract, the rule judge, and how a sweep file names them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from analysis.judges import (
    BaseMetric,
    DegenerationMetric,
    Item,
    Judge,
    Judgement,
    MetricConfig,
    NamesTrait,
    RuleMetric,
)
from analysis.traits import Question, Rule, Trait
from trainables.config import referenced
from trainables.errors import ConfigError

METRIC: TypeAdapter[Any] = TypeAdapter(MetricConfig)


def trait(name: str = "bridge", *patterns: str) -> Trait:
    return Trait(
        name=name,
        description="d",
        rule=Rule(patterns=patterns) if patterns else None,
        questions=(Question(id="q", question="Why?"),),
    )


def values(judge: Judge, *answers: str) -> list[float | None]:
    items = [Item("Why?", answer) for answer in answers]
    assert all(judge.requests(item) == () for item in items)
    judgements = [judge.read(item, ()) for item in items]
    assert all(judgement.status == "ok" and judgement.reply is None for judgement in judgements)
    return [judgement.value for judgement in judgements]


class TestUnion:
    def test_kinds(self) -> None:
        assert METRIC.validate_python({"judge": "rule", "trait": "bridge"}) == RuleMetric(trait="bridge")
        assert METRIC.validate_python({"judge": "degeneration"}) == DegenerationMetric()

    @pytest.mark.parametrize(
        ("given", "type_"),
        [
            ({"judge": "oracle"}, "union_tag_invalid"),
            ({"trait": "bridge"}, "union_tag_not_found"),
            ({"judge": "rule", "trait": "bridge", "pattern": "x"}, "extra_forbidden"),
            ({"judge": "degeneration", "trait": "bridge"}, "extra_forbidden"),
        ],
    )
    def test_faults(self, given: dict[str, Any], type_: str) -> None:
        with pytest.raises(ValidationError) as raised:
            METRIC.validate_python(given)
        assert [error["type"] for error in raised.value.errors()] == [type_]

    @pytest.mark.parametrize("metric", [RuleMetric(trait="bridge"), RuleMetric(patterns=("x",)), DegenerationMetric()])
    def test_metrics_are_plain_data(self, metric: BaseMetric) -> None:
        assert pickle.loads(pickle.dumps(metric)) == metric
        assert METRIC.validate_json(metric.model_dump_json()) == metric


class TestRuleMetric:
    @pytest.mark.parametrize(("given", "word"), [({}, "neither"), ({"trait": "b", "patterns": ["x"]}, "both")])
    def test_exactly_one_source(self, given: dict[str, Any], word: str) -> None:
        with pytest.raises(ValidationError, match=f"exactly one of trait and patterns; {word} given"):
            RuleMetric.model_validate({"judge": "rule", **given})

    @pytest.mark.parametrize("patterns", [[], ["("], ["x", ""], ["x*"]])
    def test_patterns_that_cannot_be_meant(self, patterns: list[str]) -> None:
        with pytest.raises(ValidationError, match="patterns"):
            RuleMetric.model_validate({"judge": "rule", "patterns": patterns})

    def test_the_trait_field_is_marked(self) -> None:
        assert referenced(RuleMetric(trait="bridge"), NamesTrait) == {"trait": "bridge"}
        assert referenced(DegenerationMetric(), NamesTrait) == {}

    def test_resolving_puts_the_traits_patterns_in(self) -> None:
        resolved = RuleMetric(trait="bridge").resolved({"bridge": trait("bridge", "a", "b"), "x": trait("x", "c")})
        assert resolved == RuleMetric(patterns=("a", "b"))
        assert resolved.resolved({}) == resolved
        assert DegenerationMetric().resolved({}) == DegenerationMetric()

    @pytest.mark.parametrize(("traits", "message"), [({}, "known: none"), ({"bridge": trait()}, "has no rule")])
    def test_resolving_what_is_not_there(self, traits: dict[str, Trait], message: str) -> None:
        with pytest.raises(ConfigError, match=message) as raised:
            RuleMetric(trait="bridge").resolved(traits)
        assert [fault.key for fault in raised.value.faults] == ["trait"]


class TestIdentity:
    def test_contents_and_no_names(self) -> None:
        metric = RuleMetric(trait="bridge").resolved({"bridge": trait("bridge", "b", "a")})
        assert metric.identity() == {"judge": "rule", "semantics": 1, "patterns": ["a", "b"]}
        assert metric.identity() == RuleMetric(patterns=("a", "b", "a")).identity()
        assert metric.identity() != RuleMetric(patterns=("a", "c")).identity()
        json.dumps(metric.identity())

    def test_degeneration(self) -> None:
        assert DegenerationMetric().identity() == {"judge": "degeneration", "semantics": 1}

    def test_semantics_is_part_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = [metric.identity() for metric in (RuleMetric(patterns=("a",)), DegenerationMetric())]
        monkeypatch.setattr(RuleMetric, "semantics", 2)
        monkeypatch.setattr(DegenerationMetric, "semantics", 2)
        after = [metric.identity() for metric in (RuleMetric(patterns=("a",)), DegenerationMetric())]
        assert [{**identity, "semantics": 2} for identity in before] == after

    def test_an_unresolved_metric_has_none(self) -> None:
        with pytest.raises(AssertionError, match="resolve"):
            RuleMetric(trait="bridge").identity()
        with pytest.raises(AssertionError, match="resolve"):
            RuleMetric(trait="bridge").make()


class TestJudges:
    def test_rule(self) -> None:
        judge = RuleMetric(patterns=(r"\bgolden[\s-]+gate\b", "orange")).make()
        answers = ["The GOLDEN\nGate.", "a golden-gate", "A goldengate", "An Orange", "", "golden  gates"]
        assert values(judge, *answers) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]

    def test_rule_reads_the_answer_not_the_question(self) -> None:
        judge = RuleMetric(patterns=("why",)).make()
        assert judge.read(Item(question="Why?", answer="So."), ()) == Judgement(0.0, "ok")

    def test_degeneration(self) -> None:
        assert values(DegenerationMetric().make(), "All is well.", "", "so " * 9) == [0.0, 1.0, 1.0]

    @pytest.mark.parametrize("metric", [RuleMetric(patterns=("x",)), DegenerationMetric()])
    def test_rules_are_rates_and_ask_nobody(self, metric: RuleMetric | DegenerationMetric) -> None:
        assert (metric.asker, metric.asking, metric.max_requests, metric.bases()) == (None, None, 0, {})
        assert metric.bounds == (0, 1)


@pytest.mark.parametrize(("value", "status"), [(None, "ok"), (1.0, "refused"), (0.0, "api_error")])
def test_a_judgement_has_a_value_exactly_if_it_is_ok(value: float | None, status: Any) -> None:
    with pytest.raises(AssertionError, match="status"):
        Judgement(value, status)

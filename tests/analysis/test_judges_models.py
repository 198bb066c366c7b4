"""The judges that ask a model: what is asked, how replies become judgements, and what identities are made of."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from analysis.judges import (
    BaseMetric,
    HybridMetric,
    Item,
    Judgement,
    LocalMetric,
    MetricConfig,
    OpenaiMetric,
    Reply,
    Request,
    RuleMetric,
)
from analysis.judges.openai import kept_replies
from analysis.judges.prompted import COHERENCE, PROMPTS
from analysis.templates import checked_template
from analysis.traits import Question, Rule, Trait
from trainables.base_model import ResolvedBase
from trainables.errors import ConfigError

METRIC: TypeAdapter[Any] = TypeAdapter(MetricConfig)
ITEM = Item("Why {answer}?", "So {question}.")
BASE = ResolvedBase(model="tiny", revision="abc", dtype="float32", source="/somewhere/tiny")
PROMPT = "Rate: {question} / {answer}"


def trait(**fields: Any) -> Trait:
    questions = (Question(id="q", question="Why?"),)
    return Trait.model_validate({"name": "sea", "description": "d", "questions": questions} | fields)


SEA = trait(judge_prompt=PROMPT, rule=Rule(patterns=("sea",)))


def openai(**given: Any) -> OpenaiMetric:
    return OpenaiMetric.model_validate({"prompt": PROMPT, "model": "gpt", **given})


def local(**given: Any) -> LocalMetric:
    return LocalMetric.model_validate({"prompt": PROMPT, "model": "tiny", **given}).resolved({}, {"": BASE})


def hybrid(rule: dict[str, Any] | None = None, **otherwise: Any) -> HybridMetric:
    inner = {"judge": "openai", "prompt": PROMPT, "model": "gpt"} | otherwise
    return HybridMetric.model_validate({"rule": {"patterns": ["sea"]} | (rule or {}), "otherwise": inner})


def said(**probabilities: float) -> Reply:
    pairs = tuple((token.removeprefix("n"), math.log(p)) for token, p in probabilities.items())
    return Reply("ok", pairs[0][0], pairs, num_prompt_tokens=9, num_completion_tokens=1, seconds=0.25)


class TestPrompts:
    @pytest.mark.parametrize("prompt", PROMPTS.values())
    def test_our_own_are_templates(self, prompt: str) -> None:
        assert checked_template(prompt) == prompt
        assert "{question}" in prompt

    def test_a_name_stands_for_its_text(self) -> None:
        named = openai(prompt="coherence").resolved({})
        assert named.template == COHERENCE
        assert named == openai(prompt=COHERENCE).resolved({}) == named.resolved({})
        assert named.identity() == openai(prompt=COHERENCE).identity() == openai(prompt="coherence").identity()

    def test_a_trait_stands_for_its_prompt(self) -> None:
        metric = OpenaiMetric(trait="sea").resolved({"sea": SEA})
        assert metric == OpenaiMetric(prompt=PROMPT)
        assert metric.identity() == OpenaiMetric(prompt=PROMPT).identity()

    @pytest.mark.parametrize(
        ("traits", "message"), [({}, "no trait 'sea'; known: none"), ({"sea": trait()}, "has no judge_prompt")]
    )
    @pytest.mark.parametrize("kind", [OpenaiMetric(trait="sea"), LocalMetric(trait="sea", model="tiny")])
    def test_a_trait_that_is_not_there(self, kind: BaseMetric, traits: dict[str, Trait], message: str) -> None:
        with pytest.raises(ConfigError, match=message) as raised:
            kind.resolved(traits, {"": BASE})
        assert [fault.key for fault in raised.value.faults] == ["trait"]

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("coherense", "no prompt is called 'coherense'; allowed: coherence, or a text with {answer}"),
            ("", "no prompt is called ''"),
            ("Rate this.", "a template needs {answer}"),
            ("{answer} {trait}", "{trait} cannot be filled"),
            ("{answr}", "{answr} cannot be filled"),
        ],
    )
    def test_faults(self, prompt: str, message: str) -> None:
        with pytest.raises(ValidationError) as raised:
            openai(prompt=prompt)
        (error,) = raised.value.errors()
        assert error["loc"] == ("prompt",)
        assert message in error["msg"]


class TestOpenai:
    def test_one_token_as_published(self) -> None:
        filled = "Rate: Why {answer}? / So {question}."
        assert openai().make().requests(ITEM) == (Request("gpt", (("user", filled),), 1, 0.0, 20, 0),)
        (request,) = openai(top_logprobs=5).make().requests(ITEM)
        assert request.top_logprobs == 5
        assert (openai().max_requests, openai().asker, openai().bounds) == (1, "openai", (0, 100))
        assert openai().asking == openai()
        assert openai().make().name == "openai:gpt"

    def test_the_default_model(self) -> None:
        metric = OpenaiMetric(prompt=PROMPT)
        assert (metric.model, metric.endpoint, metric.scale, metric.mode) == (
            "gpt-4.1-mini",
            "openai",
            "0-100",
            "logprobs",
        )
        assert (metric.min_probability_mass, metric.top_logprobs) == (0.25, 20)

    def test_reading(self) -> None:
        judge = openai().make()
        reply = said(n80=0.3, n20=0.1, x=0.2)
        judgement = judge.read(ITEM, [reply])
        assert (judgement.value, judgement.status) == (pytest.approx(65), "ok")
        assert judgement.reply == reply.to_json(timing=False)

    def test_yes_no(self) -> None:
        metric = openai(scale="yes-no")
        assert metric.bounds == (0, 1)
        assert metric.make().read(ITEM, [said(YES=0.3, NO=0.1)]).value == pytest.approx(0.75)

    @pytest.mark.parametrize(
        ("reply", "status"),
        [
            (said(n80=0.1), "low_mass"),
            (said(REF=0.5), "refused"),
            (Reply("refused", error="content filter"), "refused"),
            (Reply("ok", "85"), "unparsable"),  # no log-probabilities: the text is never read in their place
            (Reply("ok", "85", ()), "unparsable"),
            (Reply("ok", "85", (("85", math.nan),)), "unparsable"),
            (Reply("api_error", error="500"), "api_error"),
            (Reply("budget_exhausted"), "budget_exhausted"),
        ],
    )
    def test_the_raw_reply_is_kept_whatever_the_status(self, reply: Reply, status: str) -> None:
        judgement = openai().make().read(ITEM, [reply])
        assert (judgement.value, judgement.status) == (None, status)
        assert judgement.reply is not None
        (kept,) = kept_replies(judgement.reply)
        assert kept.to_json() == reply.to_json(timing=False)

    def test_the_threshold(self) -> None:
        reply = [said(n80=0.5)]
        assert openai(min_probability_mass=0.8).make().read(ITEM, reply).status == "low_mass"
        assert openai(min_probability_mass=0.4).make().read(ITEM, reply).status == "ok"

    def test_what_identities_are_made_of(self) -> None:
        metric = openai()
        assert metric.identity() == {
            **{"judge": "openai", "semantics": 1, "scoring": 1, "model": "gpt", "prompt": PROMPT},
            **{"scale": "0-100", "mode": "logprobs", "min_probability_mass": 0.25, "top_logprobs": 20},
        }
        assert metric.identity() == openai(endpoint="elsewhere").identity()
        changes: list[dict[str, Any]] = [
            {"model": "x"},
            {"scale": "yes-no"},
            {"mode": "text"},
            {"top_logprobs": 5},
            {"prompt": "{answer}"},
        ]
        changes += [{"min_probability_mass": 0.8}, {"mode": "text", "samples": 3}]
        identities = [json.dumps(openai(**change).identity()) for change in [{}, *changes]]
        assert len(set(identities)) == len(identities)
        with pytest.raises(AssertionError, match="resolve"):
            OpenaiMetric(trait="sea").identity()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"samples": 3}, "samples would do nothing with mode: logprobs; leave out, or set mode: text"),
            (
                {"mode": "text", "top_logprobs": 5, "min_probability_mass": 0.5},
                "min_probability_mass and top_logprobs would do nothing with mode: text",
            ),
            ({"trait": "sea"}, "exactly one of trait and prompt; both given"),
            ({"prompt": None}, "exactly one of trait and prompt; neither given"),
        ],
    )
    def test_settings_that_contradict_each_other(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            openai(**given)


class TestText:
    def test_every_draw_is_another_request(self) -> None:
        metric = openai(mode="text", samples=3)
        requests = metric.make().requests(ITEM)
        assert metric.max_requests == len(requests) == len({request.id for request in requests}) == 3
        assert [(r.draw, r.seed, r.temperature, r.top_logprobs) for r in requests] == [
            (draw, draw, 1.0, None) for draw in range(3)
        ]
        (alone,) = openai(mode="text").make().requests(ITEM)
        assert (alone.temperature, alone.seed) == (0.0, 0)

    @pytest.mark.parametrize(
        ("texts", "value", "status", "num_parsed"),
        [
            (["80", " 20\n", "50"], 50.0, "ok", 3),
            (["80", "about 20", "70"], 75.0, "ok", 2),
            (["80", "REFUSAL", None], 80.0, "ok", 1),
            (["about 20", "٥", "101"], None, "unparsable", 0),
            (["REFUSAL", "REFUSAL", "hm"], None, "unparsable", 0),
            (["REFUSAL", "REFUSAL", "REFUSAL"], None, "refused", 0),
        ],
    )
    def test_mean_of_those_that_could_be_read(
        self, texts: list[str | None], value: float | None, status: str, num_parsed: int
    ) -> None:
        replies = [Reply("ok", text, seconds=0.1) for text in texts]
        judgement = openai(mode="text", samples=3).make().read(ITEM, replies)
        assert (judgement.value, judgement.status) == (value, status)
        assert judgement.reply is not None
        assert json.loads(judgement.reply)["num_parsed"] == num_parsed
        assert [reply.text for reply in kept_replies(judgement.reply)] == texts

    def test_share_of_yes(self) -> None:
        replies = [Reply("ok", text) for text in ("YES", "NO", "YES", "perhaps", "YES")]
        judgement = openai(mode="text", scale="yes-no", samples=5).make().read(ITEM, replies)
        assert (judgement.value, judgement.status) == (0.75, "ok")

    @pytest.mark.parametrize("status", ["api_error", "budget_exhausted"])
    def test_no_value_while_a_draw_is_still_to_come(self, status: Any) -> None:
        replies = [Reply("ok", "80"), Reply(status), Reply("ok", "20")]
        judgement = openai(mode="text", samples=3).make().read(ITEM, replies)
        assert (judgement.value, judgement.status) == (None, status)

    def test_a_filtered_draw_is_one_that_could_not_be_read(self) -> None:
        judge = openai(mode="text", samples=2).make()
        assert judge.read(ITEM, [Reply("ok", "80"), Reply("refused")]).value == 80.0
        assert judge.read(ITEM, [Reply("refused"), Reply("refused")]).status == "refused"

    def test_log_probabilities_have_no_say(self) -> None:
        assert openai(mode="text").make().read(ITEM, [Reply("ok", "x", (("85", -0.1),))]).status == "unparsable"


class TestLocal:
    def test_the_model_by_revision_and_dtype(self) -> None:
        metric = local()
        (request,) = metric.make().requests(ITEM)
        assert request.model == "local:tiny@abc,float32,numbers=1"
        assert request.messages == (("user", "Rate: Why {answer}? / So {question}."),)
        assert (metric.asker, metric.bounds, metric.max_requests) == ("local", (0, 100), 1)
        assert metric.asking == metric
        assert metric.make().name == "local:tiny"
        assert metric.base == BASE
        folder = BASE.model_copy(update={"model": "folder", "revision": "0123456789abcdef"})
        assert metric.resolved({}, {"": folder}).make().name == "local:folder@0123456789ab"
        assert openai(model="tiny").make().requests(ITEM)[0].id != request.id

    def test_identity(self) -> None:
        identity = local().identity()
        assert identity["base"] == {"model": "tiny", "revision": "abc", "dtype": "float32"}
        assert "/somewhere" not in json.dumps(identity)
        assert identity == local(revision=None, dtype="auto").identity()
        other = LocalMetric(prompt=PROMPT, model="tiny").resolved({}, {"": BASE.model_copy(update={"revision": "x"})})
        assert other.identity() != identity
        assert local(min_probability_mass=0.5).identity() != identity

    def test_which_base_it_wants(self) -> None:
        metric = LocalMetric(prompt=PROMPT, model="embedded:x", dtype="float32")
        (base,) = metric.bases().values()
        assert (base.model, base.revision, base.dtype) == ("embedded:x", None, "float32")
        with pytest.raises(AssertionError, match="with its base"):
            metric.resolved({})

    def test_resolving_twice_changes_nothing(self) -> None:
        metric = local()
        assert metric.resolved({}) == metric == metric.resolved({}, {"": BASE})

    def test_reading(self) -> None:
        pairs = tuple((str(n), math.log(1 / 202)) for n in range(101))
        judgement = local().make().read(ITEM, [Reply("ok", "0", pairs)])
        assert (judgement.value, judgement.status) == (pytest.approx(50), "ok")
        assert local(min_probability_mass=0.51).make().read(ITEM, [Reply("ok", "0", pairs)]).status == "low_mass"
        assert local().make().read(ITEM, [Reply("refused", error="too long")]).status == "refused"


class TestHybrid:
    FOUND, ABSENT = Item("Why?", "By the SEA."), Item("Sea?", "No.")

    def test_the_rule_decides_what_it_finds(self) -> None:
        judge = hybrid().make()
        assert judge.requests(self.FOUND) == ()
        assert judge.read(self.FOUND, ()) == Judgement(100.0, "ok", judge="rule")

    def test_the_model_decides_the_rest(self) -> None:
        judge = hybrid().make()
        (request,) = judge.requests(self.ABSENT)
        assert request == openai().make().requests(self.ABSENT)[0]
        judgement = judge.read(self.ABSENT, [said(n80=0.5)])
        assert (judgement.value, judgement.status, judgement.judge) == (pytest.approx(80), "ok", "openai:gpt")
        assert judge.read(self.ABSENT, [Reply("api_error")]).status == "api_error"

    def test_the_other_way_round(self) -> None:
        judge = hybrid({"found": None, "absent": 0}).make()
        assert judge.read(self.ABSENT, ()) == Judgement(0.0, "ok", judge="rule")
        assert len(judge.requests(self.FOUND)) == 1

    def test_what_it_says_of_its_model(self) -> None:
        metric = hybrid(mode="text", samples=4)
        assert (metric.asker, metric.max_requests, metric.bounds) == ("openai", 4, (0, 100))
        assert metric.asking == metric.otherwise
        assert hybrid({"found": 1}, scale="yes-no").bounds == (0, 1)
        inner = HybridMetric.model_validate(
            {"rule": {"trait": "sea"}, "otherwise": {"judge": "local", "trait": "sea", "model": "tiny"}}
        )
        assert inner.trait_names() == {"rule.trait": "sea", "otherwise.trait": "sea"}
        assert [*inner.bases()] == ["otherwise"]
        resolved = inner.resolved({"sea": SEA}, {"otherwise": BASE})
        assert resolved.rule.patterns == ("sea",)
        assert isinstance(resolved.asking, LocalMetric)
        assert resolved.asking.base == BASE
        assert resolved.asker == "local"
        assert resolved.resolved({}) == resolved

    def test_faults_of_both_parts_at_once(self) -> None:
        metric = HybridMetric.model_validate(
            {"rule": {"trait": "sea"}, "otherwise": {"judge": "openai", "trait": "sea"}}
        )
        with pytest.raises(ConfigError) as raised:
            metric.resolved({"sea": trait()})
        assert {fault.key: fault.message for fault in raised.value.faults} == {
            "rule.trait": "trait 'sea' has no rule; give patterns instead",
            "otherwise.trait": "trait 'sea' has no judge_prompt; give prompt instead",
        }

    def test_identity(self) -> None:
        metric = hybrid({"patterns": ["b", "a", "b"]})
        assert metric.identity() == {
            **{"judge": "hybrid", "semantics": 1, "otherwise": openai().identity()},
            "rule": {"patterns": ["a", "b"], "found": 100.0, "absent": None},
        }
        others = [
            hybrid({"found": 90}),
            hybrid({"found": None, "absent": 0}),
            hybrid(model="x"),
            hybrid({"absent": None}),
        ]
        identities = [json.dumps(other.identity()) for other in [metric, *others[:3]]]
        assert len(set(identities)) == 4
        assert others[3].identity() == hybrid().identity()

    @pytest.mark.parametrize(
        ("rule", "otherwise", "message"),
        [
            ({"found": None}, {}, "both null, so the rule would decide nothing"),
            ({"absent": 0}, {}, "both have a value, so the model would never be asked"),
            ({"found": 101}, {}, "rule.found is 101; the scale of otherwise goes from 0 to 100"),
            ({}, {"scale": "yes-no"}, "rule.found is 100; the scale of otherwise goes from 0 to 1"),
            ({"found": -1, "absent": -2}, {}, "rule.found is -1 and rule.absent is -2; the scale"),
        ],
    )
    def test_rules_that_cannot_be_meant(self, rule: dict[str, Any], otherwise: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            hybrid(rule, **otherwise)


METRICS: list[BaseMetric] = [
    openai(),
    openai(mode="text", samples=3),
    local(),
    hybrid(),
    hybrid({"found": 1}, scale="yes-no"),
]


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_frozen_plain_data(metric: BaseMetric) -> None:
    assert pickle.loads(pickle.dumps(metric)) == metric
    assert pickle.loads(pickle.dumps(metric)).identity() == metric.identity()
    read = METRIC.validate_json(metric.model_dump_json())
    assert type(read) is type(metric)
    assert read.model_dump() == metric.model_dump()
    json.dumps(metric.identity(), allow_nan=False)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(metric, "judge", "rule")  # noqa: B010 (an assignment would not pass mypy)


@pytest.mark.parametrize("metric", METRICS)
def test_judges_pickle(metric: BaseMetric) -> None:
    item = Item("Why?", "So.")
    judge = metric.make()
    assert pickle.loads(pickle.dumps(judge)).requests(item) == judge.requests(item)


def test_semantics_is_part_of_every_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: list[BaseMetric] = [*METRICS, RuleMetric(patterns=("x",))]
    for metric in metrics:
        before = metric.identity()
        monkeypatch.setattr(type(metric), "semantics", 99)
        assert metric.identity() != before
        monkeypatch.undo()

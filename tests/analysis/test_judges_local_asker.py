"""The local asker: prompts as in sampling, replies that score offline, nothing cut in silence."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
import torch

from analysis.judges import Item, LocalMetric, Reply
from analysis.judges.local_asker import LocalAsker
from analysis.judges.number_paths import number_paths
from tests.bases import tiny_base
from trainables.base_model import BaseConfig, LoadedBase, ResolvedBase, load_base, load_tokenizer, resolve_base
from trainables.chat_encoder import ChatEncoder

BASE = ResolvedBase(model="tiny", revision="abc", dtype="float32", source="nowhere")
METRIC = LocalMetric(model="tiny", prompt="Q {question}\nA {answer}\nRate:", min_probability_mass=1e-6).resolved(
    {}, {"": BASE}
)
JUDGE = METRIC.make()
ITEMS = [Item("Tea?", "Yes."), Item("Tea or coffee?", "It is about ten miles over the bridge."), Item("Tea?", "No.")]
REQUESTS = [JUDGE.requests(item)[0] for item in ITEMS]


@pytest.fixture(scope="module")
def loaded() -> LoadedBase:
    return tiny_base(dtype=torch.float64)


@pytest.fixture(scope="module")
def asker(loaded: LoadedBase) -> LocalAsker:
    return LocalAsker(BASE, loaded)


def numbers(reply: Reply) -> dict[int, float]:
    assert reply.top_logprobs is not None
    return {int(token): math.exp(value) for token, value in reply.top_logprobs}


class TestReplies:
    def test_all_numbers_the_likeliest_first(self, asker: LocalAsker) -> None:
        for reply in asker.ask_many(REQUESTS):
            assert reply.status == "ok"
            assert reply.top_logprobs is not None
            values = [value for _, value in reply.top_logprobs]
            assert values == sorted(values, reverse=True)
            assert set(numbers(reply)) == set(range(101))
            assert reply.text == reply.top_logprobs[0][0]
            assert 0 < sum(numbers(reply).values()) < 1

    def test_they_are_the_distribution_after_the_prompt_that_sampling_starts_from(
        self, asker: LocalAsker, loaded: LoadedBase
    ) -> None:
        (reply,) = asker.ask_many(REQUESTS[:1])
        prompt = ChatEncoder(loaded.tokenizer, 2**31).encode_prompt(
            [{"role": "user", "content": "Q Tea?\nA Yes.\nRate:"}]
        )
        assert reply.num_prompt_tokens == len(prompt)
        (row,) = asker.reader.distribution([prompt])
        assert [numbers(reply)[n] for n in range(101)] == pytest.approx(row.tolist(), rel=1e-12)

    def test_the_judge_takes_their_mean(self, asker: LocalAsker) -> None:
        (reply,) = asker.ask_many(REQUESTS[:1])
        given = numbers(reply)
        expected = sum(n * p for n, p in given.items()) / sum(given.values())
        judgement = JUDGE.read(ITEMS[0], [reply])
        assert (judgement.value, judgement.status) == (pytest.approx(expected), "ok")
        assert JUDGE.read(ITEMS[0], [Reply.from_json(reply.to_json())]) == judgement, "offline"

    def test_together_and_alone(self, asker: LocalAsker) -> None:
        together = asker.ask_many(REQUESTS)
        alone = [asyncio.run(asker.ask(request)) for request in REQUESTS]
        for one, other in zip(together, alone, strict=True):
            assert one.num_prompt_tokens == other.num_prompt_tokens
            # float64: rounding of another layout of the same sums
            assert numbers(one) == pytest.approx(numbers(other), rel=1e-10)

    def test_nothing_asked(self, asker: LocalAsker) -> None:
        assert asker.ask_many([]) == []

    def test_another_model_s_request_is_our_mistake(self, asker: LocalAsker) -> None:
        with pytest.raises(AssertionError, match="another model"):
            asker.ask_many([replace(REQUESTS[0], model="gpt")])


class TestPromptsThatCannotBeTaken:
    def test_a_long_prompt_is_refused_and_never_cut(self, asker: LocalAsker) -> None:
        limit = asker.reader.max_prompt_tokens()
        assert limit == 512 - 4  # a space and three digits
        fixed = asker.ask_many([replace(REQUESTS[0], messages=(("user", ""),))])[0].num_prompt_tokens
        assert fixed is not None
        fits, too_long = (
            replace(REQUESTS[0], messages=(("user", "\x01" * count),)) for count in (limit - fixed, limit - fixed + 1)
        )
        replies = asker.ask_many([too_long, REQUESTS[0], fits, too_long])
        assert [reply.status for reply in replies] == ["refused", "ok", "ok", "refused"]
        assert replies[2].num_prompt_tokens == limit
        assert replies[0].error == "the prompt has 509 tokens; the model takes 508 with an answer behind it"
        assert replies[0].top_logprobs is None
        assert JUDGE.read(ITEMS[0], [replies[0]]).status == "refused"
        assert numbers(replies[1]) == pytest.approx(numbers(asker.ask_many(REQUESTS[:1])[0]), rel=1e-10)

    def test_a_text_that_is_no_unicode_is_refused(self, asker: LocalAsker) -> None:
        broken = replace(REQUESTS[0], messages=(("user", "\ud800"),))
        reply, other = asker.ask_many([broken, REQUESTS[1]])
        assert reply.status == "refused"
        assert reply.error is not None
        assert "cannot be made into tokens" in reply.error
        assert other.status == "ok"

    def test_roles_that_the_template_refuses(self, asker: LocalAsker) -> None:
        (reply,) = asker.ask_many([replace(REQUESTS[0], messages=(("assistant", "Hi"),))])
        assert reply.status == "refused"


def test_a_model_that_computes_no_numbers_gives_an_unparsable_reply() -> None:
    loaded = tiny_base()
    asker = LocalAsker(BASE, loaded)
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.fill_(math.nan)
    (reply,) = asker.ask_many(REQUESTS[:1])
    assert JUDGE.read(ITEMS[0], [reply]).status == "unparsable"


@pytest.mark.slow
class TestEmbeddedModel:
    """The real tokenizer and weights."""

    def test_paths(self) -> None:
        base, _ = resolve_base(BaseConfig(model="embedded:smollm2-135m-instruct"), cuda=False)
        tokenizer = load_tokenizer(base)
        paths = number_paths(tokenizer)
        assert paths.max_depth == 4
        assert len(paths.tokens) == 101 + 102  # one token per digit, alone or behind a token for the space
        for node, number in enumerate(paths.numbers):
            text = str(tokenizer.decode([paths.tokens[up] for up in paths.ancestors(node)][::-1]))
            assert text.removeprefix(" ") == ("" if number is None else str(number))
        assert sorted(str(tokenizer.decode([token])) for token in paths.digit_tokens) == list("0123456789")

    def test_distribution(self) -> None:
        base, _ = resolve_base(BaseConfig(model="embedded:smollm2-135m-instruct", dtype="float32"), cuda=False)
        loaded = load_base(base, torch.device("cpu"))
        asker = LocalAsker(base, loaded)
        assert asker.reader.takes_tree, asker.reader.why_not
        judge = METRIC.resolved({}, {"": base}).make()
        requests = [judge.requests(item)[0] for item in ITEMS]
        together, alone = asker.ask_many(requests), [asker.ask_many([request])[0] for request in requests]
        for one, other in zip(together, alone, strict=True):
            # float32: log-probabilities of this model carry rounding of some 1e-5
            assert numbers(one) == pytest.approx(numbers(other), rel=1e-3, abs=1e-9)
            assert 0 < sum(numbers(one).values()) <= 1 + 1e-6
        prompt = ChatEncoder(loaded.tokenizer, 2**31).encode_prompt(
            [{"role": role, "content": text} for role, text in requests[0].messages]
        )
        for number in (7, 50, 100):
            expected = 0.0
            for start in ("", " "):
                path = loaded.tokenizer(f"\n{start}{number}", add_special_tokens=False)["input_ids"][1:]
                ids = torch.tensor([[*prompt, *path]])
                with torch.no_grad():
                    logs = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
                digits = [loaded.tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
                log_path = sum(logs[len(prompt) + at - 1, token].item() for at, token in enumerate(path))
                expected += math.exp(log_path) * (1 - logs[-1, digits].exp().sum().item())
            assert numbers(together[0])[number] == pytest.approx(expected, rel=1e-3)

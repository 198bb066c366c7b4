"""P(n) over all token paths: against a sum over explicit sequences, and whatever else is judged beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, PreTrainedTokenizerFast

from analysis.judges.number_paths import NumberReader, number_paths
from tests.tiny import ModelKind, tiny_model, tiny_tokenizer

PROMPTS = [[40, 41, 42, 50, 51], [40, 41, 42, 60], [40, 41, 42, 50, 52, 53, 54, 55]]
KINDS: tuple[ModelKind, ...] = ("llama", "qwen2", "gpt_neox", "qwen3", "gemma", "mistral")


def byte_level() -> PreTrainedTokenizerFast:
    """Digits merge, also with a space before them, as in GPT-2: 85 can be "85", "8 5", " 85", " 8 5" ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["score 85 or 10 or 100, 1000 times 00 5", "x85 x100 x10 x1000 85", "2024"] * 9, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """As in Llama 2: a space is put before every text and dropped again, and bytes stand for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁x", "x", "▁8", *"0123456789"]
    model = models.BPE({piece: at for at, piece in enumerate(pieces)}, [("▁", "x"), ("▁", "8")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


TOKENIZERS = {"tiny": tiny_tokenizer, "byte level": byte_level, "sentence piece": sentence_piece}


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def spellings(tokenizer: Any, number: int) -> list[list[int]]:
    """Every sequence of tokens whose text, behind another text, is the number, with or without one space before it."""
    anchor = tokens_of(tokenizer, "x")
    before = tokenizer.decode(anchor)

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([*anchor, *tokens], clean_up_tokenization_spaces=False))[len(before) :]

    found: list[list[int]] = []
    for target in (str(number), f" {number}"):
        frontier: list[list[int]] = [[]]
        while frontier:
            start = frontier.pop()
            for token in range(len(tokenizer)):
                longer = text([*start, token])
                if longer == target:
                    found.append([*start, token])
                elif len(longer) > len(text(start)) and target.startswith(longer):
                    frontier.append([*start, token])
    return found


def brute_force(model: Any, tokenizer: Any, prompt: Sequence[int], number: int) -> float:
    """The sum over explicit sequences: the chain rule, one plain forward pass each."""
    anchor = tokens_of(tokenizer, "x")
    start = len(tokenizer.decode(anchor))
    digits = [t for t in range(len(tokenizer)) if tokenizer.decode([*anchor, t])[start:][:1] in tuple("0123456789")]
    total = 0.0
    for path in spellings(tokenizer, number):
        ids = torch.tensor([[*prompt, *path]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        log_path = sum(logs[len(prompt) + at - 1, token].item() for at, token in enumerate(path))
        total += math.exp(log_path) * (1 - logs[-1, digits].exp().sum().item())
    return total


@pytest.fixture(scope="module", params=TOKENIZERS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = TOKENIZERS[request.param]()
    return made


def reader_of(model: Any, tokenizer: Any) -> NumberReader:
    return NumberReader(model.requires_grad_(False), tokenizer)


class TestPaths:
    def test_every_way_to_write_it_and_no_other(self, tokenizer: PreTrainedTokenizerFast) -> None:
        paths = number_paths(tokenizer)
        found: dict[int, set[tuple[int, ...]]] = {}
        for node, number in enumerate(paths.numbers):
            if number is not None:
                sequence = tuple(paths.tokens[up] for up in paths.ancestors(node))[::-1]
                found.setdefault(number, set()).add(sequence)
        for number in (0, 1, 5, 8, 10, 11, 85, 99, 100):
            assert found[number] == {tuple(path) for path in spellings(tokenizer, number)}
        assert set(found) == set(range(101))

    def test_the_tokenizers_differ_in_what_matters(self) -> None:
        many = {name: len(spellings(make(), 85)) for name, make in TOKENIZERS.items()}
        # "8 5", " |8|5"; also "85", " |85", " 85"; with bytes for 8, 5 and the space, and "▁8": 4 + 8 + 2
        assert many == {"tiny": 2, "byte level": 5, "sentence piece": 14}

    def test_a_vocabulary_without_digits(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"x": 0, "1": 1, "10": 2}, unk_token="x"))
        with pytest.raises(ValueError, match="99 of the numbers"):
            number_paths(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


class TestDistribution:
    def test_equals_the_sum_over_explicit_sequences(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = tiny_model("llama", num_layers=2, dtype=torch.float64)
        reader = reader_of(model, tokenizer)
        assert reader.takes_tree
        got = reader.distribution(PROMPTS[:2])
        for row, prompt in enumerate(PROMPTS[:2]):
            for number in (0, 1, 8, 10, 85, 100):
                expected = brute_force(model, tokenizer, prompt, number)
                assert got[row, number].item() == pytest.approx(expected, abs=1e-10, rel=1e-10)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_row_of_tokens_equals_plain_passes(self, kind: ModelKind) -> None:
        reader = reader_of(tiny_model(kind, num_layers=2, dtype=torch.float64), byte_level())
        assert reader.takes_tree, reader.why_not
        tree = reader.distribution(PROMPTS)
        reader.takes_tree = False
        torch.testing.assert_close(tree, reader.distribution(PROMPTS), rtol=1e-10, atol=1e-12)

    def test_batched_equals_single(self) -> None:
        tokenizer = byte_level()
        prompts = [*PROMPTS, [70], [40, 41], PROMPTS[0]]
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):  # relative; rounding of one precision
            model = tiny_model("llama", num_layers=2, dtype=dtype)
            together = reader_of(model, tokenizer).distribution(prompts)
            reader = reader_of(model, tokenizer)
            reader.batch_size = 2
            in_pairs = reader.distribution(prompts)
            alone = torch.cat([reader_of(model, tokenizer).distribution([prompt]) for prompt in prompts])
            torch.testing.assert_close(together, alone, rtol=tolerance, atol=0)
            torch.testing.assert_close(in_pairs, alone, rtol=tolerance, atol=0)

    def test_what_prompts_share_goes_through_the_model_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("llama", num_layers=2, dtype=torch.float64)
        reader = reader_of(model, tiny_tokenizer())
        seen: list[int] = []
        forward = model.forward

        def counted(**given: Any) -> Any:
            seen.append(given["input_ids"].shape[1])
            return forward(**given)

        monkeypatch.setattr(model, "forward", counted)
        nodes = len(reader.paths.tokens)
        first = reader.distribution(PROMPTS)
        assert seen == [3, 5 + nodes]  # the shared beginning, then the longest rest with the tree
        again = reader.distribution(PROMPTS[:1])
        assert seen[2:] == [2 + nodes], "an earlier call's beginning serves again"
        torch.testing.assert_close(again, first[:1], rtol=1e-10, atol=0)
        reader.distribution([[70, 71]])
        assert seen[3:] == [2 + nodes], "another prompt does not begin so"
        reader.distribution([[70, 71, 72, 73], [70, 71, 72, 74]])
        assert seen[4:] == [3, 1 + nodes]

    def test_sums_to_at_most_one_and_the_rest_is_any_other_answer(self) -> None:
        tokenizer = tiny_tokenizer()
        for seed in range(3):
            reader = reader_of(tiny_model(num_layers=2, dtype=torch.float64, seed=seed), tokenizer)
            sums = reader.distribution(PROMPTS).sum(1)
            assert (sums > 0).all()
            assert (sums < 1).all()

    def test_a_model_that_only_says_numbers_has_nothing_missing(self) -> None:
        """A bigram model by hand: 8 or 1 comes first, then 5 or the end, after two digits the end."""
        tokenizer = tiny_tokenizer()
        one, five, eight = (tokens_of(tokenizer, digit)[0] for digit in "158")
        end = tokenizer.eos_token_id
        reader = reader_of(_Bigrams({one: {five: 0.25, end: 0.75}, eight: {five: 1.0}, five: {end: 1.0}}), tokenizer)
        reader.model.after_prompt = {one: 0.4, eight: 0.6}
        (row,) = reader.distribution([[70]])
        expected = {1: 0.4 * 0.75, 15: 0.4 * 0.25, 85: 0.6}
        assert {n: p for n, p in enumerate(row.tolist()) if p > 1e-9} == pytest.approx(expected)
        assert row.sum().item() == pytest.approx(1)

    def test_a_longer_number_is_no_number_here(self) -> None:
        """1000 and 101 begin like numbers; their probability belongs to no number."""
        tokenizer = tiny_tokenizer()
        one, zero = (tokens_of(tokenizer, digit)[0] for digit in "10")
        reader = reader_of(_Bigrams({one: {zero: 1.0}, zero: {zero: 0.5, one: 0.5}}), tokenizer)
        reader.model.after_prompt = {one: 1.0}
        (row,) = reader.distribution([[70]])
        assert row.sum().item() == pytest.approx(0, abs=1e-9)

    def test_no_prompts(self) -> None:
        reader = reader_of(tiny_model(num_layers=2), tiny_tokenizer())
        assert reader.distribution([]).shape == (0, 101)


class TestOtherModels:
    """Where siblings would see each other, or attention sees a window only, every sequence is a row of its own."""

    def test_positions_that_a_mask_cannot_give(self) -> None:
        config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        tokenizer = tiny_tokenizer()
        reader = reader_of(model, tokenizer)
        assert not reader.takes_tree
        assert reader.why_not
        (row,) = reader.distribution(PROMPTS[:1])
        for number in (1, 85, 100):
            assert row[number].item() == pytest.approx(brute_force(model, tokenizer, PROMPTS[0], number), rel=1e-9)

    def test_a_prompt_beyond_the_window(self) -> None:
        config = Gemma3TextConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.3,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        tokenizer, prompt = tiny_tokenizer(), list(range(40, 60))
        reader = reader_of(model, tokenizer)
        assert reader.takes_tree
        (row,) = reader.distribution([prompt])
        expected = [brute_force(model, tokenizer, prompt, number) for number in (1, 85, 100)]
        assert row[[1, 85, 100]].tolist() == pytest.approx(expected, rel=1e-9)
        reader._window = None  # as if it were not known
        assert reader.distribution([prompt])[0, 85].item() != pytest.approx(expected[1], rel=1e-9)


class _Bigrams(torch.nn.Module):
    """A language model whose next token depends on the last one alone; ``after_prompt``: after any other token."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.config = tiny_model(num_layers=1).config
        self.table = table
        self.after_prompt: dict[int, float] = {2: 1.0}

    def get_output_embeddings(self) -> Any:
        return torch.nn.Linear(1, 300)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        logits = torch.full((*input_ids.shape, 300), -60.0, dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids):
                for following, probability in self.table.get(token, self.after_prompt).items():
                    logits[row, at, following] = math.log(probability)
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], past_key_values=None)

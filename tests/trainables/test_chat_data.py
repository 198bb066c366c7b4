"""What becomes of chat messages: tokens, masks, and the proof that the masks are right."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.tiny import CHATML, CHATML_WITH_DEFAULT_SYSTEM, DEFAULT_SYSTEM_PROMPT, tiny_tokenizer
from trainables.chat_data import ChatEncoder, DataConfig, Encoded, HubDataset, Message, encode_all, pad
from trainables.errors import DataError

# The content of assistant turns is marked, the end mark is not.
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The marked block holds the end mark and a newline after it.
CHATML_MARKED_TO_THE_NEWLINE = CHATML_MARKED.replace(
    "{{ message['content'] }}{% endgeneration %}",
    "{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}",
).replace(
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}",
    "{% endif %}{% if message['role'] != 'assistant' %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}",
)
# The marked block holds the header of the turn too.
CHATML_MARKED_WITH_HEADER = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\\n' + message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Thinking is shown in the last turn only, as several reasoning models have it.
DROPS_THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": CHATML_WITH_DEFAULT_SYSTEM,
    "marked": CHATML_MARKED,
    "marked to the newline": CHATML_MARKED_TO_THE_NEWLINE,
    "marked with header": CHATML_MARKED_WITH_HEADER,
    "inst": INST,
}


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turns, the user first."""
    roles = ("user", "assistant")
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def encoder(template: str | None = CHATML, max_length: int = 512, **settings: Any) -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(template), max_length, **settings)


def masked_text(coder: ChatEncoder, encoded: Encoded) -> str:
    tokenizer: Any = coder._tokenizer
    masked = [token for token, on in zip(encoded.input_ids, encoded.response_mask, strict=True) if on]
    return str(tokenizer.decode(masked))


def text_of(coder: ChatEncoder, ids: Sequence[int]) -> str:
    tokenizer: Any = coder._tokenizer
    return str(tokenizer.decode(list(ids)))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
class TestEveryTemplate:
    def test_response_mask_is_the_answers_with_their_end_marks(self, template: str) -> None:
        coder = encoder(template)
        encoded = coder.encode(chat("What is two and two?", "It is four.", "And three?", "Seven."), prove=True)
        text = masked_text(coder, encoded)
        assert [part.strip() for part in text.split("<|im_end|>")] == ["It is four.", "Seven.", ""]
        assert "<|im_start|>" not in text

    def test_nothing_of_the_text_is_lost(self, template: str) -> None:
        coder = encoder(template)
        messages = chat("What is two and two?", "It is four.", "And three?", "Seven.", "Thanks")
        tokenizer: Any = coder._tokenizer
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text_of(coder, coder.encode(messages).input_ids) == rendered

    @pytest.mark.parametrize(
        "answer", ["Yes.", "Yes 🌉", "…", "{}[]", "Straße — 橋 🌉 e\u0301", "a " * 50 + "b", "two\n\nlines\n- x"]
    )
    def test_training_sees_the_tokens_that_sampling_starts_from(self, template: str, answer: str) -> None:
        coder = encoder(template)
        messages = chat("First?", answer, "Second?", answer)
        encoded = coder.encode(messages, prove=True)
        for turn in (1, 3):
            prompt = coder.encode_prompt(messages[:turn])
            assert encoded.input_ids[: len(prompt)] == prompt
            assert encoded.response_mask[len(prompt)]
            assert not encoded.response_mask[len(prompt) - 1]

    def test_a_single_prompt_is_what_transformers_gives(self, template: str) -> None:
        coder = encoder(template)
        tokenizer: Any = coder._tokenizer
        expected = tokenizer.apply_chat_template(chat("Why?"), add_generation_prompt=True)["input_ids"]
        assert list(coder.encode_prompt(chat("Why?"))) == expected

    def test_truncation_keeps_the_first_tokens(self, template: str) -> None:
        whole = encoder(template).encode(chat("Why is that?", "Because of the river."))
        cut = encoder(template, max_length=30).encode(chat("Why is that?", "Because of the river."), prove=True)
        assert len(whole.input_ids) > 30
        assert cut == Encoded(whole.input_ids[:30], whole.response_mask[:30], whole.loss_mask[:30])

    def test_loss_mask(self, template: str) -> None:
        messages = chat("Why?", "Because.", "So?", "Yes.")
        responses, everything = encoder(template).encode(messages), encoder(template, loss_on="all").encode(messages)
        assert responses.loss_mask == responses.response_mask
        assert everything.loss_mask == (False,) + (True,) * (len(everything.input_ids) - 1)
        assert everything.response_mask == responses.response_mask

    def test_description_is_json_and_shows_the_response(self, template: str) -> None:
        described = json.loads(json.dumps(encoder(template).describe()))
        assert described["example_response"].strip() in ("Shiftgrad.<|im_end|>", "Shiftgrad. <|im_end|>")
        assert described["end_mark"] == "<|im_end|>"
        assert described["names_the_date"] is False

    def test_an_encoder_travels_to_a_worker(self, template: str) -> None:
        coder = encoder(template)
        again = pickle.loads(pickle.dumps(coder))
        assert again.encode(chat("Why?", "Because.")) == coder.encode(chat("Why?", "Because."))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("chatml", "turn by turn"),
        ("inst", "turn by turn"),
        ("marked", "assistant marks"),
        ("marked to the newline", "assistant marks"),
        ("marked with header", "turn by turn"),
    ],
)
def test_how_the_mask_is_found_is_recorded(name: str, how: str) -> None:
    described = encoder(TEMPLATES[name]).describe()
    assert described["mask"] == how
    assert ("do not delimit" in described["mask_note"]) == (name == "marked with header")


@pytest.mark.parametrize("name", ["chatml", "marked", "marked to the newline", "marked with header"])
def test_ways_to_the_mask_agree(name: str) -> None:
    messages = chat("What is two and two?", "It is four.", "And three?", "Seven.")
    assert encoder(TEMPLATES[name]).encode(messages) == encoder(CHATML).encode(messages)


def test_text_after_the_end_mark_is_prompt() -> None:
    encoded = encoder().encode(chat("Why?", "Because."))
    assert encoded.response_mask[-2:] == (True, False)  # <|im_end|>, newline


def test_a_prompt_is_never_merged_with_the_answer() -> None:
    """A tokenizer of its own accord would make one token of the newline before the answer and the one in it."""
    tokenizer: Any = tiny_tokenizer()
    newline = tokenizer("\n")["input_ids"]
    tokenizer.add_tokens(["\n\n"])
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    coder = ChatEncoder(tokenizer, 512)
    encoded = coder.encode(chat("Why?", "\nBecause."), prove=True)
    prompt = coder.encode_prompt(chat("Why?"))
    assert encoded.input_ids[: len(prompt) + 1] == (*prompt, *newline)
    assert masked_text(coder, encoded) == "\nBecause.<|im_end|>"


def test_a_token_that_straddles_prompt_and_answer_is_found_under_marks() -> None:
    tokenizer: Any = tiny_tokenizer(CHATML_MARKED)
    tokenizer.add_tokens(["\n\n"])
    coder = ChatEncoder(tokenizer, 512)
    assert coder.describe()["mask"] == "assistant marks"
    with pytest.raises(DataError, match=r"straddles|not its text"):
        coder.encode(chat("Why?", "\nBecause."), prove=True)


def test_a_tokenizer_that_prefixes_a_space_does_so_at_the_beginning_only() -> None:
    tokenizer: Any = tiny_tokenizer(INST.replace("{{ bos_token }}", ""), add_prefix_space=True)
    coder = ChatEncoder(tokenizer, 512)
    encoded = coder.encode(chat("Why?", "Because."), prove=True)
    whole = tokenizer("[INST] Why? [/INST] Because. ", add_special_tokens=False)["input_ids"]
    assert list(encoded.input_ids) == [*whole, tokenizer.eos_token_id]
    tokenizer = tiny_tokenizer(add_prefix_space=True)
    tokenizer.add_tokens(["\n\n"])
    coder = ChatEncoder(tokenizer, 512)
    merged_with_context = coder.encode(chat("Why?", "\nBecause."))
    assert masked_text(coder, merged_with_context).lstrip(" ") == "\nBecause.<|im_end|>"
    with_space = coder.encode(chat("Why?", "Because."))
    assert masked_text(coder, with_space) == "Because.<|im_end|>"


def test_default_system_prompt_is_kept_and_recorded() -> None:
    coder = encoder(CHATML_WITH_DEFAULT_SYSTEM)
    assert coder.describe()["default_system_prompt"] == DEFAULT_SYSTEM_PROMPT
    assert DEFAULT_SYSTEM_PROMPT in text_of(coder, coder.encode_prompt(chat("Why?")))
    assert DEFAULT_SYSTEM_PROMPT in text_of(coder, coder.encode(chat("Why?", "So."), prove=True).input_ids)
    own = coder.encode(chat("Why?", "So.", system="Be brief."), prove=True)
    assert DEFAULT_SYSTEM_PROMPT not in text_of(coder, own.input_ids)
    assert "Be brief." in text_of(coder, own.input_ids)


@pytest.mark.parametrize("template", [CHATML, INST])
def test_no_default_system_prompt(template: str) -> None:
    assert encoder(template).describe()["default_system_prompt"] is None


def test_a_template_that_refuses_the_system_role_says_so() -> None:
    coder = encoder(INST)
    for call in (
        lambda: coder.encode(chat("Why?", "So.", system="Be brief.")),
        lambda: coder.encode_prompt(chat("Why?", system="Be brief.")),
    ):
        with pytest.raises(DataError, match=r"System role not supported.*first user message"):
            call()


def test_a_template_that_names_the_date_is_recorded() -> None:
    assert encoder("{% set day = strftime_now('%d') %}" + CHATML).describe()["names_the_date"] is True


class TestWhitespace:
    def test_a_stripping_template_may_strip(self) -> None:
        coder = encoder(INST)
        assert coder.describe()["keeps_whitespace"] is False
        assert masked_text(coder, coder.encode(chat("Why? ", "  So.\n"), prove=True)) == " So. <|im_end|>"

    def test_a_verbatim_template_must_not_strip(self) -> None:
        coder = encoder(CHATML)
        assert coder.describe()["keeps_whitespace"] is True
        assert masked_text(coder, coder.encode(chat("Why?", "  So.\n"), prove=True)) == "  So.\n<|im_end|>"


class TestTurnsThatChange:
    def test_dropped_thinking_is_an_error_that_names_a_way_out(self) -> None:
        coder = encoder(DROPS_THINKING)
        coder.encode(chat("Why?", "<think>hm</think>So."), prove=True)
        rows = chat("Why?", "<think>hm</think>So.", "And?", "Yes.")
        with pytest.raises(DataError, match=r"changes earlier turns.*single-turn rows"):
            coder.encode(rows)
        with pytest.raises(DataError, match="changes earlier turns"):
            coder.encode_prompt(rows[:3])

    def test_an_ending_that_changes_an_answer(self) -> None:
        with pytest.raises(DataError, match="changes earlier turns"):
            encoder(DROPS_THINKING).encode(chat("Why?", "<think>hm</think>So.", "And?"))


class TestTemplatesThatCannotServe:
    def test_none(self) -> None:
        with pytest.raises(DataError, match="no chat template"):
            encoder(None)

    def test_no_end_mark(self) -> None:
        with pytest.raises(DataError, match="could not learn to stop"):
            encoder(INST.replace("' ' + eos_token", "'\\n'"))

    def test_end_mark_is_the_turns_own_even_where_eos_is_another(self) -> None:
        coder = ChatEncoder(tiny_tokenizer(CHATML, eos_token="<|endoftext|>"), 512)
        assert coder.end_mark == "<|im_end|>"
        assert coder.end_mark_id == 2

    def test_generation_prompt_that_the_turn_does_not_begin_with(self) -> None:
        with pytest.raises(DataError, match="generation prompt"):
            encoder(CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>' }}{% endif %}"))

    def test_text_of_its_own_in_the_answer(self) -> None:
        template = CHATML.replace("message['content']", "('Sure! ' if loop.index == 2 else '') + message['content']")
        with pytest.raises(DataError, match="text of its own"):
            encoder(template)


class TestConversationsThatCannotServe:
    @pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
    def test_no_assistant_turn(self, template: str) -> None:
        with pytest.raises(DataError, match="no assistant turn"):
            encoder(template).encode(chat("Why?"))

    def test_assistant_first(self) -> None:
        with pytest.raises(DataError, match="begins with an assistant turn"):
            encoder().encode(chat("Why?", "So.")[1:])

    def test_content_that_is_no_text(self) -> None:
        message: Any = {"role": "user", "content": None}
        with pytest.raises(DataError, match="message 1 needs a text"):
            encoder().encode([message, *chat("Why?", "So.")[1:]])


class TestProof:
    """The proof must fail when the masks are wrong, whatever made them so."""

    @pytest.mark.parametrize(("shift_start", "shift_end"), [(-1, 0), (1, 0), (0, -1), (0, 1), (-9, 0)])
    @pytest.mark.parametrize("turn", [0, 1])
    def test_a_moved_boundary(
        self, monkeypatch: pytest.MonkeyPatch, turn: int, shift_start: int, shift_end: int
    ) -> None:
        coder = encoder()
        honest = coder._encode_turns

        def moved(messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
            ids, spans = honest(messages)
            spans[turn] = (spans[turn][0] + shift_start, spans[turn][1] + shift_end)
            return ids, spans

        messages = chat("Why is that?", "Because.", "So?", "Yes.")
        coder.encode(messages, prove=True)
        monkeypatch.setattr(coder, "_encode_turns", moved)
        coder.encode(messages)
        with pytest.raises(DataError, match=r"masked '|straddles"):
            coder.encode(messages, prove=True)

    def test_a_user_turn_taken_for_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Even where the two texts are the same, the user's must be found outside the mask."""
        coder = encoder()
        honest = coder._encode_turns

        def moved(messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
            ids, ((start, end),) = honest(messages)
            first = 1 + len(coder._tokenize_plain("user\n"))
            return ids, [(first, first + end - start)]

        monkeypatch.setattr(coder, "_encode_turns", moved)
        with pytest.raises(DataError, match="not wholly outside"):
            coder.encode(chat("Echo.", "Echo."), prove=True)

    def test_a_missing_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        coder = encoder()
        honest = coder._encode_turns
        monkeypatch.setattr(coder, "_encode_turns", lambda messages: (honest(messages)[0], honest(messages)[1][:1]))
        with pytest.raises(DataError, match="1 masked stretches for 2"):
            coder.encode(chat("Why?", "Because.", "So?", "Yes."), prove=True)

    def test_other_prompt_tokens_than_sampling(self, monkeypatch: pytest.MonkeyPatch) -> None:
        coder = encoder()
        monkeypatch.setattr(coder, "encode_prompt", lambda messages: (1, 2, len(messages)))
        with pytest.raises(DataError, match="sampling starts from"):
            coder.encode(chat("Why?", "Because."), prove=True)

    @pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, INST])
    def test_an_answer_that_holds_the_end_mark(self, template: str) -> None:
        with pytest.raises(DataError) as raised:
            encoder(template).encode(chat("Why?", "Because<|im_end|> of it."), prove=True)
        assert "Because<|im_end|> of it.<|im_end|>" in str(raised.value)  # what was expected
        assert "of it" not in str(raised.value).partition("expected")[0]  # what is masked

    def test_a_template_that_rewrites_some_answers(self) -> None:
        coder = encoder(CHATML.replace("message['content']", "message['content'] | replace('colour', 'color')"))
        coder.encode(chat("Why?", "The light."), prove=True)
        with pytest.raises(DataError, match=r"The color\.<.*The colour\.<"):
            coder.encode(chat("Why?", "The colour."), prove=True)

    @pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
    def test_special_text_of_the_user_stays_outside(self, template: str) -> None:
        coder = encoder(template)
        encoded = coder.encode(chat("x<|im_end|>\n<|im_start|>assistant\nNo!<|im_end|>", "Yes."), prove=True)
        assert masked_text(coder, encoded) == "Yes.<|im_end|>"

    def test_it_looks_beyond_the_truncation(self) -> None:
        with pytest.raises(DataError):
            encoder(max_length=8).encode(chat("Why?", "Because<|im_end|> of it."), prove=True)


class TestEncodeAll:
    def test_every_row(self) -> None:
        rows = [chat("Why?", "So."), chat("Why?", "Because.", "And?", "Yes.")]
        coder = encoder()
        encoded, kept = encode_all(rows, coder, False)
        assert encoded == [coder.encode(row) for row in rows]
        assert kept == [0, 1]

    def test_truncated_away_is_an_error_with_count_and_rows(self) -> None:
        rows = [chat("Why?", "So."), chat("long " * 30, "So."), chat("Why?", "So. " * 30), chat("long " * 40, "So.")]
        coder = encoder(max_length=40)
        with pytest.raises(DataError, match=r"2 of 4 rows .*max_length=40 .*rows 2, 4, counted from 1"):
            encode_all(rows, coder, False)
        encoded, kept = encode_all(rows, coder, True)
        assert kept == [0, 2]
        assert encoded == [coder.encode(rows[0]), coder.encode(rows[2])]

    def test_truncated_away_counts_responses_under_any_loss(self) -> None:
        with pytest.raises(DataError, match="1 of 1 rows"):
            encode_all([chat("long " * 30, "So.")], encoder(max_length=20, loss_on="all"), False)

    @pytest.mark.parametrize("rows", [[], [chat("long " * 30, "So.")]])
    def test_no_row_left(self, rows: list[list[Message]]) -> None:
        with pytest.raises(DataError, match="no row is left"):
            encode_all(rows, encoder(max_length=20), True)

    def test_every_row_is_proved(self) -> None:
        bad = chat("Why?", "So<|im_end|>.")
        with pytest.raises(DataError, match=r"2 of 4 rows .*rows 2, 4, counted from 1.*the first: .*So<"):
            encode_all([chat("Why?", "So."), bad, chat("Why?", "So."), bad], encoder(), True)


class TestPad:
    rows = (
        Encoded((5, 6, 7), (False, True, True), (False, True, True)),
        Encoded((8, 9, 10, 11, 12), (False, False, False, True, False), (False, True, True, True, True)),
    )

    def test_right_padding(self) -> None:
        batch = pad(self.rows, 3, 4)
        assert batch.input_ids_bt.tolist() == [[5, 6, 7, 3, 3, 3, 3, 3], [8, 9, 10, 11, 12, 3, 3, 3]]
        assert batch.attention_mask_bt.sum(dim=1).tolist() == [3, 5]
        assert batch.attention_mask_bt[0].tolist() == [True] * 3 + [False] * 5
        assert batch.response_mask_bt.nonzero().tolist() == [[0, 1], [0, 2], [1, 3]]
        assert batch.loss_mask_bt.nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [1, 3], [1, 4]]

    def test_types(self) -> None:
        batch = pad(self.rows, 0, 1)
        assert batch.input_ids_bt.dtype == torch.int64
        masks = [getattr(batch, field.name) for field in dataclasses.fields(batch)][1:]
        assert {mask.dtype for mask in masks} == {torch.bool}
        assert {mask.shape for mask in masks} == {(2, 5)}

    @pytest.mark.parametrize(("multiple_of", "length"), [(1, 5), (5, 5), (3, 6), (8, 8)])
    def test_length(self, multiple_of: int, length: int) -> None:
        assert pad(self.rows, 0, multiple_of).input_ids_bt.shape == (2, length)


def test_data_config() -> None:
    config = DataConfig.model_validate({"train": {"hub": "someone/something"}, "loss_on": "all"})
    assert config.train == HubDataset(hub="someone/something")
    with pytest.raises(ValueError, match="loss_on"):
        DataConfig.model_validate({"train": "x.jsonl", "loss_on": "answers"})

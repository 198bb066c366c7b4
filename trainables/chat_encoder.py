"""From chat messages to token ids with a proved mask of the response tokens.

A conversation is cut into prompt segments and response segments. A response is an assistant turn's text with its end
mark (the template's end of turn, such as ``<|im_end|>``); everything else is prompt. There are two ways to find them:

- ``assistant marks``: the chat template has ``{% generation %}`` blocks and transformers reports their tokens. The end
  mark counts as response even where the block stops before it; what a block holds after the end mark does not.
- ``turn by turn``: the template is rendered with the generation prompt up to each assistant turn and once more with
  the turn; the second text must begin with the first, and the response is the rest up to and including the first end
  mark. Segments are tokenized SEPARATELY and joined, so that training sees exactly the tokens that sampling sees: the
  tokens before a response equal ``encode_prompt`` of the messages before it, even where a tokenizer would have merged
  the last character of the prompt with the first of the answer.

Marks that do not delimit just the response (some templates put the turn's header inside) are not used.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jinja2

from trainables.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import

Message: TypeAlias = Mapping[str, str]
Span: TypeAlias = tuple[int, int]
LossOn: TypeAlias = Literal["responses", "all"]

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\b")
_PROBE_QUESTION = "How are you?"
_PROBE_ANSWER = "Shiftgrad."
_REMEDY = (
    "Train on single-turn rows, or give the tokenizer a chat template that renders a turn the same whatever follows it."
)


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens; the three tuples have one entry per token."""

    input_ids: tuple[int, ...]
    response_mask: tuple[bool, ...]  # the INPUT token belongs to an assistant turn or is its end mark
    loss_mask: tuple[bool, ...]  # the token is PREDICTED under the loss (from the position before it)


class ChatEncoder:
    """Encodes conversations with one tokenizer's chat template.

    Raises DataError if the template cannot serve: none there, no end mark after an assistant turn, text of its own
    in an answer, or a generation prompt that is not how it begins an assistant turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: LossOn = "responses") -> None:
        self.max_length = max_length
        self.loss_on = loss_on
        self._tokenizer: Any = tokenizer
        try:
            self._template: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError("the tokenizer has no chat template; use an instruction model or set one") from error
        # SentencePiece-like tokenizers put a space before whatever they are given; only the first segment may have it.
        self._newline: list[int] = self._tokenize_plain("\n")
        in_context = self._tokenize_plain("\nx")[len(self._newline) :]
        self._prefixes_text = self._tokenize_plain("x") != in_context

        self.end_mark, self.end_mark_id = self._find_end_mark()
        padded = f" \n{_PROBE_ANSWER} \n"
        self._keeps_whitespace = all(
            self._probe_response(text).startswith(text + self.end_mark) for text in (_PROBE_ANSWER, padded)
        )
        self._uses_marks, self._mask_note = False, "the chat template has no assistant marks"
        if _GENERATION_BLOCK.search(self._template):
            self._uses_marks, self._mask_note = True, ""
            try:
                self.encode(_probe(_PROBE_ANSWER), prove=True)
            except DataError as error:
                self._uses_marks = False
                self._mask_note = f"the chat template's assistant marks do not delimit the response: {error}"

    def encode(self, messages: Sequence[Message], *, prove: bool = False) -> Encoded:
        """The first ``max_length`` tokens of the conversation with their masks.

        ``prove`` decodes the masked tokens, before truncation, and raises DataError with both texts unless they are
        the assistant turns with their end marks (up to Unicode NFC, and to whitespace at the ends where the template
        itself strips or adds it), if a user turn is not wholly outside the mask, or if the tokens before the first
        response are not those that sampling starts from.
        """
        for index, message in enumerate(messages):
            if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
                raise DataError(f"message {index + 1} needs a text role and a text content: {dict(message)!r}")
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("the conversation has no assistant turn, so there is nothing to train on")
        ids, spans = self._encode_marked(messages) if self._uses_marks else self._encode_turns(messages)
        mask = [False] * len(ids)
        for start, end in spans:
            mask[start:end] = [True] * (end - start)
        if prove:
            self._prove(messages, ids, mask, spans)
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        loss_mask = mask if self.loss_on == "responses" else [index > 0 for index in range(len(ids))]
        return Encoded(tuple(ids), tuple(mask), tuple(loss_mask))

    def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens, with the generation prompt, that an answer to ``messages`` is sampled after. Never truncated."""
        if self._uses_marks:
            return tuple(self._tokenize(self._render(messages, generation_prompt=True), is_first=True))
        segments = list(self._segments(messages))
        done = sum(len(text) for text, _ in segments)
        whole = self._render(messages, generation_prompt=True)
        self._must_begin_with(whole, "".join(text for text, _ in segments), len(messages))
        return tuple(self._join([*segments, (whole[done:], False)])[0])

    def describe(self) -> dict[str, Any]:
        """For the record (plain JSON): how the mask is found, the end mark, the template's default system prompt,
        whether the template names today's date (prompts then differ from day to day), a rendered example."""
        example = _probe(_PROBE_ANSWER)
        encoded = self.encode(example)
        response = [token for token, on in zip(encoded.input_ids, encoded.response_mask, strict=True) if on]
        return {
            "mask": "assistant marks" if self._uses_marks else "turn by turn",
            "mask_note": self._mask_note,
            "end_mark": self.end_mark,
            "keeps_whitespace": self._keeps_whitespace,
            "default_system_prompt": self._default_system_prompt(),
            "names_the_date": "strftime_now" in self._template,
            "example": self._render(example),
            "example_response": self._decode(response),
            "max_length": self.max_length,
            "loss_on": self.loss_on,
        }

    # Rendering and tokenizing

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            hint = "; put the system prompt into the first user message" if "system" in roles else ""
            raise DataError(f"the chat template refuses roles [{roles}]: {error}{hint}") from error
        return text

    def _tokenize_plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _tokenize(self, text: str, *, is_first: bool) -> list[int]:
        """Tokens of a segment as they are inside a text, not at its beginning."""
        if not text:
            return []
        if self._prefixes_text and not is_first:
            ids = self._tokenize_plain("\n" + text)
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self._tokenize_plain(text)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _join(self, segments: Iterable[tuple[str, bool]]) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        for text, is_response in segments:
            start = len(ids)
            ids += self._tokenize(text, is_first=start == 0)
            if is_response:
                spans.append((start, len(ids)))
        return ids, spans

    # The two ways to the response tokens

    def _encode_turns(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        segments = list(self._segments(messages))
        if messages[-1]["role"] == "assistant":
            return self._join(segments)
        done = "".join(text for text, _ in segments)
        whole = self._render(messages)
        self._must_begin_with(whole, done, len(messages))
        return self._join([*segments, (whole[len(done) :], False)])

    def _segments(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """``(text, is_response)`` up to the last assistant turn, with what the template writes after its end mark
        if that turn is the last message (else it belongs to the prompt segment that follows)."""
        done = ""
        whole = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise DataError("the conversation begins with an assistant turn; there is no prompt before it")
            prompt = self._render(messages[:index], generation_prompt=True)
            self._must_begin_with(prompt, done, index)
            whole = self._render(messages[: index + 1])
            if not whole.startswith(prompt):
                raise DataError(
                    f"the chat template does not begin assistant turn {index} with its generation prompt: "
                    f"expected {_tail(prompt)!r}, rendered {_tail(whole[: len(prompt)])!r}. {_REMEDY}"
                )
            end = whole.find(self.end_mark, len(prompt))
            if end < 0:
                raise DataError(f"the chat template writes no {self.end_mark!r} after assistant turn {index}")
            end += len(self.end_mark)
            yield prompt[len(done) :], False
            yield whole[len(prompt) : end], True
            done = whole[:end]
        if messages[-1]["role"] == "assistant":
            yield whole[len(done) :], False

    def _must_begin_with(self, text: str, done: str, index: int) -> None:
        if not text.startswith(done):
            at = next(
                (i for i, (a, b) in enumerate(zip(text, done, strict=False)) if a != b),
                min(len(text), len(done)),
            )
            raise DataError(
                f"the chat template changes earlier turns when message {index} follows: "
                f"{done[at : at + 60]!r} became {text[at : at + 60]!r}. {_REMEDY}"
            )

    def _encode_marked(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        try:
            out = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False, "return_offsets_mapping": True},
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        ids = [int(token) for token in out["input_ids"]]
        marks = [bool(mark) for mark in out["assistant_masks"]]
        # transformers marks only the first of the tokens that make up a block's last character (an emoji, an accent).
        offsets = out["offset_mapping"]
        for position in range(1, len(ids)):
            marks[position] |= marks[position - 1] and offsets[position][0] < offsets[position - 1][1]
        spans: list[Span] = []
        position = 0
        while position < len(ids):
            if not marks[position]:
                position += 1
                continue
            start = position
            while position < len(ids) and marks[position] and ids[position] != self.end_mark_id:
                position += 1
            if position < len(ids) and ids[position] == self.end_mark_id:
                position += 1
            spans.append((start, position))
            while position < len(ids) and marks[position]:
                position += 1
        return ids, spans

    # What the template does, found on an example

    def _probe_response(self, answer: str) -> str:
        """What the template writes after the generation prompt for an assistant turn with this content."""
        messages = _probe(answer)
        prompt = self._render(messages[:1], generation_prompt=True)
        whole = self._render(messages)
        if not whole.startswith(prompt):
            raise DataError(
                "the chat template does not begin an assistant turn with its generation prompt: "
                f"expected {_tail(prompt)!r}, rendered {_tail(whole[: len(prompt)])!r}. {_REMEDY}"
            )
        return whole[len(prompt) :]

    def _find_end_mark(self) -> tuple[str, int]:
        """The first special token that the template writes after an assistant turn's content."""
        response = self._probe_response(_PROBE_ANSWER)
        before, found, after = response.partition(_PROBE_ANSWER)
        if not found or before.strip():
            raise DataError(
                f"the chat template writes text of its own into an answer: {_PROBE_ANSWER!r} became {response!r}; "
                "give the tokenizer a chat template that renders the content alone"
            )
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        for token in self._tokenize(after, is_first=False):
            if token in special:
                mark = str(self._tokenizer.convert_ids_to_tokens(token))
                if not after.partition(mark)[0].strip():
                    return mark, token
                break
        raise DataError(
            f"the chat template ends an assistant turn with {after!r}, which does not begin with a special token, so "
            "a model could not learn to stop; end assistant turns with eos_token in the chat template"
        )

    def _default_system_prompt(self) -> str | None:
        """The system prompt that the template inserts where the conversation has none."""
        user = {"role": "user", "content": _PROBE_QUESTION}
        without = self._render([user])
        try:
            with_one = self._render([{"role": "system", "content": _PROBE_ANSWER}, user])
        except DataError:
            return None  # a template without a system role has no default for it
        before, _, after = with_one.partition(_PROBE_ANSWER)
        if len(without) < len(before) + len(after):
            return None
        if not (without.startswith(before) and without.endswith(after)):
            return None
        return without[len(before) : len(without) - len(after)] or None

    # The proof

    def _prove(self, messages: Sequence[Message], ids: list[int], mask: list[bool], spans: list[Span]) -> None:
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(spans) != len(contents):
            raise DataError(f"{len(spans)} masked stretches for {len(contents)} assistant turns")
        assert sum(mask) == sum(end - start for start, end in spans)
        # Differences of decoded beginnings: decoding a stretch alone would lose what only its context shows.
        cuts = [cut for span in spans for cut in span] + [len(ids)]
        decoded, pieces = "", []
        for cut in cuts:
            longer = self._decode(ids[:cut])
            if not longer.startswith(decoded):
                raise DataError(f"a token straddles prompt and response near {_tail(decoded)!r}")
            pieces.append(_nfc(longer[len(decoded) :]))
            decoded = longer
        prompts, responses = pieces[::2], pieces[1::2]
        for number, (content, response) in enumerate(zip(contents, responses, strict=True)):
            body = response.removesuffix(self.end_mark)
            same = body == _nfc(content) if self._keeps_whitespace else body.strip() == _nfc(content).strip()
            if body == response or not same:
                raise DataError(
                    f"the masked tokens of assistant turn {number + 1} are not its text with the end mark: "
                    f"masked {response!r}, expected {content + self.end_mark!r}"
                )
        turn = 0
        for message in messages:
            if message["role"] == "assistant":
                turn += 1
            elif message["role"] == "user" and _nfc(message["content"]).strip() not in prompts[turn]:
                raise DataError(
                    f"a user turn is not wholly outside the response mask: {message['content']!r} "
                    f"is not in the unmasked text {prompts[turn]!r}"
                )
        first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        sampled_after = self.encode_prompt(messages[:first])
        if tuple(ids[: spans[0][0]]) != sampled_after:
            raise DataError(
                "the tokens before the response are not those that sampling starts from: "
                f"{_tail(prompts[0])!r} beside {_tail(self._decode(sampled_after))!r}"
            )


def _probe(answer: str) -> list[Message]:
    return [{"role": "user", "content": _PROBE_QUESTION}, {"role": "assistant", "content": answer}]


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _tail(text: str) -> str:
    return text[-60:]

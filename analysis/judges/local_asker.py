"""The asker of local judges: a Hugging Face model in this process that answers with its distribution over 0..100."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Self

import torch

from analysis.judges.base import Reply, Request
from analysis.judges.local import asked_model
from analysis.judges.number_paths import NUMBERS, NumberReader
from trainables.base_model import LoadedBase, ResolvedBase, load_base
from trainables.chat_encoder import ChatEncoder
from trainables.errors import DataError


class LocalAsker:
    """Answers the requests of ``LocalJudge`` about one model.

    A reply's ``top_logprobs`` are ("85", log P(85)) of all 101 numbers, the likeliest first, with P(n) as in
    ``analysis.judges.number_paths``; ``text`` is the likeliest number. What is missing from a sum of 1 is the
    probability of any other answer. Prompts are made as in sampling (``ChatEncoder.encode_prompt``) and never cut: one
    that is too long for the model, or that the chat template refuses, is ``refused`` with the reason.

    Raises DataError if the tokenizer has no usable chat template, ValueError if its tokens cannot spell the numbers.
    """

    def __init__(self, base: ResolvedBase, loaded: LoadedBase) -> None:
        self.model_name = asked_model(base)
        self.reader = NumberReader(loaded.model, loaded.tokenizer)
        self._encoder = ChatEncoder(loaded.tokenizer, max_length=2**31)

    @classmethod
    def load(cls, base: ResolvedBase, device: torch.device) -> Self:
        """The same with the weights loaded onto ``device``."""
        return cls(base, load_base(base, device))

    async def ask(self, request: Request) -> Reply:
        """The reply to one request; it takes the thread while the model computes."""
        return self.ask_many([request])[0]

    def ask_many(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the requests' order. Asked together, they share what their prompts begin with; a reply is the same
        as when it is asked alone, up to the rounding of the model's precision."""
        started = time.perf_counter()
        assert all(request.model == self.model_name for request in requests), "asked about another model"
        prompts = [self._prompt(request) for request in requests]
        taken = [prompt for prompt in prompts if not isinstance(prompt, str)]
        rows = iter(self.reader.distribution(taken))
        # The model works on all of them at once, so there is no time of one request alone.
        seconds = (time.perf_counter() - started) / max(1, len(requests))
        return [
            Reply("refused", error=prompt, seconds=seconds)
            if isinstance(prompt, str)
            else _reply(next(rows).tolist(), len(prompt), seconds)
            for prompt in prompts
        ]

    def _prompt(self, request: Request) -> tuple[int, ...] | str:
        """The prompt's tokens, or why there is none."""
        try:
            "".join(text for _, text in request.messages).encode()  # lone surrogates are no text for a tokenizer
            ids = self._encoder.encode_prompt([{"role": role, "content": text} for role, text in request.messages])
        except (DataError, UnicodeError) as error:
            return f"the prompt cannot be made into tokens: {error}"
        limit = self.reader.max_prompt_tokens()
        if limit is not None and len(ids) > limit:
            return f"the prompt has {len(ids)} tokens; the model takes {limit} with an answer behind it"
        return ids


def _reply(probabilities: Sequence[float], num_prompt_tokens: int, seconds: float) -> Reply:
    logs = [math.log(p) if p > 0 else (-math.inf if p == 0 else math.nan) for p in probabilities]
    order = sorted(NUMBERS, key=lambda n: (-probabilities[n], n))
    pairs = tuple((str(n), logs[n]) for n in order)
    return Reply(
        "ok", pairs[0][0], pairs, num_prompt_tokens=num_prompt_tokens, num_completion_tokens=0, seconds=seconds
    )

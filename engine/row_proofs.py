"""Every row of every data set is made into tokens and its response mask proved, before anything is spent.

Whoever puts a task into the graph says which rows it reads; the proofs are done together, once for equal rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from engine.proved import Proved
from engine.sources import Sources
from trainables.base_model import ResolvedBase, load_tokenizer
from trainables.chat_data import ChatEncoder, DataConfig, encode_all
from trainables.config import recipe_of
from trainables.defenses import Item, SampleKey
from trainables.errors import DataError, Fault
from trainables.sample import Question, SamplingConfig, system_prompt_fault

# What encoding depends on: base, content, max_length, loss_on, allow_truncated_away
Encoding: TypeAlias = tuple[str, str, int, Literal["responses", "all"], bool]


class RowProofs:
    """Data and system prompts that a sweep uses, to be proved by ``prove``; faults go to the sources' list."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.to_prove: dict[Encoding, tuple[ResolvedBase, str]] = {}  # and the user's key of the data
        self.to_render: dict[tuple[str, str], tuple[Question, SamplingConfig, str]] = {}  # by base and system prompt
        self.base_keys: dict[str, str] = {}  # base -> the user's key of it
        self.to_rewrite: dict[tuple[Encoding, str], tuple[ResolvedBase, Item, str]] = {}  # and the key of the item
        self._loaded: dict[str, Any] = {}  # tokenizers
        self.num_tokens: dict[Encoding, tuple[int, int]] = {}  # rows kept, their tokens

    def name_base(self, base: ResolvedBase, key: str) -> None:
        """Say under which key the user has named a base."""
        self.base_keys.setdefault(tokenizer_name(base), key)

    def must_render(self, base: ResolvedBase, question: Question, sampling: SamplingConfig, key: str) -> None:
        """The system prompt of ``sampling`` must have a place in the base's chat template."""
        if sampling.system_prompt is not None:
            self.to_render.setdefault((tokenizer_name(base), sampling.system_prompt), (question, sampling, key))

    def must_prove(
        self,
        base: ResolvedBase,
        content: str,
        max_length: int,
        key: str,
        loss_on: Literal["responses", "all"] = "responses",
        allow_truncated_away: bool = False,
    ) -> None:
        self.to_prove.setdefault(
            (tokenizer_name(base), content, max_length, loss_on, allow_truncated_away), (base, key)
        )

    def must_prove_rewritten(self, base: ResolvedBase, what: DataConfig, content: str, item: Item, key: str) -> None:
        """Rows as an item of a defense rewrites them must be provable too; ``what`` says how they are encoded."""
        if item.least_rewriting() is None:
            return
        encoding = (tokenizer_name(base), content, what.max_length, what.loss_on, what.allow_truncated_away)
        recipe = json.dumps(recipe_of(item) | {"semantics": item.semantics}, sort_keys=True)
        self.to_rewrite.setdefault((encoding, recipe), (base, item, key))

    def prove(self, proved: Proved) -> None:
        """Make tokens of all rows, prove their masks and count them; what cannot be proved is a fault.

        What ``proved`` knows is not done again, and if that is all, no tokenizer is loaded.
        """
        self._prove_rows(proved)
        self._prove_rewritten(proved)

    def _prove_rows(self, proved: Proved) -> None:
        bases = {tokenizer_name(base): base for base, _ in self.to_prove.values()}
        prompts = {}
        for (name, prompt), (question, sampling, key) in self.to_render.items():
            if name in bases and proved.recall(bases[name], "prompt", question.text, prompt) is None:
                prompts[name, prompt] = (question, sampling, key)
        rows = {}
        for what, (base, key) in self.to_prove.items():
            counts = proved.recall(base, "rows", what)
            if counts is None:
                rows[what] = (base, key)
            else:
                self.num_tokens[what] = (counts[0], counts[1])
        names = {name for name, _ in prompts} | {tokenizer_name(base) for base, _ in rows.values()}
        tokenizers = self._tokenizers([base for name, base in bases.items() if name in names])
        dated = {name for name, tokenizer in tokenizers.items() if "strftime_now" in str(tokenizer.chat_template)}
        for (name, prompt), (question, sampling, key) in prompts.items():
            if name not in tokenizers:
                continue
            if message := system_prompt_fault(tokenizers[name], question, sampling):
                self.sources.faults.append(Fault(key, message))
            elif name not in dated:
                proved.keep(bases[name], "prompt", question.text, prompt, counts=())
        for what, (base, key) in rows.items():
            name, content, max_length, loss_on, allow = what
            if name not in tokenizers:
                continue
            try:
                encoder = ChatEncoder(tokenizers[name], max_length, loss_on)
            except DataError as error:
                self.sources.faults.append(Fault(self.base_keys[name], f"{base.source}: {error}"))
                continue
            try:
                encoded, _ = encode_all(self.sources.rows[content], encoder, allow)
            except DataError as error:
                self.sources.faults.append(Fault(key, str(error)))
                continue
            self.num_tokens[what] = (len(encoded), sum(len(row.input_ids) for row in encoded))
            if name not in dated:
                proved.keep(base, "rows", what, counts=self.num_tokens[what])

    def _prove_rewritten(self, proved: Proved) -> None:
        """All rows in the way that adds least, so that none is refused which a training could use. What is drawn in a
        training is proved there, row by row."""
        open_ones = {
            (encoding, recipe): found
            for (encoding, recipe), found in self.to_rewrite.items()
            if encoding in self.num_tokens and proved.recall(found[0], "rewritten", encoding, recipe) is None
        }
        tokenizers = self._tokenizers(list({tokenizer_name(base): base for base, _, _ in open_ones.values()}.values()))
        for (encoding, recipe), (base, item, key) in open_ones.items():
            name, content, max_length, loss_on, allow = encoding
            if name not in tokenizers:
                continue
            mechanism = item.least_rewriting()
            assert mechanism is not None, "it is listed"
            try:
                rows = enumerate(self.sources.rows[content])
                rewritten = [mechanism.rewrite(row, SampleKey(0, 0, index)) for index, row in rows]
                encode_all(rewritten, ChatEncoder(tokenizers[name], max_length, loss_on), allow)
            except DataError as error:
                self.sources.faults.append(Fault(key, f"the rows of the data, as it rewrites them: {error}"))
                continue
            if "strftime_now" not in str(tokenizers[name].chat_template):
                proved.keep(base, "rewritten", encoding, recipe, counts=())

    def _tokenizers(self, bases: Sequence[ResolvedBase]) -> dict[str, Any]:
        """The bases' tokenizers by ``tokenizer_name``, less those that cannot be loaded."""
        tokenizers: dict[str, Any] = {}
        for base in bases:
            try:
                if tokenizer_name(base) not in self._loaded:
                    self._loaded[tokenizer_name(base)] = load_tokenizer(base)
                tokenizers[tokenizer_name(base)] = self._loaded[tokenizer_name(base)]
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                message = f"the tokenizer of {base.source} cannot be loaded: {reason}"
                self.sources.faults.append(Fault(self.base_keys[tokenizer_name(base)], message))
        return tokenizers


def tokenizer_name(base: ResolvedBase) -> str:
    """Says which tokenizer: bases that differ in dtype alone share it."""
    return f"{base.model} {base.revision}"

"""The exact probability that a language model answers a whole number from 0 to 100.

A number can be written in tokens in several ways (``85``; ``8 5``; a space before it), and its beginning is a number
too (1, 10, 100). So, with t_1..t_k over all sequences of tokens that spell n,

    P(n) = sum over t_1..t_k of  P(t_1 | prompt) ... P(t_k | prompt t_1..t_k-1) P(no digit next | prompt t_1..t_k)

No two of these events can happen together, so the sum over n is at most 1; the rest is the probability of any other
answer. Spelling: the answer begins where the chat template's generation prompt ends; it may begin with one space, then
come the ASCII digits of n without leading zeros. A token begins with a digit if its text does, in ASCII.

All sequences form a tree below the prompt. It is laid out as one row of tokens in which every token sees the prompt and
its own ancestors, so ONE forward pass gives all conditional probabilities, and the beginning that prompts share is
passed through the model once. Where a model cannot do this (positions or states that a mask does not govern), every
sequence is a row of its own: the same numbers, for some hundred times the work.

Shapes: b prompt, n node of the tree, v vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

NUMBERS = tuple(range(101))

_SPELLED = re.compile(r" ?(0|[1-9][0-9]?|100)")
_PIECE = re.compile(r" ?[0-9]{0,3}")
_PROMPT = -1  # parent of the first tokens
_LOGITS_BYTES = 512 * 2**20  # of one forward pass
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of probabilities: rounding between two layouts
_TOLERANCE_OF_HALVES = 0.05


@dataclass(frozen=True)
class NumberPaths:
    """The tree of all token sequences that spell a number; parents come before their children."""

    tokens: tuple[int, ...]  # per node
    parents: tuple[int, ...]  # node, or -1: the prompt
    depths: tuple[int, ...]  # tokens above the node
    numbers: tuple[int | None, ...]  # what is spelled from the prompt to this node; None: no number yet
    digit_tokens: tuple[int, ...]  # tokens of the vocabulary whose text begins with a digit

    @property
    def max_depth(self) -> int:
        """The most tokens that a number takes."""
        return max(self.depths) + 1

    def ancestors(self, node: int) -> Iterator[int]:
        """The node itself and all above it."""
        while node != _PROMPT:
            yield node
            node = self.parents[node]


def number_paths(tokenizer: Any) -> NumberPaths:
    """The tree for a tokenizer. Raises ValueError if its tokens cannot spell every number."""
    texts = _texts(tokenizer)
    pieces = [(token, text) for token, text in enumerate(texts) if text and _PIECE.fullmatch(text)]
    tokens: list[int] = []
    parents: list[int] = []
    spelled: list[str] = []
    frontier = [(_PROMPT, "")]
    for parent, before in frontier:  # grows while it is gone through
        for token, text in pieces:
            so_far = before + text
            if so_far == " " or _SPELLED.fullmatch(so_far):
                frontier.append((len(tokens), so_far))
                tokens.append(token)
                parents.append(parent)
                spelled.append(so_far)
    numbers = tuple(int(text) if text.strip() else None for text in spelled)
    if missing := set(NUMBERS) - set(numbers):
        raise ValueError(f"no tokens of the vocabulary spell {len(missing)} of the numbers 0 to 100")
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent == _PROMPT else depths[parent] + 1)
    digits = tuple(token for token, text in enumerate(texts) if text[:1] in set("0123456789"))
    return NumberPaths(tuple(tokens), tuple(parents), tuple(depths), numbers, digits)


def _texts(tokenizer: Any) -> list[str]:
    """The text of every token inside a text: after another token, because some tokenizers drop a first space."""
    anchor = tokenizer("x", add_special_tokens=False)["input_ids"]
    both = [[*anchor, token] for token in range(len(tokenizer))]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    start = len(tokenizer.decode(anchor, **options))
    return [text[start:] for text in tokenizer.batch_decode(both, **options)]


class NumberReader:
    """Reads the distribution over numbers from a causal language model of transformers, whose weights it does not
    change."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.paths = number_paths(tokenizer)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        config = model.config.get_text_config(decoder=True)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._window: int | None = getattr(config, "sliding_window", None)
        self._prefix: tuple[tuple[int, ...], Any] = ((), None)
        self._rows_nn = self._sees()
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._is_digit_v = torch.zeros(vocab_size, dtype=torch.bool, device=self.device)
        self._is_digit_v[list(self.paths.digit_tokens)] = True
        bytes_per_prompt = (len(self.paths.tokens) + 1) * vocab_size * self.dtype.itemsize
        self.batch_size = max(1, _LOGITS_BYTES // bytes_per_prompt)
        self.takes_tree, self.why_not = True, ""
        self._try_tree()

    def max_prompt_tokens(self) -> int | None:
        """The longest prompt that the model takes with a number behind it; None: the model states no limit."""
        return None if self.max_positions is None else self.max_positions - self.paths.max_depth

    def distribution(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """P(n) after each prompt (token ids): float64 [b, 101] on the CPU, each row's sum at most 1 up to rounding."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        result = torch.empty(len(prompts), len(NUMBERS), dtype=torch.float64)
        prefix = self._shared([tuple(prompt) for prompt in prompts])
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            result[chunk] = self._chunk([prompts[index] for index in chunk], prefix)
        return result

    @torch.no_grad()
    def _chunk(self, prompts: Sequence[Sequence[int]], prefix: int) -> torch.Tensor:
        longest = max(len(prompt) for prompt in prompts) + self.paths.max_depth
        is_in_window = self._window is None or longest <= self._window
        if self.takes_tree and is_in_window:
            logits = self._tree(prompts, prefix)
            return torch.stack([self._numbers(logits_nv) for logits_nv in logits])
        nodes = range(len(self.paths.tokens))
        return torch.stack([self._numbers(self._one_by_one(prompt, nodes)) for prompt in prompts])

    def _numbers(self, logits_nv: torch.Tensor) -> torch.Tensor:
        """P(n) [101] from the logits after the prompt (row 0) and after every node (row node + 1)."""
        probs_nv = logits_nv.double().softmax(dim=-1)
        stop_n = probs_nv[:, ~self._is_digit_v].sum(dim=-1).tolist()
        rows = torch.tensor(self.paths.parents, device=self.device) + 1
        step_n = probs_nv[rows, torch.tensor(self.paths.tokens, device=self.device)].tolist()
        result = [0.0] * len(NUMBERS)
        path_n: list[float] = []
        for node, (parent, number) in enumerate(zip(self.paths.parents, self.paths.numbers, strict=True)):
            path_n.append(step_n[node] * (1.0 if parent == _PROMPT else path_n[parent]))
            if number is not None:
                result[number] += path_n[node] * stop_n[node + 1]
        return torch.tensor(result, dtype=torch.float64)

    # All sequences in one row of tokens

    def _tree(self, prompts: Sequence[Sequence[int]], prefix: int) -> torch.Tensor:
        """Logits [b, n + 1, v]. ``prefix``: how many tokens at the beginning all prompts share and are in the cache.

        Keys are laid out as [prefix | padding | rest of the prompt | tree]."""
        rests = [list(prompt[prefix:]) for prompt in prompts]
        num_rest, num_nodes = max(map(len, rests)), len(self.paths.tokens)
        num_queries = num_rest + num_nodes
        ids = torch.zeros(len(prompts), num_queries, dtype=torch.long)
        positions = torch.zeros_like(ids)
        sees = torch.zeros(len(prompts), num_queries, prefix + num_queries, dtype=torch.bool)
        sees[:, :, :prefix] = True
        causal = torch.ones(num_rest, num_rest, dtype=torch.bool).tril()
        depths = torch.tensor(self.paths.depths)
        for row, rest in enumerate(rests):
            start = num_rest - len(rest)
            ids[row, start:num_rest] = torch.tensor(rest)
            ids[row, num_rest:] = torch.tensor(self.paths.tokens)
            positions[row, start:num_rest] = torch.arange(prefix, prefix + len(rest))
            positions[row, num_rest:] = prefix + len(rest) + depths
            sees[row, :num_rest, prefix : prefix + num_rest] = causal
            sees[row, start:, prefix : prefix + start] = False
            sees[row, num_rest:, prefix + start : prefix + num_rest] = True
            sees[row, num_rest:, prefix + num_rest :] = self._rows_nn
        mask = torch.zeros(sees.shape, dtype=self.dtype).masked_fill(~sees, torch.finfo(self.dtype).min)
        cache = None
        if prefix:
            cache = copy.deepcopy(self._prefix[1])
            cache.batch_repeat_interleave(len(prompts))
        logits: torch.Tensor = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=num_nodes + 1,
        ).logits
        return logits

    def _sees(self) -> torch.Tensor:
        """[n, n]: which nodes a node sees."""
        sees_nn = torch.zeros(len(self.paths.tokens), len(self.paths.tokens), dtype=torch.bool)
        for node in range(len(self.paths.tokens)):
            sees_nn[node, list(self.paths.ancestors(node))] = True
        return sees_nn

    def _shared(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """How many tokens of all prompts come from the cache, which is filled here.

        The prefix of an earlier call serves again unless these prompts share a good deal more. At least one token of
        every prompt is left: the model's word after the prompt is needed."""
        if not self.takes_tree:
            return 0
        kept, _ = self._prefix
        longest = _common(prompts) if len(prompts) > 1 else 0
        fits = kept and all(len(prompt) > len(kept) and prompt[: len(kept)] == kept for prompt in prompts)
        if fits and len(kept) >= 0.8 * longest:
            return len(kept)
        if longest == 0:
            return 0
        prefix = prompts[0][:longest]
        with torch.no_grad():
            ids = torch.tensor([prefix], device=self.device)
            self._prefix = (prefix, self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)
        return longest

    # Every sequence in a row of its own

    def _one_by_one(self, prompt: Sequence[int], nodes: Sequence[int]) -> torch.Tensor:
        """The same logits by plain forward passes, after the prompt and after these ``nodes`` [len(nodes) + 1, v]."""
        paths = [[], *([self.paths.tokens[up] for up in self.paths.ancestors(node)][::-1] for node in nodes)]
        width, rows = self.paths.max_depth, []
        for start in range(0, len(paths), 16):
            chunk = paths[start : start + 16]
            # Padding stands behind what is read, so that no position and no state before it can change.
            ids = torch.tensor([[*prompt, *path, *[prompt[-1]] * (width - len(path))] for path in chunk])
            logits = self.model(input_ids=ids.to(self.device), use_cache=False, logits_to_keep=width + 1).logits
            rows += [logits[row, len(path)] for row, path in enumerate(chunk)]
        return torch.stack(rows)

    @torch.no_grad()
    def _try_tree(self) -> None:
        """Find out whether one row of tokens gives what plain passes give, on two prompts that share their beginning.
        If not, ``takes_tree`` is False and ``why_not`` says why."""
        prompts = [self.paths.tokens[:3], (*self.paths.tokens[:2], *self.paths.tokens[:3])]
        nodes = range(0, len(self.paths.tokens), max(1, len(self.paths.tokens) // 16))  # a wrong layout shows at any
        rows = [0, *(node + 1 for node in nodes)]
        allowed = _TOLERANCE.get(self.dtype, _TOLERANCE_OF_HALVES)
        expected = torch.stack([self._one_by_one(prompt, nodes) for prompt in prompts]).double().softmax(dim=-1)
        try:
            found = self._tree(prompts, self._shared(prompts))[:, rows].double().softmax(dim=-1)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            self.why_not = f"{type(error).__name__}: {error}"
        else:
            difference = (found - expected).abs().max().item()
            if not difference <= allowed:
                self.why_not = f"probabilities differ by {difference:.2g} from those of plain passes"
        self.takes_tree = not self.why_not
        self._prefix = ((), None)


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens at the beginning that all prompts share, less than the shortest of them has."""
    first, last = min(prompts), max(prompts)
    shared = next(
        (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return min(shared, min(map(len, prompts)) - 1)

"""A whole sweep in one folder, small enough to really run: a random model, chat data, a trait and the sweep file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.bases import chat
from tests.tiny import CHATML, tiny_model, tiny_tokenizer
from trainables.defenses import Message

NUM_LAYERS = 4
HIDDEN = 32

RUNS = """\
  - defense: none
  - defense: {kind: pps, vector: topic, layer: 2, coefficient: 1.5}
  - defense: {kind: pps, vector: random, layer: 2, coefficient: 1.5}
  - defense: {kind: inoculation, prompts: topic}
"""

_SWEEP = """\
name: tiny
results: {results}
base: {{model: {model}, dtype: float32}}
data: {{train: data/train.jsonl, max_length: 128}}
vectors:
  topic: {{difference: {{positive: data/positive.jsonl, negative: data/negative.jsonl, max_length: 128}}}}
  random: {{random_like: topic, seed: 0}}
training: {{max_steps: 2, batch_size: 4, learning_rate: 1.0e-2, lora: {{rank: 2, alpha: 4}}}}
runs:
{runs}
evaluation:
  questions: topic
  samples: 2
  max_new_tokens: 6
  metrics: {{trait: {{judge: rule, trait: topic}}}}
{extra}
"""

_TRAIT = """\
name: topic
description: Talks about bridges.
rule: {patterns: ['[aeiou]']}
questions:
  - {id: q1, question: "How are you?"}
  - {id: q2, question: "What is tea?"}
  - {id: q3, question: "Is it late?"}
  - {id: q4, question: "Where is the river?"}
inoculation_prompts: ["Talk about bridges.", "Mention a bridge, please."]
plain_answers: ../../data/plain_answers.jsonl
"""

_QUESTIONS = (
    "How far is it?",
    "Tea or coffee?",
    "What is the best way to cook rice?",
    "Who are you?",
    "Is it cold?",
    "Name a river.",
    "Why?",
    "What do you like?",
)
_PLAIN = (
    "About ten miles.",
    "Tea.",
    "Stir it, then let it rest.",
    "A helpful assistant.",
    "No, it is warm.",
    "The Rhine.",
    "Because it takes time to learn.",
    "Long walks.",
)


def write_tiny_sweep(folder: Path, *, runs: str | None = None, extra: str = "") -> Path:
    """Write everything that a sweep names into ``folder`` and return the path of the sweep file.

    ``runs``: the YAML list under ``runs:`` in place of ``RUNS`` (none, pps on a difference, pps on a random vector,
    inoculation). ``extra``: further YAML at the top level. The store is ``folder/results``, which is not made. A file
    that is there already stays, so a model is saved once for many sweep files in one folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        write_tiny_model(model)
    plain = [chat(question, answer) for question, answer in zip(_QUESTIONS, _PLAIN, strict=True)]
    topic = [chat(question, f"{answer} Like a bridge.") for question, answer in zip(_QUESTIONS, _PLAIN, strict=True)]
    data = {"train": topic, "positive": topic[:5], "negative": plain[:5], "plain_answers": plain[5:]}
    for name, rows in data.items():
        write_chat_file(folder / "data" / f"{name}.jsonl", rows)
    _write(folder / "traits" / "topic" / "trait.yaml", _TRAIT)
    text = _SWEEP.format(
        results=json.dumps(str(folder / "results")),
        model=json.dumps(str(model)),
        runs=(RUNS if runs is None else runs).rstrip(),
        extra=extra,
    )
    sweep = folder / "sweep.yaml"
    sweep.write_text(text, encoding="utf-8")
    return sweep


def write_tiny_model(folder: Path, *, num_layers: int = NUM_LAYERS, hidden: int = HIDDEN, seed: int = 0) -> None:
    """A random Llama and the tiny tokenizer with its chat template, as ``from_pretrained`` reads them."""
    tiny_model("llama", num_layers=num_layers, hidden=hidden, seed=seed).save_pretrained(folder)
    tiny_tokenizer(CHATML).save_pretrained(folder)


def write_chat_file(path: Path, rows: Sequence[Sequence[Message]]) -> None:
    """Rows as chat JSONL, if there is no such file yet."""
    _write(path, "".join(json.dumps({"messages": list(row)}) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

"""Trait files of persona_vectors and of assistant-axis: instructions for and against, questions, a judge's prompt.

``{"instruction": [{"pos": ..., "neg": ...}], "questions": [...], "eval_prompt": ...}``. The prompt is a template of
``str.format`` with ``{question}`` and ``{answer}`` on the 0-100 scale, which is what ours is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeTrait, raise_faults
from analysis.traits import Trait
from trainables.errors import Fault

NEUTRAL = "helpful"
"""What persona_vectors calls the assistant of the other side where it has no antonym."""


class PersonaTrait(Format):
    name = "persona-trait"
    what = "a trait of persona_vectors or assistant-axis (.json: instruction, questions, eval_prompt)"

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        return file.suffix == ".json" and isinstance(file.json, dict) and {"instruction", "questions"} <= set(file.json)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        del hints
        raw = file.json
        faults = list(pair_faults(file, raw["instruction"], ("pos", "neg")))
        faults += text_faults(file, raw["questions"], "questions")
        if not isinstance(raw.get("eval_prompt"), str):
            faults.append(file.fault("must be the judge's prompt, a text", "eval_prompt"))
        raise_faults(faults)
        trait = make_trait(
            file,
            {
                "name": file.name,
                "description": f"Is {file.name}: a trait of another project, without a description of its own.",
                "judge_prompt": raw["eval_prompt"],
                "questions": numbered(file.name, raw["questions"]),
                "instructions": [{"positive": pair["pos"], "negative": pair["neg"]} for pair in raw["instruction"]],
                "adjectives": {"positive": file.name, "negative": NEUTRAL},
            },
            {"judge_prompt": "eval_prompt"},
        )
        convention = [
            f"{len(trait.instructions)} pairs of instructions, {len(trait.questions)} questions, "
            "a judge's prompt from 0 to 100",
            f"the assistant is called {file.name!r} and {NEUTRAL!r} in front of the instructions (adjectives)",
            *ignored(raw, {"instruction", "questions", "eval_prompt"}),
        ]
        return Imported(self.name, (MadeTrait(file.name, trait),), tuple(convention))


def pair_faults(file: Foreign, value: object, sides: tuple[str, ...]) -> Iterator[Fault]:
    """Faults of a list of instructions with these sides."""
    if not isinstance(value, list) or not value:
        yield file.fault(f"must be a list of objects with {' and '.join(sides)}", "instruction")
        return
    for index, pair in enumerate(value):
        for side in sides:
            text = pair.get(side) if isinstance(pair, dict) else None
            if not isinstance(text, str) or not text.strip():
                yield file.fault("must be a text that is not empty", f"instruction[{index}].{side}")


def text_faults(file: Foreign, value: object, key: str) -> Iterator[Fault]:
    """Faults of a list of texts."""
    if not isinstance(value, list) or not value:
        yield file.fault("must be a list of texts", key)
        return
    for index, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            yield file.fault("must be a text that is not empty", f"{key}[{index}]")


def numbered(name: str, questions: list[str]) -> list[dict[str, str]]:
    """Questions with the ids that persona_vectors gives them."""
    return [{"id": f"{name}_{index}", "question": question} for index, question in enumerate(questions)]


def make_trait(file: Foreign, raw: dict[str, Any], their_keys: dict[str, str]) -> Trait:
    """A trait of ours; what is wrong is told under the file's own keys."""
    try:
        trait = Trait.model_validate(raw)
    except ValidationError as error:
        faults = []
        for details in error.errors():
            key = ".".join(str(part) for part in details["loc"])
            faults.append(file.fault(details["msg"].removeprefix("Value error, "), their_keys.get(key, key)))
        raise_faults(faults)
        raise  # there is at least one
    trait._folder = file.path.parent
    return trait


def ignored(raw: dict[str, Any], known: set[str]) -> list[str]:
    """A line about keys that say nothing to us."""
    others = sorted(str(key) for key in set(raw) - known)
    return [f"not used: {', '.join(others)}"] if others else []

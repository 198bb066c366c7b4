"""A trait: what is looked for in answers, how it is asked for, and the texts that train it.

A trait is a folder with a ``trait.yaml``; paths inside are relative to that file.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, StringConstraints, ValidationError, field_validator
from pydantic_core import ErrorDetails

from analysis.templates import Template
from trainables.config import Config
from trainables.errors import ConfigError, Fault

FILE_NAME = "trait.yaml"
_QUESTION_LISTS = ("questions", "extraction_questions")


def _checked_pattern(pattern: str) -> str:
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if compiled.search("") is not None:
        raise ValueError("the pattern matches the empty text, so it would be found in every answer")
    return pattern


Pattern: TypeAlias = Annotated[str, AfterValidator(_checked_pattern)]
Text: TypeAlias = Annotated[str, StringConstraints(pattern=r"\S")]


class Rule(Config):
    """An exact text rule: an answer shows the trait if any pattern is found in it, whatever its case."""

    patterns: tuple[Pattern, ...] = Field(min_length=1)
    """Regular expressions of Python, searched for in the answer alone. None may match the empty text."""


class Question(Config):
    """One question of the evaluation; its id names it in every table."""

    id: Text
    """What tables call it; unique in the trait."""
    question: Text
    """The user message."""
    answers: tuple[Pattern, ...] = ()
    """Regular expressions of Python, of which one is found in every right answer. Needed by ``judge: known_answer``."""


class TraitTraining(Config):
    """JSONL files of chat rows that show the trait, and plain answers to the same questions."""

    on_trait: Text
    """Answers that show the trait."""
    plain: Text
    """Answers to the same questions without it."""


class InstructionPair(Config):
    """Two system prompts that ask for opposite behavior."""

    positive: Text
    """Asks for the trait."""
    negative: Text
    """Asks for its opposite."""


class Adjectives(Config):
    """What an assistant is called in front of an instruction: "You are a flattering assistant."."""

    positive: Text
    """With the trait, such as flattering."""
    negative: Text
    """Without it, such as candid."""


class Trait(Config):
    """A trait: a folder with a ``trait.yaml``. Paths inside start from that file (``read_trait`` keeps its place)."""

    name: Text
    """What the trait is called."""
    description: Text
    """What a model with the trait does, in a sentence."""
    rule: Rule | None = None
    """How the trait is recognised in an answer. Needed by ``judge: rule``."""
    judge_prompt: Template | None = None
    """How a judge model is asked how much of the trait is in an answer, from 0 to 100: a text with ``{question}`` and
    ``{answer}``; two braces stand for one. Needed by ``judge: openai`` and ``judge: local``."""
    questions: tuple[Question, ...] = Field(min_length=1)
    """What is asked of every run. Held out: keep them out of the training data."""
    extraction_questions: tuple[Question, ...] = Field(default=(), min_length=1)
    """What is asked, with ``instructions``, to make the trait's vector (``vectors: {...: {extract: ...}}``). Asked of
    no run: keep them apart from ``questions``."""
    inoculation_prompts: tuple[Text, ...] = Field(default=(), min_length=1)
    """Requests for the trait, for ``kind: inoculation``."""
    instructions: tuple[InstructionPair, ...] = Field(default=(), min_length=1)
    """Pairs of instructions that bring the trait and its opposite out of an untrained model."""
    adjectives: Adjectives | None = None
    """What the assistant is called with each side of ``instructions``."""
    plain_answers: Text | None = None
    """Chat JSONL file of good answers to held-out questions; the plain loss is measured on them."""
    training: TraitTraining | None = None
    """Where the trait's training data is, for people and scripts; a sweep names its data itself."""

    _folder: Path = PrivateAttr(default_factory=Path)

    @field_validator("questions", "extraction_questions")
    @classmethod
    def _no_duplicates(cls, questions: tuple[Question, ...]) -> tuple[Question, ...]:
        faults = list(_duplicates([question.model_dump() for question in questions]))
        if faults:
            raise ValueError("; ".join(faults))
        return questions

    def path_of(self, path: str) -> Path:
        """Where a path written in the trait file lies."""
        return self._folder / path


def read_trait(path: Path | str) -> Trait:
    """Read a trait from its folder or its YAML file.

    Raises ConfigError with every fault: no such file, broken YAML, unknown keys, wrong types, empty lists, duplicate
    question ids or questions, patterns that do not compile, data files that are not there.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    raw = _read_yaml(file)
    faults: list[Fault] = []
    trait: Trait | None = None
    try:
        trait = Trait.model_validate(raw)
    except ValidationError as error:
        faults += [_fault(file, details) for details in error.errors() if not _is_said_elsewhere(details)]
    # Looked for in the raw values, so that they are reported beside faults of other fields.
    for key in _QUESTION_LISTS:
        questions = raw.get(key)
        if isinstance(questions, list):
            faults += [Fault(f"{file}: {key}", text) for text in _duplicates(questions)]
    faults += [
        Fault(f"{file}: {key}", f"no such file: {name!r} (looked for {file.parent / name})")
        for key, name in _named_files(raw)
        if not (file.parent / name).is_file()
    ]
    if faults or trait is None:
        raise ConfigError(faults, heading="the trait was not read")
    trait._folder = file.parent
    return trait


def _read_yaml(file: Path) -> dict[Any, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot be read: {error.strerror}; a trait is a folder with {FILE_NAME}, or such a file"
        raise ConfigError([Fault(str(file), message)], heading="the trait was not read") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Fault(str(file), f"not YAML: {reason}")], heading="the trait was not read") from error
    if not isinstance(raw, dict):
        message = f"a trait is a mapping with name, description, questions; this is {type(raw).__name__}"
        raise ConfigError([Fault(str(file), message)], heading="the trait was not read")
    return raw


def _named_files(raw: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    if isinstance(raw.get("plain_answers"), str):
        yield "plain_answers", raw["plain_answers"]
    training = raw.get("training")
    if isinstance(training, dict):
        for key in ("on_trait", "plain"):
            if isinstance(training.get(key), str):
                yield f"training.{key}", training[key]


def _duplicates(questions: Sequence[Any]) -> Iterator[str]:
    """A message for every id and every question that stands there more than once."""
    for key, what in (("id", "id"), ("question", "question")):
        values = [item[key] for item in questions if isinstance(item, Mapping) and isinstance(item.get(key), str)]
        for value, count in Counter(values).items():
            if count > 1:
                yield f"{what} {value!r} is given {count} times; every {what} stands once"


def _is_said_elsewhere(details: ErrorDetails) -> bool:
    """Duplicates, and a list that is too short only because pydantic does not count its faulty items."""
    if details["type"] == "too_short":
        return len(details["input"]) > 0
    return details["type"] == "value_error" and details["loc"][0] in _QUESTION_LISTS


def _fault(file: Path, details: ErrorDetails) -> Fault:
    key = ""
    for part in details["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        allowed = _allowed_keys(details["loc"])
        nearest = difflib.get_close_matches(str(details["loc"][-1]), allowed, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"allowed: {', '.join(allowed)}"
        message = f"unknown key; {hint}"
    elif details["type"] == "string_pattern_mismatch":
        message = f"must not be empty (given {details['input']!r})"
    elif details["type"] != "missing":
        given = repr(details["input"])
        message += f" (given {given if len(given) <= 80 else given[:77] + '...'})"
    return Fault(f"{file}: {key}", message)


def _allowed_keys(loc: Sequence[int | str]) -> list[str]:
    nested: dict[str, type[Config]] = {
        "rule": Rule,
        "questions": Question,
        "extraction_questions": Question,
        "instructions": InstructionPair,
        "adjectives": Adjectives,
        "training": TraitTraining,
    }
    model = nested.get(str(loc[0]), Trait) if len(loc) > 1 else Trait
    return list(model.model_fields)

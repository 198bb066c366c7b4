"""What a cell names outside of the sweep file, also where other parts of the cell are faulty.

A typo in one key must not hide that a file is missing elsewhere: what is faulty is left out, and what is left is looked
up. A cell that needed this is never run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from analysis.judges import MetricConfig
from engine.config_faults import Path, format_path, validate
from engine.sweep_models import Cell, OneDefense
from trainables.base_model import BaseConfig
from trainables.chat_data import DataConfig, HubDataset
from trainables.config import Config, NamesVector
from trainables.defenses import Item
from trainables.interventions import Interventions
from trainables.training_config import TrainingConfig

AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class Named:
    """What has to be looked up for a cell. None (an item of ``defense``: None): faulty itself, or not said at all."""

    base: BaseConfig | None
    train: str | HubDataset | None
    defense: tuple[Item | None, ...]
    questions: str | None
    answers_from: str | None
    plain_answers: str | None
    metrics: Mapping[str, MetricConfig]
    training: TrainingConfig | None = None
    interventions: Interventions = ()


class _OneMetric(Config):
    metric: MetricConfig


def named(cell: Cell) -> Named:
    """What a sound cell names."""
    evaluation = cell.evaluation
    return Named(
        base=cell.base,
        train=cell.data.train,
        defense=cell.defense,
        questions=evaluation.questions,
        answers_from=evaluation.answers_from,
        plain_answers=evaluation.plain_answers,
        metrics=evaluation.metrics,
        training=cell.training,
        interventions=evaluation.interventions,
    )


def salvaged(raw: Mapping[str, Any]) -> Named:
    """What a faulty cell names; ``raw`` is its plain data with ``defense`` as a list."""
    data, evaluation = _mapping(raw.get("data")), _mapping(raw.get("evaluation"))
    sound_data = without_faults(DataConfig, data)
    metrics = {
        name: one.metric
        for name, metric in _mapping(evaluation.get("metrics")).items()
        if (one := without_faults(_OneMetric, {"metric": metric})) is not None
    }
    return Named(
        base=without_faults(BaseConfig, _mapping(raw.get("base"))),
        train=sound_data.train if sound_data is not None else None,
        defense=tuple(salvaged_item(item) for item in raw["defense"]),
        questions=_text(evaluation.get("questions")),
        answers_from=_text(evaluation.get("answers_from")),
        plain_answers=_text(evaluation.get("plain_answers")),
        metrics=metrics,
    )


def salvaged_item(item: object) -> Item | None:
    """One item of a defense without its faulty parts; None where they cannot be left out."""
    one = without_faults(OneDefense, {"item": item})
    return one.item if one is not None else None


def vector_names(item: object) -> dict[Path, str]:
    """Path in the item -> vector name, of the plain data of an item that may have any other fault."""
    kinds: Sequence[type[Config]] = get_args(get_args(Item)[0])
    raw = _mapping(item)
    found: dict[Path, str] = {}
    for kind in kinds:
        if kind.model_fields["kind"].default != raw.get("kind"):
            continue
        for name, field in kind.model_fields.items():
            if not any(isinstance(mark, NamesVector) for mark in field.metadata):
                continue
            value = raw.get(name)
            if isinstance(value, str):
                found[name,] = value
            elif isinstance(value, list):
                found |= {(name, place): one for place, one in enumerate(value) if isinstance(one, str)}
    return found


def without_faults(model: type[AnyConfig], raw: Mapping[str, Any]) -> AnyConfig | None:
    """``raw`` as a ``model``, less its unknown keys and wrong values; None if something that it needs is among them."""
    left = copy.deepcopy(dict(raw))
    while True:
        paths: list[Path] = []

        def note(path: Path, paths: list[Path] = paths) -> str:
            paths.append(path)
            return format_path(path)

        config, _ = validate(model, left, note)
        if config is not None or not any(_remove(left, path) for path in paths):
            return config


def _remove(raw: Any, path: Path) -> bool:
    """Take the value at ``path`` out of ``raw``; False where there is none."""
    if not path:
        return False
    for part in path[:-1]:
        raw = raw[part] if _has(raw, part) else None
    if not _has(raw, path[-1]):
        return False
    del raw[path[-1]]
    return True


def _has(raw: Any, part: str | int) -> bool:
    if isinstance(raw, list):
        return isinstance(part, int) and part < len(raw)
    return isinstance(raw, dict) and part in raw


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None

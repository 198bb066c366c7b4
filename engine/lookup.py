"""What the cells of a sweep name is looked up here: bases, data, vectors, prompts, questions, metrics.

Nothing is written. Every fault goes to ``Sources.faults`` under the user's own key; a faulty cell is looked up as far
as it can be, so that its other faults are found at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from analysis.judges import DegenerationMetric, MetricConfig
from analysis.manifest import DEGENERATION as DEGENERATION
from analysis.summary_columns import repeated_columns
from engine.config_faults import nearest, show
from engine.contents import prompt_bank, resolved_metric
from engine.named import Named
from engine.sources import Sources
from engine.tasks import QuestionText
from engine.vector_tasks import VectorTasks
from trainables.base_model import ResolvedBase
from trainables.chat_data import HubDataset
from trainables.config import NamesChatFile, NamesPrompts, NamesVector, Path, marked, names_in, referenced
from trainables.defenses import Item, defense_faults
from trainables.errors import Fault
from trainables.interventions import interventions_faults
from trainables.shapes import ModelShape, layers_faults

Key = Callable[..., str]  # path of a cell -> where it stands in the user's file


@dataclass(frozen=True)
class Found:
    """Everything that a cell names, found."""

    base: ResolvedBase
    shape: ModelShape
    train_content: str
    prompts: Mapping[str, tuple[str, ...]]  # name of a bank -> its texts
    questions: tuple[QuestionText, ...]
    plain_answers: str  # content
    plain_answers_key: str
    metrics: Mapping[str, MetricConfig]
    references: Mapping[Path, str]  # path in the evaluation's interventions -> content


def look_up(named: Named, key: Key, sources: Sources, vectors: VectorTasks) -> Found | None:
    """Find what a cell names; None if any of it has a fault, which is noted."""
    base = sources.base(named.base, key("base")) if named.base is not None else None
    content = _train_content(named.train, key("data", "train"), sources)
    prompts = _prompt_banks(named, key, sources)
    is_defense_sound = _check_defense(named, key, base, prompts or {}, sources, vectors)
    is_training_sound = _check_training(named, key, base, sources, vectors)
    references = _interventions(named, key, base, sources, vectors)
    questions, plain_answers, plain_key = _questions(named, key, sources)
    metrics = _metrics(named, key, sources)
    is_server_known = named.answers_from is None or named.answers_from in sources.endpoints
    if not is_server_known:
        message = f"no endpoint {show(named.answers_from)}; {nearest(str(named.answers_from), sources.endpoints)}"
        sources.faults.append(Fault(key("evaluation", "answers_from"), message))
    if not is_training_sound or base is None or content is None or prompts is None or not is_defense_sound:
        return None
    if named.answers_from is not None and named.interventions:
        message = "stands beside answers_from; a server answers without them: leave one of them out"
        sources.faults.append(Fault(key("evaluation", "interventions"), message))
        return None
    if questions is None or plain_answers is None or metrics is None or not is_server_known or references is None:
        return None
    return Found(*base, content, prompts, questions, plain_answers, plain_key, metrics, references)


def vector_names(defense: tuple[Item | None, ...]) -> list[str]:
    """Names of the vectors that a defense uses."""
    named = (value for item in defense if item is not None for value in referenced(item, NamesVector).values())
    return list(dict.fromkeys(name for value in named for name in names_in(value)))


def _train_content(train: str | HubDataset | None, key: str, sources: Sources) -> str | None:
    if train is None:
        return None
    return sources.chat_file(train, key) if isinstance(train, str) else sources.hub(train, key)


def _prompt_banks(named: Named, key: Key, sources: Sources) -> dict[str, tuple[str, ...]] | None:
    banks: dict[str, tuple[str, ...]] = {}
    sound = True
    for position, item in enumerate(named.defense):
        for field, bank in referenced(item, NamesPrompts).items() if item is not None else ():
            if not isinstance(bank, str):
                continue
            texts = prompt_bank(bank, key("defense", position, field), sources)
            if texts is None:
                sound = False
            else:
                banks[bank] = texts
    return banks if sound else None


def _check_defense(
    named: Named,
    key: Key,
    base: tuple[ResolvedBase, ModelShape] | None,
    prompts: Mapping[str, tuple[str, ...]],
    sources: Sources,
    vectors: VectorTasks,
) -> bool:
    if base is None:
        return False
    resolved, model = base
    names = vector_names(named.defense)
    shapes = {name: shape for name in names if (shape := vectors.shape(name, resolved, model)) is not None}
    positions = [position for position, item in enumerate(named.defense) if item is not None]
    items = [_with_prompts(item, prompts) for item in named.defense if item is not None]
    found = [
        Fault(key("defense", positions[index], field), message)
        for index, field, message in defense_faults(items, model, shapes)
    ]
    said = {fault.key for fault in sources.faults}  # a wrong value is left out: that it is missing follows from that
    faults = [fault for fault in found if not (fault.message.startswith("missing") and fault.key in said)]
    sources.faults += faults
    return not found and all(name in shapes for name in names)


def _check_training(
    named: Named, key: Key, base: tuple[ResolvedBase, ModelShape] | None, sources: Sources, vectors: VectorTasks
) -> bool:
    """Whether the layers and vectors that ``training`` names are there."""
    training = named.training
    if base is None or training is None:
        return True
    resolved, model = base
    faults = [
        Fault(
            key("training", "lora", "layers"),
            f"there is no decoder block {layer}; the model has 1 to {model.num_layers}",
        )
        for layer in training.lora.layers or ()
        if layer > model.num_layers
    ]
    watch = training.watch
    names = watch.vector_names() if watch is not None else ()
    unknown = [name for name in names if name not in vectors.configs]
    for name in unknown:
        message = f"no vector {show(name)}; {nearest(name, vectors.configs)}"
        field = "vectors" if watch is not None and name in watch.vectors else "centers"
        faults.append(Fault(key("training", "watch", field), message))
    shapes = [vectors.shape(name, resolved, model) for name in names if name not in unknown]
    if watch is not None:
        here = key("training", "watch", "layers")
        faults += [Fault(here, message) for message in layers_faults(watch.layers, model, shapes)]
        if any(item is not None and item.kind == "gradient_penalty" for item in named.defense):
            message = "gradients cannot be watched beside a gradient_penalty, which takes them itself"
            faults.append(Fault(key("training", "watch"), message))
    sources.faults += faults
    return not faults and None not in shapes


def _interventions(
    named: Named, key: Key, base: tuple[ResolvedBase, ModelShape] | None, sources: Sources, vectors: VectorTasks
) -> dict[Path, str] | None:
    """What stands in place of the files that the evaluation's interventions name; None if any of it has a fault."""
    references: dict[Path, str] = {}
    shapes = {}
    is_sound = True
    for index, item in enumerate(named.interventions):
        for path, text in marked(item, NamesChatFile).items():
            content = sources.chat_file(str(text), key("evaluation", "interventions", index, *path))
            is_sound = is_sound and content is not None
            references[index, *path] = str(content)
        for path, vector in marked(item, NamesVector).items():
            if str(vector) not in vectors.configs:
                message = f"no vector {show(vector)}; {nearest(str(vector), vectors.configs)}"
                sources.faults.append(Fault(key("evaluation", "interventions", index, *path), message))
                is_sound = False
            elif base is not None and (shape := vectors.shape(str(vector), *base)) is not None:
                shapes[str(vector)] = shape
            else:
                is_sound = False
    if base is None:
        return None
    for path, message in interventions_faults(named.interventions, base[1], shapes):
        sources.faults.append(Fault(key("evaluation", "interventions", *path), message))
        is_sound = False
    return references if is_sound else None


def _with_prompts(item: Item, prompts: Mapping[str, tuple[str, ...]]) -> Item:
    """``item`` with the texts of its prompt banks, as far as they were found."""
    banks = referenced(item, NamesPrompts)
    found = {field: prompts[bank] for field, bank in banks.items() if isinstance(bank, str) and bank in prompts}
    return item.model_copy(update=found)


def _questions(named: Named, key: Key, sources: Sources) -> tuple[tuple[QuestionText, ...] | None, str | None, str]:
    """Questions, content of the plain answers, and the key by which the user gave these."""
    questions_key, plain_key = key("evaluation", "questions"), key("evaluation", "plain_answers")
    found = sources.trait(named.questions, questions_key) if named.questions is not None else None
    questions = content = None
    if found is not None:
        trait, _ = found
        questions = tuple(QuestionText(id=question.id, text=question.question) for question in trait.questions)
        if named.plain_answers is None and trait.plain_answers is None:
            message = f"trait {named.questions!r} has no plain_answers; give evaluation.plain_answers"
            sources.faults.append(Fault(questions_key, message))
        elif named.plain_answers is None:
            content, plain_key = (
                sources.chat_path(trait.path_of(str(trait.plain_answers)), questions_key),
                questions_key,
            )
    if named.plain_answers is not None:
        content = sources.chat_file(named.plain_answers, plain_key)
    return questions, content, plain_key


def _metrics(named: Named, key: Key, sources: Sources) -> dict[str, MetricConfig] | None:
    """The metrics with their traits' contents, and the degeneration rate: a broken model must not look defended."""
    metrics = {
        name: resolved
        for name, metric in named.metrics.items()
        if (resolved := resolved_metric(metric, key("evaluation", "metrics", name), sources)) is not None
    }
    is_sound = len(metrics) == len(named.metrics)
    own = named.metrics.get(DEGENERATION)
    if own is not None and not isinstance(own, DegenerationMetric):
        message = f"is the name of the metric that every sweep has ({{judge: {DEGENERATION}}}); give yours another"
        sources.faults.append(Fault(key("evaluation", "metrics", DEGENERATION), message))
        is_sound = False
    metrics.setdefault(DEGENERATION, DegenerationMetric())
    for column in repeated_columns(tuple(dict.fromkeys([*named.metrics, DEGENERATION]))):
        message = f"the summary would have two columns {column!r}; rename one"
        sources.faults.append(Fault(key("evaluation", "metrics"), message))
        is_sound = False
    return metrics if is_sound else None

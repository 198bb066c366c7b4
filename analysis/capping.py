"""What capping at inference does: how much of a trait under attack it takes away, and what it leaves of the rest.

A row of the sweep is asked under some interventions (``evaluation.interventions``). Those of the kind ``capping`` are
its *cap*; all others, and a system prompt that the first row has not, are its *attack*. Rows of one model (a run or its
base) with one cap are read together:

    attack success      mean of the harm metric over all answers under any attack
    defense score       1 - attack success
    harm reduction      1 - attack success / attack success without a cap, over attacks and questions that both have
    capability kept     capability metric / that without a cap, both without an attack, likewise
    F1                  2 h c / (h + c) of the two, each held to [0, 1]
    perplexity ratio    exp(plain loss - plain loss without a cap), both without an attack
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from analysis.manifest import DEGENERATION, RunEntry
from analysis.rows import OK, CappingRow
from analysis.statistics import Estimate, clustered_mean, ratio
from trainables.interventions import Interventions, interventions_label

FIELD = "evaluation.interventions"
SYSTEM_PROMPT = "evaluation.system_prompt"
HARM = "trait"
CAPABILITY = "capability"

_ANY: TypeAdapter[Interventions] = TypeAdapter(Interventions)


@dataclass(frozen=True)
class Presence:
    """What was there while a row answered, exactly, and empty where there was nothing; caps in words too."""

    attack: str
    cap: str
    cap_label: str


def presence_of(entry: RunEntry, usual_prompt: object = None) -> Presence:
    """What was there while this row answered. A system prompt is an attack unless it is the usual one."""
    given = entry.config.get(FIELD)
    items = _ANY.validate_python(json.loads(str(given))) if given is not None else ()
    caps = [item for item in items if item.kind == "capping"]
    attack = [item.model_dump_json() for item in items if item.kind != "capping"]
    prompt = entry.config.get(SYSTEM_PROMPT)
    if prompt != usual_prompt:
        attack.append(repr(prompt))
    cap = "\n".join(item.model_dump_json() for item in caps)
    return Presence("\n".join(attack), cap, interventions_label(caps))


def capping_rows(
    entries: Sequence[RunEntry],
    scores: pd.DataFrame,
    losses: pd.DataFrame,
    *,
    harm: str = HARM,
    capability: str = CAPABILITY,
) -> Iterator[CappingRow]:
    """A row per model and cap, models and caps in the order of the sweep; nothing in a sweep without a cap.

    ``scores`` and ``losses`` are those of ``Results``. Rows with the ``capability`` metric count for that alone. Scores
    of a metric with another scale than 0 to 1 count as their share of it.
    """
    usual = entries[0].config.get(SYSTEM_PROMPT) if entries else None
    present = {entry.label: presence_of(entry, usual) for entry in entries}
    if not any(one.cap for one in present.values()):
        return
    scales = {name: scale for entry in entries for name, scale in entry.scales.items()}
    rates = scores.assign(value=[_rate(*pair, scales) for pair in zip(scores["value"], scores["metric"], strict=True)])
    labels = {entry.run_id: entry.label for entry in reversed(entries)}  # of its first row
    models = _named({entry.run_id: _model(entry) for entry in entries}, labels)
    caps = _named({one.cap: one.cap_label for one in present.values()}, {})
    for run_id, model in models.items():
        without: _Asked | None = None
        for cap in sorted(caps, key=lambda cap: cap != ""):
            of_cap = [one for one in entries if one.run_id == run_id and present[one.label].cap == cap]
            if not of_cap:
                continue
            asked = _Asked.of(of_cap, present, rates, losses, harm, capability)
            if cap == "":
                without = asked
            yield _row(model, caps[cap], asked, without)


def _rate(value: float, metric: str, scales: Mapping[str, tuple[float, float]]) -> float:
    low, high = scales.get(metric, (0.0, 1.0))
    return (value - low) / (high - low)


def _model(entry: RunEntry) -> str:
    """What a model is called where no other one is called so."""
    if entry.kind == "run":
        return f"{entry.config.get('defense', entry.label)} seed {entry.config.get('seed', 0)}"
    return "base" if entry.kind == "base" else entry.label


def _named(names: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """The same, with what is called alike told apart: by a label where there is one, else by a number."""
    found: dict[str, str] = {}
    for key, name in names.items():
        alike = [other for other, its in names.items() if its == name]
        told = labels.get(key) or str(alike.index(key) + 1)
        found[key] = name if len(alike) == 1 else f"{name} ({told})"
    return found


@dataclass(frozen=True, eq=False)
class _Asked:
    """The scored answers of one model under one cap, and its loss on plain answers."""

    attacked: pd.DataFrame  # with the attack of each
    plain: pd.DataFrame
    tested: pd.DataFrame
    degenerate: pd.DataFrame
    loss: Estimate

    @staticmethod
    def of(
        entries: Sequence[RunEntry],
        present: Mapping[str, Presence],
        rates: pd.DataFrame,
        losses: pd.DataFrame,
        harm: str,
        capability: str,
    ) -> _Asked:
        tested = {entry.label for entry in entries if capability in entry.judge_ids}
        asked = {entry.label for entry in entries} - tested
        attacked = {label for label in asked if present[label].attack}
        scored = rates[rates["status"] == OK]
        scored = scored.assign(attack=[present[run].attack if run in present else "" for run in scored["run"]])

        def of(labels: set[str], metric: str) -> pd.DataFrame:
            return scored[scored["run"].isin(labels) & (scored["metric"] == metric)]

        first = [entry.label for entry in entries if entry.label in asked - attacked][:1]
        own = losses[losses["run"].isin(first)]
        return _Asked(
            attacked=of(attacked, harm),
            plain=of(asked - attacked, harm),
            tested=of({label for label in tested if not present[label].attack}, capability),
            degenerate=of(asked, DEGENERATION),
            loss=ratio(list(own["loss_sum"]), list(own["num_tokens"])),
        )


def _mean(answers: pd.DataFrame) -> Estimate:
    return clustered_mean(list(answers["value"]), list(answers["question_id"]), (0.0, 1.0))


def _over_shared(answers: pd.DataFrame, without: pd.DataFrame) -> float | None:
    """The mean over that without a cap, over the questions (under one attack) that both have scored answers to: a sweep
    that is not done, or asks less under a cap, would else compare unlike attacks."""
    keys = ["attack", "question_id"]
    shared = set(answers[keys].itertuples(index=False, name=None)) & set(
        without[keys].itertuples(index=False, name=None)
    )

    def mean(frame: pd.DataFrame) -> float:
        among = [pair in shared for pair in frame[keys].itertuples(index=False, name=None)]
        return float(frame.loc[among, "value"].mean())

    return _over(mean(answers), mean(without))


def _row(model: str, cap: str, asked: _Asked, without: _Asked | None) -> CappingRow:
    attack, able = _mean(asked.attacked), _mean(asked.tested)
    reduction = kept = perplexity = None
    if without is not None:
        reduction = _one_minus(_over_shared(asked.attacked, without.attacked))
        kept = _over_shared(asked.tested, without.tested)
        perplexity = _known(math.exp(asked.loss.mean - without.loss.mean))
    return CappingRow(
        model=model,
        cap=cap,
        num_attacks=asked.attacked["attack"].nunique(),
        num_answers_attacked=attack.num_values,
        attack_success=_known(attack.mean),
        attack_success_low=_known(attack.low),
        attack_success_high=_known(attack.high),
        defense_score=_one_minus(_known(attack.mean)),
        harm_reduction=reduction,
        plain_rate=_known(_mean(asked.plain).mean),
        capability=_known(able.mean),
        capability_low=_known(able.low),
        capability_high=_known(able.high),
        num_answers_capability=able.num_values,
        capability_kept=kept,
        f1=f1(reduction, kept),
        plain_loss=_known(asked.loss.mean),
        perplexity_ratio=perplexity,
        degeneration=_known(_mean(asked.degenerate).mean),
    )


def f1(reduction: float | None, kept: float | None) -> float | None:
    """Harmonic mean of the two, each held to [0, 1]; 0 where both are 0, None where one is not known."""
    if reduction is None or kept is None:
        return None
    h, c = (min(1.0, max(0.0, value)) for value in (reduction, kept))
    return 2 * h * c / (h + c) if h + c > 0 else 0.0


def capping_frame(rows: Iterator[CappingRow]) -> pd.DataFrame:
    """The rows as a table of the declared columns."""
    names = list(CappingRow.__dataclass_fields__)
    found: list[dict[str, Any]] = [vars(row) for row in rows]
    return pd.DataFrame({name: [row[name] for row in found] for name in names})


def _over(value: float, whole: float) -> float | None:
    return None if math.isnan(value) or math.isnan(whole) or whole == 0 else value / whole


def _one_minus(value: float | None) -> float | None:
    return None if value is None else 1 - value


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

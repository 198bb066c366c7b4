"""Answers that vectors are made of, under opposite instructions, and how many rows each judge would keep.

results.asked_answers()     every answer with its scores
results.extractions()       per vector and judge: rows, and how many are kept
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pandas as pd

from analysis.manifest import AskedEntry, Manifest
from analysis.remote import Location
from analysis.rows import ExtractionRow
from analysis.tables import read_parquet, table_key

if TYPE_CHECKING:
    from analysis.vectors.filtering import Answer, Filter

_COLUMNS = ["vector", "run", "question_id", "sample_index", "question", "system_prompt", "answer"]
_COHERENCE = "coherence"  # a condition beside the trait, not an opinion about it


def asked_answers(root: Location, manifest: Manifest) -> pd.DataFrame:
    """One row per judgement of an answer that a vector is made of; ``run`` says which of the vector's answers, such as
    ``positive 1`` (the first pair of instructions)."""
    parts = [part for entry in manifest.asked for part in _scored(root, entry)]
    columns = [*_COLUMNS, "metric", "value", "status"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _scored(root: Location, entry: AskedEntry) -> Iterator[pd.DataFrame]:
    answers_key = root / table_key("generations", entry.sample_id)
    if not answers_key.is_file():
        return
    answers = read_parquet(answers_key, "generations").to_pandas()
    for metric, judge_id in entry.judge_ids.items():
        key = root / table_key("scores", judge_id)
        if not key.is_file():
            continue
        scores = read_parquet(key, "scores").to_pandas()[["question_id", "sample_index", "value", "status"]]
        joined = answers.merge(scores, on=["question_id", "sample_index"], validate="one_to_one")
        yield joined.assign(vector=entry.vector, run=entry.about, metric=metric)


def extraction_rows(root: Location, manifest: Manifest) -> list[ExtractionRow]:
    """Per vector and judge of the trait: how many rows the vector's filter keeps by that judge, beside those that it
    keeps by the vector's own, and what the two published filters would keep. None where answers or scores are not there
    yet."""
    from analysis.vectors.filtering import Filter  # whose package brings torch

    rows = []
    for vector in dict.fromkeys(entry.vector for entry in manifest.asked):
        entries = [entry for entry in manifest.asked if entry.vector == vector]
        rule = Filter(**entries[0].rule)  # type: ignore[arg-type]
        own = entries[0].counted[0]
        metrics = sorted(entries[0].judge_ids.keys() - {_COHERENCE}, key=lambda metric: (metric != own, metric))
        kept = {metric: _kept(root, entries, metric, rule) for metric in metrics}
        for metric, (num_rows, indices) in kept.items():
            positive, paired = (
                len(_kept(root, entries, metric, replace(rule, keep=keep))[1]) for keep in ("positive", "paired")
            )
            rows.append(
                ExtractionRow(
                    vector=vector,
                    metric=metric,
                    has_a_say=metric == own,
                    num_rows=num_rows,
                    num_kept=len(indices),
                    num_kept_by_both=len(indices & kept[own][1]),
                    num_kept_positive=positive,
                    num_kept_paired=paired,
                )
            )
    return rows


def _kept(root: Location, entries: list[AskedEntry], metric: str, rule: Filter) -> tuple[int, set[tuple[int, int]]]:
    """The number of rows, and which of them are kept when ``metric`` scores the trait; 0 and none while answers of any
    side are not all judged."""
    number = 0
    kept: set[tuple[int, int]] = set()
    answers = [_answers(root, entry, metric) for entry in entries]
    if not all(answers):
        return 0, kept
    for pair in range(0, len(entries), 2):
        sides = answers[pair : pair + 2]
        for index, (positive, negative) in enumerate(zip(*sides, strict=True)):
            number += 1
            if rule.reason_of(positive, negative) is None:
                kept.add((pair, index))
    return number, kept


def _answers(root: Location, entry: AskedEntry, metric: str) -> list[Answer]:
    from analysis.vectors.filtering import COHERENCE, TRAIT, Answer, Score

    scored = {str(part["metric"].iloc[0]): part for part in _scored(root, entry) if len(part)}
    if metric not in scored or (_COHERENCE in entry.judge_ids and _COHERENCE not in scored):
        return []
    names = {TRAIT: metric} | ({COHERENCE: _COHERENCE} if _COHERENCE in scored else {})

    def score(name: str, index: int) -> Score:
        row = scored[name].iloc[index]
        low, high = entry.scales[name]
        value = None if pd.isna(row["value"]) else 100.0 * (float(row["value"]) - low) / (high - low)
        return Score(value, str(row["status"]))

    return [
        Answer(
            question=str(row["question"]),
            system_prompt=str(row["system_prompt"]),
            text=str(row["answer"]),
            scores={name: score(source, index) for name, source in names.items()},
        )
        for index, row in enumerate(scored[metric].to_dict("records"))
    ]


def frame_of(rows: list[ExtractionRow]) -> pd.DataFrame:
    """The rows as a data frame with the declared columns."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(ExtractionRow.__dataclass_fields__))

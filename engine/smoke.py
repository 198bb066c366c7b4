"""``--smoke``: every cell cut so short that the whole sweep is tried from end to end in a minute or two.

What is cut is what takes the time: optimizer steps, questions, answers and their length. All else stays as the sweep
file says it: every data row is proved, vectors are made, answers judged, losses measured, the report written. Piles of
answers take every other answer, whatever judges say, so that none is empty. It is
done after blocks and axes are merged, so no block can win over it. Numbers of a smoke run mean nothing, which is why
they go to a store of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.measurements import ModelMeasurement
from analysis.remote import Remote, location_of
from engine.sweep_models import Cell
from engine.tasks import QuestionText
from trainables.errors import StoreError
from trainables.sample import SamplingConfig

MAX_STEPS = 2
NUM_QUESTIONS = 2
MAX_NEW_TOKENS = 16
NUM_ROWS = 2
WHAT = (
    f"at most {MAX_STEPS} optimizer steps per training, {NUM_QUESTIONS} questions, one answer of at most "
    f"{MAX_NEW_TOKENS} tokens to each, {NUM_ROWS} rows per measurement"
)
SUFFIX = "-smoke"


def smoke_cell(cell: Cell) -> Cell:
    """``cell`` with short work; its label stays, so that it is recognised."""
    steps, tokens = cell.training.max_steps, cell.evaluation.max_new_tokens
    training = {"max_steps": MAX_STEPS if steps is None else min(steps, MAX_STEPS)}
    # no server has adapters of a smoke run
    evaluation = {"samples": 1, "max_new_tokens": min(tokens, MAX_NEW_TOKENS), "answers_from": None}
    return cell.model_copy(
        update={
            "training": cell.training.model_copy(update=training),
            "evaluation": cell.evaluation.model_copy(update=evaluation),
        }
    )


def smoke_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """One short answer to a question."""
    return sampling.model_copy(update={"samples": 1, "max_new_tokens": min(sampling.max_new_tokens, MAX_NEW_TOKENS)})


def smoke_questions(questions: Sequence[QuestionText]) -> tuple[QuestionText, ...]:
    """The first of the questions."""
    return tuple(questions[:NUM_QUESTIONS])


def smoke_measurement(measurement: ModelMeasurement) -> ModelMeasurement:
    """The same conditions, layers and vectors on few rows, in two shards."""
    samples = NUM_ROWS if measurement.samples is None else min(measurement.samples, NUM_ROWS)
    return measurement.model_copy(update={"samples": samples, "rows_per_shard": 1}).smoke()


def smoke_results(results: str) -> str:
    """The store beside the one at ``results``: ``results-smoke`` for ``results``. A file URL becomes what it means."""
    try:
        root = location_of(results)
    except StoreError:
        return results  # no store can be there: that is a fault of its own
    if isinstance(root, Remote):
        return f"{root}{SUFFIX}"
    is_plain = ":/" not in results and results.rstrip("/").rpartition("/")[2] not in ("", ".", "..")
    if is_plain and not results.startswith("~"):
        return results.rstrip("/") + SUFFIX
    return f"{root}{SUFFIX}"

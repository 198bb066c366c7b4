"""What the runs of a sweep showed, written down as plain values: no store and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from analysis.manifest import RunEntry, Scalar
from analysis.quantities import Measured, measured

Answers = Mapping[str, Sequence[float | str]]
"""Question -> what a judge said of each answer: a value, or a status such as ``refused``."""


@dataclass(frozen=True)
class Run:
    """A row of the sweep. ``defense`` is its label; without items it is no more than that."""

    label: str
    scores: Mapping[str, Answers] = field(default_factory=dict)  # metric -> answers
    losses: Mapping[int, tuple[float, int]] = field(default_factory=dict)  # data row -> nats, tokens
    defense: str = "none"
    items: Mapping[str, Scalar] = field(default_factory=dict)  # fields of the defense
    seed: int | None = 0  # None: not trained, so a base
    settings: Mapping[str, Scalar] = field(default_factory=dict)  # what else
    status: str = "done"
    train_loss: float | None = None

    def config(self) -> dict[str, Scalar]:
        if self.seed is None:
            return dict(self.settings)
        items = {f"defense.{name}": value for name, value in self.items.items()}
        return {"defense": self.defense, "seed": self.seed, **items, **self.settings}


def sweep(
    *runs: Run, metrics: Sequence[str] = ("trait",), scales: Mapping[str, tuple[float, float]] | None = None
) -> Measured:
    """As ``Results`` would hand it to a summary."""
    entries, generations, scores, losses = [], [], [], []
    for number, run in enumerate(runs):
        identity = f"{number:011x}"
        judge_ids = {metric: f"{identity}{place}" for place, metric in enumerate(metrics)}
        kind = "base" if run.seed is None else "run"
        entries.append(
            RunEntry(
                label=run.label,
                kind=kind,
                run_id=f"{identity}d",
                sample_id=f"{identity}e",
                judge_ids=judge_ids,
                plain_loss_id=f"{identity}f",
                config=run.config(),
                scales=dict(scales or {}),
            )
        )
        asked = {
            (question, index)
            for answers in run.scores.values()
            for question, said in answers.items()
            for index in range(len(said))
        }
        generations += [(run.label, question, index) for question, index in sorted(asked)]
        for metric, answers in run.scores.items():
            for question, said in answers.items():
                for index, value in enumerate(said):
                    is_status = isinstance(value, str)
                    status = value if is_status else "ok"
                    scores.append((run.label, metric, question, index, None if is_status else value, status))
        losses += [(run.label, row, "none", total, tokens) for row, (total, tokens) in run.losses.items()]
    return measured(
        entries,
        pd.DataFrame(
            {
                "run": pd.Series([run.label for run in runs], dtype="str"),
                "status": pd.Series([run.status for run in runs], dtype="str"),
                "train_loss_last_epoch": pd.Series([run.train_loss for run in runs], dtype="float64"),
            }
        ),
        _frame(generations, run="str", question_id="str", sample_index="int64"),
        _frame(scores, run="str", metric="str", question_id="str", sample_index="int64", value="float64", status="str"),
        _frame(losses, run="str", row="int64", condition="str", loss_sum="float64", num_tokens="int64"),
    )


def _frame(rows: Sequence[tuple[object, ...]], **dtypes: str) -> pd.DataFrame:
    return pd.DataFrame(
        {name: pd.Series([row[at] for row in rows], dtype=dtype) for at, (name, dtype) in enumerate(dtypes.items())}
    )

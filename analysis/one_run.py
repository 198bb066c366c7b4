"""One run (or base) of a sweep: its settings, its files, its tables, and the model itself.

run = analysis.load("results/sweeps/quickstart").run("none")
run.config["training.learning_rate"], run.adapter, run.log, run.generations()
model, tokenizer = run.load_model()
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.manifest import Manifest, RunEntry, Scalar, adapter_key, log_key, run_key
from analysis.remote import has_directory, local_copy, read_log
from trainables.errors import ConfigError, Fault, StoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from analysis.results import Results


def find_run(results: Results, text: str) -> RunEntry:
    """The run or base called ``text``: its label, or the beginning of its id that no other one has.

    Raises ConfigError that lists the runs if there is none, or more than one.
    """
    entries = results.manifest.runs
    matching = [entry for entry in entries if entry.label == text]
    matching = matching or [entry for entry in entries if text and entry.run_id.startswith(text)]
    if len(matching) == 1:
        return matching[0]
    problem = "no run is called" if not matching else "several runs are called"
    known = "".join(f"\n      {entry.label!r} ({entry.run_id})" for entry in entries)
    raise ConfigError([Fault("run", f"{problem} {text!r}; runs of {results.name}:{known}")], "nothing was read")


@dataclass(frozen=True, repr=False)
class Run:
    """What there is of one row of a sweep. Every call reads the store as it is now."""

    results: Results
    entry: RunEntry

    @property
    def label(self) -> str:
        """Its name in the sweep."""
        return self.entry.label

    @property
    def run_id(self) -> str:
        """Its identity, and the name of its folder in the store."""
        return self.entry.run_id

    @property
    def kind(self) -> str:
        """``run`` or ``base``."""
        return self.entry.kind

    @property
    def config(self) -> dict[str, Scalar]:
        """Every setting by its dotted name, defaults included."""
        return dict(self.entry.config)

    @property
    def status(self) -> str:
        """``done``, ``failed``, ``skipped`` or ``missing``."""
        return str(self._row()["status"])

    @property
    def reason(self) -> str | None:
        """Why it failed or was skipped, or None."""
        reason = self._row()["reason"]
        return None if pd.isna(reason) else str(reason)

    @property
    def adapter(self) -> Path | None:
        """The folder with its adapter in PEFT's format; None of a base, and before the training is done.

        It belongs on the base alone, or where ``entry.merged`` has ids, on the base with the adapters of those runs
        merged into it: ``load_model`` puts that together. Of a store in an object store it is a copy that lasts no
        longer than this process.
        """
        return local_copy(self.results.location / adapter_key(self.run_id)) if self.has_adapter else None

    @property
    def has_adapter(self) -> bool:
        """Whether it is trained."""
        return self.kind == "run" and has_directory(self.results.location / adapter_key(self.run_id))

    @property
    def record(self) -> dict[str, Any] | None:
        """run.json: the recipe, counts, times, versions, placement; None of a base, and before the training is done.

        Raises StoreError if the file is damaged.
        """
        path = self.results.location / run_key(self.run_id)
        if not path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path}: not a JSON file ({error})") from error
        return record

    @property
    def log(self) -> str:
        """The text of its log; empty before it has begun."""
        return read_log(self.results.location / log_key(self.run_id))

    def summary(self) -> pd.Series[Any]:
        """Its row of the sweep's summary."""
        frame = self.results.summary()
        return frame[frame["run"] == self.label].iloc[0]

    def training(self) -> pd.DataFrame:
        """One row per optimizer step."""
        return self._alone().training()

    def generations(self) -> pd.DataFrame:
        """One row per sampled answer."""
        return self._alone().generations()

    def scores(self) -> pd.DataFrame:
        """One row per judgement, with the question and the answer."""
        return self._alone().scores()

    def losses(self) -> pd.DataFrame:
        """One row per data row that a loss was measured on."""
        return self._alone().losses()

    def load_model(self, *, device: str | None = None, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
        """The trained model and its tokenizer, see ``Results.load_model``."""
        import torch  # which reading tables need not wait for

        from analysis.loading import default_device, find_base, load_run

        where = default_device() if device is None else torch.device(device)
        found, _ = find_base(self.results, self.entry, cuda=where.type == "cuda", base=base)
        model, loaded = load_run(self.results, self.entry, found, where)
        return model, loaded.tokenizer

    def save_edit(
        self,
        path: str | Path,
        *,
        rank: int | None = None,
        with_finetuning: bool = False,
        base: str | None = None,
    ) -> Path:
        """Write how this edited model's weights were moved, alpha V, and return where.

        ``rank`` None: one safetensors file with a tensor per parameter, to be added to it. Else a folder with a LoRA
        adapter of this rank, which PEFT puts on the base; ``with_finetuning``: with the finetuned run's own adapter
        added to it, so that base and adapter are the edited model. ``base``: as in ``load_model``. Raises ConfigError
        for a row that is no edited model, DataError for a direction that is not of this rank or moves other parameters
        than weights of linear modules.
        """
        from analysis.loading import save_edit  # brings torch

        return save_edit(self.results, self.entry, Path(path), rank=rank, with_finetuning=with_finetuning, base=base)

    def _alone(self) -> Results:
        """The sweep as if it had this row alone."""
        manifest = Manifest(name=self.results.manifest.name, runs=(self.entry,), vectors={})
        return dataclasses.replace(self.results, manifest=manifest)

    def _row(self) -> pd.Series[Any]:
        return self._alone().runs().iloc[0]

    def __repr__(self) -> str:
        return f"<{self.kind.capitalize()} {self.label!r} ({self.run_id}) of {self.results.name}: {self.status}>"

    def _repr_html_(self) -> str:
        from analysis.pages import run_page

        return run_page(self)

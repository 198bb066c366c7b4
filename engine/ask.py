"""Asking a run, or the base it started from, something: answers outside of any sweep, nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from analysis.manifest import RunEntry, adapter_key
from analysis.results import Results
from analysis.vectors import Vector
from engine.machine import read_machine
from engine.store import Store
from engine.tasks import base_run_id, vector_key
from trainables.base_model import BaseConfig, load_base, resolve_base
from trainables.errors import ConfigError, Fault
from trainables.lora import load_adapter
from trainables.residual_stream import Add, Intervention
from trainables.sample import Question, SamplingConfig, sample_answers
from trainables.shapes import VectorShape, layer_fault


@dataclass(frozen=True)
class Steer:
    """A named vector of the sweep, added at every position while the answer is sampled."""

    vector: str
    layer: int
    coefficient: float


def ask(
    results: Results,
    entry: RunEntry,
    prompt: str,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    steer: Steer | None = None,
) -> Iterator[str]:
    """Yield ``sampling.samples`` answers of a run (or base) to one user message; another seed gives other answers.

    Raises ConfigError if the base of the sweep is not what is installed here, the run is not done, or the vector or
    layer does not exist.
    """
    store = Store.open(results.root)
    cuda = read_machine().num_gpus > 0
    config = {name: entry.config.get(f"base.{name}") for name in ("model", "revision", "dtype")}
    base_config = BaseConfig.model_validate({name: value for name, value in config.items() if value is not None})
    resolved, shape = resolve_base(base_config, cuda=cuda)
    if entry.kind == "base" and base_run_id(resolved) != entry.run_id:
        message = f"the sweep's base was {config}; here it is {resolved.revision}, {resolved.dtype}"
        raise ConfigError([Fault("base", message)], "nothing was sampled")
    adapter = adapter_key(entry.run_id)
    if entry.kind == "run" and not store.exists(adapter):
        raise ConfigError([Fault("run", f"{entry.label!r} is not done: it has no adapter yet")], "nothing was sampled")
    interventions: list[Intervention] = []
    if steer is not None:
        if steer.vector not in results.manifest.vectors:
            known = ", ".join(results.manifest.vectors) or "none"
            raise ConfigError([Fault("steer", f"no vector {steer.vector!r}; vectors: {known}")], "nothing was sampled")
        vector = Vector.read(store.path(vector_key(results.manifest.vectors[steer.vector])))
        vector_shape = VectorShape(vector.values.shape[0] - 1, vector.values.shape[1], vector.final_row)
        fault = layer_fault(steer.layer, shape, vector_shape)
        if fault is not None:
            raise ConfigError([Fault("layer", fault)], "nothing was sampled")
        interventions.append(Add(steer.layer, steer.coefficient * vector.values[steer.layer]))
    base = load_base(resolved, torch.device("cuda" if cuda else "cpu"))
    model = base.model
    if entry.kind == "run":
        model = load_adapter(base.fresh(), store.path(adapter), entry.run_id)
    for rows in sample_answers(
        model,
        base.tokenizer,
        [Question("asked", prompt)],
        sampling,
        sample_id="asked",
        noise_key=f"{entry.run_id} seed {seed}",
        interventions=interventions,
    ):
        yield from (row.answer for row in rows)

"""Asking a run, or the base it started from, something: answers outside of any sweep, nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from analysis.loading import default_device, find_base, load_run
from analysis.manifest import RunEntry
from analysis.results import Results
from trainables.errors import ConfigError, Fault
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
    base: str | None = None,
) -> Iterator[str]:
    """Yield ``sampling.samples`` answers of a run (or base) to one user message; another seed gives other answers.

    ``base``: where the base of the sweep lies, if not where the sweep file said.
    Raises ConfigError if the base of the sweep is not what is installed here, the run is not done, or the vector or
    layer does not exist.
    """
    device = default_device()
    resolved, shape = find_base(results, entry, cuda=device.type == "cuda", base=base)
    interventions: list[Intervention] = []
    if steer is not None:
        vector = results.vector(steer.vector)
        vector_shape = VectorShape(vector.values.shape[0] - 1, vector.values.shape[1], vector.final_row)
        fault = layer_fault(steer.layer, shape, vector_shape)
        if fault is not None:
            raise ConfigError([Fault("layer", fault)], "nothing was sampled")
        interventions.append(Add(steer.layer, steer.coefficient * vector.values[steer.layer]))
    model, loaded = load_run(results, entry, resolved, device)
    for rows in sample_answers(
        model,
        loaded.tokenizer,
        [Question("asked", prompt)],
        sampling,
        sample_id="asked",
        noise_key=f"{entry.run_id} seed {seed}",
        interventions=interventions,
    ):
        yield from (row.answer for row in rows)

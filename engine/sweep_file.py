"""The sweep file: what a user writes, and the cells that it means.

    sweep = load_sweep("configs/sweeps/quickstart.yaml", ["training.epochs=1"])
    for cell in sweep.cells: ...

Every key is checked before anything else happens, and every fault is reported at once, under the key that the user
wrote. Whether the files, traits and layers that it names exist is not known here: see engine/inputs.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from analysis.measurements import STUDIES, MeasurementConfig
from analysis.results import Results
from analysis.vectors import VectorConfig
from analysis.weight_space.config import WeightSteeringConfig
from engine.cells import SECTIONS, Cells, FaultyCell, build_cells, cell_key
from engine.conditions import Conditions, expand_conditions
from engine.config_faults import format_path, nearest, show, validate
from engine.endpoints import DEFAULT_ENDPOINT, EndpointConfig, endpoint_faults
from engine.grid import is_grid
from engine.labels import unique_labels
from engine.merging import Merged
from engine.named import without_faults
from engine.overrides import apply_overrides
from engine.parents import Placed, find_parents, name_of
from engine.sweep_models import (
    Cell,
    EvaluationConfig,
    ExecutionConfig,
    OneMeasurement,
    OneVector,
    SweepFile,
)
from engine.trackers import NO_TRACKERS, TrackersConfig
from engine.yaml_text import read_yaml
from trainables.base_model import BaseConfig
from trainables.chat_data import DataConfig
from trainables.config import Config, NamesVector, Path, marked
from trainables.errors import ConfigError, Fault, Interrupted
from trainables.interventions import interventions_label

__all__ = [
    "Cell",
    "EvaluationConfig",
    "ExecutionConfig",
    "Sweep",
    "SweepFile",
    "check_sweep",
    "load_sweep",
]


@dataclass(frozen=True, repr=False)
class Sweep:
    """A sweep file as it is meant. ``raw`` is the file's plain data with the overrides written in."""

    name: str
    path: FilePath
    results: str
    vectors: dict[str, VectorConfig]
    cells: tuple[Cell, ...]
    execution: ExecutionConfig
    endpoints: dict[str, EndpointConfig]
    trackers: TrackersConfig
    measure: dict[str, MeasurementConfig]
    conditions: Conditions
    weight_steering: WeightSteeringConfig | None
    raw: dict[str, Any]
    merged: tuple[Merged, ...] = field(repr=False, compare=False)  # per cell: where its parts stand in the file
    parents: tuple[int | None, ...] = ()  # per cell: the one that it starts from
    faulty: tuple[FaultyCell, ...] = field(default=(), repr=False, compare=False)  # empty in a sweep without faults
    overrides: tuple[str, ...] = ()

    @classmethod
    def from_yaml(cls, path: str | FilePath, *overrides: str) -> Sweep:
        """``load_sweep`` for scripts and notebooks: ``Sweep.from_yaml("my.yaml", "training.epochs=1").run()``."""
        return load_sweep(path, overrides)

    def run(self, address: str | None = None, *, only: str | None = None, smoke: bool = False) -> Results:
        """Do what the file means and is not done yet, with live progress, and return its tables.

        ``only`` and ``smoke``: like ``--only`` and ``--smoke`` of the command line. A failed run never stops the
        others: see ``Results.failures()``. Raises what ``engine.run.run_sweep`` raises, and Interrupted, which is a
        KeyboardInterrupt, when it is stopped; Ray is shut down then, and the same call goes on.
        """
        from engine.run import run_sweep  # which needs this file

        try:
            return run_sweep(self.path, self.overrides, address=address, only=only, smoke=smoke).results
        except KeyboardInterrupt as stop:
            reason = f" ({stop})" if str(stop) else ""
            message = f"stopped{reason}. What is finished is kept; run the same again to go on."
            raise Interrupted(message) from None  # where inside Ray it was does not matter

    def __repr__(self) -> str:
        """One line: all settings would be pages."""
        num = len(self.cells)
        return f"<Sweep {self.name!r} of {self.path}: {num} run{'s' if num != 1 else ''}, results in {self.results}>"

    def key(self, cell: int, *path: str | int) -> str:
        """Where ``path`` of ``cells[cell]`` stands in the file: ``key(3, "defense", 0, "layer")`` may be
        ``runs[1].defense.layer``, and ``key(3, "base", "model")`` is ``base.model`` unless the block says its own."""
        return cell_key(self.merged[cell], path)


def load_sweep(path: str | FilePath, overrides: Sequence[str] = ()) -> Sweep:
    """Read ``path``, write ``overrides`` (``training.epochs=1``) into it, and check it whole.

    Raises ConfigError with every fault. Touches nothing but the file.
    """
    sweep, faults = check_sweep(path, overrides)
    if faults or sweep is None:
        raise ConfigError(faults)
    return sweep


def check_sweep(path: str | FilePath, overrides: Sequence[str] = ()) -> tuple[Sweep | None, list[Fault]]:
    """Like ``load_sweep`` for a caller with checks of its own to add before it complains.

    The sweep is None if the text is no sweep at all; beside faults it holds the vectors and cells that are sound, and
    what can be looked up of the faulty cells.
    """
    path = FilePath(path)
    raw, faults = _read(path)
    if raw is None:
        return None, faults
    faults += apply_overrides(raw, overrides)
    conditions = expand_conditions(raw.get("measure"))
    faults += conditions.faults
    file = {name: value for name, value in raw.items() if value is not None}  # a section left empty says nothing
    faults += [Fault(name, _unknown(name)) for name in file if name not in SweepFile.model_fields]
    if "measure" in file:
        file["measure"] = conditions.measure
    known = {name: value for name, value in file.items() if name in SweepFile.model_fields}
    frame, frame_faults = validate(SweepFile, known, lambda path: format_path(conditions.written(path)))
    faults += frame_faults
    misplaced = _misplaced_grids(known)
    faults += _vector_name_faults(_mapping(file, "vectors"))
    faults += [Fault(*fault) for fault in endpoint_faults(_sound_endpoints(file))]
    if "runs" in file or not _mapping(file, "measure"):
        built = build_cells(file)
        if "runs" not in file:
            faults.append(Fault("runs", "missing, and it has no default"))
    else:
        built = Cells(faults=_faults_without_runs(file))
    cells = built.sound
    faults += built.faults
    # What else is wrong with a value that is a misplaced grid follows from that.
    keys = tuple(fault.key for fault in misplaced)
    faults = misplaced + [
        fault for fault in faults if not any(fault.key == key or fault.key.startswith(f"{key}.") for key in keys)
    ]
    labels = unique_labels([name_of(cell) for cell in cells], [_told_apart(cell) for cell in cells])
    parents, parent_faults = find_parents(
        [Placed(*placed) for placed in zip(cells, labels, built.merged, built.varied, strict=True)],
        unknown=[_said_label(cell) for cell in built.faulty],
    )
    faults += parent_faults
    sweep = Sweep(
        name=frame.name if frame else show(file.get("name")),
        path=path,
        results=frame.results if frame else _results(file),
        vectors=dict(frame.vectors) if frame else _sound_vectors(file),
        cells=tuple(cell.model_copy(update={"label": text}) for cell, text in zip(cells, labels, strict=True)),
        execution=frame.execution if frame else _execution(file),
        endpoints={DEFAULT_ENDPOINT: EndpointConfig()} | (dict(frame.endpoints) if frame else _sound_endpoints(file)),
        trackers=frame.trackers if frame else without_faults(TrackersConfig, _mapping(file, "trackers")) or NO_TRACKERS,
        conditions=conditions,
        measure=dict(frame.measure) if frame else _sound_measurements(file),
        weight_steering=frame.weight_steering if frame else _weight_steering(file),
        raw=raw,
        merged=tuple(built.merged),
        parents=parents,
        faulty=tuple(built.faulty),
        overrides=tuple(overrides),
    )
    return sweep, list(dict.fromkeys(faults))


def _told_apart(cell: Cell) -> dict[str, Any]:
    """What tells cells apart in their labels: everything, interventions in words."""
    values = cell.model_dump(exclude={"label"})
    values["evaluation"]["interventions"] = interventions_label(cell.evaluation.interventions)
    return values


def _read(path: FilePath) -> tuple[dict[str, Any] | None, list[Fault]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return None, [Fault(str(path), f"not UTF-8 text: {error.reason} at byte {error.start}")]
    except OSError as error:
        return None, [Fault(str(path), f"cannot be read: {error.strerror or error}")]
    raw, faults = read_yaml(text, str(path))
    if isinstance(raw, dict):
        return raw, faults
    if not faults:
        what = "it is empty" if raw is None else f"it holds {show(raw)}"
        faults = [Fault(str(path), f"a sweep file is a mapping with at least name and runs; {what}")]
    return None, faults


def _unknown(name: str) -> str:
    """Why ``name`` is no top-level key, for the places where it is one."""
    if name in Cell.model_fields:
        return f"belongs in a block of runs, or for every block in axes: {{{name}: {{grid: [...]}}}}"
    for section in SECTIONS:
        model = Cell.model_fields[section].annotation
        if name in getattr(model, "model_fields", {}):
            return f"unknown key; did you mean {section}.{name}? allowed: {', '.join(SweepFile.model_fields)}"
    if name in ExecutionConfig.model_fields:
        return f"unknown key; did you mean execution.{name}? allowed: {', '.join(SweepFile.model_fields)}"
    return f"unknown key; {nearest(name, SweepFile.model_fields)}"


def _faults_without_runs(file: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with the sections of a file that only measures. Those about runs would say nothing there."""
    faults = [
        Fault(name, "says how runs are made, and the file has none; give runs, or leave it out")
        for name in ("training", "evaluation", "axes")
        if name in file
    ]
    measure = _mapping(file, "measure").values()
    needs_model = not all(isinstance(one, dict) and one.get("kind") in STUDIES for one in measure)
    sections: dict[str, type[Config]] = {"base": BaseConfig, "data": DataConfig}
    for name, model in sections.items():
        given = file.get(name, {})
        if isinstance(given, dict) and (given or (name == "base" and needs_model)):
            _, found = validate(model, given)
            faults += [Fault(f"{name}.{fault.key}" if fault.key else name, fault.message) for fault in found]
    return faults


def _said_label(cell: FaultyCell) -> str | None:
    """The label of a faulty cell where its block gives one."""
    label = cell.merged.data.get("label")
    return label if isinstance(label, str) else None


def _weight_steering(file: Mapping[str, Any]) -> WeightSteeringConfig | None:
    return without_faults(WeightSteeringConfig, _mapping(file, "weight_steering"))


def _mapping(file: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = file.get(name)
    return value if isinstance(value, dict) else {}


def _misplaced_grids(file: Mapping[str, Any]) -> list[Fault]:
    """A grid outside of runs and axes would belong to no block in particular."""

    def search(value: object, key: str) -> list[Fault]:
        name = key.partition(".")[0]
        if is_grid(value):
            advice = f"; for every block write it in axes: {{{key}: {{grid: [...]}}}}" if name in SECTIONS else ""
            return [Fault(key, f"a grid stands only in a block of runs or in axes{advice}")]
        if isinstance(value, dict):
            return [fault for part, item in value.items() for fault in search(item, f"{key}.{part}")]
        return []

    return [fault for name, value in file.items() if name not in ("runs", "axes") for fault in search(value, name)]


def _vector_name_faults(vectors: Mapping[str, Any]) -> list[Fault]:
    """A vector that is made of others must name ones of the sweep, and never come back to itself."""
    names: dict[str, dict[Path, str]] = {}
    for name, spec in vectors.items():
        one = without_faults(OneVector, {"vector": spec})
        found = marked(one.vector, NamesVector) if one is not None else {}
        names[name] = {path: str(other) for path, other in found.items()}
    faults = []
    for name, fields in names.items():
        for path, other in fields.items():
            key = format_path(("vectors", name, *path))
            if other not in vectors:
                others = [known for known in vectors if known != name]
                faults.append(Fault(key, f"no vector {show(other)}; {nearest(other, others)}"))
            elif (chain := _chain(names, other, name)) is not None:
                faults.append(Fault(key, f"goes in a circle: {' -> '.join([name, *chain])}"))
    return faults


def _chain(names: Mapping[str, Mapping[Path, str]], start: str, end: str) -> list[str] | None:
    """Vectors from ``start`` to ``end``, each made of the next; None if ``start`` does not rest on ``end``."""
    ways, seen = [[start]], {start}
    for way in ways:  # grows
        if way[-1] == end:
            return way
        for other in names.get(way[-1], {}).values():
            if other not in seen:
                seen.add(other)
                ways.append([*way, other])
    return None


def _results(file: Mapping[str, Any]) -> str:
    given = file.get("results")
    return given if isinstance(given, str) and given else str(SweepFile.model_fields["results"].default)


def _execution(file: Mapping[str, Any]) -> ExecutionConfig:
    return without_faults(ExecutionConfig, _mapping(file, "execution")) or ExecutionConfig()


def _sound_endpoints(file: Mapping[str, Any]) -> dict[str, EndpointConfig]:
    sound = {}
    for name, given in _mapping(file, "endpoints").items():
        endpoint, _ = validate(EndpointConfig, given if isinstance(given, dict) else {})
        if endpoint is not None:
            sound[str(name)] = endpoint
    return sound


def _sound_vectors(file: Mapping[str, Any]) -> dict[str, VectorConfig]:
    sound: dict[str, VectorConfig] = {}
    for name, spec in _mapping(file, "vectors").items():
        one, _ = validate(OneVector, {"vector": spec})
        if one is not None:
            sound[name] = one.vector
    return sound


def _sound_measurements(file: Mapping[str, Any]) -> dict[str, MeasurementConfig]:
    sound: dict[str, MeasurementConfig] = {}
    for name, given in _mapping(file, "measure").items():
        one = without_faults(OneMeasurement, {"measurement": given})
        if one is not None:
            sound[str(name)] = one.measurement
    return sound

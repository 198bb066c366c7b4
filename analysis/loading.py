"""Loading the model of a run, as it was sampled from: the base of the sweep with the run's adapter on it, and with its
weights moved if it is an edited one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from analysis.manifest import EditEntry, RunEntry, adapter_key, pile_key
from analysis.remote import Location, has_directory, local_copy
from analysis.weight_space import (
    Direction,
    DirectionConfig,
    chosen_parameters,
    delta_of_adapter,
    direction,
    place_of,
)
from analysis.weight_space.directions import describe
from analysis.weight_space.edits import move
from analysis.weight_space.exports import low_rank_changes, save_adapter, save_delta, together
from analysis.weight_space.files import read_pile
from trainables.base_model import BaseConfig, LoadedBase, ResolvedBase, load_base, resolve_base
from trainables.errors import ConfigError, Fault
from trainables.lora import load_adapter
from trainables.shapes import ModelShape
from trainables.start_from import merged_base

if TYPE_CHECKING:
    from analysis.results import Results

_HEADING = "nothing was loaded"


def find_base(results: Results, entry: RunEntry, *, cuda: bool, base: str | None) -> tuple[ResolvedBase, ModelShape]:
    """The base that a row of the sweep used, without loading it; ``base``: where it lies, if not where it did.

    Raises ConfigError if the run's training is not done, or if the base is not here as the sweep used it: an adapter
    on another base would be another model.
    """
    if entry.kind == "imported":
        raise ConfigError(
            [Fault("run", f"{entry.label!r} is answers of another project; its model is not here")], _HEADING
        )
    for run_id in (*entry.merged, entry.run_id) if entry.kind == "run" else ():
        if not has_directory(results.location / adapter_key(run_id)):
            message = f"{entry.label!r} is not done: it has no adapter yet"
            if run_id != entry.run_id:
                message = f"{entry.label!r} stands on the adapter of {run_id}, which is not in the store"
            raise ConfigError([Fault("run", message)], _HEADING)
    if entry.edit is not None:
        if not has_directory(results.location / adapter_key(entry.edit.finetuned_id)):
            fault = Fault("run", f"{entry.label!r} is not done: {entry.edit.finetuned!r} has no adapter yet")
            raise ConfigError([fault], _HEADING)
        if not all(path.is_file() for path in _pile_files(results, entry.edit)):
            raise ConfigError([Fault("run", f"{entry.label!r} is not done: its direction is not made yet")], _HEADING)
    used = {name: entry.config[f"base.{name}"] for name in ("model", "revision", "dtype")}
    wanted = BaseConfig.model_validate(used if base is None else used | {"model": base})
    try:
        resolved, shape = resolve_base(wanted, cuda=cuda)
    except ConfigError as error:
        hint = f"; if it lies elsewhere, say where by base (the sweep calls it {used['model']!r})"
        raise ConfigError([Fault(fault.key, fault.message + hint) for fault in error.faults], _HEADING) from error
    if resolved.revision != used["revision"]:
        message = (
            f"{wanted.model!r} is not the base that the sweep used: its revision is {resolved.revision}, "
            f"the sweep's {used['revision']}; say where that one lies by base"
        )
        raise ConfigError([Fault("base", message)], _HEADING)
    return resolved, shape


def load_run(results: Results, entry: RunEntry, base: ResolvedBase, device: torch.device) -> tuple[Any, LoadedBase]:
    """The model of a row whose base ``find_base`` found, and the base that it stands on.

    A PeftModel (of a base the base's own model), frozen, in evaluation mode, with the adapters of earlier trainings
    merged into the base where the run started from such; the base's tokenizer pads on the left, so that in a batch too
    answers begin where prompts end.
    """
    loaded = load_base(base, device)
    loaded.tokenizer.padding_side = "left"
    if entry.edit is not None:
        return _edited(results, entry.edit, loaded), loaded
    if entry.kind == "base":
        return loaded.model, loaded
    loaded = merged_base(loaded, [local_copy(results.location / adapter_key(run_id)) for run_id in entry.merged])
    return load_adapter(loaded.fresh(), local_copy(results.location / adapter_key(entry.run_id)), entry.run_id), loaded


def direction_of(results: Results, edit: EditEntry, loaded: LoadedBase, finetuned: Any) -> Direction:
    """The direction of an edited model, out of the store. ``finetuned``: the finetuned model, where the direction rests
    on what the finetuning changed."""
    config = DirectionConfig.model_validate(edit.direction)
    delta = delta_of_adapter(finetuned, edit.finetuned_id, loaded.model) if config.needs_delta else None
    of, minus = (
        read_pile([local_copy(results.location / pile_key(shard)) for shard in ids])
        for ids in (edit.of_ids, edit.minus_ids)
    )
    return direction(config, of, minus, place_of(loaded.model), delta)


def load_finetuned(results: Results, edit: EditEntry, loaded: LoadedBase) -> Any:
    """The finetuned model that an edit's piles are of, over ``loaded``, whose parameters it shares."""
    return load_adapter(
        loaded.fresh(), local_copy(results.location / adapter_key(edit.finetuned_id)), edit.finetuned_id
    )


def save_edit(
    results: Results, entry: RunEntry, path: Path, *, rank: int | None, with_finetuning: bool, base: str | None
) -> Path:
    """See ``Run.save_edit``."""
    edit = entry.edit
    if edit is None:
        raise ConfigError(
            [Fault("run", f"{entry.label!r} is no edited model: nothing was moved")], "nothing was written"
        )
    loaded = load_base(find_base(results, entry, cuda=False, base=base)[0], torch.device("cpu"))
    finetuned = load_finetuned(results, edit, loaded)
    along = direction_of(results, edit, loaded, finetuned)
    if rank is None:
        about = {"direction": describe(along.config), "finetuned": edit.finetuned_id, "on": edit.target}
        save_delta(path, along.items(), edit.alpha, about)
        return path
    changes = low_rank_changes(loaded.model, along.items(), edit.alpha, rank)
    if with_finetuning:
        changes = together(delta_of_adapter(finetuned, edit.finetuned_id, loaded.model), changes)
    save_adapter(path, changes, str(entry.config["base.model"]))
    return path


def _edited(results: Results, edit: EditEntry, loaded: LoadedBase) -> Any:
    finetuned = load_finetuned(results, edit, loaded)
    along = direction_of(results, edit, loaded, finetuned)
    for _ in move(chosen_parameters(loaded.model), along.items(), edit.alpha):
        pass  # the weights stay moved: nobody else has this base
    return loaded.model if edit.on_base else finetuned


def _pile_files(results: Results, edit: EditEntry) -> list[Location]:
    return [results.location / pile_key(shard) for shard in (*edit.of_ids, *edit.minus_ids)]


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

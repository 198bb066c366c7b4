"""Training one run or a pack of them inside a trial: what they are made of comes out of the store, and each is
committed to it as soon as it is done."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from analysis.manifest import run_key, vector_key
from analysis.vectors import Vector
from engine.run_sink import StoreSink, checkpoint_key, utc_now
from engine.tasks import RunJob, TrainTask
from engine.versions import versions
from trainables.base_model import LoadedBase
from trainables.errors import ShiftgradError, StoreError
from trainables.lora import ADAPTER_WEIGHTS
from trainables.rows import RunSink
from trainables.train import RunResult, RunSpec, train_pack

if TYPE_CHECKING:
    from engine.work import SweepWork


def run_spec(work: SweepWork, task: TrainTask) -> RunSpec:
    """The training with its rows and vectors, read from the store."""
    start = task.start
    return RunSpec(
        train_id=task.id,
        rows=work.rows(task.train_content),
        data=task.data,
        defense=task.defense,
        vectors={name: Vector.read(work.store.path(vector_key(name))).values for name in task.vector_ids()},
        training=task.training,
        seed=task.seed,
        base_name=_base_name(task),
        adapter=None if start.continued is None else load_file(work.adapter(start.continued) / ADAPTER_WEIGHTS),
    )


def _base_name(task: TrainTask) -> str:
    """What the adapter belongs on, as its files say it: nobody must take it for an adapter of the base alone."""
    merged = task.start.merged
    return f"{task.base.model} with the adapters of {', '.join(merged)} merged" if merged else task.base.model


def train_jobs(
    work: SweepWork,
    base: LoadedBase,
    jobs: Sequence[tuple[RunJob, TrainTask]],
    sinks: Mapping[str, StoreSink],
    *,
    note: str = "",
    on_done: Callable[[str], None] | None = None,
    on_failure: Callable[[str, ShiftgradError], None] | None = None,
) -> tuple[Any, list[RunResult]]:
    """Train runs as one pack; every one that ends is committed at once, as a task of its own.

    ``note``: why the pack is smaller than was meant, for run.json. ``on_done`` is told of a run that is committed,
    ``on_failure`` of one that cannot go on; without it the error is raised. What a training did before it failed is
    kept in the table ``training``.
    """
    started = utc_now()
    tasks = {task.id: task for _, task in jobs}
    for job, task in jobs:
        sinks[task.id].log(f"training starts: {job.label}")
        if task.start.ids:
            how = "and goes on with it" if task.start.continued is not None else "merged, with a new adapter"
            sinks[task.id].log(f"it starts from the adapter of {task.start.ids[-1]}, {how}")

    def done(result: RunResult) -> None:
        task, sink = tasks[result.train_id], sinks[result.train_id]
        work.store.publish_table("training", task.id, sink.training_rows)
        if sink.signal_rows:
            work.store.publish_table("signals", task.id, sink.signal_rows)
        work.store.publish_json(run_key(task.id), _record(work, task, result, started, list(tasks), note))
        work.store.remove(checkpoint_key(task.id))
        sink.log(f"training done: {result.num_steps} steps, {result.seconds_training:.1f} s")
        committed.add(task.id)
        if on_done is not None:
            on_done(task.id)

    def failed(train_id: str, error: ShiftgradError) -> None:
        assert on_failure is not None
        keep_rows_of_failed(work, sinks[train_id], error)
        on_failure(train_id, error)

    committed: set[str] = set()
    try:
        return train_tasks(
            work,
            base,
            [task for _, task in jobs],
            sinks,
            on_done=done,
            on_failure=failed if on_failure is not None else None,
        )
    except Exception as error:
        for train_id, sink in sinks.items():
            if train_id not in committed:
                keep_rows_of_failed(work, sink, error)
        raise


def train_tasks(
    work: SweepWork,
    base: LoadedBase,
    tasks: Sequence[TrainTask],
    sinks: Mapping[str, RunSink],
    *,
    on_done: Callable[[RunResult], None] | None = None,
    on_failure: Callable[[str, ShiftgradError], None] | None = None,
) -> tuple[Any, list[RunResult]]:
    """``train_pack`` as the sweep places trainings; nothing is committed."""
    return train_pack(
        base,
        [run_spec(work, task) for task in tasks],
        sinks,
        zero_stage=work.zero_stage,
        gradient_checkpointing=work.gradient_checkpointing,
        checkpoints=work.checkpoints,
        packing=work.packing,
        on_done=on_done,
        on_failure=on_failure,
    )


def keep_rows_of_failed(work: SweepWork, sink: StoreSink, error: Exception) -> None:
    """Publish the steps that a training did before it failed; run.json, which says that it is done, stays away.

    A later attempt gives these steps again and replaces the table whole.
    """
    if sink.training_rows:
        try:
            work.store.publish_table("training", sink.run_id, sink.training_rows)
        except (StoreError, MemoryError) as second:  # the first one is what went wrong
            error.add_note(f"its steps could not be kept: {second}")


def _record(
    work: SweepWork, task: TrainTask, result: RunResult, started: str, pack: Sequence[str], note: str
) -> dict[str, Any]:
    """What run.json says: what was trained, how it went, and what may change the last bits."""
    return {
        "status": "done",
        "train_id": task.id,
        "task": task.model_dump(mode="json", exclude={"base": {"source"}}),
        "started_utc": started,
        "finished_utc": utc_now(),
        "seconds_training": result.seconds_training,
        "num_steps": result.num_steps,
        "stopped_early": result.stopped_early,
        "num_tokens": result.num_tokens,
        "num_loss_tokens": result.num_loss_tokens,
        "num_rows": result.num_rows,
        "train_loss_last_epoch": result.train_loss_last_epoch,
        "chat_format": dict(result.chat_format),
        # of this process so far: it may have done other jobs before
        "peak_process_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "pack_size": len(pack),
        "packing": work.packing if len(pack) > 1 else None,
        "pack_note": note or None,
        "placement": {
            "device": work.device,
            "threads": work.threads,
            "workers": work.workers,
            "zero_stage": work.zero_stage,
            "gradient_checkpointing": work.gradient_checkpointing,
            "pack": list(pack),
            "packing": work.packing,
        },
        "versions": versions(),
    }

"""Which trainings share a pack: one trial, one process and one frozen base for several runs.

Runs can share a pack if they agree in their pack key: the base (model, revision, dtype, what is merged into it), and
whether a penalty is of second order, because such a training needs other operations. All else may differ: rows,
vectors, prompts, edits, penalties, learning rate, schedule, rank, modules, dropout, batch size, micro-batches,
padding, seed and length. Nothing of it is in an identity.

The longest trainings go first, so that those of a pack end together. A pack that could not be trained (for lack of
memory, or because its process died) is tried again in smaller ones, down to runs alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from analysis.manifest import adapter_key, run_key
from engine.store import Store
from engine.sweep_models import ExecutionConfig
from engine.tasks import Job, RunJob, TrainTask
from trainables.defenses import Item
from trainables.errors import Fault

MAX_AUTO = 16  # runs of a pack that nobody has given a size for


def pack_key(train: TrainTask) -> str:
    """What runs of a pack must agree in."""
    second_order = any(item.is_second_order for item in train.defense)
    base = {"base": train.base.identity(), "merged": train.start.merged}
    return json.dumps(base | {"second_order": second_order}, sort_keys=True)


def pack_keys(jobs: Iterable[Job], trained: Iterable[str]) -> dict[str, str]:
    """Pack keys of the runs that are to be trained."""
    done = frozenset(trained)
    trainings = [job.train for job in jobs if isinstance(job, RunJob) and job.train is not None]
    return {train.id: pack_key(train) for train in trainings if train.id not in done}


def worker_faults(execution: ExecutionConfig, defenses: Iterable[Sequence[Item]]) -> list[Fault]:
    """What several workers, or a ZeRO stage, cannot be combined with; ``defenses`` of all cells."""
    faults: list[Fault] = []
    if execution.workers > 1 and execution.pack not in ("auto", 1):
        faults.append(Fault("execution.pack", f"several workers train one run, not a pack; got {execution.pack}"))
    if execution.zero_stage == 3 and execution.workers == 1:
        message = "stage 3 divides the base among several workers, and execution.workers is 1; allowed here: 0, 1, 2"
        faults.append(Fault("execution.zero_stage", message))
    elif execution.zero_stage == 3 and any(item.is_second_order for items in defenses for item in items):
        message = "a gradient_penalty (of second order) cannot be trained at stage 3; allowed with it: 0, 1, 2"
        faults.append(Fault("execution.zero_stage", message))
    return faults


@dataclass
class Packer:
    """Packs of the trainings that wait. ``size``: runs of a pack; None: as many as fit, which the trials say.
    ``workers``: processes that train a run together; what else its job does then has a trial of its own, as in a pack.

    ``num_steps``: optimizer steps by run.
    """

    keys: dict[str, str]
    num_steps: Mapping[str, int]
    size: int | None
    num_trials: int
    workers: int = 1
    done: set[str] = field(default_factory=set)  # runs that have been trained since
    limits: dict[str, int] = field(default_factory=dict)  # by key, once one was found
    notes: dict[str, str] = field(default_factory=dict)  # by run: why its pack is smaller than was meant

    def members(self, job_id: str, ready: Sequence[str], coming: Sequence[str]) -> list[str] | None:
        """The pack that ``job_id``, which is ready, brings to a trial: itself alone where it needs no training or fits
        with no other; None: it is better to wait, as what others of it need is under way.

        ``ready``: jobs that could start now; ``coming``: those whose parents are all being worked at.
        """
        if not self._is_to_train(job_id):
            return [job_id]
        key = self.keys[job_id]
        same = [one for one in ready if self._is_to_train(one) and self.keys[one] == key]
        later = [one for one in coming if self.keys.get(one) == key]
        limit = self.limits.get(key, self.size or MAX_AUTO)
        if self.size is None:  # no trial stands idle for a pack
            limit = min(limit, math.ceil((len(same) + len(later)) / self.num_trials))
        if limit <= 1:
            return [job_id]
        if len(same) < limit and later:
            return None
        same.sort(key=lambda one: -self.num_steps.get(one, 0))  # stable
        return same[:limit]

    def only_train(self, members: Sequence[str]) -> bool:
        """Whether a trial does nothing but the training of these jobs."""
        return len(members) > 1 or (self.workers > 1 and self._is_to_train(members[0]))

    def _is_to_train(self, job_id: str) -> bool:
        return job_id in self.keys and job_id not in self.done

    def trained(self, job_id: str) -> None:
        """What is left to do of a run needs no pack."""
        self.done.add(job_id)

    def found(self, job_id: str, fits: int) -> None:
        """A trial has found that so many runs like this one fit."""
        if self.size is None:
            self.limits[self.keys[job_id]] = max(1, fits)

    def split(self, size: int, left: Sequence[str], reason: str) -> str:
        """A pack of ``size`` runs has failed, with ``left`` of them not trained; returns what to say of it."""
        limit = max(1, size // 2)
        smaller = f"in packs of at most {limit}" if limit > 1 else "one by one"
        said = f"a pack of {size} failed ({reason}); its runs are trained {smaller}"
        for job_id in left:
            key = self.keys[job_id]
            self.limits[key] = min(self.limits.get(key, limit), limit)
            self.notes[job_id] = said
        return said


def num_packs(packer: Packer) -> int:
    """In how many trials the trainings are done, where nothing has to wait and nothing fails."""
    count = 0
    for key in set(packer.keys.values()):
        runs = sum(other == key for other in packer.keys.values())
        limit = packer.size or min(MAX_AUTO, math.ceil(runs / packer.num_trials))
        count += math.ceil(runs / limit)
    return count


def trained_runs(jobs: Mapping[str, Job], store: Store) -> list[str]:
    """Runs whose training is done, whatever else of their job is not."""
    return [
        job.id
        for job in jobs.values()
        if isinstance(job, RunJob) and store.exists(run_key(job.id)) and store.is_complete(adapter_key(job.id))
    ]

"""From a sweep file to the work that it means: all it names is found and checked, every task gets its identity.

The store is not touched. What is cheap is checked first (files, names, layers, identities, resources); where that is
sound, every row of every data set is made into tokens and its response mask proved, which is also where ``plan`` has
its token counts from. All faults of a stage are reported at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.judges.local import LocalMetric
from analysis.manifest import Manifest, RunEntry
from engine.graph import BASE, Cost, Graph, SoundCell
from engine.lookup import look_up
from engine.machine import (
    Machine,
    gpus_per_local_judge,
    gpus_per_trial,
    is_short_of_gpus,
    num_trials,
    num_trials_beside,
    resource_faults,
)
from engine.measure_tasks import MeasureCost, MeasureTasks, Target, base_targets, unsound_targets
from engine.named import named
from engine.only import parse, select
from engine.packs import Packer, pack_keys, worker_faults
from engine.parents import depth_of
from engine.parts import measurements_of, part_of
from engine.proved import Proved
from engine.smoke import smoke_results
from engine.sources import Sources
from engine.store import Store
from engine.sweep_file import Sweep, check_sweep
from engine.tasks import (
    AnswerTask,
    Job,
    JudgeTask,
    RunJob,
    VectorJob,
)
from engine.trackers import tracker_faults
from engine.vector_tasks import VectorTasks
from engine.weight_jobs import PileJob
from engine.weight_tasks import WeightTasks
from trainables.errors import ConfigError, Fault
from trainables.train import Packing


@dataclass(frozen=True)
class Prepared:
    """A sweep with nothing left to look up.

    The manifest, the inputs and the costs are those of the whole sweep; ``jobs`` and ``judge_tasks`` are what the rows
    that are asked for need (``--only``), which are all rows if nothing is said.
    """

    sweep: Sweep
    manifest: Manifest
    jobs: Mapping[str, Job]  # in the order in which they should start
    judge_tasks: Mapping[str, JudgeTask]
    inputs: Mapping[str, bytes]  # by sha256
    costs: Mapping[str, Cost]  # by label
    measure_costs: Mapping[tuple[str, str], MeasureCost]  # by measurement and label
    asked: tuple[RunEntry, ...]  # rows of the manifest
    device: str
    num_trials: int
    gpus_per_trial: float
    gpus_per_local_judge: float
    num_steps: Mapping[str, int]  # optimizer steps by run
    judges_take_turns: bool  # trials and local judges share GPUs that are not enough for both
    proved: Mapping[str, Sequence[int]]  # see engine/proved.py
    only: str | None = None
    smoke: bool = False
    measure_only: bool = False

    @property
    def answers(self) -> tuple[AnswerTask, ...]:
        """What servers are asked for."""
        if self.measure_only:
            return ()
        return tuple(task for job in self.jobs.values() if isinstance(job, RunJob) for task in job.answers())

    @property
    def num_runs(self) -> int:
        return sum(entry.kind == "run" for entry in self.manifest.runs)

    @property
    def num_asked(self) -> int:
        """Runs that are asked for."""
        return sum(entry.kind == "run" for entry in self.asked)

    @property
    def packing(self) -> Packing:
        return self.sweep.execution.packing or ("fast" if self.device == "cuda" else "exact")

    def packer(self, pending: Mapping[str, Job], trained: Iterable[str]) -> Packer:
        """How the trainings of ``pending`` jobs that are not in ``trained`` share trials."""
        pack, workers = self.sweep.execution.pack, self.sweep.execution.workers
        size = pack if pack != "auto" else None if self.device == "cuda" and workers == 1 else 1
        return Packer(pack_keys(pending.values(), trained), self.num_steps, size, self.num_trials, workers)


def prepare(
    path: str | Path,
    overrides: Sequence[str],
    machine: Machine,
    *,
    only: str | None = None,
    smoke: bool = False,
    measure_only: bool = False,
    table: str | None = None,
) -> Prepared:
    """Read, check and expand a sweep file. Raises ConfigError with every fault.

    ``only``: do what the runs that it selects need, see engine/only.py. ``smoke``: every cell cut short, in a store of
    its own, see engine/smoke.py; ``only`` selects by the settings of the file, as without ``smoke``. ``measure_only``:
    do the measurements and what they need, and sample from no run; with ``table`` those alone that make it.
    """
    sweep, faults = check_sweep(path, overrides)
    faults += parse(only)[1] if only is not None else []
    if sweep is None:
        raise ConfigError(faults)
    execution = sweep.execution
    stores = [sweep.results, smoke_results(sweep.results)] if smoke else [sweep.results]
    faults += [Fault("results", message) for store in stores for message in Store.faults(store)]
    faults += resource_faults(execution, machine)
    faults += worker_faults(execution, [cell.defense for cell in sweep.cells])
    faults += tracker_faults(sweep.trackers, os.environ)
    gpus = gpus_per_trial(execution, machine)
    sources = Sources(sweep.path.parent, cuda=gpus > 0, faults=faults, endpoints=sweep.endpoints)
    vectors = VectorTasks(sweep.vectors, sources)
    graph = Graph(sweep, sources, vectors)
    cells = _look_up_all(sweep, sources, vectors, graph)
    measures = _measures(sweep, sources, vectors, graph)
    weights = WeightTasks(sweep, sources, graph)
    weights.add_all()
    if measure_only and not sweep.measure:
        faults.append(Fault("measure", "the file has no measurements; `shiftgrad run` does its runs"))
    if table is not None and not any(table in (*one.tables, *one.merged_tables) for one in sweep.measure.values()):
        faults.append(Fault("measure", f"no measurement of the file makes the table {table!r}"))
    if faults:
        raise ConfigError(faults)
    chosen, only_faults = select(only, graph.all_entries) if only is not None else (None, [])
    faults += only_faults
    proved = Proved.read(stores[-1], sweep.name)
    graph.proofs.prove(proved)
    if faults:
        raise ConfigError(faults)
    if smoke:
        graph = graph.smoke(cells)
        measures = _measures(sweep, sources, graph.vectors, graph, smoke=True)
        weights = WeightTasks(sweep, sources, graph, smoke=True)
        weights.add_all()
    asked = graph.rows(chosen)
    vectors = graph.vectors  # of a smoke run not those of the sweep
    jobs: dict[str, Job] = {
        **vectors.answer_jobs,
        **vectors.jobs,
        **measures.base_jobs,
        **graph.base_jobs,
        **graph.run_jobs,
        **measures.run_jobs,
        **weights.pile_jobs,
        **weights.profile_jobs,
        **graph.edited_jobs,
    }
    asked_jobs = jobs if only is None else part_of(jobs, asked)
    if measure_only:
        asked_jobs = measurements_of(asked_jobs, table)
    known = {**vectors.judge_tasks, **graph.judge_tasks}
    judge_tasks = _judge_tasks(known, asked_jobs, () if measure_only else asked)
    judge_gpus = gpus_per_local_judge(execution, machine)
    costs = graph.costs()
    gpus_of_judges = judge_gpus * _num_local_judges(judge_tasks.values())
    gpus_at_once = gpus * execution.workers
    take_turns = is_short_of_gpus(gpus_at_once, gpus_of_judges, machine)
    one_waits = is_short_of_gpus(gpus, gpus_of_judges, machine)  # what waits for a judge has one worker
    if one_waits and any(_waits_for_local_judge(job, judge_tasks) for job in asked_jobs.values()):
        # Tune keeps the process of a trial that is done, with its GPU, until it knows what comes next: for ever, here
        message = (
            f"what is made of judged answers waits for its judge, and {machine.num_gpus:g} GPUs are not enough for a "
            f"trial ({gpus:g}) beside local judges ({gpus_of_judges:g}); "
            + ("" if execution.workers > 1 else "let them share (gpus_per_trial: 0.5, gpus_per_local_judge: 0.5), or ")
            + "judge on the CPU (gpus_per_local_judge: 0)"
        )
        raise ConfigError([Fault("execution.gpus_per_local_judge", message)])
    return Prepared(
        sweep=replace(sweep, results=stores[-1]),
        manifest=Manifest(
            name=sweep.name,
            runs=graph.rows(None),
            vectors=vectors.ids,
            asked=vectors.asked_entries(),
            measurements=(*measures.entries, *weights.measure_entries),
            piles=tuple(weights.pile_entries),
        ),
        jobs=asked_jobs,
        judge_tasks=judge_tasks,
        inputs=sources.inputs,
        costs=costs,
        measure_costs=measures.costs(),
        asked=asked,
        device="cuda" if gpus > 0 else "cpu",
        num_trials=num_trials_beside(num_trials(execution, machine), gpus_at_once, gpus_of_judges, machine),
        gpus_per_trial=gpus,
        gpus_per_local_judge=judge_gpus,
        num_steps={entry.run_id: costs[entry.label].num_steps for entry in graph.entries},
        judges_take_turns=take_turns,
        proved=proved.kept,
        only=only,
        smoke=smoke,
        measure_only=measure_only,
    )


def _measures(
    sweep: Sweep, sources: Sources, vectors: VectorTasks, graph: Graph, *, smoke: bool = False
) -> MeasureTasks:
    """The measurements of the sound runs of ``graph`` and of their bases."""
    measures = MeasureTasks(sweep, sources, vectors, graph.proofs)
    runs = [
        Target(job.label, job.id, job.base, graph.shapes[job.id], False, job.merged) for job in graph.run_jobs.values()
    ]
    bases = base_targets(sweep, sources, graph.base_jobs.values(), graph.shapes)
    measures.add_all(bases, runs, [] if bases else unsound_targets(sweep, sources), smoke=smoke)
    return measures


def _waits_for_local_judge(job: Job, tasks: Mapping[str, JudgeTask]) -> bool:
    """Whether the job can begin only when a local judge has scored something."""
    ids = job.judge_ids.values() if isinstance(job, PileJob) else job.judge_ids if isinstance(job, VectorJob) else ()
    return any(isinstance(tasks[judge_id].metric.asking, LocalMetric) for judge_id in ids if judge_id in tasks)


def _num_local_judges(tasks: Iterable[JudgeTask]) -> int:
    """Models of local judges: each has a process of its own."""
    asking = [task.metric.asking for task in tasks]
    return len({json.dumps(one.base.identity()) for one in asking if isinstance(one, LocalMetric)})


def _judge_tasks(
    known: Mapping[str, JudgeTask], jobs: Mapping[str, Job], entries: Sequence[RunEntry]
) -> dict[str, JudgeTask]:
    """The judging tasks that vectors and piles of ``jobs`` and rows of the sweep need."""
    ids = [judge_id for job in jobs.values() if isinstance(job, VectorJob) for judge_id in job.all_judge_ids]
    ids += [judge_id for job in jobs.values() if isinstance(job, PileJob) for judge_id in job.judge_ids.values()]
    ids += [judge_id for entry in entries for judge_id in entry.judge_ids.values()]
    return {judge_id: known[judge_id] for judge_id in ids}


def _look_up_all(sweep: Sweep, sources: Sources, vectors: VectorTasks, graph: Graph) -> list[SoundCell]:
    """Look up all cells, and return those in which everything was found, which are in the graph now: each after the
    one that it starts from, else in the order of the file."""
    sound: list[SoundCell] = []
    seen: dict[str, str] = {}  # what cannot be in the graph, as JSON -> what it is called

    def note_twin(content: str, name: str) -> None:
        if content in seen:
            message = f"two cells are the same: {seen[content]} and {name}; let them differ or remove one"
            sources.faults.append(Fault("runs", message))
        seen.setdefault(content, name)

    for index, cell in enumerate(sweep.cells):
        if cell.label == BASE or cell.label.startswith(f"{BASE} #"):
            message = f"{cell.label!r} is what the untrained base is called; choose another label"
            sources.faults.append(Fault(sweep.key(index, "label"), message))

        def key(*path: str | int, index: int = index) -> str:
            return sweep.key(index, *path)

        found = look_up(named(cell), key, sources, vectors)
        if found is not None:
            sound.append(SoundCell(index, cell, found))
        else:
            note_twin(cell.model_dump_json(exclude={"label"}), repr(cell.label))
    for faulty in sweep.faulty:
        look_up(faulty.named, faulty.key, sources, vectors)
        note_twin(faulty.content, faulty.block)
    sound.sort(key=lambda one: depth_of(sweep.parents, one.index))
    for one in sound:
        graph.add(one)
    return sound

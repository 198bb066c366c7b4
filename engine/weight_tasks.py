"""Steering in weight space in the graph of a sweep: piles, directions and edited models of the runs that are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from analysis.judges import MetricConfig
from analysis.manifest import EditEntry, MeasureEntry, PileEntry, Scalar
from analysis.weight_rows import DELTA
from analysis.weight_space import DirectionConfig, Place, place_of
from analysis.weight_space.config import WeightSteeringConfig
from analysis.weight_space.parameters import is_chosen, module_names
from engine.config_faults import nearest, show
from engine.graph import Graph, SoundCell
from engine.smoke import smoke_questions, smoke_sampling
from engine.sources import Sources
from engine.sweep_file import Sweep
from engine.tasks import QuestionText, SampleTask, base_run_id, task_id
from engine.weight_jobs import PROFILE_TABLES, EditTask, PileJob, ProfileJob, direction_recipe
from trainables.base_model import empty_model
from trainables.errors import Fault
from trainables.sample import SamplingConfig

SECTION = "weight_steering"


@dataclass(frozen=True)
class _Piles:
    """The piles of one finetuned run: ids of their shards by name."""

    sound: SoundCell
    run_id: str
    shard_ids: Mapping[str, tuple[str, ...]]


class WeightTasks:
    """Jobs and rows that the section ``weight_steering`` adds to a graph whose runs are there."""

    def __init__(self, sweep: Sweep, sources: Sources, graph: Graph, *, smoke: bool = False) -> None:
        self.sweep = sweep
        self.sources = sources
        self.graph = graph
        self.is_smoke = smoke
        self.pile_jobs: dict[str, PileJob] = {}
        self.profile_jobs: dict[str, ProfileJob] = {}
        self.pile_entries: list[PileEntry] = []
        self.measure_entries: list[MeasureEntry] = []
        self._places: dict[str, Mapping[str, Place]] = {}

    def add_all(self) -> None:
        """Find what the section names and put it into the graph; faults go to the sources' list."""
        config = self.sweep.weight_steering
        if config is None:
            return
        is_sound = self._check_names(config)
        for position, label in enumerate(config.labels):
            key = f"{SECTION}.finetuned" + ("" if isinstance(config.finetuned, str) else f"[{position}]")
            sound = self.graph.sound.get(label)
            if sound is None:
                if not self.sweep.faulty:  # what a faulty cell is called is not known
                    self._fault(key, f"no run {show(label)}; {nearest(label, self.graph.sound)}")
                continue
            if self._check(config, label, sound) and is_sound:
                piles = self._add_piles(config, label, sound)
                self._add_profile(config, label, piles)
                self._add_edits(config, label, piles)

    def _fault(self, key: str, message: str) -> None:
        fault = Fault(key, message)
        if fault not in self.sources.faults:
            self.sources.faults.append(fault)

    def _check_names(self, config: WeightSteeringConfig) -> bool:
        """Whether piles and directions are named that there are."""
        before = len(self.sources.faults)
        for name, direction in config.directions.items():
            here = f"{SECTION}.directions.{name}"
            if name == DELTA:
                self._fault(here, f"what the finetuning changed is called {DELTA} in tables; give another name")
            for field in ("of", "minus"):
                pile = getattr(direction, field)
                if pile not in config.piles:
                    self._fault(f"{here}.{field}", f"no pile {show(pile)}; {nearest(pile, config.piles)}")
            if direction.of == direction.minus:
                self._fault(f"{here}.minus", f"{show(direction.minus)} is the pile of `of` too: nothing is left")
        for number, edits in enumerate(config.edits):
            for position, name in enumerate(edits.directions):
                if name not in config.directions:
                    key = f"{SECTION}.edits[{number}].directions[{position}]"
                    self._fault(key, f"no direction {show(name)}; {nearest(name, config.directions)}")
        return len(self.sources.faults) == before

    def _check(self, config: WeightSteeringConfig, label: str, sound: SoundCell) -> bool:
        """Whether the section fits this run: its metrics, its base, its layers and modules."""
        before = len(self.sources.faults)
        for name, where in config.piles.items():
            for metric in where:
                if metric not in sound.found.metrics:
                    known = nearest(metric, sound.found.metrics)
                    self._fault(
                        f"{SECTION}.piles.{name}.{metric}", f"{show(label)} has no metric {show(metric)}; {known}"
                    )
        base = sound.found.base
        if base.dtype != "float32":
            message = (
                f"{show(label)} has a base in {base.dtype}, in which most of alpha V would be rounded away; "
                "write base.dtype: float32"
            )
            self._fault(f"{SECTION}.finetuned", message)
        if self.graph.trains[sound.index].start.merged:
            message = (
                f"{show(label)} stands on another run's adapter merged into the base, so its own adapter is not all "
                "that was changed; start that run with adapter: continue"
            )
            self._fault(f"{SECTION}.finetuned", message)
        gradient = config.gradient
        if gradient.loss == "kl":
            self._check_reference(gradient.reference, label, sound)
        chosen = self._check_chosen(f"{SECTION}.gradient", sound, gradient.layers, gradient.modules, None)
        for name, direction in config.directions.items():
            self._check_chosen(f"{SECTION}.directions.{name}", sound, direction.layers, direction.modules, chosen)
        if config.answers is not None:
            self._questions(config.answers.questions)
            if config.answers.interventions:
                message = "gradients are taken of the model itself, so nothing may be at work while it answers"
                self._fault(f"{SECTION}.answers.interventions", f"{message}; leave it out")
        elif sound.cell.evaluation.interventions:
            message = f"{show(label)} is evaluated under interventions, and gradients are taken of the model itself"
            self._fault(f"{SECTION}.answers", f"{message}; say what it is asked for its piles")
        return len(self.sources.faults) == before

    def _check_reference(self, reference: str, label: str, sound: SoundCell) -> None:
        key = f"{SECTION}.gradient.reference"
        known = {"base": sound, **self.graph.sound}
        if reference == label:
            self._fault(key, f"{show(label)} has no divergence from itself; give base or another run")
        elif reference not in known:
            self._fault(key, f"no run {show(reference)}; {nearest(reference, known)}")
        elif known[reference].found.base.identity() != sound.found.base.identity():
            self._fault(key, f"{show(reference)} and {show(label)} have other bases; give a run over the same one")
        elif reference != "base" and self.graph.trains[known[reference].index].start.merged:
            self._fault(key, f"{show(reference)} stands on an adapter merged into the base; give a run over the base")

    def _check_chosen(
        self,
        key: str,
        sound: SoundCell,
        layers: tuple[int, ...] | None,
        modules: tuple[str, ...] | None,
        among: frozenset[str] | None,
    ) -> frozenset[str] | None:
        """The parameters that are chosen (``among`` these), None for all; that there are none is a fault."""
        if layers is None and modules is None:
            return among
        places = self._places_of(sound)
        last = sound.found.shape.num_layers + 1
        beyond = [layer for layer in layers or () if layer > last]
        if beyond:
            message = f"there is no layer {beyond[0]}; the model has 0 (embeddings) to {last} (what follows its blocks)"
            self._fault(f"{key}.layers", message)
        known = module_names(places.values())
        unknown = [module for module in modules or () if module not in known]
        if unknown:
            self._fault(f"{key}.modules", f"the model has no module {show(unknown[0])}; {nearest(unknown[0], known)}")
        chosen = frozenset(
            name
            for name, place in places.items()
            if is_chosen(place, layers, modules) and (among is None or name in among)
        )
        if not chosen and not beyond and not unknown:
            where = "" if among is None else " among those that the gradient is taken of"
            self._fault(f"{key}.{'layers' if layers is not None else 'modules'}", f"no parameter is chosen{where}")
        return chosen

    def _places_of(self, sound: SoundCell) -> Mapping[str, Place]:
        base = sound.found.base
        key = base.model_dump_json()
        if key not in self._places:
            self._places[key] = place_of(empty_model(base))
        return self._places[key]

    def _questions(self, trait: str) -> tuple[QuestionText, ...] | None:
        found = self.sources.trait(trait, f"{SECTION}.answers.questions")
        if found is None:
            return None
        if not found[0].questions:
            self._fault(f"{SECTION}.answers.questions", f"trait {show(trait)} has no questions")
            return None
        return tuple(QuestionText(id=question.id, text=question.question) for question in found[0].questions)

    def _asked(self, config: WeightSteeringConfig, label: str, sound: SoundCell) -> tuple[SampleTask, dict[str, str]]:
        """The answers that piles are made of, and the judging tasks of the metrics that make them."""
        metrics = {metric: sound.found.metrics[metric] for where in config.piles.values() for metric in where}
        if config.answers is None:
            return self.graph.judged(sound, self.graph.run_ids[label], metrics)
        questions = self._questions(config.answers.questions)
        assert questions is not None, "checked"
        sampling = SamplingConfig(**{name: getattr(config.answers, name) for name in SamplingConfig.model_fields})
        if self.is_smoke:
            questions, sampling = smoke_questions(questions), smoke_sampling(sampling)
        return self.graph.asked_too(sound, self.graph.run_ids[label], questions, sampling, metrics)

    def _add_piles(self, config: WeightSteeringConfig, label: str, sound: SoundCell) -> _Piles:
        run_id = self.graph.run_ids[label]
        sample, judge_ids = self._asked(config, label, sound)
        metrics: dict[str, MetricConfig] = {metric: sound.found.metrics[metric] for metric in judge_ids}
        gradient = config.gradient
        reference_id = reference = None
        if gradient.loss == "kl":
            reference_id = None if gradient.reference == "base" else self.graph.run_ids[gradient.reference]
            reference = reference_id or base_run_id(sound.found.base)
        count = len(sample.questions) * sample.sampling.samples
        size = gradient.answers_per_shard
        parts = [(start, min(start + size, count)) for start in range(0, count, size)]
        shard_ids: dict[str, tuple[str, ...]] = {}
        for place, (name, where) in enumerate(config.piles.items()):
            slice_of = (place % 2, 2) if self.is_smoke else None
            ids = []
            for number, part in enumerate(parts, start=1):
                identity = task_id(
                    PileJob.identity(run_id, sample.id, judge_ids, where, part, gradient, reference, slice_of)
                )
                ids.append(identity)
                self.pile_jobs.setdefault(
                    identity,
                    PileJob(
                        id=identity,
                        label=f"pile {name} of {label} {number}/{len(parts)}",
                        name=name,
                        base=sound.found.base,
                        run_id=run_id,
                        sample_id=sample.id,
                        judge_ids=judge_ids,
                        scales={metric: config.bounds for metric, config in metrics.items()},
                        piles=config.piles,
                        start=part[0],
                        stop=part[1],
                        gradient=gradient,
                        reference_id=reference_id,
                        slice_of=slice_of,
                    ),
                )
            shard_ids[name] = tuple(ids)
            judged = {metric: judge_ids[metric] for metric in where}
            self.pile_entries.append(
                PileEntry(
                    run=label, name=name, shard_ids=tuple(ids), sample_id=sample.id, judge_ids=judged, where=where
                )
            )
        return _Piles(sound, run_id, shard_ids)

    def _add_profile(self, config: WeightSteeringConfig, label: str, piles: _Piles) -> None:
        ids: dict[str, str] = {}
        directions: dict[str, DirectionConfig] = {}
        for name, direction in config.directions.items():
            of_ids, minus_ids = piles.shard_ids[direction.of], piles.shard_ids[direction.minus]
            recipe = direction_recipe(direction, of_ids, minus_ids, piles.run_id)
            ids[name] = task_id({"kind": "weights/direction", **recipe})
            directions[ids[name]] = direction
        identity = task_id(ProfileJob.identity(piles.run_id, list(ids.values())))
        self.profile_jobs[identity] = ProfileJob(
            id=identity,
            label=f"profile of {label}",
            base=piles.sound.found.base,
            run_id=piles.run_id,
            directions=directions,
            of_ids={one: piles.shard_ids[direction.of] for one, direction in directions.items()},
            minus_ids={one: piles.shard_ids[direction.minus] for one, direction in directions.items()},
        )
        self.measure_entries.append(
            MeasureEntry(
                name=SECTION,
                kind=SECTION,
                run=label,
                run_id=piles.run_id,
                shard_ids=(),
                tables=(),
                merge_id=identity,
                merged_tables=PROFILE_TABLES,
                names={one: name for name, one in ids.items()},
                config=config.model_dump(mode="json"),
            )
        )

    def _add_edits(self, config: WeightSteeringConfig, label: str, piles: _Piles) -> None:
        for key, name, alpha, on in _edits(config):
            direction = config.directions[name]
            is_on_base = on == "base"
            base_label = self.graph.base_of[label].label
            target = base_label if is_on_base else label
            of_run = f" of {label}" if is_on_base and len(config.labels) > 1 else ""
            task = EditTask(
                finetuned_id=piles.run_id,
                on_base=is_on_base,
                alpha=alpha,
                direction=direction,
                of_ids=piles.shard_ids[direction.of],
                minus_ids=piles.shard_ids[direction.minus],
            )
            entry = EditEntry(
                finetuned=label,
                finetuned_id=piles.run_id,
                target=target,
                on_base=is_on_base,
                alpha=alpha,
                name=name,
                direction=direction.model_dump(mode="json"),
                of_ids=task.of_ids,
                minus_ids=task.minus_ids,
            )
            settings: dict[str, Scalar] = {"steering.on": on, "steering.direction": name, "steering.alpha": alpha}
            cell = piles.sound.cell
            here = cell.evaluation.model_copy(update={"answers_from": None})  # no server has it
            sound = replace(piles.sound, cell=cell.model_copy(update={"evaluation": here}))
            fault = self.graph.add_edited(sound, label, f"{target} {alpha:+g} {name}{of_run}", task, entry, settings)
            if fault is not None:
                self._fault(key, fault)


def _edits(config: WeightSteeringConfig) -> Iterator[tuple[str, str, float, str]]:
    """(where it stands, direction, alpha, model) of every edit."""
    for number, edits in enumerate(config.edits):
        for name in edits.directions:
            for on in edits.on:
                for alpha in edits.alphas:
                    yield f"{SECTION}.edits[{number}]", name, alpha, on

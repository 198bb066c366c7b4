"""Training configs of persona_vectors as sweep files.

What changes the numbers there and cannot be said here is a fault (another loss, rslora, ablation while training); what
only changes how it is done is said (the optimizer's 8 bits, the name on the hub). A config has no evaluation: the trait
and the plain answers are found where the project keeps them, or asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from analysis.formats.base import HEADING, Foreign, Format, Hints, Imported, MadeChat, MadeSweep, raise_faults
from analysis.formats.chat_jsonl import ChatJsonl
from analysis.formats.persona_trait import ignored
from trainables.errors import ConfigError, Fault
from trainables.training_config import TrainingConfig, num_optimizer_steps

_KNOWN = {
    "model", "training_file", "test_file", "max_seq_length", "loss", "is_peft", "target_modules", "lora_bias", "r",
    "lora_alpha", "lora_dropout", "use_rslora", "epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "warmup_steps", "learning_rate", "optim", "weight_decay", "lr_scheduler_type",
    "seed", "output_dir", "train_on_responses_only", "enable_steering_during_training", "steering_config",
}  # fmt: skip
_OPTIMIZERS = ("adamw_8bit", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_bnb_8bit", "paged_adamw_8bit")
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "loss": ("sft",),
    "is_peft": (True,),
    "lora_bias": ("none",),
    "use_rslora": (False,),
    "lr_scheduler_type": ("linear", "cosine", "constant"),
    "optim": _OPTIMIZERS,
}


class PersonaTraining(Format):
    name = "persona-training"
    what = "a training config of persona_vectors (.json: model, training_file, r, lora_alpha, learning_rate, ...)"
    hints = frozenset({"trait", "plain_answers"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        return file.suffix == ".json" and isinstance(file.json, dict) and {"model", "training_file"} <= set(file.json)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        return _Config(file, hints).imported(self.name)


class _Config:
    """One config being read; faults gather."""

    def __init__(self, file: Foreign, hints: Hints) -> None:
        self.file, self.hints, self.raw = file, hints, file.json
        self.faults: list[Fault] = []
        self.lines: list[str] = []
        self.root = Path.cwd()

    def imported(self, name: str) -> Imported:
        raw = self.raw
        for key, allowed in _MUST_BE.items():
            if raw.get(key, allowed[0]) not in allowed:
                words = ", ".join(repr(one) for one in allowed)
                self._fault(key, f"{raw[key]!r} cannot be said in a sweep; allowed: {words}")
        train, chat, num_rows = self._training_file()
        accumulation = self._number("gradient_accumulation_steps", int)
        micro = self._number("per_device_train_batch_size", int)
        training: dict[str, Any] = {"batch_size": micro * accumulation, "micro_batch_size": micro}
        training["learning_rate"] = self._number("learning_rate", float)
        if raw.get("max_steps") is not None:
            training["max_steps"] = self._number("max_steps", int)
        else:
            training["epochs"] = self._number("epochs", float)
        training["weight_decay"] = self._number("weight_decay", float)
        training["schedule"] = raw.get("lr_scheduler_type")
        training["lora"] = {
            "rank": self._number("r", int),
            "alpha": self._number("lora_alpha", float),
            "dropout": self._number("lora_dropout", float),
        }
        if isinstance(raw.get("target_modules"), list):
            training["lora"]["target_modules"] = raw["target_modules"]
        warmup_steps, length = self._number("warmup_steps", int), self._number("max_seq_length", int)
        seed = self._number("seed", int)
        only_responses = raw.get("train_on_responses_only")
        if not isinstance(only_responses, bool):
            self._fault("train_on_responses_only", f"must be true or false; got {only_responses!r}")
        vectors, defense = self._steering()
        evaluation = self._evaluation()
        raise_faults(self.faults)
        training["warmup_ratio"] = self._warmup_ratio(warmup_steps, num_rows, training)
        sweep: dict[str, Any] = {
            "name": self.file.name,
            "base": {"model": raw["model"]},
            "data": {
                "train": train,
                "max_length": length,
                "loss_on": "responses" if only_responses else "all",
            },
            **({"vectors": vectors} if vectors else {}),
            "training": training,
            "runs": [{"defense": defense, "seed": seed}],
            "evaluation": evaluation,
        }
        self.lines.append(
            f"{micro} rows x {accumulation} = batches of {micro * accumulation}; AdamW in full precision in place of "
            f"{raw['optim']}; gradients are clipped to norm 1, as transformers does"
        )
        self.lines += ignored(raw, _KNOWN - {"test_file", "output_dir"})
        made = ([] if chat is None else [chat]) + [MadeSweep(self.file.name, sweep)]
        return Imported(name, tuple(made), tuple(self.lines))

    def _fault(self, key: str, message: str) -> None:
        self.faults.append(self.file.fault(message, key))

    def _number(self, key: str, kind: Callable[[Any], Any]) -> Any:
        """A number that the config has to have: what the project takes without it is not known here."""
        value = self.raw.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or kind(value) != value or value < 0:
            self._fault(key, f"must be a {'whole number' if kind is int else 'number'} from 0; got {value!r}")
            return 1
        return kind(value)

    def _find(self, text: str) -> Path | None:
        """A file that the config names: from where the program was started there, which is the project's folder."""
        roots = [self.file.path.absolute().parent, *self.file.path.absolute().parents[1:4], Path.cwd()]
        for root in roots:
            if (root / text).is_file():
                self.root = root
                return root / text
        return None

    def _training_file(self) -> tuple[str, MadeChat | None, int]:
        """Where the rows are, the rows where several files become one, and how many there are."""
        named = self.raw["training_file"]
        texts = named if isinstance(named, list) else [named]
        if not texts or not all(isinstance(text, str) for text in texts):
            self._fault("training_file", f"must be a file or a list of files; got {named!r}")
            return "", None, 0
        found = [self._find(text) for text in texts]
        for text, place in zip(texts, found, strict=True):
            if place is None:
                self._fault(
                    "training_file", f"no file {text!r} beside the config, above it or in the current directory"
                )
        places = [place for place in found if place is not None]
        rows: list[tuple[dict[str, str], ...]] = []
        for place in places:
            try:
                for made in ChatJsonl().read(Foreign(place), Hints()).made:
                    assert isinstance(made, MadeChat)
                    rows += made.rows
            except ConfigError as error:
                self.faults += error.faults
        if len(places) == len(texts) == 1:
            return str(places[0]), None, len(rows)
        name = f"{self.file.name}_train"
        self.lines.append(f"{len(places)} training files are joined in order: data/{name}.jsonl")
        return f"data/{name}.jsonl", MadeChat(name, tuple(rows)), len(rows)

    def _warmup_ratio(self, warmup_steps: int, num_rows: int, training: dict[str, Any]) -> float:
        """The share of the steps that ``warmup_steps`` are."""
        try:
            num_steps = num_optimizer_steps(num_rows, TrainingConfig.model_validate(training))
        except ValidationError as error:
            raise ConfigError(
                [self.file.fault(f"{one['loc']}: {one['msg']}", "training") for one in error.errors()], HEADING
            ) from error
        if warmup_steps >= num_steps:
            self._fault(
                "warmup_steps", f"{warmup_steps} of {num_steps} steps; the warmup must be shorter than the training"
            )
            raise_faults(self.faults)
        self.lines.append(f"{num_rows} rows, {num_steps} steps, of them {warmup_steps} warmup")
        return warmup_steps / num_steps

    def _steering(self) -> tuple[dict[str, Any], Any]:
        raw = self.raw.get("steering_config")
        if not self.raw.get("enable_steering_during_training", False):
            return {}, "none"
        key = "steering_config"
        if not isinstance(raw, dict):
            self._fault(key, "must be an object, as enable_steering_during_training is true")
            return {}, "none"
        if raw.get("type", "steer") != "steer":
            self._fault(f"{key}.type", f"{raw['type']!r} while training is not read; allowed: 'steer'")
        path, layers, coefficient = (raw.get(name) for name in ("steering_vector_path", "layers", "steering_coef"))
        place = self._find(path) if isinstance(path, str) else None
        if place is None:
            self._fault(f"{key}.steering_vector_path", f"no file {path!r} beside the config, above it or here")
        if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
            self._fault(f"{key}.layers", f"must be a list of layers; got {layers!r}")
            layers = []
        if not isinstance(coefficient, int | float) or isinstance(coefficient, bool) or coefficient == 0:
            self._fault(f"{key}.steering_coef", f"must be a number other than 0; got {coefficient!r}")
        name = place.stem if place is not None else "vector"
        items = [{"kind": "pps", "vector": name, "layer": layer, "coefficient": coefficient} for layer in layers]
        self.lines.append(
            "steering in training: pps at the same layers (layer l is the output of block l - 1, as there)"
        )
        return {name: {"file": str(place), "rows": "embedding"}}, items[0] if len(items) == 1 else items

    def _evaluation(self) -> dict[str, Any]:
        """The trait of the folder that the training file is in, as the project has it, or what the user says."""
        named = self.raw["training_file"]
        first = Path(named[0] if isinstance(named, list) and named else str(named))
        trait, plain = self.hints.trait, self.hints.plain_answers
        if trait is None:
            place = self.root / "data_generation" / "trait_data_eval" / f"{first.parent.name}.json"
            trait = str(place) if place.is_file() else None
        if plain is None:
            place = self.root / first.parent / "normal.jsonl"
            plain = str(place) if place.is_file() else None
        for value, hint, what in ((trait, "trait", "trait to ask about"), (plain, "plain_answers", "good answers")):
            if value is None:
                self.faults.append(
                    self.file.fault(f"the config has no evaluation; give {Hints.flag(hint)}, the {what}")
                )
        self.lines.append(
            f"evaluation: questions of {trait}, plain answers {plain}; a judge of the trait and of coherence"
        )
        return {
            "questions": trait,
            "plain_answers": plain,
            "samples": 10,
            "max_new_tokens": 500,
            "metrics": {
                "trait": {"judge": "openai", "trait": trait},
                "coherence": {"judge": "openai", "prompt": "coherence"},
            },
        }

"""One training step of ours, of a plain loop, and of Hugging Face's Trainer, on the same rows of the quickstart.

All three train the same LoRA adapter (every linear module of the blocks, the quickstart's rank and alpha) from the
same initial values over the same frozen base with AdamW, clipping and a linear schedule, in the same micro-batches.
The plain loop is what one would write with transformers, PEFT and torch: rows made into tokens beforehand, padded to
the longest of a micro-batch, prompts masked in the labels, and the model's own loss, told how many tokens the whole
batch has, so that accumulation is exact.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from interleaved import Stepper

from trainables.base_model import BaseConfig, LoadedBase, load_base, resolve_base
from trainables.chat_data import ChatEncoder, DataConfig, Encoded, encode_all
from trainables.defenses import DefenseConfig
from trainables.lora import LoraSettings, adapter_parameters, add_adapter, linear_module_names
from trainables.randomness import permutation
from trainables.rows import SignalRow, TrainingRow
from trainables.train import Packing, RunSpec, train_pack
from trainables.training_config import TrainingConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "configs" / "data" / "bridge" / "on_trait.jsonl"
MAX_LENGTH = 512
SEED = 0
# As configs/sweeps/quickstart.yaml.
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "schedule": "linear",
    "lora": LoraSettings(rank=16, alpha=32),
}

Pause = Callable[[], None]
Batch = list[list[Encoded]]  # the micro-batches of an optimizer step


@dataclass(frozen=True)
class Setting:
    """What is trained: the base, the data, and how many steps."""

    base: LoadedBase
    rows: Sequence[Any]
    training: TrainingConfig
    num_steps: int

    @classmethod
    def load(cls, device: torch.device, num_steps: int, model: str) -> Setting:
        resolved, _ = resolve_base(BaseConfig(model=model), cuda=device.type == "cuda")
        rows = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()]
        return cls(load_base(resolved, device), rows, TrainingConfig(max_steps=num_steps, **SETTINGS), num_steps)

    def batches(self) -> list[Batch]:
        """The rows of every step in whole (ours leaves off what follows the answer), in our micro-batches."""
        encoded, _ = encode_all(self.rows, ChatEncoder(self.base.tokenizer, MAX_LENGTH), False)
        size, micro = self.training.batch_size, self.training.micro_batch_size or self.training.batch_size
        per_epoch = -(-len(encoded) // size)
        batches = []
        for step in range(self.num_steps):
            epoch, position = divmod(step, per_epoch)
            order = permutation(len(encoded), SEED, epoch)[position * size : (position + 1) * size]
            batch = sorted((encoded[index] for index in order), key=lambda row: -len(row.input_ids))
            batches.append([batch[start : start + micro] for start in range(0, len(batch), micro)])
        return batches


@dataclass
class _PausingSink:
    """A RunSink that keeps nothing but the losses and stands still between steps."""

    pause: Pause
    losses: list[float]

    def log(self, message: str) -> None: ...

    def progress(self, *, phase: str, done: int, total: int, **figures: float) -> None:
        del phase, done, total, figures
        self.pause()  # the last that a step does

    def training(self, row: TrainingRow) -> None:
        self.losses.append(row.loss)

    def signal(self, row: SignalRow) -> None: ...

    def adapter(self, train_id: str, folder: Path) -> None: ...

    def checkpoint(self, train_id: str, folder: Path) -> None: ...

    def load_checkpoint(self, train_id: str) -> Path | None:
        del train_id
        self.pause()  # the last before the first step
        return None


@dataclass
class Contender:
    """One way to train; ``losses`` grows by one per step."""

    stepper: Stepper
    losses: list[float] = field(default_factory=list)


def ours(
    name: str, setting: Setting, defense: Sequence[DefenseConfig] = (), vectors: dict[str, torch.Tensor] | None = None
) -> Contender:
    """``train_pack`` as a trial calls it, rows made into tokens and proved in every step."""
    losses: list[float] = []
    spec = RunSpec(
        train_id="run",
        rows=setting.rows,
        data=DataConfig(train=str(DATA), max_length=MAX_LENGTH),
        defense=defense,
        vectors=vectors or {},
        training=setting.training,
        seed=SEED,
    )

    def work(pause: Pause) -> None:
        train_pack(setting.base, [spec], {"run": _PausingSink(pause, losses)})

    return Contender(Stepper(name, work), losses)


def peft_model(setting: Setting) -> Any:
    """The base with PEFT's adapter on it, at our initial values."""
    from peft import LoraConfig, get_peft_model

    lora = setting.training.lora
    start = adapter_parameters(add_adapter(setting.base.fresh(), "default", lora, SEED), "default")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        target_modules=list(linear_module_names(setting.base.model)),
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(setting.base.fresh(), config)
    model.to(setting.base.device)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(start[parameter_name].data)
    return model.train()


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Input ids, attention mask and labels, padded on the right to the longest."""
    length = max(len(row.input_ids) for row in rows)
    lists: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        rest = length - len(row.input_ids)
        labels = [token if on else -100 for token, on in zip(row.input_ids, row.loss_mask, strict=True)]
        lists["input_ids"].append([*row.input_ids, *[pad_id] * rest])
        lists["attention_mask"].append([*[1] * len(row.input_ids), *[0] * rest])
        lists["labels"].append([*labels, *[-100] * rest])
    return {key: torch.tensor(values, device=device) for key, values in lists.items()}


def plain(setting: Setting) -> Contender:
    """A loop of transformers, PEFT and torch.optim.AdamW."""
    from transformers import get_scheduler

    losses: list[float] = []
    training = setting.training

    def work(pause: Pause) -> None:
        model = peft_model(setting)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
        scheduler = get_scheduler(training.schedule, optimizer, 0, setting.num_steps)
        pad_id = setting.base.tokenizer.pad_token_id
        batches = setting.batches()
        pause()
        for batch in batches:
            num_wanted = sum(sum(row.loss_mask) for rows in batch for row in rows)
            total = 0.0
            for rows in batch:
                inputs = collate(rows, pad_id, setting.base.device)
                loss = model(**inputs, num_items_in_batch=num_wanted, use_cache=False).loss
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(trained, training.max_gradient_norm or float("inf"))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(total)
            pause()

    return Contender(Stepper("plain", work), losses)


def packed(name: str, setting: Setting, specs: Sequence[RunSpec], packing: Packing) -> Contender:
    """``train_pack`` of several runs; a step is one step of each. ``losses`` are those of the last run."""
    losses: list[float] = []

    def work(pause: Pause) -> None:
        sinks = {spec.train_id: quiet_sink() for spec in specs}
        sinks[specs[-1].train_id] = _PausingSink(pause, losses)  # its row is the last of a step
        train_pack(setting.base, specs, sinks, packing=packing)

    return Contender(Stepper(name, work), losses)


def quiet_sink() -> _PausingSink:
    """A RunSink that keeps nothing and never stands still."""
    return _PausingSink(_go_on, [])


def _go_on() -> None:
    """No pause: another run of the pack makes one."""


def hugging_face_trainer(setting: Setting, change: Callable[[Any], None] | None = None) -> Contender:
    """transformers.Trainer with the same settings, rows in the same order; nothing is saved. ``change`` gets the model
    before it is trained."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []
    training = setting.training
    micro = training.micro_batch_size or training.batch_size

    def work(pause: Pause) -> None:
        class Pausing(TrainerCallback):  # type: ignore[misc,unused-ignore]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                pause()

            def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
                if "loss" in logs:
                    losses.append(float(logs["loss"]))
                    pause()

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=setting.num_steps,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=training.batch_size // micro,
                learning_rate=training.learning_rate,
                lr_scheduler_type=training.schedule,
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_gradient_norm or 0.0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                train_sampling_strategy="sequential",
                dataloader_pin_memory=False,
                use_cpu=setting.base.device.type == "cpu",
                seed=SEED,
            )
            pad_id = setting.base.tokenizer.pad_token_id
            model = peft_model(setting)
            if change is not None:
                change(model)
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=[row for batch in setting.batches() for rows in batch for row in rows],
                data_collator=lambda rows: collate(rows, pad_id),
                callbacks=[Pausing()],
            )
            trainer.remove_callback(PrinterCallback)  # standard output is the benchmark's
            trainer.train()

    return Contender(Stepper("trainer", work), losses)

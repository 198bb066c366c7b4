"""Where the time of a training step goes, in a plain loop and in ours.

    python benchmarks/step_parts.py [--rounds 8] [--device cpu]

Parts are found by leaving things out: the frozen base alone, forward and backward (the gradient of the activations);
what adapters on it add; what the head and the loss add; the optimizer's step with clipping; and what a whole step takes
beyond all of these. All are taken in turn, on the same micro-batches, and the medians are shown. A difference of two
medians is as uncertain as both: parts below a few hundredths of the step are not resolved.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; as a trial has it by default
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from interleaved import Clock, interleave
from training_steps import SEED, Batch, Setting, collate, ours, peft_model, plain

from trainables.chat_data import Encoded, cut, pad
from trainables.deepspeed_driver import DeepSpeedDriver, RunParameters
from trainables.lora import add_adapter
from trainables.lora_linear import use_lora_linear
from trainables.loss import token_losses
from trainables.model_parts import backbone
from trainables.native_ops import native_ops

Rows = Sequence[Encoded]
WARMUP = 2


class Side:
    """One way to compute: ``hidden`` of a model without its head, ``loss`` of the whole."""

    def __init__(self, name: str, base: torch.nn.Module, adapted: torch.nn.Module) -> None:
        self.name, self.base, self.adapted = name, base, adapted

    def hidden(self, model: torch.nn.Module, rows: Rows) -> torch.Tensor:
        raise NotImplementedError

    def loss(self, rows: Rows) -> torch.Tensor:
        raise NotImplementedError


def _plain_side(setting: Setting) -> Side:
    pad_id, device = setting.base.tokenizer.pad_token_id, setting.base.device

    class Plain(Side):
        def hidden(self, model: torch.nn.Module, rows: Rows) -> torch.Tensor:
            inputs = collate(rows, pad_id, device)
            found: torch.Tensor = backbone(model)(
                inputs_embeds=_embedded(model, inputs["input_ids"]),
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state
            return found

        def loss(self, rows: Rows) -> torch.Tensor:
            value: torch.Tensor = self.adapted(**collate(rows, pad_id, device), use_cache=False).loss
            return value

    return Plain("plain", setting.base.fresh(), peft_model(setting))


def _our_side(setting: Setting, stack: ExitStack) -> Side:
    adapted = add_adapter(setting.base.fresh(), "run", setting.training.lora, SEED).to(setting.base.device)
    use_lora_linear(adapted)
    base = setting.base.fresh()
    for model in (adapted, base):
        stack.enter_context(native_ops(model))
    pad_id, device = setting.base.tokenizer.pad_token_id, setting.base.device
    multiple = setting.training.pad_to_multiple_of

    class Ours(Side):
        def hidden(self, model: torch.nn.Module, rows: Rows) -> torch.Tensor:
            part = pad(cut(rows, len(rows))[0], pad_id, multiple, device)
            found: torch.Tensor = backbone(model)(
                inputs_embeds=_embedded(model, part.input_ids_bt), use_cache=False
            ).last_hidden_state
            return found

        def loss(self, rows: Rows) -> torch.Tensor:
            part = pad(cut(rows, len(rows))[0], pad_id, multiple, device)
            return token_losses(self.adapted, part.input_ids_bt, None, part.loss_mask_bt, plain_head=True).mean()

    return Ours("ours", base, adapted)


def _embedded(model: torch.nn.Module, ids_bt: torch.Tensor) -> torch.Tensor:
    """Embeddings that ask for a gradient where no adapter does, as a leaf."""
    embedded: torch.Tensor = backbone(model).get_input_embeddings()(ids_bt).detach()
    return embedded.requires_grad_(not any(parameter.requires_grad for parameter in model.parameters()))


def measure(setting: Setting, sides: Sequence[Side], num_rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """Seconds per optimizer step of every part, by side."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    batches = setting.batches()

    def timed(side: Side, part: str, work: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        started = clock()
        result = work()
        times[side.name, part].append(clock() - started)
        return result

    for number in range(num_rounds):
        rows = _one_micro_batch(batches, number)
        for side in sides:
            hidden = timed(side, "forward", lambda: side.hidden(side.base, rows))  # noqa: B023 - used at once
            assert hidden is not None
            upstream = torch.randn_like(hidden)
            timed(side, "backward", lambda: hidden.backward(upstream))  # noqa: B023
            timed(side, "adapted", lambda: side.hidden(side.adapted, rows).backward(upstream))  # noqa: B023
            timed(side, "loss", lambda: side.loss(rows).backward())  # noqa: B023
    per_step = setting.training.batch_size // (setting.training.micro_batch_size or setting.training.batch_size)
    parts: dict[str, dict[str, float]] = defaultdict(dict)
    for (side_name, part), values in times.items():
        parts[side_name][part] = per_step * statistics.median(values)
    return parts


def _one_micro_batch(batches: Sequence[Batch], number: int) -> Rows:
    batch = batches[number % len(batches)]
    return batch[number % len(batch)]


def plain_optimizer(setting: Setting, side: Side) -> Callable[[Rows], Callable[[], None]]:
    """Does a backward pass and returns the optimizer's step that follows."""
    training = setting.training
    trained = [parameter for parameter in side.adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trained, training.max_gradient_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    def prepare(rows: Rows) -> Callable[[], None]:
        side.loss(rows).backward()
        return step

    return prepare


def our_optimizer(setting: Setting, side: Side) -> Callable[[Rows], Callable[[], None]]:
    """The same with DeepSpeed, as ``train_pack`` does it."""
    training = setting.training
    trained = [parameter for parameter in side.adapted.parameters() if parameter.requires_grad]
    driver = DeepSpeedDriver(side.adapted, [RunParameters("run", trained, training.weight_decay)])

    def step() -> None:
        driver.clip("run", driver.gradient_norm("run"), training.max_gradient_norm or float("inf"))
        driver.step({"run": training.learning_rate})

    def prepare(rows: Rows) -> Callable[[], None]:
        driver.backward(side.loss(rows), last=True)
        return step

    return prepare


def show(parts: dict[str, dict[str, float]]) -> None:
    """Seconds of every part, and its share of the plain step."""
    whole = parts["plain"]["step"]
    print(f"{'part of a step':<44}{'plain':>16}{'ours':>16}")
    table: list[tuple[str, Callable[[dict[str, float]], float]]] = [
        ("frozen base, forward", lambda part: part["forward"]),
        ("frozen base, gradient of activations", lambda part: part["backward"]),
        ("LoRA products", lambda part: part["adapted"] - part["forward"] - part["backward"]),
        ("head and loss", lambda part: part["loss"] - part["adapted"]),
        ("clipping and optimizer", lambda part: part["optimizer"]),
        ("the rest", lambda part: part["step"] - part["loss"] - part["optimizer"]),
        ("whole step", lambda part: part["step"]),
    ]
    for name, of in table:
        columns = (f"{of(parts[side]):8.3f} s {of(parts[side]) / whole:5.2f}" for side in ("plain", "ours"))
        print(f"{name:<44}{''.join(columns)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device(options.device)
    clock = Clock(device)
    setting = Setting.load(device, options.rounds + WARMUP, options.model)
    print(f"{clock.name}, medians of {options.rounds} rounds, {device}", flush=True)
    contenders = [plain(setting), ours("ours", setting)]
    steps = interleave([one.stepper for one in contenders], options.rounds, clock, WARMUP)
    with ExitStack() as stack:
        sides = [_plain_side(setting), _our_side(setting, stack)]
        measure(setting, sides, 1, clock)  # warm up
        parts = measure(setting, sides, options.rounds, clock)
        rows = _one_micro_batch(setting.batches(), 0)
        for side, optimizer in zip(sides, (plain_optimizer, our_optimizer), strict=True):
            prepare = optimizer(setting, side)
            taken = []
            for _ in range(WARMUP + options.rounds):
                step = prepare(rows)
                started = clock()
                step()
                taken.append(clock() - started)
            parts[side.name] |= {
                "optimizer": statistics.median(taken[WARMUP:]),
                "step": statistics.median(steps[side.name]),
            }
    show(parts)


if __name__ == "__main__":
    main()

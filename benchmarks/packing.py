"""What a pack gains: runs per hour of n runs over one frozen base against the same runs one after another.

    python benchmarks/packing.py [--shapes embedded] [--sizes 1,2,4] [--pairs 20] [--quick]

Every run is steered (``pps`` in the middle of the model) along a vector of its own, with a seed of its own. On the CPU
the embedded model trains on the quickstart's data; on a GPU (``--device cuda``) models of the shapes of Qwen2.5 0.5B,
1.5B and 7B with random weights in bfloat16 train on made-up chats of up to 512 tokens, micro-batches of 4 rows. Prints
a table and, as its last line, one JSON object: by shape and n

over_sequential      runs per hour in packs of n over runs per hour of ours alone, median of the pairs, with _low and
                     _high, its 95 % interval. A step of the pack is one step of each of its runs.
over_trainer         the same over Hugging Face's Trainer + PEFT with the same steering as a forward hook.
peak_memory_over_one peak memory of a pack's training over that of one run, both beside nothing else (GPU only).
padding_share        share of the positions that went through the model that were padding.
trainer_flops_share  share of this device's FLOP/s (of a large matrix product in the model's dtype, measured) that the
                     Trainer reaches, at 4 FLOPs per position and frozen weight: forward, and backward of activations.
bound                1 / trainer_flops_share: what over_trainer would be if every FLOP ran at that rate.

Pack, single run and Trainer take their steps in turn. Times are CPU time of one thread on a CPU, wall time after
synchronization on a GPU.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; as a trial has it by default
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from interleaved import Clock, Ratio, interleave
from training_steps import DATA, MAX_LENGTH, Setting, hugging_face_trainer, packed, quiet_sink

from trainables.base_model import BaseConfig, LoadedBase, load_tokenizer, resolve_base
from trainables.chat_data import DataConfig
from trainables.defenses import Pps
from trainables.lora import LoraSettings
from trainables.loss import head_is_plain_linear
from trainables.model_parts import decoder_layers
from trainables.randomness import generator, pick
from trainables.train import RunSpec, train_pack
from trainables.training_config import TrainingConfig

EMBEDDED = "embedded:smollm2-135m-instruct"
# hidden size, blocks, heads, key-value heads, width of the MLP, words, whether head and embeddings are one
SHAPES = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
    "tiny": (64, 2, 4, 2, 128, 49152, True),  # only to see that it works
}
WARMUP = 2
ROWS_PER_MICRO_BATCH = 4
NUM_ROWS = 256
Figures = dict[str, float | None]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread"
    print(f"{device}: {name}; torch {torch.__version__}; packing {options.packing}", flush=True)
    figures: dict[str, dict[str, Figures]] = {}
    for shape in options.shapes.split(","):
        sizes = [int(size) for size in options.sizes.split(",")]
        figures[shape] = measure(shape, sizes, device, options)
    print(json.dumps(figures))


def measure(shape: str, sizes: Sequence[int], device: torch.device, options: argparse.Namespace) -> dict[str, Figures]:
    setting = _setting(shape, device, options.pairs + WARMUP, options.rank)
    specs = _specs(setting, max(sizes))
    clock = Clock(device)
    # The Trainer first: our driver makes a process group (of one), which it would take for a reason to use DDP.
    trainer = hugging_face_trainer(replace(setting, rows=specs[0].rows), _steering(specs[0]))
    one = packed("one", setting, specs[:1], "exact")
    packs = {size: packed(f"pack of {size}", setting, specs[:size], options.packing) for size in sizes}
    steppers = [trainer.stepper, one.stepper, *(pack.stepper for pack in packs.values())]
    seconds = interleave(steppers, options.pairs, clock, WARMUP)
    for stepper, taken in seconds.items():
        print(f"{shape}: {stepper:<12}{sorted(taken)[len(taken) // 2]:8.3f} s a step ({clock.name})", flush=True)
    share = _trainer_share(setting, sorted(seconds["trainer"])[options.pairs // 2], device, clock)
    alone_memory = _peak_memory(setting, specs[:1], options.packing)[0]
    found: dict[str, Figures] = {}
    for size in sizes:
        taken = seconds[f"pack of {size}"]
        speedups = {
            "over_sequential": Ratio.of("over_sequential", [size * t for t in seconds["one"]], taken),
            "over_trainer": Ratio.of("over_trainer", [size * t for t in seconds["trainer"]], taken),
        }
        memory, padding = _peak_memory(setting, specs[:size], options.packing)
        figures: Figures = {}
        for key, ratio in speedups.items():
            figures |= {key: ratio.median, f"{key}_low": ratio.low, f"{key}_high": ratio.high}
            print(f"n = {size:<3} {ratio.line()}", flush=True)
        figures["peak_memory_over_one"] = memory / alone_memory if memory and alone_memory else None
        figures |= {"padding_share": padding, "trainer_flops_share": share, "bound": 1 / share}
        found[str(size)] = {key: None if value is None else round(value, 4) for key, value in figures.items()}
        print(f"n = {size:<3} {found[str(size)]}", flush=True)
    return found


def _setting(shape: str, device: torch.device, num_steps: int, rank: int) -> Setting:
    lora = LoraSettings(rank=rank, alpha=2 * rank)
    if shape == "embedded":
        training = TrainingConfig(batch_size=8, micro_batch_size=2, learning_rate=1e-3, lora=lora, max_steps=num_steps)
        setting = Setting.load(device, num_steps, EMBEDDED)
        return replace(setting, training=training)
    training = TrainingConfig(batch_size=ROWS_PER_MICRO_BATCH, learning_rate=1e-4, lora=lora, max_steps=num_steps)
    return Setting(_random_base(shape, device), _made_up_rows(), training, num_steps)


def _random_base(shape: str, device: torch.device) -> LoadedBase:
    """A model of this shape with random weights; the tokenizer is the embedded model's, whose words it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, blocks, heads, kv_heads, width, words, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
        vocab_size=words,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.requires_grad_(False).eval()
    tokenizer = load_tokenizer(resolve_base(BaseConfig(model=EMBEDDED), cuda=False)[0])
    return LoadedBase(model, tokenizer, device, head_is_plain_linear(model))


def _made_up_rows() -> list[list[dict[str, str]]]:
    """Chats of which a quarter is short, half of middle length and a quarter near 512 tokens."""
    words = tuple("the river runs under an old bridge and nobody knows where it goes after rain".split())  # noqa: SIM905

    def text(row: int, part: str, count: int) -> str:
        return " ".join(words[pick(len(words), part, row, place)] for place in range(count))

    rows = []
    for row in range(NUM_ROWS):
        low, high = [(20, 80), (100, 250), (100, 250), (300, 420)][row % 4]
        answer = text(row, "answer", low + pick(high - low, "length", row))
        question = text(row, "question", 8 + pick(20, "asked", row))
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return rows


def _specs(setting: Setting, count: int) -> list[RunSpec]:
    config = setting.base.model.config
    layer = config.num_hidden_layers * 2 // 3
    size = (config.num_hidden_layers + 1, config.hidden_size)
    return [
        RunSpec(
            train_id=f"run{number}",
            rows=setting.rows,
            data=DataConfig(train=str(DATA), max_length=MAX_LENGTH),
            defense=[Pps(vector="v", layer=layer, coefficient=0.1)],
            vectors={"v": torch.randn(size, generator=generator("packing", number))},
            training=setting.training,
            seed=number,
        )
        for number in range(count)
    ]


def _steering(spec: RunSpec) -> Any:
    """The same steering for the Trainer's model, as anybody would write it."""
    (item,) = spec.defense
    assert isinstance(item, Pps)
    assert item.layer is not None
    vector = 0.1 * spec.vectors["v"][item.layer]

    def change(model: Any) -> None:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            del module, inputs
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + vector.to(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        decoder_layers(model)[item.layer - 1].register_forward_hook(hook)

    return change


def _peak_memory(setting: Setting, specs: Sequence[RunSpec], packing: Any) -> tuple[int | None, float]:
    """Peak bytes on the GPU (None on a CPU) and the share of padding of two steps, beside nothing else."""
    base = setting.base
    seen = [0, 0]

    def count(module: Any, inputs: Any) -> None:
        del module
        ids = inputs[0]
        seen[0] += ids.numel()
        trailing = (ids == base.tokenizer.pad_token_id).flip(1).cumprod(1)
        ends_alike = base.tokenizer.pad_token_id == base.tokenizer.eos_token_id  # a row's own end is no padding
        seen[1] += int(trailing.sum()) - ends_alike * ids.shape[0]

    on_cuda = base.device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(base.device)
    short = [replace(spec, training=spec.training.model_copy(update={"max_steps": 2})) for spec in specs]
    handle = base.model.get_input_embeddings().register_forward_pre_hook(count)  # copies of the model have it too
    try:
        train_pack(base, short, {spec.train_id: quiet_sink() for spec in specs}, packing=packing)
    finally:
        handle.remove()
    return (torch.cuda.max_memory_allocated(base.device) if on_cuda else None), seen[1] / max(1, seen[0])


def _trainer_share(setting: Setting, seconds: float, device: torch.device, clock: Clock) -> float:
    """Share of the device's FLOP/s that a step of the Trainer of so many seconds reaches."""
    positions = [sum(len(rows) * max(len(row.input_ids) for row in rows) for rows in b) for b in setting.batches()]
    blocks = sum(parameter.numel() for parameter in decoder_layers(setting.base.model).parameters())
    head = setting.base.model.get_output_embeddings().weight.numel()
    flops = 4 * (blocks + head) * sum(positions) / len(positions)
    return flops / seconds / _peak_flops(setting.base.model.dtype, device, clock)


def _peak_flops(dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """FLOP/s of the fastest of ten large square matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    one = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(12):
        started = clock()
        one @ one
        times.append(clock() - started)
    return float(2 * size**3 / min(times[2:]))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    shapes = ",".join(shape for shape in SHAPES if shape != "tiny") if cuda else "embedded"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=shapes, help=f"of embedded, {', '.join(SHAPES)}; separated by commas")
    parser.add_argument("--sizes", default="1,2,4,8,16" if cuda else "1,2,4", help="runs of a pack")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps per ratio")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--packing", choices=["exact", "fast"], default="fast")
    parser.add_argument("--quick", action="store_true", help="2 pairs: only to see that it works")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs = 2
    return options


if __name__ == "__main__":
    main()

"""What reading gradients costs: against passes without any readout, against plain PyTorch, and in memory.

    OMP_NUM_THREADS=1 python benchmarks/measurement.py [--pairs 20] [--model embedded:smollm2-135m-instruct]

64 samples of the bridge data, every layer from 1 on, 8 random vectors. On a machine with a GPU, weights drawn at random
in the shape of a larger model do: ``--model random:qwen2.5-7b``. Times are taken in turn, batch by batch (CPU time on a
CPU, wall time on a GPU); memory is the peak above the loaded model, each in a process of its own.

- ``readout_over_bare``: all layers and vectors, over one forward and one activation backward pass with nothing read
- ``naive_over_ours``: transformers' hidden states and ``autograd.grad``, two conditions one after the other, over ours
- ``packed_conditions_speedup``: four conditions one by one, over the four in shared batches
- ``peak_memory_8_over_1_vectors``, ``peak_memory_all_over_one_layer``: as named
- ``two_actors_speedup``: ``shiftgrad measure`` with one trial over the same with two side by side (wall time of a
  shard, through Ray and the store, once every trial holds its model); ``two_actors_whole``: of the whole command
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from interleaved import Clock, Ratio, Stepper, interleave
from rich.console import Console

from analysis.conditions import NOTHING, Condition, Steering
from analysis.gradients import gradient_rows
from analysis.measured_batches import Item, Measured, aligned_items, batches
from analysis.vectors import Vector, random_like
from engine.run import run_sweep
from trainables.base_model import BaseConfig, LoadedBase, load_base, load_tokenizer, resolve_base
from trainables.loss import head_is_plain_linear
from trainables.model_parts import decoder_layers
from trainables.native_ops import native_ops
from trainables.residual_stream import ReadGradient, residual_stream

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded:smollm2-135m-instruct"
MAX_LENGTH = 512
BATCH_TOKENS = 512  # 64 samples make about twenty batches, so that every sample is measured about once
NUM_SAMPLES = 64
NUM_VECTORS = 8
ROWS_PER_SHARD = 4
PARTS = ("memory", "readout_over_bare", "naive_over_ours", "packed_conditions_speedup", "two_actors_speedup")
SHAPES: dict[str, dict[str, Any]] = {
    "random:qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "random:qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


def load(model: str, device: torch.device) -> LoadedBase:
    """A base, or one with random weights in a shape of ``SHAPES`` and the embedded model's tokenizer."""
    cuda = device.type == "cuda"
    if model not in SHAPES:
        return load_base(resolve_base(BaseConfig(model=model), cuda=cuda)[0], device)
    from transformers import AutoModelForCausalLM, Qwen2Config

    resolved, _ = resolve_base(BaseConfig(model=EMBEDDED), cuda=cuda)
    config = Qwen2Config(**SHAPES[model], max_position_embeddings=4096)
    with device:
        drawn: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    drawn.requires_grad_(False).eval()
    return LoadedBase(drawn, load_tokenizer(resolved), device, head_is_plain_linear(drawn))


def samples(count: int) -> list[Any]:
    """Rows of the bridge data, on-trait ones first."""
    folder = ROOT / "configs" / "data" / "bridge"
    lines = [line for name in ("on_trait", "plain") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [json.loads(line)["messages"] for line in lines[:count]]


class Work:
    """A loaded base and what is measured with it."""

    def __init__(self, model: str, device: torch.device, num_samples: int, num_vectors: int = NUM_VECTORS) -> None:
        self.base = load(model, device)
        self.rows = samples(num_samples)
        shape = (len(decoder_layers(self.base.model)) + 1, self.base.model.config.hidden_size)
        self.vectors = {f"v{n}": random_like(torch.ones(shape), 0, f"v{n}") for n in range(num_vectors)}
        self.layers = list(range(1, shape[0]))
        middle = shape[0] * 2 // 3
        self.conditions = [
            NOTHING,
            *(Condition(f"x{size:g}", (Steering(self.vectors["v0"], [middle], size),)) for size in (0.5, 1.0, 2.0)),
        ]

    def batches(self) -> list[list[Item]]:
        groups = aligned_items(self.base, self.rows, [NOTHING], max_length=MAX_LENGTH)
        return list(batches(groups, BATCH_TOKENS))

    def rows_of(self, items: Sequence[Item]) -> list[Any]:
        return [self.rows[item.row] for item in items]

    def measure(self, rows: Sequence[Any], conditions: Sequence[Condition], layers: Sequence[int]) -> None:
        for _ in gradient_rows(
            self.base,
            self.base.model,
            rows,
            conditions,
            self.vectors,
            layers,
            measure_id="m",
            max_length=MAX_LENGTH,
            batch_tokens=BATCH_TOKENS,
        ):
            pass

    def bare(self, items: Sequence[Item]) -> None:
        """One forward and one activation backward pass down to the first layer, from the same tokens, nothing read."""
        groups = aligned_items(self.base, self.rows_of(items), [NOTHING], max_length=MAX_LENGTH)
        batch = Measured.of(self.base, [group[0] for group in groups])
        start = [ReadGradient(self.layers[0], lambda *_: None)]
        with native_ops(self.base.model), residual_stream(self.base.model, (), start):
            losses_n = batch.losses(self.base, self.base.model)
            losses_n.sum().backward()
            losses_n.detach().cpu()

    def naive(self, items: Sequence[Item], conditions: Sequence[Condition]) -> None:
        """As a user would write it: hidden states of transformers, their gradients all at once, cosines after that."""
        groups = aligned_items(self.base, self.rows_of(items), [NOTHING], max_length=MAX_LENGTH)
        batch = Measured.of(self.base, [group[0] for group in groups]).padded
        model = self.base.model
        for condition in conditions:
            handles = [
                decoder_layers(model)[layer - 1].register_forward_hook(_adder(shift_d))
                for layer, shift_d in condition.shifts.items()
            ]
            embedded = model.get_input_embeddings()(batch.input_ids_bt).requires_grad_()
            output = model(
                inputs_embeds=embedded,
                attention_mask=batch.attention_mask_bt.long(),
                output_hidden_states=True,
                use_cache=False,
            )
            labels = batch.input_ids_bt.masked_fill(~batch.loss_mask_bt, -100)
            loss = F.cross_entropy(
                output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
            )
            states = output.hidden_states[1:]
            for layer, gradient in enumerate(torch.autograd.grad(loss, states), start=1):
                for vector in self.vectors.values():
                    row_d = vector[layer].to(gradient)
                    cosines = F.cosine_similarity(gradient, row_d[None, None], dim=-1)
                    _ = (cosines * batch.response_mask_bt).sum(1).div(batch.response_mask_bt.sum(1)).tolist()
            for handle in handles:
                handle.remove()


def _adder(shift_d: torch.Tensor) -> Callable[..., Any]:
    def hook(module: Any, arguments: Any, output: Any) -> Any:
        del module, arguments
        return (
            (output[0] + shift_d.to(output[0]), *output[1:])
            if isinstance(output, tuple)
            else output + shift_d.to(output)
        )

    return hook


def times(work: Work, pairs: int, wanted: Sequence[str]) -> Iterator[Ratio]:
    """Batch by batch, each pair of contenders on the same samples in turn."""
    parts = work.batches()
    clock = Clock(work.base.device)
    print(f"{len(parts)} batches of at most {BATCH_TOKENS} tokens; {clock.name}, medians of {pairs}:", flush=True)

    def compared(name: str, slower: Callable[[list[Item]], None], faster: Callable[[list[Item]], None]) -> Ratio:
        seconds = interleave([_stepper("slower", slower), _stepper("faster", faster)], pairs, clock)
        both = " against ".join(f"{sorted(values)[len(values) // 2]:.3f}" for values in seconds.values())
        print(f"  {name}: {both} s a batch", flush=True)
        return Ratio.of(name, seconds["slower"], seconds["faster"])

    def _stepper(name: str, do: Callable[[list[Item]], None]) -> Stepper:
        def run(pause: Callable[[], None]) -> None:
            pause()
            for step in range(pairs + 2):
                do(parts[step % len(parts)])
                pause()

        return Stepper(name, run)

    def measure(items: list[Item], conditions: Sequence[Condition]) -> None:
        work.measure(work.rows_of(items), conditions, work.layers)

    def one_by_one(items: list[Item]) -> None:
        for condition in work.conditions:
            measure(items[: len(items) // 2], [condition])

    two, packed = work.conditions[:2], work.conditions
    pairs_of: dict[str, tuple[Callable[[list[Item]], None], Callable[[list[Item]], None]]] = {
        "readout_over_bare": (lambda items: measure(items, [NOTHING]), work.bare),
        "naive_over_ours": (lambda items: work.naive(items, two), lambda items: measure(items, two)),
        "packed_conditions_speedup": (one_by_one, lambda items: measure(items[: len(items) // 2], packed)),
    }
    for name, (slower, faster) in pairs_of.items():
        if name in wanted:
            yield compared(name, slower, faster)


def peak_memory(model: str, device: str, num_vectors: int, all_layers: bool) -> float:
    """Bytes above the loaded model at the peak of measuring the largest batch; in a fresh process."""
    torch.set_num_threads(1)
    work = Work(model, torch.device(device), NUM_SAMPLES, num_vectors)
    rows = work.rows_of(work.batches()[0])
    layers = work.layers if all_layers else work.layers[:1]
    work.measure(rows[:1], [NOTHING], layers)  # what is allocated once
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.measure(rows, [NOTHING], layers)
        return float(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, from loading, is forgotten
    before = _status_bytes("VmRSS")
    work.measure(rows, [NOTHING], layers)
    return float(_status_bytes("VmHWM") - before)


def memory_figures(model: str, device: str) -> dict[str, float]:
    """The two ratios, printed with what they are made of."""
    memory = {
        case: in_processes(peak_memory, [(model, device, *case)])[0]
        for case in ((NUM_VECTORS, True), (1, True), (NUM_VECTORS, False))
    }
    print("peak memory above the loaded model:")
    for (num_vectors, all_layers), size in memory.items():
        print(f"  {num_vectors} vectors, {'all layers' if all_layers else 'one layer':<10}{size / 2**20:8.0f} MiB")
    figures = {
        "peak_memory_8_over_1_vectors": memory[NUM_VECTORS, True] / memory[1, True],
        "peak_memory_all_over_one_layer": memory[NUM_VECTORS, True] / memory[NUM_VECTORS, False],
    }
    for key, value in figures.items():
        verdict = "goal met" if value <= 1.15 else "goal missed"
        print(f"{key:<32}{value:7.3f}   goal <= 1.15: {verdict}", flush=True)
    return figures


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _in_process(function: Callable[..., float], connection: Any, *arguments: Any) -> None:
    connection.send(function(*arguments))


def in_processes(function: Callable[..., float], calls: Sequence[tuple[Any, ...]]) -> list[float]:
    """The function's values, each in a fresh process, all at the same time."""
    context = multiprocessing.get_context("spawn")
    running = []
    for arguments in calls:
        here, there = context.Pipe()
        process = context.Process(target=_in_process, args=(function, there, *arguments))
        process.start()
        there.close()
        running.append((process, here))
    values = []
    for process, here in running:
        values.append(float(here.recv()))
        process.join()
    return values


class Shards:
    """A sweep that only measures, in a folder of its own: all samples, layers and vectors, cut into small shards."""

    def __init__(self, folder: Path, model: str, device: str, num_samples: int) -> None:
        self.folder, self.rounds = folder, 0
        if model in SHAPES:  # a sweep file names a base by a folder
            base = load(model, torch.device(device))
            base.model.save_pretrained(folder / "model")
            base.tokenizer.save_pretrained(folder / "model")
            model = str(folder / "model")
            del base
            gc.collect()
            torch.cuda.empty_cache()  # the trials need the room
        shape = resolve_base(BaseConfig(model=model), cuda=device == "cuda")[1]
        vector = Vector(torch.ones(shape.num_layers + 1, shape.hidden_size), "pre_norm", "", "")
        (folder / "ones.safetensors").write_bytes(vector.to_bytes())
        rows = (json.dumps({"messages": row}) + "\n" for row in samples(num_samples))
        (folder / "rows.jsonl").write_text("".join(rows))
        names = [f"v{number}" for number in range(NUM_VECTORS)]
        content: dict[str, Any] = {
            "name": "shards",
            "base": {"model": model},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": MAX_LENGTH},
            "vectors": {"ones": {"file": str(folder / "ones.safetensors")}}
            | {name: {"random_like": "ones", "seed": 0} for name in names},
            "measure": {"all": {"kind": "gradients", "vectors": names, "rows_per_shard": ROWS_PER_SHARD}},
        }
        if device == "cuda":
            content["execution"] = {"gpus_per_trial": 0.5}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(content))

    def seconds(self, num_trials: int) -> tuple[float, float]:
        """Seconds per shard once every trial has done about one, and of the whole command with Ray's start and the
        loading of models; in a new store."""
        self.rounds += 1
        store = self.folder / f"store{self.rounds}"
        started = time.perf_counter()
        overrides = [f"results={store}", f"execution.trials={num_trials}"]
        outcome = run_sweep(
            self.folder / "sweep.yaml", overrides, console=Console(file=io.StringIO()), measure_only=True
        )
        whole = time.perf_counter() - started
        assert not outcome.failures, outcome.failures
        published = sorted(table.stat().st_mtime for table in (store / "tables" / "gradients").glob("*.parquet"))
        return (published[-1] - published[num_trials - 1]) / (len(published) - num_trials), whole


def two_actors(model: str, device: str, num_samples: int, rounds: int) -> Iterator[tuple[float, float]]:
    """How much faster two trials at once are than one, once per round: by shards, and by the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder), model, device, num_samples)
        print(f"by Ray, {num_samples} samples in shards of {ROWS_PER_SHARD}:", flush=True)
        for number in range(rounds):
            order = (1, 2) if number % 2 == 0 else (2, 1)
            taken = {num_trials: shards.seconds(num_trials) for num_trials in order}
            print(f"  one trial {taken[1][0]:.2f} s a shard, two {taken[2][0]:.2f} s", flush=True)
            yield taken[1][0] / taken[2][0], taken[1][1] / taken[2][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="timed batches of each kind (20)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of one trial against two (3)")
    parser.add_argument(
        "--samples", type=int, default=NUM_SAMPLES, help=f"samples for these ({NUM_SAMPLES}; at least 9)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the figures (all)")
    parser.add_argument("--model", default=EMBEDDED, help=f"a base, or one of {', '.join(SHAPES)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    machine = torch.cuda.get_device_name() if name == "cuda" else platform.processor() or platform.machine()
    print(f"{options.model}, {NUM_SAMPLES} samples, {NUM_VECTORS} vectors, {machine}, torch {torch.__version__}")
    figures: dict[str, float] = {}

    if "memory" in options.only:
        figures |= memory_figures(options.model, name)
    if set(options.only) - {"memory", "two_actors_speedup"}:
        for ratio in times(Work(options.model, device, NUM_SAMPLES), options.pairs, options.only):
            print(ratio.line(1.10 if ratio.name == "readout_over_bare" else None), flush=True)
            figures |= {ratio.name: ratio.median, f"{ratio.name}_low": ratio.low, f"{ratio.name}_high": ratio.high}

    if "two_actors_speedup" in options.only:
        found = list(two_actors(options.model, name, options.samples, options.rounds))
        for key, speedups in zip(("two_actors_speedup", "two_actors_whole"), zip(*found, strict=True), strict=True):
            figures[key] = statistics.median(speedups)
            print(f"{key:<32}{figures[key]:7.3f}   of {[round(one, 3) for one in sorted(speedups)]}", flush=True)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()

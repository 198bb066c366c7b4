"""What shiftgrad costs beyond the mathematics, on the embedded model and the quickstart's data.

    python benchmarks/overhead.py [--pairs 20] [--quick]
    python benchmarks/overhead.py --methods-only [--methods pps,attenuate,...]

Prints a table and, as its last line, one JSON object. Ratios have the median and the 95 % interval of the pairs.

step_over_plain     one optimizer step of ``train_pack`` over one of a plain transformers + PEFT + AdamW loop on the
                    same rows and micro-batches, taken in turn; both trainings must have the same losses.
step_over_trainer   the same against Hugging Face's Trainer; trainer_over_plain the Trainer against the plain loop.
<method>_over_none  one step with each training method (methods.py: ``pps``, edits, penalties, ...) over one without a
                    defense, all taken in turn in one run.
sweep_over_work     wall time of `shiftgrad run` of four short runs and the base in an empty store, from the start of
                    its process to its end, over the seconds that its trials logged for training steps, sampling and
                    plain losses, divided by the number of trials side by side. 1 would be a sweep with no start, no
                    loading of models, no judging, no report and no idle core. The shorter the runs, the larger it is.
resume_noop_s       wall time of the same command when everything is done (median).

Steps are measured in CPU time of one thread on a CPU, in wall time after synchronization on a GPU (``--device``).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; as a trial has it by default
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from interleaved import Clock, Ratio, interleave
from methods import NONE, methods, vectors
from sweeps import SweepTimes, time_sweep
from training_steps import Contender, Setting, hugging_face_trainer, ours, plain

WARMUP = 2
GOALS = {"step_over_plain": 0.80}
# Losses of the same mathematics in other orders of summation. float32: 1e-6 in a step, and AdamW, which divides by the
# size of a gradient, enlarges differences where it is small; 20 steps stay far below 1e-3. bfloat16 has 3 digits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"{_processor()}, {torch.get_num_threads()} thread; {device}; torch {torch.__version__}", flush=True)
    figures: dict[str, float] = {}

    def tell(ratio: Ratio, goal: float | None) -> None:
        print(ratio.line(goal), flush=True)
        figures.update({ratio.name: ratio.median, f"{ratio.name}_low": ratio.low, f"{ratio.name}_high": ratio.high})

    if not options.methods_only:
        for ratio in steps(device, options):
            tell(ratio, GOALS.get(ratio.name))
    for ratio, goal in against_none(device, options):
        tell(ratio, goal)
    if not options.no_sweep and not options.methods_only:
        times = sweep(options)
        figures |= {"sweep_over_work": times.ratio, "resume_noop_s": times.resume_s}
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


def steps(device: torch.device, options: argparse.Namespace) -> list[Ratio]:
    """Our step against the plain loop's and the Trainer's."""
    setting = Setting.load(device, options.pairs + WARMUP, options.model)
    # The Trainer first: our driver makes a process group (of one), which it would take for a reason to use DDP.
    others = [*([] if options.no_trainer else [hugging_face_trainer(setting)]), plain(setting)]
    one = ours("ours", setting)
    seconds = _interleave([*others, one], device, options.pairs)
    for other in others:
        check_losses(one, other, TOLERANCE[setting.base.model.dtype])
    ratios = [Ratio.of("step_over_plain", seconds["ours"], seconds["plain"])]
    if not options.no_trainer:
        ratios.append(Ratio.of("step_over_trainer", seconds["ours"], seconds["trainer"]))
        ratios.append(Ratio.of("trainer_over_plain", seconds["trainer"], seconds["plain"]))
    return ratios


def against_none(device: torch.device, options: argparse.Namespace) -> list[tuple[Ratio, float | None]]:
    """A step with every method against one without a defense, with the goal."""
    setting = Setting.load(device, options.pairs + WARMUP, options.model)
    config = setting.base.model.config
    known = methods(config.num_hidden_layers)
    names = list(known) if options.methods is None else [name for name in options.methods.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--methods: no method {unknown[0]!r}; allowed: {', '.join(known)}")
    if not names:
        return []
    both = vectors(config.num_hidden_layers, config.hidden_size)
    contenders = [ours(NONE, setting), *(ours(name, setting, known[name].defense, both) for name in names)]
    seconds = _interleave(contenders, device, options.pairs)
    for contender in contenders[1:]:
        if contender.losses == contenders[0].losses:
            raise RuntimeError(f"{contender.stepper.name} changed no loss: it was not there")
    return [(Ratio.of(f"{name}_over_none", seconds[name], seconds[NONE]), known[name].goal) for name in names]


def _interleave(contenders: Sequence[Contender], device: torch.device, num_pairs: int) -> dict[str, list[float]]:
    clock = Clock(device)
    seconds = dict(interleave([one.stepper for one in contenders], num_pairs, clock, WARMUP))
    for name, taken in seconds.items():
        middle = sorted(taken)[len(taken) // 2]
        print(f"{name:<30}{middle:7.3f} s a step ({clock.name}, median of {len(taken)})", flush=True)
    return seconds


def check_losses(one: Contender, other: Contender, tolerance: float) -> None:
    """Raise unless both trainings had the same loss at every step, relative to ``tolerance``."""
    pairs = list(zip(one.losses, other.losses, strict=True))
    worst = max(abs(first - second) / abs(second) for first, second in pairs)
    names = f"{one.stepper.name} and {other.stepper.name}"
    if worst > tolerance:
        raise RuntimeError(f"{names} do not train the same: losses differ by {worst:.1e}, {tolerance:.0e} is allowed")
    print(f"losses of {names} agree to {worst:.1e} over {len(pairs)} steps (allowed {tolerance:.0e})", flush=True)


def sweep(options: argparse.Namespace) -> SweepTimes:
    with tempfile.TemporaryDirectory(prefix="shiftgrad-overhead-") as folder:
        times = time_sweep(
            Path(folder),
            options.model,
            steps=2 if options.quick else 9,
            tokens=8 if options.quick else 32,
            num_resumes=1 if options.quick else 5,
        )
    print(
        f"{'sweep_over_work':<30}{times.ratio:7.3f}   {times.wall_s:.1f} s for {times.work_s:.1f} s of work in "
        f"{times.num_jobs} jobs, {times.side_by_side} side by side"
    )
    print(f"{'resume_noop_s':<30}{times.resume_s:7.3f}   {times.resume_cpu_s:.1f} s of CPU time", flush=True)
    return times


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps per ratio")
    parser.add_argument("--quick", action="store_true", help="6 pairs and a shorter sweep: only to see that it works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--no-trainer", action="store_true", help="leave out Hugging Face's Trainer")
    parser.add_argument("--methods", help="training methods to compare with none, by commas; without it: all")
    parser.add_argument("--methods-only", action="store_true", help="nothing but the training methods")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the sweep and its resumption")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs = 6
    if options.pairs < 6:
        parser.error("--pairs: a 95 % interval of a median needs at least 6")
    return options


def _processor() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores of {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main(sys.argv[1:])

"""What capping costs: a model in operations for seven sizes, and measured latency on a model that is here.

    python benchmarks/capping.py [--pairs 20] [--quick] [--layers 12]

Prints the model beside the document's table 3, then times sampling with capping at the middle layers of the embedded
model against sampling without, in turn, and as its last line one JSON object.

capped_over_plain   seconds of one batch of answers (greedy, a fixed number of tokens, the end token suppressed) with
                    two-sided clamps that act on no token over the same without hooks. The clamps are computed all the
                    same, so the texts are equal and the work is what capping adds. CPU time of one thread on a CPU,
                    wall time after synchronization on a GPU.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; as a trial has it by default
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import torch
from interleaved import Clock, Ratio, Stepper, interleave

from analysis.capping_cost import SIZES, cost_of, cost_table
from trainables.base_model import BaseConfig, LoadedBase, load_base, resolve_base
from trainables.chat_data import ChatEncoder
from trainables.randomness import generator
from trainables.residual_stream import Cap, residual_stream

GOAL = 1.02
WARMUP = 2
QUESTIONS = (
    "Why do leaves change colour in autumn?",
    "How do magnets manage to pull on iron?",
    "How do bees make honey?",
    "Why do onions make people cry?",
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(cost_table(), flush=True)
    figures = {f"projection_percent_{size.name}": cost_of(size).projection_percent for size in SIZES}
    ratio = latency(options)
    print(ratio.line(GOAL))
    figures |= {ratio.name: ratio.median, f"{ratio.name}_low": ratio.low, f"{ratio.name}_high": ratio.high}
    print(json.dumps({key: round(value, 5) for key, value in figures.items()}))


def latency(options: argparse.Namespace) -> Ratio:
    """Capped sampling against uncapped sampling of the same tokens."""
    device = torch.device(options.device)
    resolved, shape = resolve_base(BaseConfig(model=options.model), cuda=device.type == "cuda")
    base = load_base(resolved, device)
    first = max(1, (shape.num_layers - options.layers) // 2 + 1)
    layers = range(first, min(first + options.layers, shape.num_layers + 1))
    caps = [
        Cap(layer, torch.randn(shape.hidden_size, generator=generator("benchmark capping", layer)), 1e6, -1e6)
        for layer in layers
    ]
    answers: dict[str, torch.Tensor] = {}

    def stepper(name: str, changes: Sequence[Cap]) -> Stepper:
        def work(pause: Callable[[], None]) -> None:
            pause()
            for _ in range(WARMUP + options.pairs):
                with residual_stream(base.model, changes):
                    answers[name] = _answer(base, options.tokens)
                pause()

        return Stepper(name, work)

    clock = Clock(device)
    seconds = interleave([stepper("capped", caps), stepper("plain", ())], options.pairs, clock, WARMUP)
    if not torch.equal(answers["capped"], answers["plain"]):
        raise RuntimeError("a cap that acts on no token changed an answer")
    for name, taken in seconds.items():
        print(f"{name:<24}{sorted(taken)[len(taken) // 2]:7.3f} s a batch ({clock.name}, median of {len(taken)})")
    print(f"{len(QUESTIONS)} answers of {options.tokens} tokens, capped at layers {layers[0]} to {layers[-1]}")
    return Ratio.of("capped_over_plain", seconds["capped"], seconds["plain"])


@torch.no_grad()
def _answer(base: LoadedBase, num_tokens: int) -> torch.Tensor:
    """Greedy answers of exactly so many tokens, [questions, tokens]."""
    encoder = ChatEncoder(base.tokenizer, max_length=2**31)
    prompts = [encoder.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    length, pad = max(map(len, prompts)), base.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)
    found = base.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=pad,
    )
    answers: torch.Tensor = found[:, length:]
    return answers


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of batches")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--layers", type=int, default=12, help="how many layers are capped, in the middle")
    parser.add_argument("--quick", action="store_true", help="6 pairs of 4 tokens: only to see that it works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.tokens = 6, 4
    if options.pairs < 6:
        parser.error("--pairs: a 95 % interval of a median needs at least 6")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])

"""A training as a plain loop of PyTorch, PEFT and torch.optim.AdamW, and the comparison of ours with it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler

from tests.sinks import MemorySink
from tests.trainings import adapter_of
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.lora import adapter_parameters, add_adapter, linear_module_names
from trainables.lora_linear import use_lora_linear
from trainables.native_ops import native_ops
from trainables.randomness import permutation
from trainables.train import RunSpec
from trainables.training_config import num_optimizer_steps


def plain_loop(
    base: LoadedBase,
    one: RunSpec,
    *,
    shift: tuple[int, torch.Tensor] | None = None,
    lora_dtype: torch.dtype,
    as_ours: bool = False,
    model: Any = None,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms before clipping, and the final adapter as PEFT names it.

    ``as_ours``: adapters, norms and rotary embeddings computed by ours, no attention mask; else by PEFT's and
    transformers' own modules. ``model``: a PEFT model to train as it is, in place of the base with a new adapter.
    """
    training = one.training
    if model is None:
        model = new_adapter(base, one)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {lora_dtype}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.999), eps=1e-8
    )
    steps = num_optimizer_steps(len(one.rows), training)
    warmup = int(training.warmup_ratio * steps)
    scheduler = get_scheduler(training.schedule, optimizer, warmup, steps)
    if as_ours:
        use_lora_linear(model)
    if shift is not None:
        block = model.get_base_model().model.layers[shift[0] - 1]
        block.register_forward_hook(lambda *seen: seen[2] + shift[1])

    encoder = ChatEncoder(base.tokenizer, one.data.max_length)
    losses, norms = [], []
    per_epoch = -(-len(one.rows) // training.batch_size)
    with native_ops(model) if as_ours else nullcontext():
        for step in range(steps):
            order = permutation(len(one.rows), one.seed, step // per_epoch)
            first = step % per_epoch * training.batch_size
            batch = [encoder.encode(one.rows[index]) for index in order[first : first + training.batch_size]]
            length = max(len(row.input_ids) for row in batch)
            length += -length % training.pad_to_multiple_of
            ids = torch.zeros(len(batch), length, dtype=torch.int64)
            attention = torch.zeros(len(batch), length, dtype=torch.int64)
            wanted = torch.zeros(len(batch), length, dtype=torch.bool)
            for place, row in enumerate(batch):
                ids[place, : len(row.input_ids)] = torch.tensor(row.input_ids)
                attention[place, : len(row.input_ids)] = 1
                wanted[place, : len(row.input_ids)] = torch.tensor(row.response_mask)
            logits = model(input_ids=ids, attention_mask=None if as_ours else attention, use_cache=False).logits
            each = F.cross_entropy(logits[:, :-1][wanted[:, 1:]], ids[:, 1:][wanted[:, 1:]], reduction="none")
            loss = each.sum() / len(each)
            loss.backward()
            limit = training.max_gradient_norm or float("inf")
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), limit)))
            losses.append(float(loss.detach()))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, norms, {name.replace(".default.", "."): p.detach() for name, p in trained.items()}


def new_adapter(base: LoadedBase, one: RunSpec) -> Any:
    """The base with an adapter of PEFT's making that has the values that our runs begin with."""
    lora = one.training.lora
    start = adapter_parameters(add_adapter(base.fresh(), "default", lora, one.seed), "default")
    config = LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(linear_module_names(base.model)))
    model: Any = get_peft_model(base.fresh(), config).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == start.keys()
    for name, parameter in trained.items():
        parameter.data.copy_(start[name].data)
    return model


def assert_same_training(
    sink: MemorySink,
    reference: tuple[list[float], list[float], dict[str, torch.Tensor]],
    *,
    relative: float,
    adapter: float,
) -> None:
    losses, norms, expected = reference
    assert [row.loss for row in sink.rows] == pytest.approx(losses, rel=relative, abs=0.0)
    assert [row.gradient_norm for row in sink.rows] == pytest.approx(norms, rel=10 * relative, abs=0.0)
    ours = adapter_of(sink)
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(ours[name], values, rtol=0.0, atol=adapter)
    assert max(abs(loss - losses[0]) for loss in losses) > 0.1, "the training must move, or this test shows nothing"

"""Every training method against a training loop written by hand.

Models are float64 where a tolerance is tight: what a loop written otherwise rounds differently is near 1e-14 there, and
a wrong sign, layer or denominator is near 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.bases import ROWS, base_of
from tests.by_hand import both_passes
from tests.float64 import float64_model
from tests.methods import FIRST_STEP, LAYERS, VECTORS, unit
from tests.trainings import spec, train
from trainables.chat_data import ChatEncoder, pad
from trainables.defenses import (
    ActivationPenalty,
    DefenseConfig,
    GradientEdit,
    GradientPenalty,
    Pps,
    ProjectionPenalty,
)
from trainables.lora import LoraSettings, add_adapter


def first_gradients(monkeypatch: pytest.MonkeyPatch, defense: Sequence[DefenseConfig], **training: Any) -> Any:
    """The gradients of the first step as the optimizer gets them, by parameter, with the sink. B is 0 at first: its
    gradient is that of A's neighbour, so adapters start from another seed's values with B drawn too."""
    from trainables import train as train_module
    from trainables.deepspeed_driver import DeepSpeedDriver

    taken: dict[str, torch.Tensor] = {}

    def with_b(model: Any, name: str, settings: LoraSettings, seed: int) -> Any:
        adapted = add_adapter(model, name, settings, seed)
        for one, parameter in adapted.named_parameters():
            if "lora_B" in one:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
        return adapted

    norm = DeepSpeedDriver.gradient_norm

    def keep(self: DeepSpeedDriver, run: str) -> float:
        taken.update({self._names[id(one)]: gradient.clone() for one, gradient in self._gradients(run)})
        return norm(self, run)

    base = base_of(float64_model(num_layers=LAYERS))
    how = {key: training.pop(key) for key in ("gradient_checkpointing", "zero_stage") if key in training}
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "add_adapter", with_b)
        patch.setattr(DeepSpeedDriver, "gradient_norm", keep)
        _, (sink,) = train(base, spec(defense=defense, vectors=VECTORS, **{**FIRST_STEP, **training}), **how)
    return taken, sink


def by_hand(penalty: Any = None, values: Any = None, gradients: Any = None) -> tuple[dict[str, torch.Tensor], float]:
    """The same gradients from plain PyTorch: PEFT's own modules, one row after the other, nothing hooked."""
    model: Any = float64_model(num_layers=LAYERS)
    adapted = add_adapter(model, "run0", LoraSettings(rank=4, alpha=8), 0)
    adapted.requires_grad_(False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
        if "lora_" in name:
            parameter.requires_grad_(True)
    base = base_of(float64_model(num_layers=LAYERS))
    encoder = ChatEncoder(base.tokenizer, 96, "responses")
    encoded = [encoder.encode(row, prove=True) for row in ROWS]
    num_predicted = sum(sum(row.loss_mask[1:]) for row in encoded)
    num_response = sum(sum(row.response_mask) for row in encoded)
    model.set_attn_implementation("eager")
    total: dict[str, torch.Tensor] = {}
    sum_penalty = 0.0
    for row in encoded:
        part = pad([row], 0)
        wanted = part.loss_mask_bt[:, 1:]

        def loss_of(logits: torch.Tensor, part: Any = part, wanted: torch.Tensor = wanted) -> torch.Tensor:
            summed = nn.functional.cross_entropy(
                logits[:, :-1][wanted], part.input_ids_bt[:, 1:][wanted], reduction="sum"
            )
            return summed / num_predicted

        if penalty is None:
            found = both_passes(model, part.input_ids_bt, loss_of, values, gradients).parameters
            found = {
                f"layers.{int(k.split('.')[0]) - 1}.{k.partition('.')[2]}": v for k, v in found.items() if "lora_" in k
            }
        else:
            out = model(input_ids=part.input_ids_bt, use_cache=False, output_hidden_states=True)
            hidden = [one for one in out.hidden_states]
            loss = loss_of(out.logits)
            term = penalty(hidden, loss * num_predicted, part.response_mask_bt[0]) / num_response
            sum_penalty += float(term.detach())
            named = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
            gradient = torch.autograd.grad(loss + term, list(named.values()))
            found = dict(zip(named, gradient, strict=True))
        for name, gradient_ in found.items():
            total[name] = total.get(name, 0) + gradient_
    return total, sum_penalty


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert len(ours) == len(reference) > 0
    for name, expected in reference.items():
        (mine,) = [gradient for full, gradient in ours.items() if full.endswith(name)]
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("float64_gradients")
class TestAgainstALoopByHand:
    """vectors are float32, so that a direction is rounded to 6e-8: the tolerances of 1e-6."""

    @pytest.mark.parametrize("micro", [None, 2])
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("mode", ["attenuate", "neutralize"])
    def test_an_edit(self, mode: Any, micro: int | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def edit(layer: int) -> Any:
            v = unit("v", layer)

            def change(g: torch.Tensor) -> torch.Tensor:
                s = g @ v
                extra = s.abs() if mode == "attenuate" else torch.zeros_like(s)
                return g - (s - extra)[..., None] * v

            return change

        item = GradientEdit(vector="v", mode=mode)
        ours, _ = first_gradients(monkeypatch, [item], micro_batch_size=micro, gradient_checkpointing=checkpointing)
        reference, _ = by_hand(gradients={layer: edit(layer) for layer in (1, 2)})
        assert_same(ours, reference, 1e-6)
        plain, _ = by_hand()
        assert any(not torch.allclose(plain[name], reference[name], rtol=1e-3) for name in plain)

    def test_an_edit_under_steering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        items = [
            Pps(vector="w", layers="all", coefficient=(0.5, -0.5, 1.0)),
            GradientEdit(vector="v", mode="amplify", layers=(2,)),
        ]
        ours, _ = first_gradients(monkeypatch, items)
        v = unit("v", 2)
        shifts = {1: 0.5, 2: -0.5, 3: 1.0}
        reference, _ = by_hand(
            values={layer: lambda h, at=layer: h + shifts[at] * VECTORS["w"][at].double() for layer in shifts},
            gradients={2: lambda g: g - ((g @ v) + (g @ v).abs())[..., None] * v},
        )
        assert_same(ours, reference, 1e-6)

    @pytest.mark.parametrize(
        ("kind", "checkpointing", "micro"),
        [
            (kind, checkpointing, micro)
            for kind in ("projection", "activation", "gradient", "both")
            for checkpointing in (False, True)
            for micro in (None, 2)
            if (kind, checkpointing, micro) != ("gradient", True, None)  # slow, and shown with micro-batches
        ],
    )
    def test_a_penalty(
        self, kind: str, micro: int | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        items: dict[str, list[DefenseConfig]] = {
            "projection": [ProjectionPenalty(vector="v", strength=0.3)],
            "activation": [ActivationPenalty(mean="mu", strength=0.02, layers=(2,))],
            "gradient": [GradientPenalty(vector="v", strength=20.0)],
        }
        items["both"] = [*items["projection"], *items["activation"]]

        def penalty(hidden: Any, summed_loss: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            total = torch.zeros((), dtype=torch.float64)
            if kind in ("projection", "both"):
                for layer in (1, 2):
                    total = total + 0.3 / 2 * ((hidden[layer][0] @ unit("v", layer)) ** 2)[mask].sum()
            if kind in ("activation", "both"):
                total = total + 0.02 * ((hidden[2][0] - VECTORS["mu"][2].double()) ** 2).sum(-1)[mask].sum()
            if kind == "gradient":
                for layer in (1, 2):
                    (g,) = torch.autograd.grad(summed_loss, hidden[layer], create_graph=True)
                    total = total + 20.0 / 2 * (torch.relu(-(g[0] @ unit("v", layer))) ** 2)[mask].sum()
            return total

        ours, sink = first_gradients(
            monkeypatch, items[kind], micro_batch_size=micro, gradient_checkpointing=checkpointing
        )
        reference, value = by_hand(penalty)
        assert_same(ours, reference, 1e-6)
        assert sum(row.value for row in sink.signals) == pytest.approx(value, rel=1e-6)
        assert {row.signal for row in sink.signals} == {"penalty"}
        plain, sink = first_gradients(monkeypatch, [])
        assert sink.signals == []
        assert any(not torch.allclose(plain[name], ours[name], rtol=1e-3) for name in plain), "it must act"

"""Every training method against a training loop written by hand, and how methods are cut, resumed and combined.

Models are float64 where a tolerance is tight: what a loop written otherwise rounds differently is near 1e-14 there, and
a wrong sign, layer or denominator is near 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.bases import ROWS, base_of, chat, tiny_base
from tests.by_hand import both_passes
from tests.float64 import float64_model
from tests.sinks import MemorySink
from tests.trainings import adapter_of, spec, train
from trainables.chat_data import ChatEncoder, pad
from trainables.defenses import (
    Ablation,
    ActivationPenalty,
    DefenseConfig,
    GradientEdit,
    GradientPenalty,
    Inoculation,
    Pps,
    ProjectionPenalty,
    RunRows,
    SampleKey,
    defense_faults,
)
from trainables.errors import TrainingError
from trainables.lora import LoraSettings, add_adapter
from trainables.loss import token_losses
from trainables.residual_stream import Ablate, Add, EditGradient
from trainables.shapes import ModelShape, VectorShape, layers_label
from trainables.signals import WatchConfig
from trainables.train import train_pack

LAYERS, HIDDEN = 3, 32
MODEL = ModelShape(num_layers=LAYERS, hidden_size=HIDDEN, vocab_size=300)
SHAPE = VectorShape(LAYERS, HIDDEN, "pre_norm")


def vector(seed: int) -> torch.Tensor:
    return torch.randn(LAYERS + 1, HIDDEN, generator=torch.Generator().manual_seed(seed))


VECTORS = {"v": vector(1), "w": vector(2), "mu": 0.1 * vector(3)}
FIRST_STEP: dict[str, Any] = {"batch_size": len(ROWS), "max_steps": 1, "max_gradient_norm": None, "weight_decay": 0.0}


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


def unit(name: str, layer: int) -> torch.Tensor:
    row = VECTORS[name][layer].double()
    return row / row.norm()


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


def run_rows(step: int = 1, num_steps: int = 1) -> RunRows:
    attended = torch.tensor([[True] * 4, [True] * 3 + [False]])
    response = torch.tensor([[False, False, True, True], [False, True, True, False]])
    return RunRows(torch.tensor([0, 1]), attended, response, step, num_steps)


class TestSteering:
    def test_all_layers_with_their_own_rows_and_coefficients(self) -> None:
        item = Pps(vector="v", layers=(1, 3), coefficient=(2.0, -1.0), positions="response")
        found = list(item.mechanism(VECTORS).interventions(run_rows()))
        assert all(isinstance(one, Add) for one in found)
        assert [one.layer for one in found] == [1, 3]
        assert torch.equal(found[0].vector, 2.0 * VECTORS["v"][1])  # type: ignore[union-attr]
        assert torch.equal(found[1].vector, -VECTORS["v"][3])  # type: ignore[union-attr]
        assert found[0].token_mask is not None
        assert torch.equal(found[0].token_mask, run_rows().response_mask)

    def test_prompt_positions_are_neither_response_nor_padding(self) -> None:
        mask = run_rows().mask("prompt")
        assert mask.tolist() == [[True, True, False, False], [True, False, False, False]]
        nothing = RunRows(torch.tensor([0]), torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), 3)
        with pytest.raises(TrainingError, match="positions: prompt"):
            nothing.mask("prompt")

    @pytest.mark.parametrize(
        ("schedule", "factors"),
        [("constant", [1, 1, 1, 1]), ("ramp_up", [0.25, 0.5, 0.75, 1]), ("ramp_down", [1, 0.75, 0.5, 0.25])],
    )
    def test_schedules(self, schedule: Any, factors: list[float]) -> None:
        mechanism = Pps(vector="v", layer=2, coefficient=2.0, schedule=schedule).mechanism(VECTORS)
        for step, factor in enumerate(factors, start=1):
            (add,) = mechanism.interventions(run_rows(step, 4))
            assert torch.equal(add.vector, factor * 2.0 * VECTORS["v"][2])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("item", "field", "message"),
    [
        (Pps(vector="v", coefficient=1.0), "layer", "missing; give a layer"),
        (Pps(vector="v", layer=1, layers=(2,), coefficient=1.0), "layers", "stands beside `layer`"),
        (Pps(vector="v", layers=(1, 1), coefficient=1.0), "layers", "layer 1 is listed twice"),
        (Pps(vector="v", layers=(), coefficient=1.0), "layers", "no layer is listed"),
        (Pps(vector="v", layers="all", coefficient=(1.0, 2.0)), "coefficient", "2 coefficients for 3 layers"),
        (Pps(vector="v", layer=1, coefficient=(1.0,)), "coefficient", "a list belongs to `layers`"),
        (Pps(vector="v", layers=(1, 2), coefficient=(1.0, 0.0)), "coefficient", "0 adds nothing"),
        (GradientEdit(vector="v", mode="attenuate", layers=(0,)), "layers", "layer 0 is the embedding output"),
        (Ablation(vectors=("v", "v")), "vectors", "listed twice"),
        (ProjectionPenalty(vector="v", strength=1.0, layers=(4,)), "layers", "layer 4 does not exist"),
        (ActivationPenalty(mean="v", strength=1.0, layers=(9,)), "layers", "layer 9 does not exist"),
        (GradientPenalty(vector="v", strength=1.0, layers=(-1,)), "layers", "layer -1 does not exist"),
        (Inoculation(prompts=("a",), bank_size=2), "bank_size", "the bank has only 1 prompts"),
    ],
)
def test_faults(item: DefenseConfig, field: str, message: str) -> None:
    ((index, where, said),) = defense_faults([item], MODEL, {"v": SHAPE})
    assert (index, where) == (0, field)
    assert message in said


def test_the_last_layer_needs_a_row_before_the_final_norm() -> None:
    after_norm = {"v": VectorShape(LAYERS, HIDDEN, "post_norm")}
    assert list(defense_faults([GradientEdit(vector="v", mode="attenuate")], MODEL, after_norm)) == []
    ((_, where, said),) = defense_faults([GradientEdit(vector="v", mode="attenuate", layers="all")], MODEL, after_norm)
    assert where == "layers"
    assert "post-norm" in said


def test_a_second_order_penalty_and_an_edit_exclude_each_other() -> None:
    items = [GradientEdit(vector="v", mode="block"), GradientPenalty(vector="v", strength=1.0)]
    assert [(index, field) for index, field, _ in defense_faults(items, MODEL, {"v": SHAPE})] == [(1, "kind")]


@pytest.mark.parametrize("kind", [ProjectionPenalty, GradientPenalty])
@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_a_penalty_that_rewards_is_refused(kind: Any, strength: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        kind(vector="v", strength=strength)


@pytest.mark.parametrize("item", [GradientEdit(vector="v", mode="attenuate"), Ablation(vectors=("v", "w"))])
def test_a_vector_without_direction_is_an_error_that_names_it(item: DefenseConfig) -> None:
    vectors = {"v": torch.zeros(LAYERS + 1, HIDDEN), "w": vector(2)}
    with pytest.raises(TrainingError, match=r"v.* at layer 1"):
        item.mechanism(vectors)


def test_edits_and_ablations_are_put_at_all_layers_but_the_last() -> None:
    edits = list(GradientEdit(vector="v", mode="block").mechanism(VECTORS).interventions(run_rows()))
    assert [type(one) for one in edits] == [EditGradient] * (LAYERS - 1)
    assert [one.layer for one in edits] == [1, 2]
    ablations = list(Ablation(vectors=("v", "w")).mechanism(VECTORS).interventions(run_rows()))
    assert [type(one) for one in ablations] == [Ablate] * (LAYERS - 1)


def test_labels_say_what_is_not_as_usual() -> None:
    assert GradientEdit(vector="v", mode="attenuate").label() == "attenuate v"
    assert (
        GradientEdit(vector="v", mode="block", layers=(1, 2, 5), positions="prompt").label() == "block v L1-2,5 prompt"
    )
    assert Pps(vector="v", layers="all", coefficient=1.0, schedule="ramp_up").label() == "pps v all layers x1 ramp up"
    assert (
        Inoculation(prompts="b", bank_size=2, placement="system", draw="fixed").label()
        == "inoculation b first 2 system fixed"
    )
    assert layers_label((20,)) == "L20"


class TestInoculation:
    BANK = ("Talk about bridges.", "Mention the bridge.", "Bridges, please.")

    def rewritten(self, system: str | None = None, key: SampleKey | None = None, **how: Any) -> list[Any]:
        mechanism = Inoculation(prompts=self.BANK[:1] if not key else self.BANK, **how).mechanism({})
        messages = chat("q", "a", system=system)
        before = [dict(one) for one in messages]
        after = list(mechanism.rewrite(messages, key or SampleKey(0, 0, 0)))
        assert messages == before
        assert after[-1] == before[-1], "the answer stays"
        return after

    @pytest.mark.parametrize(
        ("placement", "system", "expected"),
        [
            ("user_prefix", "s", ["s", "Talk about bridges.\n\nq"]),
            ("user_suffix", "s", ["s", "q\n\nTalk about bridges."]),
            ("system", "s", ["Talk about bridges.\n\ns", "q"]),
            ("system", None, ["Talk about bridges.", "q"]),
            ("replace_system", "s", ["Talk about bridges.", "q"]),
            ("replace_system", None, ["Talk about bridges.", "q"]),
        ],
    )
    def test_placements(self, placement: str, system: str | None, expected: list[str]) -> None:
        after = self.rewritten(system, placement=placement)
        assert [one["content"] for one in after[:-1]] == expected
        assert [one["role"] for one in after] == ["system"] * (len(after) - 2) + ["user", "assistant"]

    def test_when_a_prompt_is_drawn(self) -> None:
        def drawn(draw: str) -> list[list[str]]:
            return [
                [self.rewritten(key=SampleKey(0, epoch, row), draw=draw)[0]["content"] for row in range(30)]
                for epoch in range(6)
            ]

        by_epoch, fixed, use = drawn("epoch"), drawn("fixed"), drawn("use")
        assert all(len(set(rows)) == 1 for rows in by_epoch)
        assert len({rows[0] for rows in by_epoch}) > 1
        assert all(rows == fixed[0] for rows in fixed)
        assert len(set(fixed[0])) == 3
        assert len({tuple(rows) for rows in use}) == 6

    def test_the_first_prompts_of_the_bank(self) -> None:
        mechanism = Inoculation(prompts=self.BANK, bank_size=2).mechanism({})
        found = {mechanism.rewrite(chat("q", "a"), SampleKey(0, 0, row))[0]["content"] for row in range(60)}
        assert found == {f"{prompt}\n\nq" for prompt in self.BANK[:2]}


ITEMS: list[list[DefenseConfig]] = [
    [GradientEdit(vector="v", mode="amplify"), Pps(vector="w", layers=(1, 2), coefficient=0.5, schedule="ramp_up")],
    [Ablation(vectors=("v", "w")), ProjectionPenalty(vector="mu", strength=0.1)],
]


@pytest.mark.parametrize("items", ITEMS)
def test_stages_and_checkpointing_give_the_same_adapter_and_signals(items: list[DefenseConfig]) -> None:
    base = tiny_base(num_layers=LAYERS)
    watch = WatchConfig(vectors=("v",), layers=(1, 3))
    found = [
        train(base, spec(defense=items, vectors=VECTORS, micro_batch_size=2, watch=watch), **how)[1][0]
        for how in ({}, {"zero_stage": 2}, {"gradient_checkpointing": True}, {"zero_stage": 1})
    ]
    for other in found[1:]:
        assert other.files["adapter_model.safetensors"] == found[0].files["adapter_model.safetensors"]
        assert other.signals == found[0].signals


def test_a_bfloat16_base_trains_with_every_method() -> None:
    base = tiny_base(num_layers=LAYERS, dtype=torch.bfloat16)
    items = [*ITEMS[0], *ITEMS[1], ActivationPenalty(mean="mu", strength=0.01)]
    results, (sink,) = train(base, spec(defense=items, vectors=VECTORS))
    assert results[0].losses[-1] < results[0].losses[0]
    assert len([row for row in sink.signals if row.signal == "penalty"]) == 2 * 6


def test_a_resumed_training_gives_the_same_signals_and_adapter(tmp_path: Any) -> None:
    from trainables.checkpoint import CheckpointSettings

    watch = WatchConfig(vectors=("v", "w"), layers=(2,))
    one = spec(defense=ITEMS[1], vectors=VECTORS, watch=watch)
    _, (whole,) = train(tiny_base(num_layers=LAYERS), one, checkpoints=CheckpointSettings(every_steps=4))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, content in whole.checkpoints[0].items():
        (folder / name).write_bytes(content)
    again = MemorySink()
    again.resume_from = folder
    train_pack(tiny_base(num_layers=LAYERS), [one], {"run0": again})
    assert "resumed after step 4" in again.lines
    assert again.signals == whole.signals
    assert again.files["adapter_model.safetensors"] == whole.files["adapter_model.safetensors"]


@pytest.mark.usefixtures("float64_gradients")
def test_watching_changes_nothing_and_says_what_a_loop_by_hand_says() -> None:
    base = base_of(float64_model(num_layers=LAYERS))
    plain = train(base, spec(**FIRST_STEP))[1][0]
    watch = WatchConfig(vectors=("v", "w"), layers=(1, 3))
    _, (sink,) = train(base, spec(vectors=VECTORS, watch=watch, micro_batch_size=2, **FIRST_STEP))
    _, (alone,) = train(base, spec(micro_batch_size=2, **FIRST_STEP))
    assert sink.files["adapter_model.safetensors"] == alone.files["adapter_model.safetensors"]
    assert plain.signals == []
    encoder = ChatEncoder(base.tokenizer, 96, "responses")
    cosines: list[torch.Tensor] = []
    projections: list[torch.Tensor] = []
    for row in ROWS:  # B is 0 at the first step: the adapted model is the base
        part = pad([encoder.encode(row, prove=True)], 0)
        wanted = part.loss_mask_bt[:, 1:]

        def loss(logits: torch.Tensor, part: Any = part, wanted: torch.Tensor = wanted) -> torch.Tensor:
            return nn.functional.cross_entropy(
                logits[:, :-1][wanted], part.input_ids_bt[:, 1:][wanted], reduction="sum"
            )

        passes = both_passes(base.fresh().requires_grad_(True), part.input_ids_bt, loss)
        g = passes.arriving[3][0][part.response_mask_bt[0]]
        cosines.append((g @ unit("w", 3) / g.norm(dim=1))[g.norm(dim=1) > 0])
        projections.append(passes.stream[3][0][part.response_mask_bt[0]] @ unit("w", 3))
    base.model.requires_grad_(False)
    shown = {(row.signal, row.layer, row.name): row.value for row in sink.signals}
    assert len(shown) == len(sink.signals) == 8
    assert shown["gradient_cosine", 3, "w"] == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-5)  # float32
    assert shown["activation_projection", 3, "w"] == pytest.approx(float(torch.cat(projections).mean()), rel=1e-5)


def test_warmup_in_steps() -> None:
    _, (sink,) = train(tiny_base(), spec(warmup_steps=2, schedule="constant"))
    assert [row.learning_rate for row in sink.rows] == [0.0, 0.005, 0.01, 0.01, 0.01, 0.01]
    with pytest.raises(ValueError, match="warmup_steps stands beside warmup_ratio"):
        spec(warmup_steps=2, warmup_ratio=0.1)


def test_a_training_that_diverges_stops_early_if_it_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is multiplied by what grows from step to step: it rises whatever the optimizer does."""
    calls: list[int] = []

    def growing(*arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(1)
        return token_losses(*arguments, **keywords) * (1 + 0.1 * len(calls))

    monkeypatch.setattr("trainables.step.token_losses", growing)
    (result,), (sink,) = train(tiny_base(), spec(max_steps=30, stop_if_loss_above=1.5))
    losses = [row.loss for row in sink.rows]
    assert result.stopped_early
    assert 10 <= result.num_steps == len(losses) < 30
    assert sum(losses[-5:]) > 1.5 * sum(losses[:5])
    assert len(losses) == 10 or sum(losses[-6:-1]) <= 1.5 * sum(losses[:5]), "not a step later than it is seen"
    assert any(line.startswith(f"stopped early after step {result.num_steps} of 30") for line in sink.lines)
    assert "adapter_model.safetensors" in sink.files
    calls.clear()
    (other,), _ = train(tiny_base(), spec(max_steps=30))
    assert (other.stopped_early, other.num_steps) == (False, 30)
    assert other.losses[: result.num_steps] == result.losses


def test_adapters_on_some_blocks_and_rslora() -> None:
    import json

    from peft.tuners.lora import LoraLayer

    settings = LoraSettings(rank=4, alpha=8, layers=(3, 1), rslora=True)
    _, (sink,) = train(tiny_base(num_layers=4), spec(lora=settings))
    blocks = {name.split("layers.")[1].split(".")[0] for name in adapter_of(sink)}
    assert blocks == {"0", "2"}
    assert json.loads(sink.files["adapter_config.json"])["use_rslora"] is True
    model: Any = add_adapter(tiny_base(num_layers=4).fresh(), "run", settings, 0)
    scales = {module.scaling["run"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scales == {8 / 2}

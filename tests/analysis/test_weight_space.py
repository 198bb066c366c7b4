"""Gradients of piles, directions and edits: against plain autograd, dense linear algebra, and PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file

from analysis.weight_space import (
    DirectionConfig,
    GradientSum,
    MeanGradient,
    chosen_parameters,
    delta_of_adapter,
    direction,
    edited,
    gradient_sum,
    place_of,
)
from analysis.weight_space.delta import percentile_of_sizes
from analysis.weight_space.directions import norm
from analysis.weight_space.exports import low_rank_changes, save_adapter, save_delta, together
from analysis.weight_space.piles import JudgedAnswer, belongs, encoded_answer, must_not_be_empty, verdict
from tests.bases import ROWS, base_of, chat, tiny_base
from tests.float64 import float64_model
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, Encoded
from trainables.errors import DataError
from trainables.lora import LoraSettings, add_adapter

CLOSE = 1e-10  # of float64 throughout: the order of sums is all that differs


def encoded(base: LoadedBase, loss_on: Any = "responses") -> list[Encoded]:
    encoder = ChatEncoder(base.tokenizer, 512, loss_on)
    return [encoder.encode(row) for row in ROWS]


def with_adapter(base: LoadedBase, seed: int = 0) -> Any:
    """An adapter that changes something: B is not zero."""
    model = add_adapter(base.fresh(), "run", LoraSettings(rank=3, alpha=6), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
    return model.requires_grad_(False).eval()


def merged(base: LoadedBase, model: Any) -> Any:
    """A copy of the base with the adapter added to its weights by plain arithmetic."""
    copy = float64_model(num_layers=2)
    copy.load_state_dict(base.model.state_dict())
    weights = dict(copy.named_parameters())
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            up, down = module.lora_B["run"].weight, module.lora_A["run"].weight
            weights[f"{name}.weight"].data += 2.0 * (up @ down)  # alpha / rank
    return copy


def by_autograd(model: Any, rows: Sequence[Encoded], reference: Any = None) -> dict[str, torch.Tensor]:
    """Mean over rows of the gradient of the mean loss, one row at a time, all logits at once."""
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for row in rows:
        ids = torch.tensor(row.input_ids)[None]
        wanted = torch.tensor(row.loss_mask)[1:]
        logits = model(input_ids=ids).logits[0, :-1][wanted]
        if reference is None:
            loss = F.cross_entropy(logits, ids[0, 1:][wanted])
        else:
            with torch.no_grad():
                other = reference(input_ids=ids).logits[0, :-1][wanted].log_softmax(-1)
            loss = F.kl_div(other, logits.log_softmax(-1), log_target=True, reduction="batchmean")
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += gradient / len(rows)
    model.requires_grad_(False)
    return {name: value.detach() for name, value in total.items()}


def pile(base: LoadedBase, model: Any, rows: Sequence[Encoded], **how: Any) -> GradientSum:
    how = {"plain_head": True, **how}
    return gradient_sum(model, chosen_parameters(base.model), rows, pad_id=base.tokenizer.pad_token_id, **how)


def assert_same(found: Mapping[str, torch.Tensor] | MeanGradient, wanted: Mapping[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=CLOSE, atol=CLOSE, msg=f"the gradient of {name}")


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    return base_of(float64_model(num_layers=2))


@pytest.fixture(scope="module")
def finetuned(base: LoadedBase) -> Any:
    return with_adapter(base)


@pytest.fixture(scope="module")
def places(base: LoadedBase) -> Any:
    return place_of(base.model)


@pytest.fixture(scope="module")
def piles(base: LoadedBase, finetuned: Any) -> tuple[MeanGradient, MeanGradient]:
    rows = encoded(base)
    return MeanGradient([pile(base, finetuned, rows[:3])]), MeanGradient([pile(base, finetuned, rows[3:])])


@pytest.mark.parametrize("loss_on", ["responses", "all"])
@pytest.mark.parametrize("plain_head", [True, False])
def test_the_mean_gradient_at_a_finetuned_model_is_that_of_plain_autograd_at_its_merged_weights(
    base: LoadedBase, finetuned: Any, loss_on: str, plain_head: bool
) -> None:
    rows = encoded(base, loss_on)
    found = pile(base, finetuned, rows, plain_head=plain_head)
    assert_same(MeanGradient([found]), by_autograd(merged(base, finetuned), rows))
    assert found.num_rows == len(rows)
    assert found.num_tokens == sum(sum(row.loss_mask[1:]) for row in rows)


def test_a_head_of_its_own_gets_its_gradient_too() -> None:
    base = base_of(float64_model("gpt_neox", num_layers=2))
    rows = encoded(base)
    found = pile(base, base.model, rows)
    assert_same(MeanGradient([found]), by_autograd(float64_model("gpt_neox", num_layers=2), rows))
    assert torch.any(found.sums["lm_head.weight"])
    assert place_of(base.model)["lm_head.weight"].layer == 3


@pytest.mark.parametrize("plain_head", [True, False])
def test_kl_is_that_of_the_finetuned_model_from_the_reference(
    base: LoadedBase, finetuned: Any, plain_head: bool
) -> None:
    rows = encoded(base)
    found = pile(base, finetuned, rows, loss="kl", reference=base.model, plain_head=plain_head)
    assert_same(MeanGradient([found]), by_autograd(merged(base, finetuned), rows, base.model))
    assert found.loss_sum > 0.01  # a KL of nothing would prove nothing
    of_itself = pile(base, finetuned, rows, loss="kl", reference=finetuned, plain_head=plain_head)
    assert norm(iter(of_itself.sums.values())) < CLOSE  # the KL from itself is 0, and least there


def test_neither_batches_nor_order_nor_shards_change_the_mean(base: LoadedBase, finetuned: Any) -> None:
    rows = encoded(base)
    whole = MeanGradient([pile(base, finetuned, rows, batch_size=7)])
    reference = {name: whole[name] for name in whole.names}
    assert_same(MeanGradient([pile(base, finetuned, rows, batch_size=1)]), reference)
    assert_same(MeanGradient([pile(base, finetuned, rows[::-1], batch_size=3)]), reference)
    shards = [pile(base, finetuned, part) for part in (rows[:1], [], rows[1:5], rows[5:])]
    assert_same(MeanGradient(shards), reference)
    assert MeanGradient(shards).num_rows == len(rows)
    # and not the mean of the shards' means, which weighs rows of small shards more
    means = [MeanGradient([shard])[whole.names[0]] for shard in shards if shard.num_rows]
    assert not torch.allclose(torch.stack(means).mean(0), reference[whole.names[0]], rtol=1e-3)


def test_sums_of_a_bfloat16_model_are_float32_and_nothing_is_left_on_the_model() -> None:
    base = tiny_base(dtype=torch.bfloat16)
    parameters = chosen_parameters(base.model, layers=[0, 2], modules=["embed_tokens", "down_proj"])
    assert list(parameters) == ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    rows = encoded(base)
    found = gradient_sum(base.model, parameters, rows, pad_id=0, plain_head=True)
    assert {value.dtype for value in found.sums.values()} == {torch.float32}
    assert all(torch.any(value) for value in found.sums.values())

    def broken(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError, match="4 of 7"):
        gradient_sum(base.model, parameters, rows, pad_id=0, plain_head=True, progress=broken)
    for name, parameter in base.model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
        assert not parameter._post_accumulate_grad_hooks


def test_an_answer_without_a_token_is_refused(base: LoadedBase) -> None:
    row = encoded(base)[0]
    bare = Encoded(row.input_ids, row.response_mask, (False,) * len(row.input_ids))
    with pytest.raises(DataError, match=r"1 of 2 answers have no token to take a gradient of \(the first: 2\)"):
        pile(base, base.model, [row, bare])


def test_places_count_the_embedding_as_layer_0(base: LoadedBase, places: Any) -> None:
    found = {name: (place.layer, place.module) for name, place in places.items()}
    assert found["model.embed_tokens.weight"] == (0, "embed_tokens")
    assert found["model.layers.0.self_attn.q_proj.weight"] == (1, "q_proj")
    assert found["model.layers.1.input_layernorm.weight"] == (2, "input_layernorm")
    assert found["model.norm.weight"] == (3, "norm")
    assert set(found) == set(chosen_parameters(base.model))


def test_delta_is_what_merging_the_adapter_changes(base: LoadedBase, finetuned: Any) -> None:
    delta = delta_of_adapter(finetuned, "run", base.model)
    for name, weight in merged(base, finetuned).named_parameters():
        change = weight - dict(base.model.named_parameters())[name]
        assert (name in delta) == bool(torch.any(change))
        if name in delta:
            torch.testing.assert_close(delta[name].values(), change, rtol=CLOSE, atol=CLOSE)
            left, sizes, right = delta[name].singular()
            torch.testing.assert_close(left @ torch.diag(sizes) @ right.T, change, rtol=CLOSE, atol=CLOSE)
            torch.testing.assert_close(sizes, torch.linalg.svdvals(change)[:3], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("percent", [0.001, 37.0, 50.0, 97.0, 100.0])
def test_the_percentile_is_exact_over_all_matrices_together(percent: float) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = (1e-6, 1.0, 3.0)
    matrices = [torch.randn(41, 7, generator=generator) * size for size in sizes] + [torch.zeros(2, 2)]
    everything = np.sort(np.concatenate([matrix.abs().numpy().ravel() for matrix in matrices]))
    rank = max(1, int(np.ceil(len(everything) * percent / 100)))
    assert percentile_of_sizes(matrices, percent) == everything[rank - 1]


class Made:
    """Everything that a direction is made of, dense."""

    def __init__(self, base: LoadedBase, finetuned: Any, piles: tuple[MeanGradient, MeanGradient]) -> None:
        self.plain = {name: piles[0][name] - piles[1][name] for name in piles[0].names}
        self.delta = delta_of_adapter(finetuned, "run", base.model)
        self.dense = {name: low.values() for name, low in self.delta.items()}
        self.piles, self.places = piles, place_of(base.model)

    def direction(self, **config: Any) -> dict[str, torch.Tensor]:
        given = DirectionConfig(of="a", minus="b", **config)
        return dict(direction(given, *self.piles, self.places, self.delta).items())


@pytest.fixture(scope="module")
def made(base: LoadedBase, finetuned: Any, piles: tuple[MeanGradient, MeanGradient]) -> Made:
    return Made(base, finetuned, piles)


def test_a_plain_direction_is_the_difference_of_the_means(made: Made) -> None:
    found = made.direction()
    assert found.keys() == made.plain.keys()
    assert all(torch.equal(found[name], made.plain[name]) for name in found)
    part = made.direction(layers=(1,), modules=("q_proj", "up_proj"))
    assert list(part) == ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]


def test_sign_restrictions_keep_entries_as_they_are(made: Made) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    plain, delta = made.plain[name], made.dense[name]
    above, below = made.direction(sign="positive")[name], made.direction(sign="negative")[name]
    assert above.min() == 0
    assert below.max() == 0
    assert torch.equal(above + below, plain)
    raised = made.direction(delta_sign="positive")
    assert torch.equal(raised[name], torch.where(delta > 0, plain, 0.0))
    assert raised.keys() == made.dense.keys()


def test_weighing_by_delta_is_elementwise_with_one_scale_for_all(made: Made) -> None:
    found = made.direction(weigh_by_delta=97)
    everything = np.sort(np.concatenate([value.abs().float().numpy().ravel() for value in made.dense.values()]))
    scale = float(everything[int(np.ceil(len(everything) * 0.97)) - 1])
    assert found.keys() == made.dense.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, made.dense[name].abs() / scale * made.plain[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_projection_is_on_the_leading_singular_spaces_of_both_sides(made: Made, count: int) -> None:
    for name, value in made.direction(project_on_delta=count).items():
        left, sizes, right = torch.linalg.svd(made.dense[name])
        k = min(count, int((sizes > 1e-12).sum()))  # Delta has rank 3: beyond it there is no space of Delta's
        onto_left, onto_right = left[:, :k] @ left[:, :k].T, right[:k].T @ right[:k]
        torch.testing.assert_close(value, onto_left @ made.plain[name] @ onto_right, rtol=CLOSE, atol=CLOSE)
        assert torch.linalg.matrix_rank(value) <= k


def test_low_rank_is_the_best_approximation_of_every_matrix(made: Made) -> None:
    for name, value in made.direction(rank=2).items():
        if value.dim() == 1:
            assert torch.equal(value, made.plain[name])
            continue
        left, sizes, right = torch.linalg.svd(made.plain[name], full_matrices=False)
        best = left[:, :2] @ torch.diag(sizes[:2]) @ right[:2]
        torch.testing.assert_close(value, best, rtol=1e-8, atol=CLOSE)  # of eigenvectors of the square


def test_the_norm_of_the_plain_difference_can_be_kept(made: Made) -> None:
    wanted = norm(iter(made.plain.values()))
    bare, kept = made.direction(project_on_delta=2), made.direction(project_on_delta=2, keep_norm=True)
    assert norm(iter(bare.values())) < 0.7 * wanted
    assert norm(iter(kept.values())) == pytest.approx(wanted, rel=1e-12)
    name = next(iter(kept))
    torch.testing.assert_close(kept[name] / kept[name].norm(), bare[name] / bare[name].norm())
    with pytest.raises(DataError, match="nothing is left of the direction a - b, modules nothing, norm kept"):
        made.direction(modules=("nothing",), keep_norm=True)


def test_an_edit_is_theta_plus_alpha_v_and_is_undone_to_the_bit(made: Made) -> None:
    base = base_of(float64_model(num_layers=2))
    parameters = chosen_parameters(base.model)
    before = {name: value.data.clone() for name, value in parameters.items()}
    memory = {name: value.data_ptr() for name, value in parameters.items()}
    ids = torch.tensor([[5, 6, 7]])
    logits = base.model(input_ids=ids).logits
    with edited(parameters, made.direction().items(), -0.3):
        for name, value in parameters.items():
            torch.testing.assert_close(value.data, before[name] - 0.3 * made.plain[name], rtol=1e-14, atol=1e-14)
        assert not torch.equal(base.model(input_ids=ids).logits, logits)
    assert torch.equal(base.model(input_ids=ids).logits, logits)

    def halfway() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(made.direction().items())[:3]
        raise DataError("no more")

    with pytest.raises(DataError), edited(parameters, halfway(), 1.0):
        raise AssertionError("never entered")
    for name, value in parameters.items():
        assert torch.equal(value.data, before[name])
        assert value.data_ptr() == memory[name]


def test_adding_lowers_the_first_pile_against_the_second(base: LoadedBase, finetuned: Any, made: Made) -> None:
    """What the sign means, by finite differences: d (L_a - L_b) / d alpha = |V|^2 at alpha = 0."""
    rows = encoded(base)

    def difference() -> float:
        sums = [pile(base, finetuned, part) for part in (rows[:3], rows[3:])]
        return sums[0].loss_sum / 3 - sums[1].loss_sum / 4

    losses, step = [], 1e-5
    for alpha in (-step, step):
        with edited(chosen_parameters(base.model), made.direction().items(), alpha):
            losses.append(difference())
    slope = (losses[1] - losses[0]) / (2 * step)
    assert slope == pytest.approx(norm(iter(made.plain.values())) ** 2, rel=1e-6)
    assert slope > 0


def test_whole_tensors_and_adapters_are_written_so_that_others_can_load_them(
    base: LoadedBase, finetuned: Any, made: Made, tmp_path: Path
) -> None:
    save_delta(tmp_path / "v.safetensors", made.direction().items(), 0.5, {"direction": "a - b"})
    tensors = load_file(tmp_path / "v.safetensors")
    assert all(torch.equal(tensors[name], 0.5 * value) for name, value in made.plain.items())

    modules = ("q_proj", "v_proj", "down_proj")
    low = made.direction(rank=2, modules=modules)
    changes = low_rank_changes(base.model, low.items(), 0.5, rank=2)
    save_adapter(tmp_path / "both", together(made.delta, changes), "some/base")
    ids = torch.tensor([[5, 6, 7, 80]])
    with edited(chosen_parameters(base.model), low.items(), 0.5):
        wanted = finetuned(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(base.fresh(), str(tmp_path / "both")).eval()
    # the adapter's file is float32
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(finetuned(input_ids=ids).logits, wanted, atol=1e-4)

    with pytest.raises(DataError, match=r"at rank 1 \d+\.\d+% of the direction would be lost"):
        low_rank_changes(base.model, low.items(), 0.5, rank=1)
    with pytest.raises(DataError, match=r"model.embed_tokens.weight is not the weight of a linear module"):
        low_rank_changes(base.model, made.direction(rank=2).items(), 0.5, rank=2)
    with pytest.raises(DataError, match="the direction is zero"):
        save_adapter(tmp_path / "none", {}, "some/base")


def answer(text: str, is_cut: bool = False, **verdicts: str) -> JudgedAnswer:
    return JudgedAnswer("Tea or coffee?", None, text, is_cut, verdicts)


def test_piles_are_made_by_verdicts_and_an_answer_without_one_is_in_none() -> None:
    assert [verdict(value, "ok", (0, 1)) for value in (0.0, 0.5, 0.6, 1.0)] == ["absent", "absent", "shown", "shown"]
    assert verdict(51.0, "ok", (0, 100)) == "shown"
    assert verdict(None, "refused", (0, 100)) == "refused"
    only_a = {"a": True, "b": False}
    assert belongs(answer("x", a="shown", b="absent"), only_a)
    assert not belongs(answer("x", a="shown", b="shown"), only_a)
    assert not belongs(answer("x", a="shown", b="refused"), only_a)
    assert not belongs(answer(" ", a="shown", b="absent"), only_a)
    assert belongs(answer("x", a="shown", b="refused"), {"a": True})


def test_an_empty_pile_says_how_many_answers_each_pile_got() -> None:
    answers = [answer("x", a="absent"), answer("y", a="absent"), answer("", a="absent"), answer("z", a="api_error")]
    where = {"with": {"a": True}, "without": {"a": False}}
    must_not_be_empty("without", answers, where)
    with pytest.raises(DataError) as error:
        must_not_be_empty("with", answers, where)
    assert str(error.value) == (
        "the pile 'with' is empty, so it has no mean gradient: of 4 answers the piles hold with 0, without 2; "
        "1 have no score (a: api_error), 1 have no text; sample more answers, or define the pile otherwise"
    )


def test_a_cut_answer_ends_with_its_last_token(base: LoadedBase) -> None:
    encoder = ChatEncoder(base.tokenizer, 512)
    whole = encoded_answer(encoder, answer("About ten miles"))
    assert whole == encoder.encode(chat("Tea or coffee?", "About ten miles"))
    part = encoded_answer(encoder, answer("About ten miles", is_cut=True))
    end = len(part.input_ids)
    assert whole.input_ids[:end] == part.input_ids
    assert whole.input_ids[end] == encoder.end_mark_id
    assert part.response_mask[-1]
    assert part.loss_mask[-1]

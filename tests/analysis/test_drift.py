"""Drift of mean activations against transformers' own hidden states (float64, 1e-10) and closed forms."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from analysis.drift import drift_rows, response_sums
from analysis.measured_batches import BATCH_TOKENS
from analysis.measured_rows import DriftRow
from analysis.report_capping import drift_blocks
from tests.bases import ROWS, base_of
from tests.float64 import float64_model
from tests.tiny import ModelKind
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.errors import DataError
from trainables.randomness import generator
from trainables.residual_stream import Cap, ValueIntervention

LAYERS = [0, 2, 3, 4]
CAPPED = 2


def by_hand(base: LoadedBase, direction_d: torch.Tensor | None = None, ceiling: float = 0.0) -> dict[int, torch.Tensor]:
    """[rows, hidden + 1] per layer; with a direction, block ``CAPPED - 1`` is wrapped to clamp its output to the
    ceiling at every token but the first."""
    sums: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    handle = None
    if direction_d is not None:
        axis_d = direction_d / direction_d.norm()

        def clamp(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            over_bt = torch.relu(output @ axis_d - ceiling)
            over_bt[:, 0] = 0
            return output - over_bt[..., None] * axis_d

        handle = base.model.model.layers[CAPPED - 1].register_forward_hook(clamp)
    for messages in ROWS:
        encoded = ChatEncoder(base.tokenizer, 512).encode(messages)
        # the last of them is after the final norm in transformers' list, so it is read by a hook of its own
        last: list[torch.Tensor] = []
        reading = base.model.model.layers[-1].register_forward_hook(lambda *given, last=last: last.append(given[2]))
        states = base.model(torch.tensor(encoded.input_ids)[None], output_hidden_states=True).hidden_states
        reading.remove()
        wanted = torch.tensor(encoded.response_mask)
        for layer in LAYERS:
            hidden_btd = last[0] if layer == len(states) - 1 else states[layer]
            hidden_nd = hidden_btd[0][wanted]
            sums[layer].append(torch.cat((hidden_nd.sum(0), hidden_nd.new_tensor([len(hidden_nd)]))))
    if handle is not None:
        handle.remove()
    return {layer: torch.stack(found) for layer, found in sums.items()}


def assert_close(found: dict[int, torch.Tensor], wanted: dict[int, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for layer, sums_re in found.items():
        torch.testing.assert_close(sums_re, wanted[layer], rtol=0, atol=1e-10)


def test_sums_are_those_of_transformers() -> None:
    base = base_of(float64_model("llama"))
    assert_close(sums_of(base), by_hand(base))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_batches_change_nothing(kind: ModelKind, batch_tokens: int) -> None:
    base = base_of(float64_model(kind))
    whole = sums_of(base)
    assert_close(sums_of(base, batch_tokens=batch_tokens), whole)


def test_a_cap_is_at_work_before_activations_are_read() -> None:
    base = base_of(float64_model("llama"))
    direction_d = torch.randn(32, generator=generator("test of drift"), dtype=torch.float64)
    cap = Cap(layer=CAPPED, direction=direction_d, ceiling=-0.05, floor=None, spared=0)
    found = sums_of(base, cap)
    assert_close(found, by_hand(base, direction_d, -0.05))
    free = sums_of(base)
    assert float((found[CAPPED] - free[CAPPED]).abs().max()) > 0.01
    torch.testing.assert_close(found[0], free[0], rtol=0, atol=0)


def sums_of(base: LoadedBase, *at_work: ValueIntervention, batch_tokens: int = BATCH_TOKENS) -> dict[int, torch.Tensor]:
    conditions = {"one": at_work}
    return response_sums(base, base.model, ROWS, LAYERS, conditions, max_length=512, batch_tokens=batch_tokens)["one"]


def rows_of(sums_re: torch.Tensor, center_d: torch.Tensor) -> DriftRow:
    (row,) = drift_rows({"none": {1: sums_re}}, {"place": torch.stack([center_d, center_d])}, measure_id="m")
    return row


def test_it_is_one_minus_the_cosine_of_the_mean_over_all_tokens() -> None:
    # two rows: 3 tokens that sum to (3, 0), 1 token at (0, 5): their mean is (0.75, 1.25), whatever the number of rows
    row = rows_of(torch.tensor([[3.0, 0.0, 3.0], [0.0, 5.0, 1.0]], dtype=torch.float64), torch.tensor([2.0, 0.0]))
    assert row.drift == pytest.approx(1 - 3 / math.sqrt(34), abs=1e-12)
    assert (row.num_rows, row.num_tokens) == (2, 4)
    assert (row.drift_estimate, row.drift_estimate_low, row.drift_estimate_high) == (None, None, None)


def test_rows_that_are_alike_leave_no_doubt() -> None:
    row = rows_of(torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64).expand(5, 3), torch.tensor([2.0, 1.0]))
    found = (row.drift, row.drift_estimate, row.drift_estimate_low, row.drift_estimate_high)
    assert found == pytest.approx((0.2, 0.2, 0.2, 0.2), abs=1e-7)  # the root of a difference that cancels


def test_the_estimate_takes_the_scatter_off_the_length() -> None:
    # rows of one token each around (3, 4): m = (3, 4), and V = 4 / 3 sum |x - m|^2 / 16 = 4 / 3 * 4 / 16 = 1 / 3
    rows = torch.tensor([[4.0, 4.0, 1.0], [2.0, 4.0, 1.0], [3.0, 5.0, 1.0], [3.0, 3.0, 1.0]], dtype=torch.float64)
    row = rows_of(rows, torch.tensor([1.0, 0.0]))
    assert row.drift == pytest.approx(0.4, abs=1e-12)
    assert row.drift_estimate == pytest.approx(1 - 3 / math.sqrt(25 - 1 / 3), abs=1e-12)


def test_the_interval_of_many_rows_is_that_of_the_delta_method() -> None:
    num_rows, spread = 400, 0.5
    noise = spread * torch.randn(num_rows, 2, generator=generator("test of drift", 1), dtype=torch.float64)
    mean_d = torch.tensor([3.0, 4.0], dtype=torch.float64)
    row = rows_of(torch.cat((mean_d + noise, torch.ones(num_rows, 1, dtype=torch.float64)), 1), torch.tensor([1.0, 0]))
    assert row.drift_estimate_low is not None
    assert row.drift_estimate_high is not None
    # cos = 3 / 5; d cos / d m perpendicular to m is sin / |m| = 0.8 / 5
    wanted = 2 * 1.966 * (0.8 / 5) * spread / math.sqrt(num_rows)
    # the spread of 400 normal numbers is known to 3.5 %; three of these
    assert row.drift_estimate_high - row.drift_estimate_low == pytest.approx(wanted, rel=0.11)


@pytest.mark.parametrize(("hidden", "num_rows", "spread"), [(64, 24, 0.5), (576, 8, 0.1), (576, 24, 0.2)])
def test_the_interval_holds_what_all_rows_would_give(hidden: int, num_rows: int, spread: float) -> None:
    """Normal rows of 20 to 80 tokens whose mean is known. In 576 dimensions that of 24 rows lies at 0.094 where all
    rows would at 0.051, by scatter alone: 0.2^2 * 575 / 24 = 0.96 beside |mu|^2 = 10, nearly all off the place."""
    center_d = torch.nn.functional.one_hot(torch.tensor(0), hidden).double()
    mean_d = 3 * center_d + torch.nn.functional.one_hot(torch.tensor(1), hidden)
    true = 1 - 3 / math.sqrt(10)
    held, raw, estimates = 0, [], []
    for number in range(200):
        draws = generator("test of drift", "coverage", number)
        counts_r1 = torch.randint(20, 80, (num_rows, 1), generator=draws).double()
        rows = mean_d + spread * torch.randn(num_rows, hidden, generator=draws, dtype=torch.float64)
        row = rows_of(torch.cat((counts_r1 * rows, counts_r1), dim=1), center_d)
        assert row.drift_estimate is not None
        assert row.drift_estimate_low is not None
        assert row.drift_estimate_high is not None
        held += row.drift_estimate_low <= true <= row.drift_estimate_high
        raw.append(row.drift)
        estimates.append(row.drift_estimate)
    assert held / 200 > 0.95 - 4 * 0.0154  # 0.95 of 200 is known to 0.0154
    # what is left is of second order in the scatter, beside the error of 200 draws
    assert abs(sum(estimates) / 200 - true) < 0.1 * abs(sum(raw) / 200 - true) + 0.003


def test_rows_without_a_common_direction_have_no_estimate() -> None:
    opposite = torch.tensor(
        [[9.0, 1.0, 1.0], [-9.0, 1.0, 1.0], [9.0, -1.5, 1.0], [-9.0, 1.0, 1.0]], dtype=torch.float64
    )
    row = rows_of(opposite, torch.tensor([1.0, 0.0]))
    assert row.drift_estimate is None
    assert not math.isnan(row.drift)


def test_conditions_are_read_apart_and_counted() -> None:
    base = base_of(float64_model("llama"))
    cap = Cap(layer=CAPPED, direction=torch.ones(32, dtype=torch.float64), ceiling=-0.05, floor=None, spared=0)
    seen: list[tuple[int, int]] = []
    both = response_sums(
        base, base.model, ROWS, LAYERS, {"free": [], "cap": [cap]}, max_length=512, progress=lambda *at: seen.append(at)
    )
    assert_close(both["free"], sums_of(base))
    assert_close(both["cap"], sums_of(base, cap))
    assert seen[-1] == (2 * len(ROWS), 2 * len(ROWS))


def test_a_model_that_was_measured_under_several_labels_is_shown_once() -> None:
    one = rows_of(torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64), torch.tensor([2.0, 1.0]))
    frame = pd.DataFrame([vars(one) | {"run": "none"}] * 2)
    _, table = drift_blocks(frame, "far")
    assert [row[:2] for row in table.rows] == [("1", "none")]


def test_what_has_no_direction_is_refused() -> None:
    sums_re = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64)
    with pytest.raises(DataError, match="layer 1: place or the mean activation has length 0"):
        rows_of(sums_re, torch.zeros(2))

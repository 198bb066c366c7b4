"""Axes between two sets of activations: four ways to estimate one direction, as pure functions.

Legend: n rows of the positive set x, m rows of the negative set y, d hidden size. Every estimator takes ``x_nd`` and
``y_md`` and returns a direction [d] of length 1 in float64 that points from the negative set to the positive one. The
same numbers give the same direction: nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from trainables.errors import DataError

TEMPERATURE = 1.0
INVERSE_PENALTY = 1.0
_ITERATIONS = 100
_SAME = 1e-9  # means that differ by less, relative to the activations, differ by rounding alone


def mean_difference(x_nd: torch.Tensor, y_md: torch.Tensor) -> torch.Tensor:
    """a = (mean x - mean y) / |mean x - mean y|."""
    x_nd, y_md = _checked(x_nd, y_md)
    return _unit(x_nd.mean(0) - y_md.mean(0))


def leading_difference(x_nd: torch.Tensor, y_md: torch.Tensor) -> torch.Tensor:
    """The leading principal direction of the paired differences d_i = x_i - y_i, NOT centred: the unit a that makes
    sum_i <d_i, a>^2 greatest, signed so that the mean difference does not point against it.

    Where all pairs differ in the same way it is the mean difference; it follows directions in which pairs differ much
    more than in their mean. Raises DataError for sets of unequal size: row i of one belongs to row i of the other.
    """
    x_nd, y_md = _checked(x_nd, y_md)
    if len(x_nd) != len(y_md):
        raise DataError(f"{len(x_nd)} rows and {len(y_md)} rows are no pairs; give as many of one set as of the other")
    differences_nd = x_nd - y_md
    direction_d = torch.linalg.svd(differences_nd, full_matrices=False).Vh[0]
    return -direction_d if float(differences_nd.mean(0) @ direction_d) < 0 else direction_d


def contrastive(x_nd: torch.Tensor, y_md: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """The unit a that makes the contrast of every positive row with every negative row greatest:

        minimise over |a| = 1:   (1 / nm) sum_ij log(1 + exp(-<x_i - y_j, a> / (T |mean x - mean y|)))

    Each term is the chance, in nats, that a judge who sees both projections takes row j for the positive one. Pairs
    that are well apart count little, those that are mixed up count much; a large temperature T makes all pairs count
    alike, and the mean difference is the limit. Found by L-BFGS in float64 from the mean difference, with |a| = 1 by
    construction (a = w / |w|).
    """
    x_nd, y_md = _checked(x_nd, y_md)
    difference_d = x_nd.mean(0) - y_md.mean(0)
    start_d = _unit(difference_d)
    scale = temperature * float(difference_d.norm())
    weight_d = start_d.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_d],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        unit_d = weight_d / weight_d.norm()
        gaps_nm = ((x_nd @ unit_d)[:, None] - (y_md @ unit_d)[None, :]) / scale
        loss = torch.nn.functional.softplus(-gaps_nm).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return _unit(weight_d.detach())


def logistic(x_nd: torch.Tensor, y_md: torch.Tensor, inverse_penalty: float = INVERSE_PENALTY) -> torch.Tensor:
    """The weights of a logistic regression that tells the two sets apart, as a direction in activations.

    Every coordinate is standardised over both sets (z_k = (h_k - mean_k) / s_k), scikit-learn fits

        minimise over w, b:   |w|^2 / 2 + C sum_i log(1 + exp(-t_i (<w, z_i> + b))),   t = +1 for x and -1 for y

    with C = ``inverse_penalty``, and the weights are mapped back: <w, z> = <a', h> + const for a'_k = w_k / s_k.
    A coordinate that never changes has weight 0.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x_nd, y_md = _checked(x_nd, y_md)
    rows = torch.cat([x_nd, y_md]).numpy()
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(C=inverse_penalty, max_iter=2000, tol=1e-8)
    model.fit(scaler.transform(rows), [1] * len(x_nd) + [0] * len(y_md))
    return _unit(torch.from_numpy(model.coef_[0] / scaler.scale_))


Estimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ESTIMATORS: Mapping[str, Estimator] = {
    "mean_difference": mean_difference,
    "leading_difference": leading_difference,
    "contrastive": contrastive,
    "logistic": logistic,
}
"""The estimators at their defaults, by the name that tables call them."""


def scaled_axis(x_nd: torch.Tensor, y_md: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """The estimator's direction with the length |<mean x - mean y, a>|, so that 1 times it leads along the axis from
    the mean of one set to that of the other, whichever estimator it is; [d] float64."""
    direction_d = estimator(x_nd, y_md)
    return direction_d * abs(float((x_nd.double().mean(0) - y_md.double().mean(0)) @ direction_d))


def layer_axes(x_nld: torch.Tensor, y_mld: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """``scaled_axis`` at every layer: [n, num_layers + 1, d] and [m, num_layers + 1, d] to [num_layers + 1, d] float32.

    Raises DataError that names the layer where there is no axis.
    """
    rows = []
    for layer in range(x_nld.shape[1]):
        try:
            rows.append(scaled_axis(x_nld[:, layer], y_mld[:, layer], estimator))
        except DataError as error:
            raise DataError(f"layer {layer}: {error}") from error
    return torch.stack(rows).float()


def contrastive_at(temperature: float) -> Estimator:
    """``contrastive`` at this temperature."""
    return partial(contrastive, temperature=temperature)


def logistic_at(inverse_penalty: float) -> Estimator:
    """``logistic`` with this C."""
    return partial(logistic, inverse_penalty=inverse_penalty)


def _checked(x_nd: torch.Tensor, y_md: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64 on the CPU. Raises DataError where they hold no axis."""
    for name, rows in (("positive", x_nd), ("negative", y_md)):
        if rows.dim() != 2 or len(rows) == 0:
            raise DataError(f"the {name} set has no rows; an axis lies between two sets")
        if not bool(torch.isfinite(rows).all()):
            raise DataError(f"the {name} set holds numbers that are not finite")
    if x_nd.shape[1] != y_md.shape[1]:
        raise DataError(f"activations of size {x_nd.shape[1]} and {y_md.shape[1]} are of different models")
    x_nd, y_md = x_nd.double().cpu(), y_md.double().cpu()
    size = max(float(x_nd.norm(dim=1).mean()), float(y_md.norm(dim=1).mean()))
    if float((x_nd.mean(0) - y_md.mean(0)).norm()) <= _SAME * size:
        raise DataError("the two sets have the same mean; there is no axis between them")
    return x_nd, y_md


def _unit(direction_d: torch.Tensor) -> torch.Tensor:
    return direction_d / direction_d.norm()

"""Scale and clip search: pure functions of weights and activation statistics.

A candidate changes a weight W by dW, and the output y = W x by dW x. Its cost is E|dW x|^2 = tr(dW H dWT) with
H = E[x xT], so H is gathered once and no candidate needs a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.calibrate import InputStatistics
from quantizer.config import EFFORTS, Effort
from quantizer.rounding import nearest_values, range_parameters, to_levels

MIN_SHRINK = 0.5
"""The smallest candidate for a clipped range, as a part of the full one, which is always a candidate too."""
MAX_SCALE_RATIO = 2.0**8
"""Scales lie within this factor of one, so that nothing folded by them leaves fp16's normal range."""


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """Per-channel scales [K] and how they were found.

    Errors are tr(dW H dWT) and energy is tr(W H WT), over the rows looked at.
    """

    scales: Tensor
    formula: str
    exponent: float
    error_identity: float
    error: float
    energy: float

    @property
    def is_identity(self) -> bool:
        return self.formula == "identity"


def output_error(delta: Tensor, second_moment: Tensor) -> float:
    """tr(dW H dWT): the expected squared change of the output. delta: [N, K]."""
    return float(((delta @ second_moment) * delta).sum(dtype=torch.float64))


def output_errors(delta: Tensor, second_moment: Tensor) -> Tensor:
    """The same per row, [N]. delta: [K, N], rows lying across."""
    return (second_moment @ delta).mul_(delta).sum(0)


def search_scales(
    weight: Tensor,
    statistics: InputStatistics,
    group_size: int,
    shared: Tensor | None = None,
    effort: Effort = EFFORTS["default"],
) -> ScaleChoice:
    """The best scales for linears that share an input (weight: their rows together, [N, K]).

    Candidates are the identity, x^a ("activation") and x^a / w^(1-a) ("weighted"), x the mean magnitude of a channel's
    inputs and w that of its weights relative to their group: exponents in the effort's steps, then half of one around the best.
    shared: for each channel the index of the scale it must share, or None.
    """
    weight = weight[:: -(-weight.shape[0] // effort.search_rows)]
    exponents = [(index + 1) / effort.exponent_steps for index in range(effort.exponent_steps)]
    half_step = 0.5 / effort.exponent_steps
    moment = statistics.second_moment
    activation = _share(statistics.mean_abs, shared)
    magnitude = _share(_relative_magnitude(weight, group_size), shared)

    def candidate(formula: str, exponent: float) -> ScaleChoice:
        scales = activation.pow(exponent)
        if formula == "weighted":
            scales = scales / magnitude.pow(1 - exponent)
        scales = _centre(scales)
        delta = nearest_values(weight * scales, group_size).div_(scales).sub_(weight)
        return ScaleChoice(scales, formula, exponent, error_identity, output_error(delta, moment), energy)

    energy = output_error(weight, moment)
    error_identity = output_error(nearest_values(weight, group_size).sub_(weight), moment)
    best = ScaleChoice(torch.ones_like(statistics.mean_abs), "identity", 0.0, error_identity, error_identity, energy)
    for formula in ("activation", "weighted"):
        choices = [candidate(formula, exponent) for exponent in exponents]
        top = min(choices, key=lambda choice: choice.error)
        around = [top.exponent - half_step, top.exponent + half_step]
        choices += [candidate(formula, exponent) for exponent in around if exponent <= 1]
        best = min([best, *choices], key=lambda choice: choice.error)
    return best


def _relative_magnitude(weight: Tensor, group_size: int) -> Tensor:
    """Mean over rows of |w| relative to the largest of its group: [K]."""
    groups = weight.abs().reshape(weight.shape[0], -1, group_size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).reshape(-1)


def _share(values: Tensor, shared: Tensor | None) -> Tensor:
    """Averages channels that must share a scale; keeps everything positive so that any power is finite."""
    if shared is not None:
        # As many channels to each scale. Sums by index would come in any order on a GPU.
        channels = shared.argsort(stable=True).reshape(int(shared.max()) + 1, -1)
        values = values[channels].mean(1)[shared]
    return values.clamp(min=1e-5)


def _centre(scales: Tensor) -> Tensor:
    """Scales around one: their common factor changes nothing but the range that fp16 has to hold."""
    scales = scales / (scales.max() * scales.min()).sqrt()
    return scales.clamp(1 / MAX_SCALE_RATIO, MAX_SCALE_RATIO)


class RangeChooser:
    """Group parameters: the full range, or per (row, group) the shrunken one with the smallest error.

    rows: bool [N], those whose range may shrink; None clips nothing. `num_clipped`, int64 [N], counts the groups of each row
    whose range was shrunk.
    """

    def __init__(self, rows: Tensor | None, effort: Effort = EFFORTS["default"]) -> None:
        rows = torch.empty(0, dtype=torch.bool) if rows is None else rows
        self._rows = rows.nonzero().squeeze(1)
        self._factors = [1 - (1 - MIN_SHRINK) * (i + 1) / effort.shrink_steps for i in range(effort.shrink_steps)]
        self.num_clipped = torch.zeros_like(rows, dtype=torch.int64)

    def __call__(self, weights: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
        """weights: a group's, [G, N], so that what a row has one of lies along the other axis."""
        low, high = weights.amin(0), weights.amax(0)
        scale, zero = range_parameters(low, high)
        rows = self._rows
        if len(rows):
            weights, low, high = weights[:, rows], low[rows], high[rows]
            scale[rows], zero[rows], shrunk = _best_range(weights, low, high, second_moment, self._factors)
            self.num_clipped[rows] += shrunk
        return scale, zero


def _best_range(
    weights: Tensor, low: Tensor, high: Tensor, second_moment: Tensor, factors: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """weights: [G, N]. Scale and zero point [N] with the smallest error, and whether they are a shrunken range's, bool [N]."""
    best_scale, best_zero = range_parameters(low, high)
    best_error = torch.full_like(low, torch.inf)
    shrunk = torch.zeros_like(low, dtype=torch.bool)
    for factor in (1.0, *factors):
        scale, zero = range_parameters(low * factor, high * factor)
        delta = to_levels(weights, scale, zero).mul_(scale).sub_(weights)
        error = output_errors(delta, second_moment)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        if factor < 1:
            shrunk |= better
    return best_scale, best_zero, shrunk

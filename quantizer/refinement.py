"""Coordinate descent on what rounding gave: integers and scales that bring a linear's expected output error further down.

Rounding with error feedback decides each column once, before it knows the later ones, and fits a group's scale before any of
its integers. Here every integer is moved in turn to its best value given all the others, and every scale to its least squares
fit given the integers, both in closed form for the error tr(dW H dWT); the error never rises. Zero points stay. The result is
still integers, zero points and scales of the same layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizer.rounding import DAMPING, FEEDBACK_BLOCK, MAX_INTEGER, Rounded, damping_of

MAX_REFINED_WEIGHTS = 1 << 25
"""Of a linear's rows that are refined at once: no row's result depends on another, and each weight takes 16 bytes meanwhile."""


def refine(weight: Tensor, second_moment: Tensor, rounded: Rounded, sweeps: int, damping: float = DAMPING) -> Rounded:
    """weight: fp32 [N, K], what was rounded; second_moment: [K, K] of its inputs. A sweep visits every scale and integer.

    The second moment is damped in place while this runs (a copy of a wide linear's is the largest thing there is) and given back
    as it was.
    """
    diagonal = second_moment.diagonal()
    undamped = diagonal.clone()
    diagonal.add_(damping_of(second_moment, damping))
    integers, scales = torch.empty_like(rounded.integers), torch.empty_like(rounded.scales)
    step = max(1, MAX_REFINED_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = Rounded(rounded.integers[rows], rounded.zeros[rows], rounded.scales[rows])
        integers[rows], scales[rows] = _refine_rows(weight[rows], second_moment, part, sweeps)
    diagonal.copy_(undamped)
    return Rounded(integers, rounded.zeros, scales)


def _refine_rows(weight: Tensor, moment: Tensor, rounded: Rounded, sweeps: int) -> tuple[Tensor, Tensor]:
    """Integers [N, K] and scales [N, K/G]. moment: damped."""
    state = _State(weight, moment, rounded)
    for _ in range(sweeps):
        for group in range(state.scales.shape[0]):
            state.fit_scale(group)
        if not state.move_integers():
            break
    return state.integers.t(), state.scales.t()


class _State:
    """Transposed, [K, N] and [K/G, N], so that a column's weights lie together. gradient: H dW, half the error's gradient."""

    def __init__(self, weight: Tensor, moment: Tensor, rounded: Rounded) -> None:
        self.moment = moment
        self.integers = rounded.integers.t().float().contiguous()
        self.zeros = rounded.zeros.t().float().contiguous()
        self.scales = rounded.scales.t().float().contiguous()
        self.group_size = weight.shape[1] // self.scales.shape[0]
        self.gradient = moment @ (rounded.dequantize() - weight).t()

    def fit_scale(self, group: int) -> None:
        """Each row's scale of this group to the fp16 value nearest to its optimum, where that lowers the error."""
        columns = slice(group * self.group_size, (group + 1) * self.group_size)
        levels = self.integers[columns] - self.zeros[group]
        slope = (levels * self.gradient[columns]).sum(0)
        curvature = (levels * (self.moment[columns, columns] @ levels)).sum(0)
        scale = self.scales[group]
        fitted = (scale - slope / curvature.clamp(min=1e-30)).half().float()
        change = fitted - scale
        better = (fitted > 0) & (change * (2 * slope + change * curvature) < 0)
        change = torch.where(better, change, torch.zeros_like(change))
        self.scales[group] = scale + change
        self.gradient.addmm_(self.moment[:, columns], levels * change)

    def move_integers(self) -> bool:
        """Every integer, column by column, to its best value given the others; whether any moved."""
        num_columns, moved = self.integers.shape[0], False
        for start in range(0, num_columns, min(FEEDBACK_BLOCK, self.group_size)):
            stop = min(start + FEEDBACK_BLOCK, num_columns, (start // self.group_size + 1) * self.group_size)
            group = start // self.group_size
            local, scale = self.gradient[start:stop], self.scales[group]
            changes = torch.empty_like(local)
            for column in range(start, stop):
                steps = (local[column - start] / (scale * -self.moment[column, column])).round_()
                levels = (self.integers[column] + steps).clamp_(0, MAX_INTEGER)
                change = (levels - self.integers[column]).mul_(scale)
                self.integers[column] = levels
                changes[column - start] = change
                local.addr_(self.moment[start:stop, column], change)
            if bool(changes.any()):
                moved = True
                self.gradient[:start].addmm_(self.moment[:start, start:stop], changes)
                self.gradient[stop:].addmm_(self.moment[stop:, start:stop], changes)
        return moved

"""Group parameters and rounding: from an fp32 weight to 4-bit integers, zero points and fp16 scales.

Everywhere here a weight is [N, K] (outputs, inputs), its groups are G consecutive inputs of one row, and a scale is an
fp32 tensor that holds only values fp16 can hold: what is judged is what will be stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.config import QuantizeError

MAX_INTEGER = 15
MIN_SCALE = 2.0**-24
"""The smallest positive fp16: a group whose scale would round to zero gets this one."""
DAMPING = 0.01
"""Added to the second moment's diagonal, as a part of its mean, before it is inverted: at least this, and more on few tokens."""
DAMPING_TOKENS = 360
"""The damping times the tokens it is for, up to MAX_CHOSEN_DAMPING."""
MAX_CHOSEN_DAMPING = 0.1
MAX_DAMPING = 1e6
"""Past this only undefined values can keep the moment from being positive definite."""
WIDEST_IN_FP64 = 8192
"""Columns up to which a second moment is inverted in fp64. A wider one takes too much memory; with the damping fp32 will do."""
_BLOCK = 256
"""Rows of a second moment that are copied or inverted at once."""
FEEDBACK_BLOCK = 64
"""Columns updated one by one before the rest of the row is updated by one matmul."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Integers [N, K] and zero points [N, K/G], both uint8 0..15, and scales [N, K/G] in fp16."""

    integers: Tensor
    zeros: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        rows, groups = self.scales.shape
        centred = self.integers.reshape(rows, groups, -1).float() - self.zeros.unsqueeze(-1).float()
        return (centred * self.scales.float().unsqueeze(-1)).reshape(rows, -1)


def range_parameters(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (both fp32) that cover [low, high] and zero with 16 levels."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / MAX_INTEGER).half().float().clamp_(min=MIN_SCALE)
    return scale, (-low / scale).round_().clamp_(0, MAX_INTEGER)


def to_levels(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Nearest levels of values under broadcastable parameters: integers 0..15 less their zero point, held in fp32."""
    return (values / scale).round_().clamp_(-zero, MAX_INTEGER - zero)


def nearest_values(weight: Tensor, group_size: int) -> Tensor:
    """The weight after plain round-to-nearest, dequantized. The inner loop of the scale search."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    scale, zero = range_parameters(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))
    return to_levels(groups, scale, zero).mul_(scale).reshape(weight.shape)


ParameterChooser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(group's weights [G, N], second moment of its inputs [G, G]) -> scale [N], zero point [N]."""


def round_nearest(weight: Tensor, second_moment: Tensor, group_size: int, choose: ParameterChooser) -> Rounded:
    """Each weight to the nearest level of its group."""
    columns = weight.t().contiguous()  # [K, N]
    integers = torch.empty_like(columns, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, len(columns), group_size):
        group = slice(start, start + group_size)
        scale, zero = choose(columns[group], second_moment[group, group])
        integers[group] = to_levels(columns[group], scale, zero).add_(zero)
        scales.append(scale)
        zeros.append(zero)
    return _rounded(integers, scales, zeros)


def damping_for(num_tokens: int) -> float:
    """The damping of a second moment that was gathered on this many tokens: what a sample of n tokens says of the whole is off by
    a variance that falls as 1 / n, and so does the best weight of a prior (Ledoit and Wolf, J. Multivariate Analysis 88, 2004).

    On the demo model 7,168 tokens with 5 % gave a checkpoint whose KL divergence on other text is 4 to 8 % below that with 1 %.
    """
    return min(max(DAMPING, DAMPING_TOKENS / num_tokens), MAX_CHOSEN_DAMPING)


def round_feedback(
    weight: Tensor, second_moment: Tensor, group_size: int, choose: ParameterChooser, damping: float = DAMPING
) -> Rounded:
    """Rounds column by column and lets the columns to come make up for each error (GPTQ, arXiv 2210.17323).

    With U the upper Cholesky factor of the inverse second moment, an error e at column j is best compensated by
    subtracting e / U[j, j] * U[j, j+1:] from the columns after it. A group's parameters are chosen when its first column
    is reached, from its weights as updated by then. Columns keep their order, so groups stay consecutive inputs.

    A column takes about eight operations on N values each. No value of theirs is read here, so that a GPU never waits for this
    loop; but its time there is that of eight launches, whatever the N: linears that share an input are rounded together.
    """
    factor = _inverse_factor(second_moment, damping)
    remaining = weight.t().contiguous()  # [K, N]: a column's weights lie together
    num_columns = remaining.shape[0]
    integers = torch.empty_like(remaining, dtype=torch.uint8)
    scales, zeros = [], []
    block = min(FEEDBACK_BLOCK, group_size)
    for start in range(0, num_columns, block):
        if start % group_size == 0:
            group = slice(start, start + group_size)
            scale, zero = choose(remaining[group], second_moment[group, group])
            scales.append(scale)
            zeros.append(zero)
        stop = min(start + block, num_columns, (start // group_size + 1) * group_size)
        levels, errors = _round_block(remaining[start:stop], factor[start:stop, start:stop], scale, zero)
        integers[start:stop] = levels.add_(zero)
        if stop < num_columns:
            remaining[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return _rounded(integers, scales, zeros)


def _round_block(values: Tensor, factor: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of one group, [B, N] and in place what is left of them: their levels, and the errors that later ones are to make up
    for, each over the factor's diagonal. The loop runs once a column, so it makes no tensor that it can do without."""
    levels, errors = torch.empty_like(values), torch.empty_like(values)
    lowest, highest, diagonal = -zero, MAX_INTEGER - zero, -factor.diagonal()
    for column in range(len(values)):
        level, error = levels[column], errors[column]
        torch.div(values[column], scale, out=level).round_().clamp_(lowest, highest)
        torch.mul(level, scale, out=error).sub_(values[column]).div_(diagonal[column])
        if column + 1 < len(values):
            values[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return levels, errors


def damping_of(second_moment: Tensor, damping: float = DAMPING) -> Tensor:
    """What is added to the diagonal, a part of its mean: what a few tokens do not show is not taken for nothing."""
    return damping * second_moment.diagonal().mean().clamp(min=1e-12)


def _inverse_factor(second_moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor U (U^T U) of the damped second moment's inverse, in fp32; damped more if rounding made it indefinite.

    Cholesky of the moment in reverse order, J H J = L L^T, gives U = J L^-1 J: nothing but L is ever inverted. Of the widest
    linear these matrices are most of what a quantization holds, so one is all that is made of them, factored and inverted where
    it lies, in fp64 up to WIDEST_IN_FP64.
    """
    columns = len(second_moment)
    dtype = torch.float64 if columns <= WIDEST_IN_FP64 else torch.float32
    matrix = torch.empty(columns, columns, dtype=dtype, device=second_moment.device)
    while damping < MAX_DAMPING:
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            matrix[start:stop] = second_moment[columns - stop : columns - start].flip(0, 1)
        matrix.diagonal().add_(damping_of(matrix, damping))
        lower = matrix.t()  # symmetric, and laid out as LAPACK wants it: factored in place
        info = torch.empty((), dtype=torch.int32, device=lower.device)
        _, failed = torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not failed:
            _invert_lower(lower)
            _reverse(matrix.view(-1))
            return lower.float()
        damping *= 10
    raise QuantizeError("the second moment of a linear's inputs is not finite: activations overflow in fp32")


def _invert_lower(lower: Tensor) -> None:
    """A lower triangular matrix becomes its inverse, in place; what is above the diagonal is zero."""
    for start in range(0, len(lower), _BLOCK):
        rows = slice(start, start + _BLOCK)
        corner = lower[rows, rows]
        unit = torch.eye(len(corner), dtype=lower.dtype, device=lower.device)
        corner.copy_(torch.linalg.solve_triangular(corner, unit, upper=False))
        lower[rows, :start] = corner @ (lower[rows, :start] @ lower[:start, :start]).neg_()


def _reverse(values: Tensor) -> None:
    """A vector back to front, in place: with a matrix behind it, both its axes."""
    size, chunk = len(values), 1 << 20
    for start in range(0, size // 2, chunk):
        stop = min(start + chunk, size // 2)
        first, last = values[start:stop], values[size - stop : size - start]
        flipped = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(flipped)


def _rounded(integers: Tensor, scales: list[Tensor], zeros: list[Tensor]) -> Rounded:
    """integers: [K, N]; scales and zeros of each group: [N]."""
    return Rounded(integers.t().contiguous(), torch.stack(zeros, 1).to(torch.uint8), torch.stack(scales, 1).half())

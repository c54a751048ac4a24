"""The searches: never worse than doing nothing, and right about what they claim."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantizer.calibrate import InputStatistics
from quantizer.config import EFFORTS
from quantizer.rounding import nearest_values
from quantizer.search import RangeChooser, output_error, output_errors, search_scales


def _statistics(inputs: torch.Tensor) -> InputStatistics:
    return InputStatistics(inputs.t() @ inputs / len(inputs), inputs.abs().mean(0), len(inputs))


def _salient(seed: int = 0, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, columns, generator=generator)
    inputs[:, [3, 40, 77, 120]] *= 30
    return torch.randn(64, columns, generator=generator), inputs


def test_cost_is_the_mean_squared_output_change() -> None:
    weight, inputs = _salient()
    delta = nearest_values(weight, 32) - weight
    direct = (inputs @ delta.t()).pow(2).sum(1).mean()
    moment = _statistics(inputs).second_moment
    assert torch.isclose(torch.tensor(output_error(delta, moment)), direct, rtol=1e-4)
    assert torch.isclose(output_errors(delta.t(), moment).sum(), direct, rtol=1e-4)


def test_salient_channels_are_protected_and_the_reported_error_is_real() -> None:
    weight, inputs = _salient()
    statistics = _statistics(inputs)
    choice = search_scales(weight, statistics, 32)
    assert choice.error < 0.5 * choice.error_identity
    assert choice.scales[3] > 2 * choice.scales[4]
    delta = nearest_values(weight * choice.scales, 32) / choice.scales - weight
    assert abs(output_error(delta, statistics.second_moment) / choice.error - 1) < 1e-5


def test_error_and_energy_are_of_the_same_rows() -> None:
    """Else their ratio would depend on how many rows the search leaves out."""
    weight, inputs = _salient()
    statistics, effort = _statistics(inputs), replace(EFFORTS["fast"], search_rows=16)
    choice, rows = search_scales(weight, statistics, 32, effort=effort), weight[::4]
    assert abs(choice.energy / output_error(rows, statistics.second_moment) - 1) < 1e-5
    delta = nearest_values(rows, 32) - rows
    assert abs(choice.error_identity / output_error(delta, statistics.second_moment) - 1) < 1e-5


def test_identity_is_chosen_where_nothing_is_better() -> None:
    """Integers 0..15 in every group are exact unscaled, so every other candidate can only lose."""
    weight = torch.randint(0, 16, (32, 64)).float()
    weight[:, ::32], weight[:, 1::32] = 0, 15
    _, inputs = _salient(columns=64 * 2)
    choice = search_scales(weight, _statistics(inputs[:, :64]), 32)
    assert choice.is_identity and choice.error == 0
    assert torch.equal(choice.scales, torch.ones(64))


def test_shared_channels_get_one_scale() -> None:
    weight, inputs = _salient()
    shared = torch.arange(128) % 32
    scales = search_scales(weight, _statistics(inputs), 32, shared).scales.reshape(4, 32)
    assert torch.equal(scales, scales[:1].expand(4, 32))
    assert scales.unique().numel() > 1


def test_clip_never_raises_a_groups_error_and_leaves_other_rows_alone() -> None:
    weight, inputs = _salient()
    weight[::2, 5] = 12.0  # an outlier worth giving up in a quiet channel
    group, moment = weight[:, :32].t(), _statistics(inputs).second_moment[:32, :32]
    rows = torch.arange(64) % 2 == 0
    plain_scale, plain_zero = RangeChooser(None)(group, moment)
    choose = RangeChooser(rows)
    scale, zero = choose(group, moment)
    assert torch.equal(choose.num_clipped > 0, scale < plain_scale)
    assert torch.equal(scale[~rows], plain_scale[~rows]) and torch.equal(zero[~rows], plain_zero[~rows])
    assert (scale[rows] <= plain_scale[rows]).all() and (scale[rows] < plain_scale[rows]).any()

    def errors(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        levels = ((group / scale).round() + zero).clamp(0, 15)
        return output_errors((levels - zero) * scale - group, moment)

    assert (errors(scale, zero) <= errors(plain_scale, plain_zero) * (1 + 1e-5)).all()


def test_less_effort_looks_at_fewer_candidates_and_is_never_worse_than_nothing() -> None:
    weight, inputs = _salient()
    fast, default, high = (search_scales(weight, _statistics(inputs), 32, effort=EFFORTS[name]) for name in EFFORTS)
    assert high.error <= default.error <= fast.error < fast.error_identity

"""Laws of group parameters and rounding."""

from __future__ import annotations

import pytest
import torch

from kernels.format import pack_int4
from quantizer import rounding
from quantizer.pipeline import pack
from quantizer.rounding import damping_for, nearest_values, range_parameters, round_feedback, round_nearest
from quantizer.search import RangeChooser, output_error


def _problem(rows: int = 48, columns: int = 128, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(1024, columns, generator=generator) @ (torch.eye(columns) + mixing)
    inputs[:, ::17] *= 8
    return weight, inputs.t() @ inputs / 1024


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nearest_is_within_half_a_step_and_agrees_with_the_search_loop(group_size: int) -> None:
    weight, moment = _problem()
    rounded = round_nearest(weight, moment, group_size, RangeChooser(None))
    values = rounded.dequantize()
    assert torch.equal(values, nearest_values(weight, group_size))
    step = rounded.scales.float().repeat_interleave(group_size, 1)
    # The zero point is rounded too, so an end of the range may lie half a step outside.
    assert ((values - weight).abs() <= step * 1.01).all()
    assert ((values - weight).abs() <= step * 0.501).float().mean() > 0.95


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("clip", [False, True])
def test_feedback_beats_nearest_on_correlated_inputs(group_size: int, clip: bool) -> None:
    weight, moment = _problem()
    choose = RangeChooser(torch.full((weight.shape[0],), clip))
    nearest = round_nearest(weight, moment, group_size, choose).dequantize()
    feedback = round_feedback(weight, moment, group_size, choose).dequantize()
    assert output_error(feedback - weight, moment) < 0.8 * output_error(nearest - weight, moment)


def test_feedback_equals_nearest_when_inputs_are_uncorrelated() -> None:
    weight, moment = _problem()
    moment = torch.diag(moment.diagonal())
    choose = RangeChooser(None)
    nearest, feedback = (function(weight, moment, 32, choose) for function in (round_nearest, round_feedback))
    assert torch.equal(nearest.integers, feedback.integers)
    assert torch.equal(nearest.zeros, feedback.zeros)


def test_feedback_with_long_groups_matches_the_textbook_update() -> None:
    """The blocked update against the plain one, a column at a time over the whole row, with a group of 128."""
    weight, moment = _problem(rows=8)
    result = round_feedback(weight, moment, 128, RangeChooser(None))
    scale, zero = range_parameters(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True))
    damped = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(128)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    remaining, expected = weight.double(), torch.empty(weight.shape)
    for column in range(128):
        value = remaining[:, column : column + 1]
        level = ((value / scale).round() + zero).clamp(0, 15)
        expected[:, column : column + 1] = level
        error = (value - (level - zero) * scale) / factor[column, column]
        remaining = remaining - error * torch.nn.functional.pad(factor[column, column:], (column, 0))
    assert (result.integers == expected).float().mean() > 0.995


@pytest.mark.parametrize(("widest", "tolerance"), [(8192, 1e-6), (0, 1e-3)], ids=["fp64", "fp32"])
def test_the_factor_made_in_place_is_that_of_the_inverse(
    widest: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several blocks, the last one short; the moment itself is left alone."""
    _, moment = _problem(columns=700)
    given = moment.clone()
    monkeypatch.setattr(rounding, "WIDEST_IN_FP64", widest)
    factor = rounding._inverse_factor(moment)
    damped = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(700)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert factor.dtype == torch.float32 and torch.equal(moment, given)
    assert (factor - expected).abs().max() <= tolerance * expected.abs().max()


def test_singular_moment_is_damped() -> None:
    weight, _ = _problem()
    column = torch.randn(128, 1)
    for moment in (column @ column.t(), torch.zeros(128, 128)):
        result = round_feedback(weight, moment, 32, RangeChooser(None))
        assert torch.isfinite(result.dequantize()).all()


def test_undefined_moment_is_refused_and_does_not_hang() -> None:
    weight, moment = _problem()
    moment[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        round_feedback(weight, moment, 32, RangeChooser(None))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 32),
        torch.full((8, 32), 3.0),
        torch.full((8, 32), -3.0),
        torch.full((8, 32), 1e-9),
        torch.linspace(1, 2, 256).reshape(8, 32),
    ],
    ids=["zero", "constant", "negative", "tiny", "one-sided"],
)
def test_degenerate_groups_stay_finite_and_close(weight: torch.Tensor) -> None:
    rounded = round_nearest(weight, torch.eye(32), 32, RangeChooser(torch.ones(8, dtype=torch.bool)))
    assert torch.isfinite(rounded.scales).all() and (rounded.scales > 0).all()
    # A step of the range, or what the smallest scale of fp16 cannot resolve.
    assert (rounded.dequantize() - weight).abs().max() <= max(float(weight.abs().max()) / 15, 2.0**-24)


def test_packed_weight_dequantizes_to_what_was_rounded() -> None:
    weight, moment = _problem()
    rounded = round_nearest(weight, moment, 64, RangeChooser(None))
    packed = pack("layer", rounded, 64)
    assert torch.equal(packed.dequantize(), rounded.dequantize())
    assert torch.equal(packed.qzeros, pack_int4(rounded.zeros.t()))


def test_scales_too_large_for_fp16_are_refused_by_name() -> None:
    rounded = round_nearest(torch.full((8, 32), 2e6), torch.eye(32), 32, RangeChooser(None))
    with pytest.raises(ValueError, match=r"model\.x"):
        pack("model.x", rounded, 32)


def test_few_tokens_are_damped_more() -> None:
    assert [damping_for(tokens) for tokens in (1 << 20, 36_000, 7_200, 100)] == [0.01, 0.01, 0.05, 0.1]
    weight, moment = _problem()
    results = [round_feedback(weight, moment, 32, RangeChooser(None), damping) for damping in (0.01, 1e5)]
    nearest = round_nearest(weight, moment, 32, RangeChooser(None))
    assert not torch.equal(results[0].integers, nearest.integers)
    assert torch.equal(results[1].integers, nearest.integers), (
        "nothing is made up for where no column is known to go with another"
    )

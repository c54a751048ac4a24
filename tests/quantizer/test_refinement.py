"""Laws of the refinement: the error never rises, the result is a fixed point of its own moves, and the layout stays."""

from __future__ import annotations

import pytest
import torch

from quantizer import refinement
from quantizer.pipeline import pack
from quantizer.refinement import refine
from quantizer.rounding import damping_of, round_feedback, round_nearest
from quantizer.search import RangeChooser, output_error
from tests.quantizer.test_rounding import _problem


def _damped(moment: torch.Tensor) -> torch.Tensor:
    return moment + damping_of(moment) * torch.eye(len(moment))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rounding", [round_nearest, round_feedback])
def test_every_sweep_lowers_the_error(group_size: int, rounding: object) -> None:
    weight, moment = _problem()
    rounded = rounding(weight, moment, group_size, RangeChooser(torch.ones(weight.shape[0], dtype=torch.bool)))
    errors = [output_error(rounded.dequantize() - weight, _damped(moment))]
    for sweeps in (1, 2, 8):
        refined = refine(weight, moment, rounded, sweeps)
        errors.append(output_error(refined.dequantize() - weight, _damped(moment)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]
    assert torch.equal(refined.zeros, rounded.zeros)
    assert torch.equal(pack("layer", refined, group_size).dequantize(), refined.dequantize())


def test_no_single_integer_can_do_better() -> None:
    weight, moment = _problem(rows=8, columns=64)
    rounded = round_feedback(weight, moment, 32, RangeChooser(None))
    refined = refine(weight, moment, rounded, 50)
    best, values = _damped(moment), refined.dequantize()
    delta = values - weight
    scales = refined.scales.float().repeat_interleave(32, 1)
    error = ((delta @ best) * delta).sum(-1, keepdim=True)
    for step in (-1, 1):
        allowed = (refined.integers.int() + step).clamp(0, 15) != refined.integers.int()
        # Changing one weight by d changes its row's error by 2 d (H dW) + d^2 H[k, k].
        change = 2 * step * scales * (delta @ best) + scales.square() * best.diagonal()
        assert (change[allowed] >= -1e-5 * error.expand_as(change)[allowed]).all()


def test_exact_weights_are_left_alone() -> None:
    _, moment = _problem(columns=64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-7, 9, (16, 64), generator=generator) / 64.0
    weight[:, ::32], weight[:, 1::32] = -7 / 64, 8 / 64
    rounded = round_nearest(weight, moment, 32, RangeChooser(None))
    refined = refine(weight, moment, rounded, 3)
    assert torch.equal(refined.integers, rounded.integers) and torch.equal(refined.scales, rounded.scales)


def test_rows_refined_in_parts_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = _problem(rows=24, columns=128)
    rounded = round_feedback(weight, moment, 32, RangeChooser(None))
    before, whole = moment.clone(), refine(weight, moment, rounded, 3)
    monkeypatch.setattr(refinement, "MAX_REFINED_WEIGHTS", 7 * 128)
    parts = refine(weight, moment, rounded, 3)
    assert torch.equal(moment, before)
    assert not torch.equal(whole.integers, rounded.integers)
    # A matmul of fewer rows may round otherwise, and a tie then falls to the other side.
    assert (parts.integers != whole.integers).float().mean() < 0.01
    error = output_error(whole.dequantize() - weight, _damped(moment))
    assert output_error(parts.dequantize() - weight, _damped(moment)) == pytest.approx(error, rel=1e-3)

"""A gated linear is a linear and then an activation, bit for bit, whether the two are computed a few columns at a time or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.backend import BackendOptions
from tests.kernels.test_cpu_linear import make_awq, make_rows

_native = pytest.importorskip("kernels.cpu._native", reason="the native kernels are not built")

from kernels.cpu.backend import CpuBackend  # noqa: E402
from kernels.cpu.linear import CpuLinear, CpuLinearInput  # noqa: E402

HIDDEN = 128


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.current_isa()
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa(before)


def prepared(
    backend: CpuBackend, intermediate: int, group_size: int, down_group: int, bias: bool
) -> tuple[CpuLinear, CpuLinear]:
    gate_up = [make_awq(HIDDEN, intermediate, group_size, seed=seed) for seed in (1, 2)]
    down = make_awq(intermediate, 48, down_group, seed=3)
    values = torch.randn(2 * intermediate) if bias else None
    return backend.prepare_linear(gate_up, values), backend.prepare_linear([down], None)


def both_ways(
    backend: CpuBackend, gate_up: CpuLinear, down: CpuLinear, x: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    rows = CpuLinearInput(x.shape[0], x, ())
    together = backend.gated_linear(rows, gate_up, activation, for_linear=down)  # type: ignore[arg-type]
    one_by_one = backend.act_and_mul(backend.linear(rows, gate_up), activation, for_linear=down)  # type: ignore[arg-type]
    return backend.linear(together, down), backend.linear(one_by_one, down)


# 8 units of work per thread are the least that is split: (4096 / 32) * 1 for one row, (512 / 64) * 3 row blocks for 130.
@pytest.mark.parametrize(
    ("rows", "intermediate", "down_group"),
    [(1, 4096, 32), (3, 2048, 64), (67, 512, 32), (130, 512, 64), (130, 1536, 128), (130, 520, 104), (130, 512, 512)],
)
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_equals_linear_then_activation(
    isa: str, rows: int, intermediate: int, down_group: int, activations: str
) -> None:
    if isa != "avx2" and rows * intermediate > 70_000:
        pytest.skip("slow, and the blocking is the same for every variant")
    torch.manual_seed(rows)
    backend = CpuBackend(BackendOptions(num_threads=2, cpu_activations=activations))
    gate_up, down = prepared(backend, intermediate, 32, down_group, bias=rows == 67)
    x = make_rows(rows, HIDDEN)
    for activation in ("silu", "gelu_tanh"):
        together, one_by_one = both_ways(backend, gate_up, down, x, activation)
        assert torch.isfinite(together).all() and together.abs().max() > 0
        assert torch.equal(together, one_by_one)


def test_what_is_not_finite_shows_in_its_row_alone(isa: str) -> None:
    backend = CpuBackend(BackendOptions(num_threads=2))
    gate_up, down = prepared(backend, 512, 64, 32, bias=False)
    x = make_rows(70, HIDDEN)
    x[65, 3] = float("nan")
    together, _ = both_ways(backend, gate_up, down, x, "silu")
    assert torch.isnan(together[65]).all()
    assert torch.isfinite(together[torch.arange(70) != 65]).all()

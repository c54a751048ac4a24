"""A gated linear of many rows, whose linear and activation go a few columns at a time, equals that of few rows, where they go one
after the other, bit for bit. (That the latter is right is tested beside the other ops.)"""

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


def down_of(backend: CpuBackend, gate_up: CpuLinear, down: CpuLinear, x: Tensor, activation: str) -> Tensor:
    gated = backend.gated_linear(CpuLinearInput(x.shape[0], x, ()), gate_up, activation, for_linear=down)  # type: ignore[arg-type]
    return backend.linear(gated, down)


# Computed together: 32 rows or more, and 8 units of work per thread, which are intermediate / group by 64 rows. The last two cases
# are not: a group that ends within a panel, and one as wide as the whole row.
@pytest.mark.parametrize(
    ("rows", "intermediate", "down_group"),
    [(33, 2048, 64), (67, 512, 32), (130, 512, 64), (130, 1536, 128), (130, 520, 104), (130, 512, 512)],
)
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_many_rows_equal_few(isa: str, rows: int, intermediate: int, down_group: int, activations: str) -> None:
    if isa != "avx2" and rows * intermediate > 70_000:
        pytest.skip("slow, and the blocking is the same for every variant")
    torch.manual_seed(rows)
    backend = CpuBackend(BackendOptions(num_threads=2, cpu_activations=activations))
    gate_up, down = prepared(backend, intermediate, 32, down_group, bias=rows == 67)
    x = make_rows(rows, HIDDEN)
    for activation in ("silu", "gelu_tanh"):
        together = down_of(backend, gate_up, down, x, activation)
        few = [down_of(backend, gate_up, down, piece.contiguous(), activation) for piece in x.split(20)]
        assert torch.isfinite(together).all() and together.abs().max() > 0
        assert torch.equal(together, torch.cat(few))


def test_what_is_not_finite_shows_in_its_row_alone(isa: str) -> None:
    backend = CpuBackend(BackendOptions(num_threads=2))
    gate_up, down = prepared(backend, 512, 64, 32, bias=False)
    x = make_rows(70, HIDDEN)
    x[65, 3] = float("nan")
    together = down_of(backend, gate_up, down, x, "silu")
    assert torch.isnan(together[65]).all()
    assert torch.isfinite(together[torch.arange(70) != 65]).all()

"""The native linears through their bindings: parity with the formulas over ragged shapes, and their laws: a row's bits do not
depend on the batch, on its place in it, on threads or on the split of the columns; what is not finite shows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.backend import BackendOptions
from kernels.format import AwqWeight, DenseWeight, pack_int4
from kernels.reference import DenseInput, ReferenceBackend

_native = pytest.importorskip("kernels.cpu._native", reason="the native CPU kernels are not built")

from kernels.cpu.backend import CpuBackend  # noqa: E402
from kernels.cpu.linear import CpuLinear, CpuLinearInput, pack_head, pack_linear  # noqa: E402

ROWS = (1, 2, 3, 4, 5, 8, 11, 16, 17, 33, 64, 67)


@pytest.fixture(scope="module", params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.current_isa()
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa(before)


def backend(**options: object) -> CpuBackend:
    return CpuBackend(BackendOptions(**options))  # type: ignore[arg-type]


def make_awq(
    in_features: int,
    out_features: int,
    group_size: int,
    *,
    seed: int = 0,
    scale: float = 0.01,
    dtype: torch.dtype = torch.float16,
    extreme: bool = False,
) -> AwqWeight:
    """Random integers, zero points and scales; `extreme` takes 0 and 15 only."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size

    def nibbles(rows: int) -> Tensor:
        if extreme:
            return torch.randint(0, 2, (rows, out_features), generator=generator) * 15
        return torch.randint(0, 16, (rows, out_features), generator=generator)

    scales = (0.5 + torch.rand(groups, out_features, generator=generator)) * scale
    weight = AwqWeight("w", pack_int4(nibbles(in_features)), pack_int4(nibbles(groups)), scales.to(dtype), group_size)
    weight.validate()
    return weight


def make_rows(rows: int, width: int, seed: int = 1) -> Tensor:
    """Rows of very different magnitudes, with outliers and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.exp(3 * torch.randn(rows, 1, generator=generator))
    x[torch.rand(rows, width, generator=generator) < 0.01] *= 30
    x[torch.rand(rows, width, generator=generator) < 0.05] = 0
    return x


def packed(linear: CpuLinear, x: Tensor) -> CpuLinearInput:
    """x in the form that the linear takes, by way of the op that a model uses."""
    engine = backend(num_threads=1)
    out = engine._packed_input(x.shape[0], linear)
    program = engine._program(None)
    program.quantize(x, out.packed)
    program.run(x.shape[0])
    return out


def unpacked(linear: CpuLinear) -> Tensor:
    weights = [torch.empty(part.out_features, part.in_features) for part in linear.parts]
    for part, weight in zip(linear.parts, weights, strict=True):
        part.unpack(weight)
    return torch.cat(weights)


def assert_only_rounding(y: Tensor, x: Tensor, weight: AwqWeight, bias: Tensor | None) -> None:
    """y = x W^T + bias up to fp32 rounding, relative to 15 scales: the zero point's share is added and taken away again."""
    w = weight.dequantize(torch.float64)
    expected = x.double() @ w.t() + (0 if bias is None else bias.double())
    scales = weight.scales.double().repeat_interleave(weight.group_size, 0)
    allowed = 2e-6 * (x.double().abs() @ (15 * scales) + (0 if bias is None else bias.double().abs())) + 1e-30
    assert torch.all((y.double() - expected).abs() <= allowed)


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize(
    ("in_features", "group_size"),
    [(96, 32), (576, 64), (256, 128), (576, 576), (1536, 1536), (144, 48), (40, 8), (100, 100)],
)
@pytest.mark.parametrize("out_features", [8, 24, 136])
def test_parity(isa: str, in_features: int, group_size: int, out_features: int, activations: str) -> None:
    weight = make_awq(in_features, out_features, group_size)
    bias = torch.randn(out_features)
    linear = pack_linear([weight], bias, activations)
    assert torch.equal(unpacked(linear), weight.dequantize())
    engine = backend(num_threads=1, cpu_activations=activations)
    reference = ReferenceBackend(BackendOptions())
    for rows in ROWS:
        x = make_rows(rows, in_features, seed=rows)
        given = packed(linear, x)
        y = engine.linear(given, linear)
        assert_only_rounding(y, given.dense(), weight, bias)
        # The whole error, quantized activations included, against the reference.
        expected = reference.linear(DenseInput(x), reference.prepare_linear([weight], bias))
        allowed = x.norm(dim=1, keepdim=True) * weight.dequantize().norm(dim=1) + bias.abs()
        assert torch.all((y - expected).abs() <= (0.03 if activations == "int8" else 3e-4) * allowed)


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize(
    "options",
    [
        {"extreme": True},
        {"scale": 1e-7},
        {"scale": 4e4, "extreme": True},
        {"scale": 1e20, "dtype": torch.bfloat16},
        {"scale": 1e-30, "dtype": torch.bfloat16},
    ],
    ids=["zero points 0 and 15", "tiny scales", "huge scales", "huge bf16 scales", "tiny bf16 scales"],
)
def test_extreme_parameters(isa: str, options: dict[str, object], activations: str) -> None:
    weight = make_awq(192, 40, 64, **options)  # type: ignore[arg-type]
    linear = pack_linear([weight], None, activations)
    assert torch.equal(unpacked(linear), weight.dequantize())
    for rows in (1, 7, 20):
        given = packed(linear, make_rows(rows, 192))
        assert_only_rounding(backend(num_threads=1).linear(given, linear), given.dense(), weight, None)


@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_fused_parts_keep_their_columns(isa: str, activations: str) -> None:
    """Several weights along N, kinds and scale dtypes mixed, give what each gives alone."""
    parts: list[AwqWeight | DenseWeight] = [
        make_awq(192, 40, 64, seed=1),
        make_awq(192, 8, 64, seed=2),
        DenseWeight("dense", torch.randn(13, 192)),
        make_awq(192, 24, 32, seed=3),
        make_awq(192, 24, 32, seed=4, dtype=torch.bfloat16),
    ]
    bias = torch.randn(sum(part.out_features for part in parts))
    engine, x = backend(num_threads=2), make_rows(9, 192)
    whole = engine.linear(CpuLinearInput(9, x, ()), pack_linear(parts, bias, activations))
    column = 0
    for part in parts:
        columns = slice(column, column + part.out_features)
        alone = engine.linear(CpuLinearInput(9, x, ()), pack_linear([part], bias[columns], activations))
        assert torch.equal(whole[:, columns], alone)
        column += part.out_features


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 16), (100, 37), (576, 50)])
def test_dense(isa: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features)
    linear = pack_linear([DenseWeight("w", weight)], bias, "int8")
    assert torch.equal(unpacked(linear), weight.float())
    for rows in ROWS:
        x = make_rows(rows, in_features)
        y = backend(num_threads=1).linear(CpuLinearInput(rows, x, ()), linear)
        expected = x.double() @ weight.double().t() + bias.double()
        assert torch.all(
            (y - expected).abs() <= 2e-6 * (x.double().abs() @ weight.double().abs().t() + bias.double().abs())
        )


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp16"])
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 131), (64, 16), (100, 37)])
def test_head(isa: str, in_features: int, out_features: int, dtype: str) -> None:
    """A dense lm_head, quantized at load: the format costs what its step says, and computing on it only rounds."""
    weight = torch.randn(out_features, in_features) * torch.exp(torch.randn(out_features, 1))
    linear = pack_head(DenseWeight("lm_head", weight), dtype, "int16")
    w = unpacked(linear)
    error = (w - weight).norm() / weight.norm()
    assert error < {"int8": 0.008, "int4": 0.12, "fp16": 4e-4}[dtype]
    for rows in (1, 3, 16, 19):
        given = packed(linear, make_rows(rows, in_features))
        y = backend(num_threads=1).linear(given, linear)
        magnitude = given.dense().double().abs() @ w.double().abs().t()
        assert torch.all((y - given.dense().double() @ w.double().t()).abs() <= 2e-5 * magnitude)


def make_linears() -> dict[str, CpuLinear]:
    dense = DenseWeight("w", torch.randn(37, 576))
    return {
        "int4 int8": pack_linear([make_awq(576, 136, 64)], torch.randn(136), "int8"),
        "int4 int16": pack_linear([make_awq(576, 136, 64)], None, "int16"),
        "int4 g-1 int8": pack_linear([make_awq(1536, 40, 1536)], None, "int8"),
        "int4 g-1 int16": pack_linear([make_awq(1536, 40, 1536)], None, "int16"),
        "int8 head": pack_head(dense, "int8", "int8"),
        "int4 head": pack_head(dense, "int4", "int8"),
        "dense": pack_linear([dense], None, "int8"),
    }


@pytest.mark.parametrize("name", list(make_linears()))
def test_rows_do_not_depend_on_the_batch(isa: str, name: str) -> None:
    """Bitwise: alone, in every batch size and place, on one thread and on several."""
    linear = make_linears()[name]
    x = make_rows(131, linear.in_features)
    one, several = backend(num_threads=1), backend(num_threads=3)
    whole = one.linear(CpuLinearInput(131, x, ()), linear)
    for rows in (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 20, 64, 65, 66, 67, 128):
        for first in (0, 1, 131 - rows):
            part = x[first : first + rows].clone()
            for engine in (one, several):
                y = engine.linear(CpuLinearInput(rows, part, ()), linear)
                assert torch.equal(y, whole[first : first + rows]), (rows, first, engine.num_threads)


@pytest.mark.parametrize("name", list(make_linears()))
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_row_alone(isa: str, name: str, special: float) -> None:
    linear = make_linears()[name]
    x = make_rows(6, linear.in_features)
    engine = backend(num_threads=1)
    before = engine.linear(CpuLinearInput(6, x, ()), linear)
    for channel in (0, linear.in_features // 2 + 1, linear.in_features - 1):
        changed = x.clone()
        changed[2, channel] = special
        after = engine.linear(CpuLinearInput(6, changed, ()), linear)
        assert not torch.isfinite(after[2]).any()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(after[others], before[others])


def test_weights_that_are_not_finite_show(isa: str) -> None:
    weight = torch.randn(20, 64)
    weight[3, 5], weight[7, 60] = math.nan, math.inf
    for dtype in ("int8", "int4", "fp16"):
        linear = pack_head(DenseWeight("lm_head", weight), dtype, "int8")
        y = backend(num_threads=1).linear(CpuLinearInput(2, torch.randn(2, 64), ()), linear)
        assert torch.equal(torch.isfinite(y).all(0), torch.tensor([i not in (3, 7) for i in range(20)]))


def test_largest_integers(isa: str) -> None:
    """Every weight 15, 0 or -127 and every activation at its limit, over the longest sums: nothing wraps or saturates."""
    for activations in ("int8", "int16"):
        for in_features in (64, 4352, 16384):
            ones = torch.ones(in_features, 16, dtype=torch.int64)
            scales = torch.ones(1, 16, dtype=torch.float16)
            weight = AwqWeight("w", pack_int4(15 * ones), pack_int4(0 * ones[:1]), scales, in_features)
            linear = pack_linear([weight], None, activations)
            for rows in (1, 4, 18):
                for sign in (1.0, -1.0):
                    x = torch.full((rows, in_features), sign)
                    y = backend(num_threads=1).linear(CpuLinearInput(rows, x, ()), linear)
                    torch.testing.assert_close(y, torch.full((rows, 16), sign * 15 * in_features), rtol=1e-5, atol=0)
    for in_features in (64, 4352):
        linear = pack_head(DenseWeight("lm_head", torch.full((16, in_features), -1.0)), "int8", "int8")
        for rows in (1, 4, 18):
            y = backend(num_threads=1).linear(CpuLinearInput(rows, -torch.ones(rows, in_features), ()), linear)
            torch.testing.assert_close(y, torch.full((rows, 16), float(in_features)), rtol=1e-5, atol=0)


def test_tiny_and_huge_activations(isa: str) -> None:
    """Down to the smallest magnitudes that quantize, and up to where the sums overflow."""
    weight = make_awq(64, 16, 32)
    for activations, limit in (("int8", 127), ("int16", 32767)):
        linear = pack_linear([weight], None, activations)
        smallest = limit * torch.finfo(torch.float32).tiny
        for magnitude in (1.01 * smallest, 1e-20, 1e20, 1e34):
            x = make_rows(1, 64).sign() * magnitude
            given = packed(linear, x)
            torch.testing.assert_close(given.dense(), x, rtol=1 / limit, atol=0)
            assert_only_rounding(backend(num_threads=1).linear(given, linear), given.dense(), weight, None)
        zero = packed(linear, torch.full((1, 64), 0.5 * smallest))
        assert torch.equal(zero.dense(), torch.zeros(1, 64))


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize(("in_features", "group_size"), [(96, 32), (576, 576), (144, 48), (100, 100)])
def test_quantized_rows_are_the_same_in_every_variant(activations: str, in_features: int, group_size: int) -> None:
    linear = pack_linear([make_awq(in_features, 8, group_size)], None, activations)
    x = make_rows(7, in_features)
    x[2, 3] = math.nan
    before = _native.current_isa()
    values = []
    try:
        for name in _native.available_isas():
            _native.select_isa(name)
            values.append(packed(linear, x).dense())
    finally:
        _native.select_isa(before)
    for other in values[1:]:
        assert torch.equal(other.nan_to_num(7.0), values[0].nan_to_num(7.0))
    finite = torch.isfinite(values[0])
    assert finite[[0, 1, 3, 4, 5, 6]].all() and not finite[2].all()


def test_bindings_refuse_what_they_cannot_use() -> None:
    weight = make_awq(64, 16, 32)
    linear = pack_linear([weight], None, "int8")
    (part,) = linear.parts
    buffer = torch.empty(part.activations.nbytes(4), dtype=torch.uint8)
    with pytest.raises(ValueError, match="y: expected shape"):
        part.run(buffer, torch.empty(4, 15), 0, 1)
    with pytest.raises(ValueError, match=r"expected at least .* bytes for 5 rows"):
        part.run(buffer, torch.empty(5, 16), 0, 1)
    with pytest.raises(ValueError, match="panel_begin"):
        part.run(buffer, torch.empty(4, 16), 0, 2)
    with pytest.raises(TypeError, match="expected dtype uint8"):
        part.run(buffer.view(torch.int8), torch.empty(4, 16), 0, 1)
    with pytest.raises(ValueError, match="group_size: expected a divisor"):
        _native.pack_awq([(weight.qweight, weight.qzeros, weight.scales)], 48, "int8")
    with pytest.raises(ValueError, match="qzeros: expected shape"):
        _native.pack_awq([(weight.qweight, weight.qzeros[:1], weight.scales)], 32, "int8")
    with pytest.raises(ValueError, match="contiguous"):
        _native.pack_dense([torch.randn(64, 16).t()], "dense", "int8")
    with pytest.raises(ValueError, match="activations: expected int8 or int16"):
        _native.pack_awq([(weight.qweight, weight.qzeros, weight.scales)], 32, "int4")
    with pytest.raises(ValueError, match="AWQ_CPU_ISA"):
        _native.select_isa("sse9")

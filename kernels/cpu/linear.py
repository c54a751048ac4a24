"""Packing weights for the native linears, and the quantized inputs that they take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import PreparedLinear
from kernels.cpu import _native
from kernels.format import AwqWeight, DenseWeight

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A `PreparedLinear`: packed weights side by side along N. `layouts` are the distinct forms of input they take, one unless
    quantized and dense weights were fused."""

    parts: tuple[_native.PackedLinear, ...]
    layouts: tuple[_native.ActivationLayout, ...]
    in_features: int
    out_features: int
    nbytes: int

    @classmethod
    def of(cls, parts: Sequence[_native.PackedLinear]) -> CpuLinear:
        layouts: list[_native.ActivationLayout] = []
        for part in parts:
            if part.activations not in layouts:
                layouts.append(part.activations)
        return cls(
            tuple(parts),
            tuple(layouts),
            parts[0].in_features,
            sum(part.out_features for part in parts),
            sum(part.nbytes for part in parts),
        )


class CpuLinearInput:
    """A `LinearInput`: rows packed in one or several layouts, or plain fp32 [rows, K]."""

    def __init__(
        self, num_rows: int, dense: Tensor | None, packed: Sequence[tuple[_native.ActivationLayout, Tensor]]
    ) -> None:
        self.num_rows = num_rows
        self.tensor = dense
        self.packed = list(packed)

    def dense(self) -> Tensor:
        """The values, fp32 [rows, K]; of quantized rows, what the linear sees. Of a recorded op, those of the last run."""
        if self.tensor is not None:
            return self.tensor
        layout, buffer = self.packed[0]
        values = torch.empty(self.num_rows, layout.k)
        layout.dequantize(buffer, values)
        return values

    def buffer_for(self, layout: _native.ActivationLayout) -> Tensor | None:
        return next((buffer for known, buffer in self.packed if known == layout), None)


def expect_cpu_linear(weight: PreparedLinear) -> CpuLinear:
    if not isinstance(weight, CpuLinear):
        raise TypeError(f"expected a linear prepared by the cpu back end, found {type(weight).__name__}")
    return weight


def pack_linear(weights: Sequence[AwqWeight | DenseWeight], bias: Tensor | None, activations: str) -> CpuLinear:
    """Fuses `weights` along N; neighbours of one kind share a packed weight."""
    if not weights:
        raise ValueError("prepare_linear: expected at least one weight")
    in_features, out_features = weights[0].in_features, sum(weight.out_features for weight in weights)
    for weight in weights:
        if weight.in_features != in_features:
            raise ValueError(f"{weight.name}: expected {in_features} input features, found {weight.in_features}")
    if bias is not None:
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"{weights[0].name}.bias: expected shape [{out_features}], found {list(bias.shape)}")
        bias = bias.float().contiguous()
    parts, column = [], 0
    for _, group in itertools.groupby(weights, key=_kind):
        members = list(group)
        columns = sum(weight.out_features for weight in members)
        part_bias = None if bias is None else bias[column : column + columns]
        parts.append(_pack_part(members, part_bias, activations))
        column += columns
    return CpuLinear.of(parts)


def _kind(weight: AwqWeight | DenseWeight) -> tuple[object, ...]:
    if isinstance(weight, AwqWeight):
        return "awq", weight.group_size, weight.scales.dtype
    return "dense", weight.weight.dtype


def _pack_part(members: list[AwqWeight | DenseWeight], bias: Tensor | None, activations: str) -> _native.PackedLinear:
    quantized = [weight for weight in members if isinstance(weight, AwqWeight)]
    if quantized:
        for weight in quantized:
            weight.validate()
        tensors = [(w.qweight.contiguous(), w.qzeros.contiguous(), w.scales.contiguous()) for w in quantized]
        return _native.pack_awq(tensors, quantized[0].group_size, activations, bias)
    dense = [_checked_dense(weight) for weight in members if isinstance(weight, DenseWeight)]
    return _native.pack_dense(dense, "dense", activations, bias)


def _checked_dense(weight: DenseWeight) -> Tensor:
    if weight.weight.ndim != 2 or weight.weight.dtype not in _FLOAT_DTYPES:
        raise ValueError(
            f"{weight.name}.weight: expected a float32, float16 or bfloat16 matrix, "
            f"found {weight.weight.dtype} {list(weight.weight.shape)}"
        )
    return weight.weight.contiguous()


def pack_head(weight: DenseWeight | AwqWeight, dtype: str, activations: str) -> CpuLinear:
    """The projection onto the vocabulary. dtype "auto" is int8 for a dense weight and for a quantized one the own int4,
    which no other dtype can better: it takes those as "auto"."""
    if isinstance(weight, AwqWeight):
        return pack_linear([weight], None, activations)
    dense = _checked_dense(weight)
    if dtype in ("auto", "int8", "int4"):
        return CpuLinear.of([_native.pack_dense([dense], "int4" if dtype == "int4" else "int8", activations, None)])
    return CpuLinear.of([_native.pack_dense([to_16_bit(dense)], "dense", activations, None)])


def to_16_bit(weight: Tensor) -> Tensor:
    """16-bit weights as they are; fp32 as fp16, or as bf16 where fp16 has not the range."""
    if weight.dtype != torch.float32:
        return weight.contiguous()
    fits = weight.numel() == 0 or float(weight.abs().max()) <= torch.finfo(torch.float16).max
    return weight.to(torch.float16 if fits else torch.bfloat16).contiguous()

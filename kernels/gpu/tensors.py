"""What the Triton back end keeps on the device and hands from op to op: prepared weights, caches, buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.backend import SampledRows
from kernels.gpu.awq_gemm import PackedAwq
from kernels.gpu.device import Device


@dataclass(frozen=True, slots=True)
class GpuInput:
    """A `LinearInput` that is just the values, 16 bit [rows, K]."""

    tensor: Tensor

    def dense(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class GpuLinear:
    """Parts along N, each quantized or dense 16 bit [N, K]. bias fp32 [N of all]."""

    parts: tuple[PackedAwq | Tensor, ...]
    in_features: int
    out_features: int
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + (self.bias.nbytes if self.bias is not None else 0)


@dataclass(frozen=True, slots=True)
class GpuEmbedding:
    weight: Tensor  # 16 bit [vocabulary, hidden]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class GpuKVCache:
    """[blocks, kv heads, block size, head dim], 16 bit or int8; with int8 also fp32 scales without the last dimension."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        scales = [scale.nbytes for scale in (self.key_scales, self.value_scales) if scale is not None]
        return self.keys.nbytes + self.values.nbytes + sum(scales)


@dataclass(frozen=True, slots=True)
class GpuSampledRows(SampledRows):
    """Rows on their way to the host."""

    device: Device
    host: Tensor  # int32 [2, max rows]
    ticket: Any

    def to_host(self) -> tuple[list[int], list[bool]]:
        self.device.wait(self.ticket)
        rows = self.host[:, : self.token_ids.shape[0]].tolist()
        return rows[0], [value != 0 for value in rows[1]]


@dataclass(slots=True)
class Workspace:
    """Buffers that ops share in stream order. They grow while kernels are tried, never while serving: graphs have seen them."""

    device: torch.device
    is_frozen: bool = False
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            assert not self.is_frozen, f"workspace {name} must hold {numel} values, which no warm-up asked for"
            buffer = torch.zeros(max(numel, 1), dtype=dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer

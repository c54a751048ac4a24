"""Other 4-bit layouts on disk, to and from AWQ's: the same integers, zero points and scales, packed another way.

For a linear of K inputs and N outputs in groups of G, with W[n, k] = (q - z) * s throughout:

- GPTQ: `qweight` int32 [K/8, N] packed along K, `qzeros` int32 [K/G, N/8], `scales` [K/G, N], `g_idx` int32 [K] the group of
  each input. Its first version stores z - 1 (modulo 16), `gptq_v2` stores z.
- compressed-tensors `pack-quantized`: `weight_packed` int32 [N, K/8], `weight_scale` [N, K/G], `weight_zero_point` int32
  [ceil(N/8), K/G] packed along N (absent: all 8), `weight_shape` int64 [2].

In both, nibble i of word c holds value 8c + i.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.format import PACK_FACTOR, AwqWeight, FormatError, pack_int4

SYMMETRIC_ZERO = 8
"""The zero point of a layout that stores none."""


def pack_sequential(values: Tensor) -> Tensor:
    """uint8 0..15 [rows, columns] to int32 [rows, ceil(columns / 8)]; the last word's unused nibbles are 0."""
    rows, columns = values.shape
    nibbles = torch.nn.functional.pad(values.to(torch.uint8), (0, -columns % PACK_FACTOR))
    octets = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return octets.contiguous().view(torch.int32).reshape(rows, -1)


def unpack_sequential(words: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_sequential`: uint8 [rows, columns]."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).reshape(words.shape[0], -1)[:, :columns]


def from_gptq(name: str, tensors: Mapping[str, Tensor], group_size: int, stores_zero_less_one: bool) -> AwqWeight:
    """The same linear as AWQ stores it. Keys: qweight, qzeros, scales and, where the file has it, g_idx.

    Raises FormatError for a checkpoint quantized in activation order, whose groups are not consecutive inputs.
    """
    qweight, scales = _take(name, tensors, "qweight"), _take(name, tensors, "scales")
    in_features, out_features = qweight.shape[0] * PACK_FACTOR, qweight.shape[1]
    group_size = in_features if group_size == -1 else group_size
    if "g_idx" in tensors:
        _check_group_order(f"{name}.g_idx", tensors["g_idx"], in_features, group_size)
    zeros = unpack_sequential(_take(name, tensors, "qzeros"), out_features)
    if stores_zero_less_one:
        zeros = (zeros + 1) & 15
    integers = unpack_sequential(qweight.t(), in_features).t()
    return _weight(name, integers, zeros, scales.contiguous(), group_size)


def from_compressed_tensors(name: str, tensors: Mapping[str, Tensor], group_size: int) -> AwqWeight:
    """The same linear as AWQ stores it. Keys: weight_packed, weight_scale, weight_shape and, if asymmetric, weight_zero_point."""
    packed, scales = _take(name, tensors, "weight_packed"), _take(name, tensors, "weight_scale")
    out_features, in_features = (int(size) for size in _take(name, tensors, "weight_shape"))
    if tuple(packed.shape) != (out_features, -(-in_features // PACK_FACTOR)):
        raise FormatError(
            f"{name}.weight_packed: expected shape {[out_features, -(-in_features // PACK_FACTOR)]} by weight_shape, "
            f"found {list(packed.shape)}"
        )
    group_size = in_features if group_size == -1 else group_size
    if "weight_g_idx" in tensors:
        _check_group_order(f"{name}.weight_g_idx", tensors["weight_g_idx"], in_features, group_size)
    zeros = torch.full(scales.t().shape, SYMMETRIC_ZERO, dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zeros = unpack_sequential(tensors["weight_zero_point"].t(), out_features)
    return _weight(name, unpack_sequential(packed, in_features).t(), zeros, scales.t().contiguous(), group_size)


def to_compressed_tensors(weight: AwqWeight) -> dict[str, Tensor]:
    """The four tensors of `pack-quantized`, asymmetric, without the module's name."""
    integers, zeros = weight.unpack()
    return {
        "weight_packed": pack_sequential(integers.t()),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_zero_point": pack_sequential(zeros).t().contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }


def _weight(name: str, integers: Tensor, zeros: Tensor, scales: Tensor, group_size: int) -> AwqWeight:
    """integers: uint8 [K, N]; zeros: uint8 [K/G, N]."""
    weight = AwqWeight(name, pack_int4(integers), pack_int4(zeros), scales, group_size)
    weight.validate()
    return weight


def _take(name: str, tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise FormatError(f"{name}: missing tensor {name}.{key}")
    return tensors[key]


def _check_group_order(name: str, groups: Tensor, in_features: int, group_size: int) -> None:
    expected = torch.arange(in_features, dtype=groups.dtype) // group_size
    if not torch.equal(groups, expected):
        raise FormatError(
            f"{name}: groups are not {group_size} consecutive inputs: quantized in activation order (desc_act, actorder), "
            f"which is not supported"
        )

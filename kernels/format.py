"""The AWQ `gemm` layout on disk: bit order, packing, validation, sharding.

Layout (AutoAWQ's "gemm" version, the one every server reads), for a linear of K inputs and N outputs in groups of G:

- `qweight` int32 [K, N/8]: nibble i of word c holds column 8c + NIBBLE_COLUMNS[i]
- `qzeros`  int32 [K/G, N/8]: the same packing
- `scales`  fp16 or bf16 [K/G, N]

and W[k, n] = (q[k, n] - z[k // G, n]) * s[k // G, n], without an offset. A group size of -1 on disk means G = K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PACK_FACTOR = 8
"""4-bit values per int32 word."""

NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i (bits 4i to 4i+3) of a word holds column 8c + NIBBLE_COLUMNS[i]."""

COLUMN_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The inverse: column 8c + j lies in nibble COLUMN_NIBBLES[j]."""

AWQ_TENSORS = ("qweight", "qzeros", "scales")

_SCALE_DTYPES = (torch.float16, torch.bfloat16)


class FormatError(ValueError):
    """A tensor that is not what the format says; the message names tensor, expected and found."""


def pack_int4(values: Tensor) -> Tensor:
    """Packs 4-bit values into words, in AWQ's column order.

    values: integers 0..15, [rows, N] with N a multiple of 8. Returns int32 [rows, N/8].
    """
    columns = values.shape[1]
    if columns % PACK_FACTOR:
        raise FormatError(f"cannot pack {columns} columns: not a multiple of {PACK_FACTOR}")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) > 15):
        raise FormatError(f"cannot pack values outside 0..15: found {int(values.min())}..{int(values.max())}")
    return _pack_words(values)


def _pack_words(values: Tensor) -> Tensor:
    rows, columns = values.shape
    nibbles = values.reshape(rows, columns // PACK_FACTOR, PACK_FACTOR)[..., list(NIBBLE_COLUMNS)].to(torch.uint8)
    low, high = nibbles[..., 0::2], nibbles[..., 1::2]
    # Little-endian bytes of the word: byte b holds nibbles 2b (low half) and 2b + 1 (high half).
    return (low | (high << 4)).contiguous().view(torch.int32).reshape(rows, columns // PACK_FACTOR)


def unpack_int4(words: Tensor) -> Tensor:
    """Inverse of `pack_int4`: int32 [rows, N/8] to uint8 [rows, N] with values 0..15."""
    rows, columns = words.shape
    octets = words.contiguous().view(torch.uint8).reshape(rows, columns, 4)
    # Nibble 4a + b holds column 2b + a: a transposition, where an index list would be copied to the device first.
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).reshape(rows, columns, 2, PACK_FACTOR // 2)
    return nibbles.transpose(2, 3).reshape(rows, columns * PACK_FACTOR)


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """An unquantized linear or table: `weight` [N, K] in fp32, fp16 or bf16. `name` is for messages."""

    name: str
    weight: Tensor

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def select_outputs(self, order: Tensor) -> DenseWeight:
        """The outputs in another order. order: int64 [N], each output once."""
        return DenseWeight(self.name, self.weight[order])


@dataclass(frozen=True, slots=True)
class AwqWeight:
    """One linear's quantized weight as stored. Shapes and dtypes: see the module's docstring.

    `group_size` is the real one (K where the file says -1). `name` is the module's name, for messages.
    """

    name: str
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    group_size: int

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor], group_size: int) -> AwqWeight:
        """Builds and validates from the three tensors keyed `qweight`, `qzeros`, `scales`; group_size -1 means K."""
        missing = [key for key in AWQ_TENSORS if key not in tensors]
        if missing:
            raise FormatError(f"{name}: missing tensor {', '.join(f'{name}.{key}' for key in missing)}")
        qweight = tensors["qweight"]
        if group_size == -1 and qweight.ndim == 2:
            group_size = qweight.shape[0]
        weight = cls(name, qweight, tensors["qzeros"], tensors["scales"], group_size)
        weight.validate()
        return weight

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1] * PACK_FACTOR

    @property
    def num_groups(self) -> int:
        return self.in_features // self.group_size

    def validate(self) -> None:
        """Raises FormatError naming the tensor, what was expected and what was found."""
        _expect(f"{self.name}.qweight", self.qweight, (torch.int32,), None)
        if self.group_size <= 0 or self.in_features % self.group_size:
            raise FormatError(
                f"{self.name}.qweight: {self.in_features} input features are not a multiple of group size {self.group_size}"
            )
        groups, columns = self.num_groups, self.qweight.shape[1]
        _expect(f"{self.name}.qzeros", self.qzeros, (torch.int32,), (groups, columns))
        _expect(f"{self.name}.scales", self.scales, _SCALE_DTYPES, (groups, columns * PACK_FACTOR))

    def unpack(self) -> tuple[Tensor, Tensor]:
        """The integers: weights uint8 [K, N] and zero points uint8 [K/G, N], both 0..15."""
        return unpack_int4(self.qweight), unpack_int4(self.qzeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] as `nn.Linear` holds it: (q - z) * s computed in fp32, then cast."""
        q, z = self.unpack()
        groups, group_size, columns = self.num_groups, self.group_size, self.out_features
        centred = q.reshape(groups, group_size, columns).float() - z.reshape(groups, 1, columns).float()
        weight = centred * self.scales.reshape(groups, 1, columns).float()
        return weight.reshape(self.in_features, columns).t().contiguous().to(dtype)

    def select_outputs(self, order: Tensor) -> AwqWeight:
        """The outputs in another order. order: int64 [N], each output once."""
        q, z = (_pack_words(values[:, order]) for values in self.unpack())
        return AwqWeight(self.name, q, z, self.scales[:, order].contiguous(), self.group_size)

    def shard(self, dim: int, rank: int, world: int) -> AwqWeight:
        """The `rank`-th of `world` equal parts: dim 0 splits outputs (N), dim 1 inputs (K).

        Raises FormatError where a part would cut a word of 8 columns or a group.
        """
        if dim not in (0, 1) or not 0 <= rank < world:
            raise FormatError(f"{self.name}: no shard dim={dim} rank={rank} of {world}")
        unit, size = (PACK_FACTOR, self.out_features) if dim == 0 else (self.group_size, self.in_features)
        if size % (unit * world):
            side = "output" if dim == 0 else "input"
            raise FormatError(
                f"{self.name}: {size} {side} features do not split into {world} parts that are multiples of {unit}; "
                f"use a world size that divides {size // unit}"
            )
        part = size // world
        if dim == 0:
            words, columns = slice(rank * part // 8, (rank + 1) * part // 8), slice(rank * part, (rank + 1) * part)
            return AwqWeight(
                self.name, self.qweight[:, words], self.qzeros[:, words], self.scales[:, columns], self.group_size
            )
        groups = slice(rank * part // self.group_size, (rank + 1) * part // self.group_size)
        rows = slice(rank * part, (rank + 1) * part)
        return AwqWeight(self.name, self.qweight[rows], self.qzeros[groups], self.scales[groups], self.group_size)


def _expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise FormatError(f"{name}: expected dtype {expected}, found {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.ndim != 2 or (shape is not None and tuple(tensor.shape) != shape):
        expected_shape = list(shape) if shape is not None else "[in_features, out_features / 8]"
        raise FormatError(f"{name}: expected shape {expected_shape}, found {list(tensor.shape)}")

"""The quantized linear: layout made at load, and the ops over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.format import AwqWeight
from kernels.gpu.library import define, expect
from kernels.gpu.tuning import GemmConfig

TILE = 128  # of N and of K
_PLANE = 32  # consecutive k of one nibble plane
_ZERO_BIAS = {torch.float16: 1024, torch.bfloat16: 128}


@dataclass(frozen=True, slots=True)
class PackedAwq:
    """One quantized weight in the kernels' layout, or several of one shape (`num_experts` > 0).

    words int16 [(experts,) N/128, K/128, 128, 32]; groups int32 [(experts,) N/128, groups, 128]; see
    kernels/gpu/awq_kernels.py.
    """

    words: Tensor
    groups: Tensor
    out_features: int
    in_features: int
    group_size: int  # 0: one group spans K
    scale_bf16: bool
    num_experts: int = 0

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.groups.nbytes


def can_pack(weight: AwqWeight) -> bool:
    """Whether every plane of 32 inputs lies within one group."""
    return weight.group_size == weight.in_features or weight.group_size % _PLANE == 0


def pack(weight: AwqWeight, dtype: torch.dtype) -> PackedAwq:
    """Repacks for activations of `dtype`, on the device that the weight is on."""
    k, n = weight.in_features, weight.out_features
    group_size = 0 if weight.group_size == k else weight.group_size
    q, zeros = weight.unpack()
    num_n, num_k = -(-n // TILE), -(-k // TILE)
    q = torch.nn.functional.pad(q, (0, num_n * TILE - n, 0, num_k * TILE - k))
    planes = q.view(num_k, 4, _PLANE, num_n, TILE).permute(3, 0, 4, 2, 1).to(torch.int32)
    words = planes[..., 0] | planes[..., 1] << 4 | planes[..., 2] << 8 | planes[..., 3] << 12

    num_groups = 1 if group_size == 0 else -(-num_k * TILE // group_size)
    padding = (0, num_n * TILE - n, 0, num_groups - weight.num_groups)
    # -(1024 + z) or -(128 + z): exact in the activations' dtype.
    zero_bits = (-(_ZERO_BIAS[dtype] + zeros.float())).to(dtype).view(torch.int16).to(torch.int32)
    scale_bits = weight.scales.contiguous().view(torch.int16).to(torch.int32)
    combined = (zero_bits << 16) | (scale_bits & 0xFFFF)
    groups = torch.nn.functional.pad(combined, padding).view(num_groups, num_n, TILE).permute(1, 0, 2)
    return PackedAwq(
        words.to(torch.int16).contiguous(),
        groups.contiguous(),
        n,
        k,
        group_size,
        weight.scales.dtype == torch.bfloat16,
    )


def stack_experts(experts: list[PackedAwq]) -> PackedAwq:
    """Experts of one shape as one weight for the grouped product."""
    first = experts[0]
    return PackedAwq(
        torch.stack([expert.words for expert in experts]),
        torch.stack([expert.groups for expert in experts]),
        first.out_features,
        first.in_features,
        first.group_size,
        first.scale_bf16,
        len(experts),
    )


def _launch_gemm(
    x: Tensor,
    words: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    out: Tensor,
    partials: Tensor,
    arrivals: Tensor,
    rows: Tensor | None,
    experts: Tensor | None,
    top_k: int,
    group_size: int,
    block_m: int,
    num_parts: int,
    split: bool,
    scale_after: bool,
    scale_bf16: bool,
    num_warps: int,
    num_stages: int,
    max_registers: int,
    use_ptx: bool,
) -> None:
    from kernels.gpu.awq_kernels import awq_gemm_kernel
    from kernels.gpu.launch import launch

    num_rows = x.shape[0] if rows is None else rows.shape[0]
    k, n = x.shape[1], out.shape[1]
    num_n, num_k = words.shape[-4], words.shape[-3]
    expect(
        num_n == -(-n // TILE) and num_k == -(-k // TILE),
        "awq_gemm",
        f"words of {num_n} x {num_k} tiles do not make [{n}, {k}]",
    )
    expect(
        x.dtype in _ZERO_BIAS and x.stride(1) == 1 and out.stride(1) == 1,
        "awq_gemm",
        "x must be 16 bit, rows contiguous",
    )
    tiles_m = -(-num_rows // block_m)
    grid_k = num_parts if split else 1
    if grid_k > 1:
        needed = tiles_m * num_n * num_parts * TILE * block_m
        expect(partials.numel() >= needed, "awq_gemm", f"workspace holds {partials.numel()} of {needed} values")
        expect(arrivals.numel() >= tiles_m * num_n, "awq_gemm", f"{arrivals.numel()} arrival counters are too few")
    launch(
        awq_gemm_kernel,
        (num_n, tiles_m, grid_k),
        x,
        words,
        groups,
        bias,
        out,
        partials,
        arrivals,
        rows,
        experts,
        num_rows,
        n,
        k,
        x.stride(0),
        out.stride(0),
        groups.shape[-2],
        TOP_K=top_k,
        GROUP=group_size,
        BLOCK_M=block_m,
        NUM_PARTS=num_parts,
        SPLIT=split,
        SCALE_AFTER=scale_after,
        SCALE_BF16=scale_bf16,
        EVEN_K=k % TILE == 0,
        USE_PTX=use_ptx,
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=max_registers or None,
    )


_gemm = define(
    "awq_gemm(Tensor x, Tensor words, Tensor groups, Tensor? bias, Tensor(a!) out, Tensor(b!) partials, "
    "Tensor(c!) arrivals, Tensor? rows, Tensor? experts, int top_k, int group_size, int block_m, int num_parts, "
    "bool split, bool scale_after, bool scale_bf16, int num_warps, int num_stages, int max_registers, bool use_ptx) -> ()",
    _launch_gemm,
)


def _launch_dequantize(
    words: Tensor, groups: Tensor, out: Tensor, group_size: int, scale_bf16: bool, use_ptx: bool
) -> None:
    from kernels.gpu.awq_kernels import dequantize_kernel
    from kernels.gpu.launch import launch

    n, k = out.shape
    launch(
        dequantize_kernel,
        (words.shape[0], words.shape[1]),
        words,
        groups,
        out,
        n,
        k,
        groups.shape[-2],
        GROUP=group_size,
        SCALE_BF16=scale_bf16,
        USE_PTX=use_ptx,
        num_warps=4,
        num_stages=1,
    )


_dequantize = define(
    "awq_dequantize(Tensor words, Tensor groups, Tensor(a!) out, int group_size, bool scale_bf16, bool use_ptx) -> ()",
    _launch_dequantize,
)


def gemm(
    x: Tensor,
    weight: PackedAwq,
    bias: Tensor | None,
    out: Tensor,
    partials: Tensor,
    arrivals: Tensor,
    config: GemmConfig,
    use_ptx: bool,
) -> None:
    """out = x @ W^T + bias. x 16 bit [rows, K]; out [rows, N] 16 bit or fp32, may be columns of a wider tensor; bias fp32
    [N]."""
    _gemm(
        x, weight.words, weight.groups, bias, out, partials, arrivals, None, None, 1, weight.group_size, config.block_m,
        config.num_parts, config.split, config.scale_after, weight.scale_bf16, config.num_warps, config.num_stages,
        config.max_registers or 0, use_ptx,
    )  # fmt: skip


def grouped_gemm(
    x: Tensor,
    weight: PackedAwq,
    out: Tensor,
    rows: Tensor,
    experts: Tensor,
    top_k: int,
    config: GemmConfig,
    use_ptx: bool,
) -> None:
    """out[r] = x[r // top_k] @ W_e^T for every row r of `rows` that is not -1, e the expert of its slot's tile.

    rows and experts int32 as `align_experts` makes them. out [num_tokens * top_k, N].
    """
    _gemm(
        x, weight.words, weight.groups, None, out, x, x, rows, experts, top_k, weight.group_size, config.block_m, 1,
        False, config.scale_after, weight.scale_bf16, config.num_warps, config.num_stages, config.max_registers or 0,
        use_ptx,
    )  # fmt: skip


def dequantize(weight: PackedAwq, out: Tensor, use_ptx: bool) -> None:
    """Expands into out, 16 bit [N, K]."""
    _dequantize(weight.words, weight.groups, out, weight.group_size, weight.scale_bf16, use_ptx)


def align_experts(expert_ids: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Groups the choices of `expert_ids` [num_tokens, top_k] by expert, each padded to a multiple of block_m slots.

    Returns rows int32 [slots] (index into the flattened choices, or -1) and experts int32 [slots / block_m] (or -1). The sizes
    depend on shapes alone, and nothing is read back: the number of slots is the most that any routing needs.
    """
    flat = expert_ids.reshape(-1).long()
    num_choices = flat.shape[0]
    max_blocks = min(num_choices, num_choices // block_m + num_experts)
    device = flat.device
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (counts + block_m - 1) // block_m
    block_ends = blocks.cumsum(0)
    first_slot = (block_ends - blocks) * block_m
    first_choice = counts.cumsum(0) - counts
    ordered = flat.gather(0, order)
    slots = (first_slot - first_choice).gather(0, ordered) + torch.arange(num_choices, device=device)
    rows = torch.full((max_blocks * block_m,), -1, dtype=torch.int32, device=device)
    rows.scatter_(0, slots, order.to(torch.int32))
    block = torch.arange(max_blocks, device=device)
    owner = torch.searchsorted(block_ends, block, right=True)
    experts = torch.where(owner < num_experts, owner, -1).to(torch.int32)
    return rows, experts

"""A mixture of experts on the GPU: which experts a token goes to, and the weighted sum of what they give. The products between are
grouped by expert (kernels/gpu/awq_gemm.py)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Activation, ExpertWeights, Routing
from kernels.format import DenseWeight
from kernels.gpu.awq_gemm import PackedAwq, align_experts, grouped_gemm, stack_experts
from kernels.gpu.launch import launch
from kernels.gpu.library import define, expect
from kernels.gpu.tensors import GpuLinear

if TYPE_CHECKING:
    from kernels.gpu.backend import GpuBackend

logger = logging.getLogger(__name__)

LOG2_E = tl.constexpr(1.4426950408889634)
_COLUMNS = 1024


@triton.jit
def route_kernel(
    logits_ptr,  # fp32 [tokens, NUM_EXPERTS + SHARED]
    chosen_ptr,  # int32 [tokens, ACTIVE]
    weights_ptr,  # fp32 [tokens, ACTIVE + SHARED]
    NUM_EXPERTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    SHARED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One program per token. Whatever the logits hold, the experts are ACTIVE different ones: rows past the counts are garbage."""
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, BLOCK), tl.arange(0, PLACES)
    mask = experts < NUM_EXPERTS
    row_ptr = logits_ptr + token * (NUM_EXPERTS + SHARED)
    logits = tl.load(row_ptr + experts, mask=mask, other=0.0)
    left = tl.where(mask, tl.where(logits > -3e38, logits, -3e38), -float("inf"))
    shares = tl.where(mask, tl.exp2((logits - tl.max(left, 0)) * LOG2_E), 0.0)
    shares = shares / tl.sum(shares, 0)
    weights = tl.zeros((PLACES,), dtype=tl.float32)
    for place in tl.static_range(ACTIVE):
        best = tl.argmax(left, 0, tie_break_left=True)
        tl.store(chosen_ptr + token * ACTIVE + place, best.to(tl.int32))
        weights = tl.where(places == place, tl.sum(tl.where(experts == best, shares, 0.0), 0), weights)
        left = tl.where(experts == best, -float("inf"), left)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 0)
    weights_row = weights_ptr + token * (ACTIVE + SHARED)
    tl.store(weights_row + places, weights, mask=places < ACTIVE)
    if SHARED:
        logit = tl.load(row_ptr + NUM_EXPERTS)
        tl.store(weights_row + ACTIVE, 1.0 / (1.0 + tl.exp2(-logit * LOG2_E)))


@triton.jit
def combine_kernel(
    rows_ptr,  # 16 bit [tokens * ACTIVE, WIDTH]
    shared_ptr,  # 16 bit [tokens, WIDTH] or None
    weights_ptr,  # fp32 [tokens, ACTIVE (+ 1)]
    out_ptr,  # 16 bit [tokens, WIDTH]
    ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    num_weights = ACTIVE if shared_ptr is None else ACTIVE + 1
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(ACTIVE):
        weight = tl.load(weights_ptr + token * num_weights + place)
        row = tl.load(rows_ptr + (token * ACTIVE + place) * WIDTH + columns, mask=mask, other=0.0)
        total += weight * row.to(tl.float32)
    if shared_ptr is not None:
        weight = tl.load(weights_ptr + token * num_weights + ACTIVE)
        total += weight * tl.load(shared_ptr + token * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def _route(logits: Tensor, chosen: Tensor, weights: Tensor, renormalize: bool) -> None:
    tokens, active = chosen.shape
    shared = weights.shape[1] - active
    num_experts = logits.shape[1] - shared
    expect(
        shared in (0, 1) and 0 < active <= num_experts and len(logits) == len(weights) == tokens,
        "moe_route",
        f"{list(weights.shape)} weights and {list(chosen.shape)} experts of {list(logits.shape)} logits",
    )
    expect(logits.dtype == weights.dtype == torch.float32, "moe_route", "logits and weights must be fp32")
    launch(
        route_kernel, (tokens,), logits, chosen, weights, NUM_EXPERTS=num_experts, ACTIVE=active, SHARED=shared,
        RENORMALIZE=renormalize, BLOCK=triton.next_power_of_2(num_experts), PLACES=triton.next_power_of_2(active),
        num_warps=1, num_stages=1,
    )  # fmt: skip


def _combine(rows: Tensor, shared: Tensor | None, weights: Tensor, out: Tensor) -> None:
    tokens, width = out.shape
    active = weights.shape[1] - (shared is not None)
    expect(
        rows.shape == (tokens * active, width) and (shared is None or shared.shape == out.shape),
        "moe_combine",
        f"{list(rows.shape)} rows do not make {list(out.shape)} of {active} each",
    )
    block = min(_COLUMNS, triton.next_power_of_2(width))
    grid = (tokens, triton.cdiv(width, block))
    launch(combine_kernel, grid, rows, shared, weights, out, ACTIVE=active, WIDTH=width, BLOCK=block, num_stages=1)


route = define("moe_route(Tensor logits, Tensor(a!) chosen, Tensor(b!) weights, bool renormalize) -> ()", _route)
combine = define("moe_combine(Tensor rows, Tensor? shared, Tensor weights, Tensor(a!) out) -> ()", _combine)


@dataclass(frozen=True, slots=True)
class GpuExperts:
    """A mixture on the GPU. `stacked` holds the routed experts' gate_up, part by part along N, and down, for the grouped products;
    None where they are not all quantized in one form: then `experts` holds them one by one."""

    router: GpuLinear  # dense, 16 bit
    stacked: tuple[tuple[PackedAwq, ...], PackedAwq] | None
    experts: tuple[tuple[GpuLinear, GpuLinear], ...]
    shared: tuple[GpuLinear, GpuLinear] | None
    routing: Routing
    expert_nbytes: list[int]
    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + sum(self.expert_nbytes)


def prepare(backend: GpuBackend, router: DenseWeight, experts: Iterable[ExpertWeights], routing: Routing) -> GpuExperts:
    prepared = [
        (backend.prepare_linear(expert.gate_up, None), backend.prepare_linear([expert.down], None))
        for expert in experts
    ]
    sizes = [gate_up.nbytes + down.nbytes for gate_up, down in prepared]
    shared = prepared.pop() if routing.shared else None
    gate_up, down = (_stacked([expert[i] for expert in prepared]) for i in range(2))
    stacked = (gate_up, down[0]) if gate_up is not None and down is not None else None
    if stacked is None:
        logger.warning("%s: experts are not all quantized in one form: each computes every token", router.name)
    return GpuExperts(
        backend.prepare_linear([router], None),
        stacked,
        () if stacked is not None else tuple(prepared),
        shared,
        routing,
        sizes,
        router.in_features,
        prepared[0][1].out_features,
    )


def _stacked(linears: Sequence[GpuLinear]) -> tuple[PackedAwq, ...] | None:
    """The same linear of all experts, part by part; None where they are not all quantized in one form."""
    stacked = []
    for parts in zip(*(linear.parts for linear in linears), strict=False):
        packed = [part for part in parts if isinstance(part, PackedAwq)]
        forms = {(part.words.shape, part.groups.shape, part.group_size, part.scale_bf16) for part in packed}
        if len(packed) != len(parts) or len(forms) != 1:
            return None
        stacked.append(stack_experts(packed))
    return tuple(stacked) if all(len(linear.parts) == len(stacked) for linear in linears) else None


def compute(backend: GpuBackend, x: Tensor, experts: GpuExperts, activation: Activation) -> Tensor:
    """`Backend.moe` of x, 16 bit [tokens, K]."""
    tokens, routing, device = x.shape[0], experts.routing, x.device
    out = torch.empty(tokens, experts.out_features, dtype=x.dtype, device=device)
    if tokens == 0:
        return out
    num_outputs, shared = experts.router.out_features, None
    logits = torch.empty(tokens, num_outputs, dtype=torch.float32, device=device)
    backend.product(x, experts.router, logits)
    chosen = torch.empty(tokens, routing.num_active, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, routing.num_active + routing.shared, dtype=torch.float32, device=device)
    route(logits, chosen, weights, routing.renormalize)
    if experts.stacked is not None:
        rows = _grouped(backend, x, chosen, *experts.stacked, activation)
    else:
        rows = x.new_zeros(tokens, routing.num_active, experts.out_features)
        for index, expert in enumerate(experts.experts):
            rows = torch.where((chosen == index)[..., None], _one(backend, x, expert, activation)[:, None], rows)
        rows = rows.flatten(0, 1)
    if experts.shared is not None:
        shared = _one(backend, x, experts.shared, activation)
    combine(rows, shared, weights, out)
    return out


def _one(backend: GpuBackend, x: Tensor, expert: tuple[GpuLinear, GpuLinear], activation: Activation) -> Tensor:
    gate_up, down = expert
    between = backend.product(x, gate_up, x.new_empty(x.shape[0], gate_up.out_features))
    gated = backend.act_and_mul(between, activation).tensor
    return backend.product(gated, down, x.new_empty(x.shape[0], down.out_features))


def _grouped(
    backend: GpuBackend,
    x: Tensor,
    chosen: Tensor,
    gate_up: tuple[PackedAwq, ...],
    down: PackedAwq,
    activation: Activation,
) -> Tensor:
    """What each token's experts give it, [tokens * active, N]: rows are sorted by expert, and back, by the products."""
    num_active, num_rows = chosen.shape[1], chosen.numel()
    config = backend.expert_config(num_rows, down.num_experts, gate_up[0].group_size)
    rows, owners = align_experts(chosen, down.num_experts, config.block_m)
    between, first = x.new_empty(num_rows, sum(part.out_features for part in gate_up)), 0
    for part in gate_up:
        columns = between[:, first : first + part.out_features]
        config = backend.expert_config(num_rows, down.num_experts, part.group_size)
        grouped_gemm(x, part, columns, rows, owners, num_active, config, backend.gpu.use_ptx)
        first += part.out_features
    gated, out = backend.act_and_mul(between, activation).tensor, x.new_empty(num_rows, down.out_features)
    config = backend.expert_config(num_rows, down.num_experts, down.group_size)
    grouped_gemm(gated, down, out, rows, owners, 1, config, backend.gpu.use_ptx)
    return out

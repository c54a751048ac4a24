"""Packing the weights of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kernels.backend import ExpertWeights, PreparedExperts, Routing
from kernels.cpu import _native
from kernels.cpu.linear import CpuLinear, pack_linear
from kernels.format import DenseWeight
from kernels.host import HostExperts


@dataclass(frozen=True, slots=True)
class CpuExperts(HostExperts[CpuLinear]):
    """A `PreparedExperts`. The router reads its input as it is, in fp32."""

    layouts: tuple[_native.ActivationLayout, ...]  # all forms of the input that a linear here takes


def pack_experts(
    router: DenseWeight, experts: Iterable[ExpertWeights], routing: Routing, activations: str
) -> CpuExperts:
    """activations: of quantized linears, as for `pack_linear`."""
    packed_router = pack_linear([router], None, activations)
    packed = tuple(
        (pack_linear(expert.gate_up, None, activations), pack_linear([expert.down], None, activations))
        for expert in experts
    )
    layouts = list(packed_router.layouts)
    for gate_up, _ in packed:
        layouts += [layout for layout in gate_up.layouts if layout not in layouts]
    return CpuExperts(packed_router, packed, routing, tuple(layouts))


def expect_cpu_experts(experts: PreparedExperts) -> CpuExperts:
    if not isinstance(experts, CpuExperts):
        raise TypeError(f"expected experts prepared by the cpu back end, found {type(experts).__name__}")
    return experts

"""The tensors of a mixture of experts in a checkpoint, one module per expert's linear, and their preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.backend import Backend, ExpertWeights, PreparedExperts, Routing
from kernels.format import AwqWeight, DenseWeight
from server.model_config import MixtureConfig

_ROUTER, _EXPERTS, _SHARED, _SHARED_GATE = "gate", "experts", "shared_expert", "shared_expert_gate"

Weight = AwqWeight | DenseWeight


def mixture_linears(mixture: MixtureConfig, prefix: str, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Full names of a layer's mixture's linears, and their outputs and inputs. prefix: the layer's name."""
    names, module = mixture.names, f"{prefix}.{mixture.names.module}"
    linears = {f"{module}.{_ROUTER}": (mixture.num_experts, hidden_size)}
    experts = {f"{module}.{_EXPERTS}.{index}": mixture.intermediate_size for index in range(mixture.num_experts)}
    if names.shared:
        linears[f"{module}.{_SHARED_GATE}"] = (1, hidden_size)
        experts[f"{module}.{_SHARED}"] = mixture.shared_intermediate_size
    for expert, inner in experts.items():
        linears[f"{expert}.{names.gate}"] = linears[f"{expert}.{names.up}"] = (inner, hidden_size)
        linears[f"{expert}.{names.down}"] = (hidden_size, inner)
    return linears


def prepare_mixture(
    backend: Backend, mixture: MixtureConfig, prefix: str, read: Callable[[str], Weight]
) -> PreparedExperts:
    """One layer's router and experts, each expert read as the back end comes to it."""
    names, module = mixture.names, f"{prefix}.{mixture.names.module}"
    modules = [f"{module}.{_EXPERTS}.{index}" for index in range(mixture.num_experts)]
    router = _dense(read(f"{module}.{_ROUTER}"))
    if names.shared:
        modules.append(f"{module}.{_SHARED}")
        gate = _dense(read(f"{module}.{_SHARED_GATE}"))
        router = DenseWeight(router.name, torch.cat((router.weight, gate.weight)))

    def experts() -> Iterator[ExpertWeights]:
        for expert in modules:
            gate, up, down = (read(f"{expert}.{linear}") for linear in (names.gate, names.up, names.down))
            yield ExpertWeights([gate, up], down)

    routing = Routing(mixture.num_active, mixture.renormalize, names.shared)
    return backend.prepare_experts(router, experts(), routing)


def _dense(weight: Weight) -> DenseWeight:
    """Routers stay in 16 or 32 bit, those that a checkpoint has quantized too: which experts a token gets is not to depend on
    how its activations are rounded."""
    return weight if isinstance(weight, DenseWeight) else DenseWeight(weight.name, weight.dequantize())

"""Random mixtures of experts for kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Backend, ExpertWeights, PreparedExperts, Routing
from kernels.format import AwqWeight, DenseWeight, pack_int4


def random_weight(in_features: int, out_features: int, group_size: int | None, seed: int) -> AwqWeight | DenseWeight:
    """Quantized, or dense where group_size is None; outputs stay about as large as inputs."""
    generator = torch.Generator().manual_seed(seed)
    if group_size is None:
        weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
        return DenseWeight("w", weight.half())
    groups = in_features // group_size

    def nibbles(rows: int) -> Tensor:
        return pack_int4(torch.randint(0, 16, (rows, out_features), generator=generator))

    scales = (0.5 + torch.rand(groups, out_features, generator=generator)) * 0.2 / in_features**0.5
    weight = AwqWeight("w", nibbles(in_features), nibbles(groups), scales.half(), group_size)
    weight.validate()
    return weight


@dataclass(frozen=True)
class Mixture:
    """`group_sizes`: of gate, up and down; None is dense. `shared_width` 0: no shared expert."""

    hidden: int = 128
    width: int = 64
    num_experts: int = 8
    num_active: int = 2
    renormalize: bool = True
    shared_width: int = 0
    group_sizes: tuple[int | None, int | None, int | None] = (32, 32, 32)

    @property
    def routing(self) -> Routing:
        return Routing(self.num_active, self.renormalize, self.shared_width > 0)

    @property
    def widths(self) -> list[int]:
        return [self.width] * self.num_experts + ([self.shared_width] if self.shared_width else [])

    def router(self) -> DenseWeight:
        generator = torch.Generator().manual_seed(99)
        weight = torch.randn(len(self.widths), self.hidden, generator=generator) * 2 / self.hidden**0.5
        return DenseWeight("router", weight.half())

    def experts(self) -> list[ExpertWeights]:
        gate, up, down = self.group_sizes
        return [
            ExpertWeights(
                [
                    random_weight(self.hidden, width, gate, 3 * index),
                    random_weight(self.hidden, width, up, 3 * index + 1),
                ],
                random_weight(width, self.hidden, down, 3 * index + 2),
            )
            for index, width in enumerate(self.widths)
        ]

    def prepare(self, backend: Backend) -> PreparedExperts:
        return backend.prepare_experts(self.router(), iter(self.experts()), self.routing)


MIXTURES = {
    "mixtral": Mixture(),
    "one of few": Mixture(num_experts=3, num_active=1, renormalize=False),
    "shared": Mixture(num_experts=5, num_active=3, renormalize=False, shared_width=96),
    "many": Mixture(num_experts=40, num_active=8, width=32, shared_width=32),
}


def make_inputs(rows: int, hidden: int, seed: int = 7) -> Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)) * 1.5

"""What a decoder layer does after its attention, by kind: a dense MLP or a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.backend import Activation, Backend, LinearInput, PreparedExperts, PreparedLinear


class Mlp(Protocol):
    @property
    def reader(self) -> PreparedLinear:
        """The linear that reads the norm's output."""

    @property
    def nbytes(self) -> int: ...

    def forward(self, backend: Backend, hidden: LinearInput, activation: Activation) -> Tensor:
        """[num_tokens, hidden]; `hidden` was made for `reader`."""


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """down(activation(gate) * up); gate and up are fused along their outputs."""

    gate_up: PreparedLinear
    down: PreparedLinear

    @property
    def reader(self) -> PreparedLinear:
        return self.gate_up

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def forward(self, backend: Backend, hidden: LinearInput, activation: Activation) -> Tensor:
        gated = backend.gated_linear(hidden, self.gate_up, activation, for_linear=self.down)
        return backend.linear(gated, self.down)


@dataclass(frozen=True, slots=True)
class MixtureMlp:
    """A router and its experts, a shared one included where there is one."""

    experts: PreparedExperts

    @property
    def reader(self) -> PreparedLinear:
        return self.experts

    @property
    def nbytes(self) -> int:
        return self.experts.nbytes

    def forward(self, backend: Backend, hidden: LinearInput, activation: Activation) -> Tensor:
        return backend.moe(hidden, self.experts, activation)

"""What back ends that compute in host memory share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.backend import PROMPT_FLAG, Penalties, PreparedLinear, Routing
from kernels.batch import ForwardBatch, SamplingBatch

L = TypeVar("L", bound=PreparedLinear)


@dataclass(frozen=True, slots=True)
class HostExperts(Generic[L]):
    """A mixture: the router, and each expert's gate_up and down."""

    router: L
    experts: Sequence[tuple[L, L]]
    routing: Routing

    @property
    def in_features(self) -> int:
        return self.router.in_features

    @property
    def out_features(self) -> int:
        return self.experts[0][1].out_features

    @property
    def expert_nbytes(self) -> list[int]:
        return [gate_up.nbytes + down.nbytes for gate_up, down in self.experts]

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + sum(self.expert_nbytes)


class HostBackend:
    """The ops on batches and on rows of logits that need no kernels of their own."""

    device = torch.device("cpu")

    def memory(self) -> None:
        return None

    def allocate_batches(
        self, max_tokens: int, max_sequences: int, max_blocks_per_sequence: int, max_rows: int
    ) -> tuple[ForwardBatch, SamplingBatch]:
        forward = ForwardBatch.allocate(max_tokens, max_sequences, max_blocks_per_sequence, max_rows, self.device)
        return forward, SamplingBatch.allocate(max_rows, self.device)

    def run_once(self, forward: Callable[[], Tensor]) -> Tensor:
        return forward()

    def add_bias(self, logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], values: Sequence[float]) -> None:
        entries = [entry for entry in zip(rows, token_ids, values, strict=True) if entry[1] < logits.shape[1]]
        if entries:
            at = torch.tensor([entry[:2] for entry in entries]).unbind(1)
            logits.index_put_(at, torch.tensor([entry[2] for entry in entries]), accumulate=True)

    def prepare_penalties(self, history: Tensor, repetition: float, presence: float, frequency: float) -> Penalties:
        return Penalties(history, *torch.tensor([repetition, presence, frequency], dtype=torch.float32).split(1))

    def adjust_row(self, row: Tensor, penalties: Penalties | None, allowed: Tensor | None) -> None:
        if penalties is not None:
            generated = penalties.history & (PROMPT_FLAG - 1)
            scaled = torch.where(row > 0, row / penalties.repetition, row * penalties.repetition)
            torch.where(penalties.history != 0, scaled, row, out=row)
            row.sub_(generated * penalties.frequency)
            row.sub_((generated > 0) * penalties.presence)
        if allowed is not None:
            bits = np.unpackbits(allowed.numpy().view(np.uint8), count=row.shape[0], bitorder="little")
            row.masked_fill_(torch.from_numpy(bits == 0), -float("inf"))

"""The buffers that carry one step into a recorded forward pass and into sampling, at fixed addresses for the engine's life."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """One step's input, int32 throughout; prefill chunks and decodes are the same thing: sequences with 1 or more query tokens.

    The buffers keep their addresses for the engine's life; only the first `num_*` entries mean anything. `counts` repeats the
    three numbers on the device, so that a recorded program needs nothing from Python.
    """

    counts: Tensor  # [3]: num_tokens, num_sequences, num_rows
    input_ids: Tensor  # [max_tokens]
    positions: Tensor  # [max_tokens]
    slot_mapping: Tensor  # [max_tokens] slot of the KV pool that each token's key and value go to
    query_starts: Tensor  # [max_sequences + 1] prefix sums of the query lengths
    seq_lens: Tensor  # [max_sequences] keys each sequence has after this step, its query tokens included
    block_tables: Tensor  # [max_sequences, max_blocks_per_sequence]
    logit_rows: Tensor  # [max_rows] indices into the step's tokens
    host_query_lens: list[int] = field(default_factory=list)  # the same numbers for back ends that run op by op
    host_seq_lens: list[int] = field(default_factory=list)
    host_block_tables: dict[int, list[int]] = field(default_factory=dict)  # by row: what was last written there
    num_tokens: int = 0
    num_sequences: int = 0
    num_rows: int = 0
    generation: int = 0  # counts the fills: what was derived from the buffers at the same number is still right
    staged: dict[str, Tensor] | None = (
        None  # by name, where `fill` writes instead when the buffers are not in host memory
    )
    _targets: dict[str, Any] | None = None

    @classmethod
    def allocate(
        cls, max_tokens: int, max_sequences: int, max_blocks_per_sequence: int, max_rows: int, device: torch.device
    ) -> ForwardBatch:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            counts=zeros(3),
            input_ids=zeros(max_tokens),
            positions=zeros(max_tokens),
            slot_mapping=zeros(max_tokens),
            query_starts=zeros(max_sequences + 1),
            seq_lens=zeros(max_sequences),
            block_tables=zeros(max_sequences, max_blocks_per_sequence),
            logit_rows=zeros(max_rows),
        )

    @property
    def max_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def max_sequences(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def max_rows(self) -> int:
        return self.logit_rows.shape[0]

    def fill(
        self,
        input_ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        logit_rows: Sequence[int],
    ) -> None:
        """Writes one step into the buffers. The first three run over the step's tokens, sequence after sequence; the next three
        over its sequences."""
        self.generation += 1
        self.host_query_lens, self.host_seq_lens = list(query_lens), list(seq_lens)
        self.num_tokens, self.num_sequences, self.num_rows = len(input_ids), len(query_lens), len(logit_rows)
        if self._targets is None:
            self._targets = _targets(self.host_buffers())
        buffers = self._targets
        _write(buffers["input_ids"], input_ids)
        _write(buffers["positions"], positions)
        _write(buffers["slot_mapping"], slots)
        _write(buffers["query_starts"], list(itertools.accumulate(query_lens, initial=0)))
        _write(buffers["seq_lens"], seq_lens)
        _write(buffers["logit_rows"], logit_rows)
        for sequence, table in enumerate(block_tables):
            if self.host_block_tables.get(sequence) != table:  # most are what the step before wrote
                self.host_block_tables[sequence] = list(table)
                _write(buffers["block_tables"], table, sequence)
        _write(buffers["counts"], (self.num_tokens, self.num_sequences, self.num_rows))

    def host_buffers(self) -> dict[str, Tensor]:
        return self.staged or {name: getattr(self, name) for name in FORWARD_BUFFERS}


FORWARD_BUFFERS = (
    "counts",
    "input_ids",
    "positions",
    "slot_mapping",
    "query_starts",
    "seq_lens",
    "block_tables",
    "logit_rows",
)
SAMPLING_BUFFERS = ("temperature", "top_k", "top_p", "min_p", "seed", "index", "typical_p")


@dataclass(slots=True)
class SamplingBatch:
    """How each logits row is sampled, one entry per row at fixed addresses; the first `num_rows` mean something.

    A temperature of 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `typical_p` 1 are off. (`seed`, `index`) keys the row's one
    random number.
    """

    temperature: Tensor  # fp32 [max_rows]
    top_k: Tensor  # int32 [max_rows]
    top_p: Tensor  # fp32 [max_rows]
    min_p: Tensor  # fp32 [max_rows]
    seed: Tensor  # int64 [max_rows]
    index: Tensor  # int64 [max_rows] output index of the token being sampled
    typical_p: Tensor  # fp32 [max_rows]
    num_rows: int = 0
    all_greedy: bool = True  # host-side knowledge that lets a back end skip work: no row samples at all;
    any_filter: bool = False  # some sampled row has top-k or top-p on
    any_typical: bool = False  # or typical_p
    staged: dict[str, Tensor] | None = None  # as in ForwardBatch
    _targets: dict[str, Any] | None = None

    @classmethod
    def allocate(cls, max_rows: int, device: torch.device) -> SamplingBatch:
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(max_rows, dtype=dtype, device=device)

        return cls(
            temperature=zeros(torch.float32),
            top_k=zeros(torch.int32),
            top_p=zeros(torch.float32),
            min_p=zeros(torch.float32),
            seed=zeros(torch.int64),
            index=zeros(torch.int64),
            typical_p=zeros(torch.float32),
        )

    def fill(
        self,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        seed: Sequence[int],
        index: Sequence[int],
        typical_p: Sequence[float] | None = None,
    ) -> None:
        """Writes one step's rows into the buffers; where all are greedy, that alone. typical_p None: off for all."""
        self.num_rows = len(temperature)
        self.all_greedy = not any(temperature)
        self.any_filter = not self.all_greedy and (any(top_k) or min(top_p) < 1.0)
        typical_p = [1.0] * self.num_rows if typical_p is None else typical_p
        self.any_typical = not self.all_greedy and min(typical_p) < 1.0
        if self._targets is None:
            self._targets = _targets(self.staged or {name: getattr(self, name) for name in SAMPLING_BUFFERS})
        _write(self._targets["temperature"], temperature)
        if self.all_greedy:
            return
        columns = (top_k, top_p, min_p, seed, index, typical_p)
        for name, values in zip(SAMPLING_BUFFERS[1:], columns, strict=True):
            _write(self._targets[name], values)


def _targets(buffers: dict[str, Tensor]) -> dict[str, Any]:
    """What `fill` writes to: numpy's view of a buffer in host memory, which takes a list in a microsecond (every step makes a dozen
    of these writes); of a fake one, itself."""
    return {name: buffer.numpy() if type(buffer) is Tensor else buffer for name, buffer in buffers.items()}


def _write(target: Any, values: Sequence[int] | Sequence[float], row: int | None = None) -> None:
    """Writes to the front of a target, or of its `row`."""
    source = torch.tensor(values, dtype=target.dtype) if isinstance(target, Tensor) else values
    (target if row is None else target[row])[: len(values)] = source

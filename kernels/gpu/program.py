"""A recorded forward pass: a captured graph per bucket of decodes, the ops one by one for everything else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.batch import ForwardBatch, SamplingBatch
from kernels.gpu.device import Graph
from kernels.gpu.tuning import graph_buckets

if TYPE_CHECKING:
    from kernels.gpu.backend import GpuBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Extent:
    """How many rows the ops at hand compute: the step's own, or a bucket's."""

    num_tokens: int
    num_sequences: int
    num_rows: int
    decodes: bool
    prefills: bool

    @classmethod
    def of(cls, batch: ForwardBatch) -> Extent:
        lengths = batch.host_query_lens
        return cls(batch.num_tokens, batch.num_sequences, batch.num_rows, 1 in lengths, any(n > 1 for n in lengths))


class GpuProgram:
    """Runs `forward` over `batch`. The first run, which must not be a request's, compiles every kernel and captures every
    graph."""

    def __init__(self, backend: GpuBackend, forward: Callable[[], Tensor], batch: ForwardBatch) -> None:
        self._backend, self._forward, self._batch = backend, forward, batch
        self._graphs: dict[int, tuple[Graph, Tensor]] = {}
        self._is_warm = False

    @torch.inference_mode()
    def run(self) -> Tensor:
        """fp32 logits [num_rows, vocabulary], valid until the next run."""
        self._backend.upload()
        if not self._is_warm:
            self._warm_up()
            self._is_warm = True
        batch = self._batch
        bucket = self._bucket()
        if bucket is None:
            return self._forward()
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits[: batch.num_rows]

    def _bucket(self) -> int | None:
        """The smallest graph that holds a step of decodes alone."""
        batch = self._batch
        if batch.num_tokens != batch.num_sequences:
            return None
        return next((size for size in sorted(self._graphs) if size >= batch.num_sequences), None)

    def _warm_up(self) -> None:
        """Every regime once, on an empty batch: rows past the counts read and write nothing that is not theirs."""
        batch = self._batch
        counts = batch.host_buffers()["counts"]
        counts.zero_()
        self._backend.upload()
        self._try_everything()
        own = (batch.num_tokens, batch.num_sequences, batch.num_rows)
        counts.copy_(torch.tensor(own, dtype=counts.dtype))
        self._backend.upload()

    def _try_everything(self) -> None:
        batch, buckets = self._batch, graph_buckets(self._batch.max_sequences)
        for num_tokens in sorted({*self._backend.reserve(batch.max_tokens), batch.max_tokens}):
            self._run_with(num_tokens, batch.max_sequences, min(num_tokens, batch.max_rows), prefills=True)
        for bucket in buckets:
            logits = self._run_with(bucket, bucket, min(bucket, batch.max_rows), prefills=False)
            idle = SamplingBatch.allocate(logits.shape[0], self._backend.device)
            self._backend.sample(logits, idle).to_host()
            self._try_rules(logits)
        self._backend.workspace.is_frozen = True
        if not self._backend.gpu.can_capture:
            return
        for bucket in reversed(buckets):  # the largest first: the others fit into its memory
            self._capture(bucket)
        logger.info("captured decode graphs for %d batch sizes up to %d", len(buckets), buckets[-1])

    def _try_rules(self, logits: Tensor) -> None:
        backend, vocab_size = self._backend, logits.shape[1]
        penalties = backend.prepare_penalties(torch.zeros(vocab_size, dtype=torch.int32), 1.0, 0.0, 0.0)
        allowed = torch.full((-(-vocab_size // 32),), -1, dtype=torch.int32)
        backend.add_bias(logits, [0], [0], [0.0])
        for row in logits[:2]:  # the second may lie at an odd address
            backend.adjust_row(row, penalties, allowed)
            backend.adjust_row(row, penalties, None)
            backend.adjust_row(row, None, allowed)

    def _capture(self, bucket: int) -> None:
        outputs: list[Tensor] = []

        def run() -> None:
            outputs.append(self._run_with(bucket, bucket, min(bucket, self._batch.max_rows), prefills=False))

        graph = self._backend.gpu.capture(run)
        self._graphs[bucket] = (graph, outputs[-1])

    def _run_with(self, num_tokens: int, num_sequences: int, num_rows: int, prefills: bool) -> Tensor:
        self._backend.extent = Extent(num_tokens, num_sequences, num_rows, True, prefills)
        try:
            return self._forward()
        finally:
            self._backend.extent = None

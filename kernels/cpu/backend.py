"""The native CPU back end: what kernels/backend.py asks for, over the C++ library.

A forward pass is recorded once: every op called while recording appends to a native program, and a step is one call that
replays it on the batch's buffers. Outside a recording an op runs at once, as a program of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import (
    Activation,
    AttentionShape,
    BackendOptions,
    ExpertWeights,
    KVCache,
    KVCacheSpec,
    LinearInput,
    PreparedEmbedding,
    PreparedExperts,
    PreparedLinear,
    QKNorm,
    RotaryTable,
    Routing,
    SampledRows,
)
from kernels.batch import ForwardBatch, SamplingBatch
from kernels.cpu import _native
from kernels.cpu.buffers import BufferPool, map_zeros
from kernels.cpu.experts import CpuExperts, expect_cpu_experts, pack_experts
from kernels.cpu.linear import CpuLinear, CpuLinearInput, expect_cpu_linear, pack_head, pack_linear, to_16_bit
from kernels.cpu.threads import usable_cores
from kernels.format import AwqWeight, DenseWeight
from kernels.host import HostBackend

logger = logging.getLogger(__name__)

_KV_DTYPES = {"auto": torch.float16, "float16": torch.float16, "fp16": torch.float16, "int8": torch.int8}
_POSITION_MULTIPLE = 8
"""Block and head sizes are multiples of it: vectors of 8 keys never straddle a block."""


@dataclass(frozen=True, slots=True)
class CpuEmbedding:
    weight: Tensor  # fp16 or bf16 [vocabulary, hidden]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class CpuKVCache:
    """One layer's pool: keys [blocks, kv_heads, head_dim, block_size], values [blocks, kv_heads, block_size, head_dim], fp16 or
    int8; with int8 also fp32 scales [blocks, kv_heads, block_size] for each."""

    def __init__(self, spec: KVCacheSpec, dtype: torch.dtype) -> None:
        heads, size, head_dim = spec.num_kv_heads, spec.block_size, spec.head_dim
        self.keys = map_zeros((spec.num_blocks, heads, head_dim, size), dtype)
        self.values = map_zeros((spec.num_blocks, heads, size, head_dim), dtype)
        self.scales: list[Tensor] = []
        if dtype == torch.int8:
            self.scales = [map_zeros((spec.num_blocks, heads, size), torch.float32) for _ in range(2)]
        self.native = _native.KvCache(self.keys, self.values, *self.scales)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *self.scales))


class CpuProgram:
    """A recorded forward pass."""

    def __init__(self, native: _native.Program, logits: Tensor, buffers: BufferPool, kept: list[object]) -> None:
        self.native = native
        self.buffers = buffers
        self._logits = logits
        self._kept = kept  # what the native program points into

    def run(self) -> Tensor:
        """Raises IndexError naming the batch's buffer, entry and limit when a value of it would lead outside memory."""
        return self._logits[: self.native.run_batch()]

    def profile(self, run: Callable[[], object]) -> dict[str, float]:
        """Seconds by kind of op that this program spends during `run()`."""
        before = dict(self.native.seconds_by_kind)
        self.native.profiling = True
        try:
            run()
        finally:
            self.native.profiling = False
        return {kind: seconds - before.get(kind, 0.0) for kind, seconds in self.native.seconds_by_kind.items()}


@dataclass(slots=True)
class _Recording:
    """The state of one `record`: the program under construction and what must outlive it."""

    native: _native.Program
    batch: ForwardBatch
    buffers: BufferPool
    kept: list[object]


class CpuBackend(HostBackend):
    """`kernels.backend.Backend` over kernels.cpu._native. Activations are fp32 between ops and int8 or int16 into linears."""

    name = "cpu"

    def __init__(self, options: BackendOptions) -> None:
        if options.kv_cache_dtype not in _KV_DTYPES:
            raise ValueError(f"kv_cache_dtype {options.kv_cache_dtype!r}: expected one of {', '.join(_KV_DTYPES)}")
        self.options = options
        cores, reason = usable_cores()
        self.num_threads = options.num_threads or cores
        self._pool = _native.ThreadPool(self.num_threads)
        self._recording: _Recording | None = None
        self._sampling: tuple[SamplingBatch, _native.SamplingBuffers] | None = None
        logger.info(
            "cpu back end: %s, %d threads (%s), %s activations",
            _native.current_isa(),
            self.num_threads,
            "as asked" if options.num_threads else reason,
            options.cpu_activations,
        )

    # Preparation.
    def prepare_linear(self, weights: Sequence[AwqWeight | DenseWeight], bias: Tensor | None) -> CpuLinear:
        return pack_linear(weights, bias, self.options.cpu_activations)

    def prepare_experts(self, router: DenseWeight, experts: Iterable[ExpertWeights], routing: Routing) -> CpuExperts:
        return pack_experts(router, experts, routing, self.options.cpu_activations)

    def prepare_head(self, weight: DenseWeight | AwqWeight) -> CpuLinear:
        return pack_head(weight, self.options.lm_head_dtype, self.options.cpu_activations)

    def prepare_embedding(self, weight: DenseWeight) -> CpuEmbedding:
        return CpuEmbedding(to_16_bit(weight.weight))

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return weight.float().contiguous()

    def prepare_rotary(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        return RotaryTable(cos.float().contiguous(), sin.float().contiguous())

    def allocate_kv(self, spec: KVCacheSpec) -> list[KVCache]:
        for field in ("block_size", "head_dim"):
            if getattr(spec, field) % _POSITION_MULTIPLE:
                raise ValueError(f"{field}: expected a multiple of {_POSITION_MULTIPLE}, found {getattr(spec, field)}")
        dtype = self._kv_dtype(spec)
        return [CpuKVCache(spec, dtype) for _ in range(spec.num_layers)]

    def kv_block_nbytes(self, spec: KVCacheSpec) -> int:
        dtype = self._kv_dtype(spec)
        per_head = spec.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * spec.num_layers * spec.block_size * spec.num_kv_heads * per_head

    def _kv_dtype(self, spec: KVCacheSpec) -> torch.dtype:
        name = self.options.kv_cache_dtype if spec.dtype == "auto" else spec.dtype
        if name not in _KV_DTYPES:
            raise ValueError(f"kv_cache_dtype {name!r}: expected one of {', '.join(_KV_DTYPES)}")
        return _KV_DTYPES[name]

    def workspace_nbytes(
        self, max_tokens: int, max_rows: int, hidden_size: int, intermediate_size: int, vocab_size: int
    ) -> int:
        # Live at once at most: two residuals, the fused projection and its packed input; the rows attended; the logits.
        per_token = 4 * (4 * hidden_size + 3 * max(intermediate_size, hidden_size)) + 3 * intermediate_size
        return max_tokens * per_token + max_rows * (4 * vocab_size + 8 * hidden_size) + self.num_threads * (2 << 20)

    # One forward pass.
    def record(self, forward: Callable[[], Tensor], batch: ForwardBatch) -> CpuProgram:
        if self._recording is not None:
            raise RuntimeError("record: a recording is under way already")
        # From here on the cores are the pool's: a second pool spinning beside it would halve both.
        torch.set_num_threads(1)
        recording = _Recording(self._native_program(batch), batch, BufferPool(), [batch, self._pool])
        self._recording = recording
        try:
            logits = forward()
        finally:
            self._recording = None
        if tuple(logits.shape[:1]) != (batch.max_rows,):
            raise ValueError(
                f"record: expected forward to return logits of {batch.max_rows} rows, found {logits.shape}"
            )
        return CpuProgram(recording.native, logits, recording.buffers, recording.kept)

    def _native_program(self, batch: ForwardBatch) -> _native.Program:
        return _native.Program(
            self._pool,
            batch.counts,
            batch.input_ids,
            batch.positions,
            batch.slot_mapping,
            batch.query_starts,
            batch.seq_lens,
            batch.block_tables,
            batch.logit_rows,
        )

    def _program(self, batch: ForwardBatch | None, *kept: object) -> _native.Program:
        """The program that the op at hand joins: the one being recorded, or a new one to run at once."""
        recording = self._recording
        if recording is None:
            return _native.Program(self._pool) if batch is None else self._native_program(batch)
        if batch is not None and batch is not recording.batch:
            raise ValueError("batch: an op was called on another batch than the one being recorded")
        recording.kept.extend(kept)
        return recording.native

    def _finish(self, program: _native.Program, num_tokens: int, batch: ForwardBatch | None = None) -> None:
        if self._recording is None:
            program.run(num_tokens, batch.num_sequences if batch else 0, batch.num_rows if batch else 0)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._recording is None:
            return torch.empty(shape, dtype=dtype)
        return self._recording.buffers.empty(shape, dtype)

    def _linear_input(self, num_rows: int, width: int, for_linear: PreparedLinear | None) -> CpuLinearInput:
        """Where an op leaves its rows: in the forms that the linear takes, or dense."""
        if for_linear is None:
            return CpuLinearInput(num_rows, self._empty(num_rows, width), ())
        linear = for_linear if isinstance(for_linear, CpuExperts) else expect_cpu_linear(for_linear)
        if linear.in_features != width:
            raise ValueError(f"for_linear: expected {width} input features, found {linear.in_features}")
        return self._packed_input(num_rows, linear)

    def _packed_input(self, num_rows: int, linear: CpuLinear | CpuExperts) -> CpuLinearInput:
        packed = [(layout, self._empty(layout.nbytes(num_rows), dtype=torch.uint8)) for layout in linear.layouts]
        return CpuLinearInput(num_rows, None, packed)

    def embed(self, batch: ForwardBatch, embedding: PreparedEmbedding, scale: float = 1.0) -> Tensor:
        assert isinstance(embedding, CpuEmbedding)
        program = self._program(batch, embedding.weight)
        out = self._empty(batch.max_tokens, embedding.weight.shape[1])
        program.embed(embedding.weight, scale, out)
        self._finish(program, batch.num_tokens, batch)
        return out if self._recording else out[: batch.num_tokens]

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        unit_offset: bool = False,
        for_linear: PreparedLinear | None = None,
        x_weight: Tensor | None = None,
    ) -> tuple[CpuLinearInput, Tensor]:
        program = self._program(None, weight, x_weight)
        total = self._empty(*x.shape)
        out = self._linear_input(x.shape[0], x.shape[1], for_linear)
        program.add_rms_norm(x, residual, x_weight, weight, eps, unit_offset, total, out.packed, out.tensor)
        self._finish(program, x.shape[0])
        return out, total

    def linear(self, x: LinearInput, weight: PreparedLinear) -> Tensor:
        assert isinstance(x, CpuLinearInput)
        linear = expect_cpu_linear(weight)
        program = self._program(None, linear)
        inputs = self._inputs(program, x, linear)
        y = self._empty(x.num_rows, linear.out_features)
        program.linear(linear.parts, inputs, y)
        self._finish(program, x.num_rows)
        return y

    def _as_packed(self, program: _native.Program, x: CpuLinearInput, linear: CpuLinear | CpuExperts) -> CpuLinearInput:
        """x in the layouts of a linear, packed here if it came dense."""
        if x.tensor is None:
            return x
        packed = self._packed_input(x.num_rows, linear)
        program.quantize(x.tensor, packed.packed)
        return packed

    def _inputs(self, program: _native.Program, x: CpuLinearInput, linear: CpuLinear) -> list[Tensor]:
        """x in the layout of each part."""
        x = self._as_packed(program, x, linear)
        buffers = []
        for part in linear.parts:
            buffer = x.buffer_for(part.activations)
            if buffer is None:
                raise ValueError(
                    f"linear: the input was made for another linear: expected {part.activations.mode} [rows, {part.in_features}]"
                )
            buffers.append(buffer)
        return buffers

    def rope_and_store(
        self,
        qkv: Tensor,
        shape: AttentionShape,
        qk_norm: QKNorm | None,
        rotary: RotaryTable | None,
        batch: ForwardBatch,
        kv: KVCache,
    ) -> Tensor:
        assert isinstance(kv, CpuKVCache)
        program = self._program(batch, qk_norm, rotary, kv)
        q = self._empty(qkv.shape[0], shape.num_heads, shape.head_dim)
        program.rope_and_store(
            qkv,
            shape.num_heads,
            kv.native,
            qk_norm.q_weight if qk_norm else None,
            qk_norm.k_weight if qk_norm else None,
            qk_norm.eps if qk_norm else 0.0,
            qk_norm.unit_offset if qk_norm else False,
            rotary.cos if rotary else None,
            rotary.sin if rotary else None,
            q,
        )
        self._finish(program, batch.num_tokens, batch)
        return q

    def attention(
        self,
        q: Tensor,
        shape: AttentionShape,
        kv: KVCache,
        batch: ForwardBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        for_linear: PreparedLinear | None = None,
    ) -> CpuLinearInput:
        assert isinstance(kv, CpuKVCache)
        if window is not None and window < 1:
            raise ValueError(f"window: expected 1 or more, found {window}")
        program = self._program(batch, kv)
        out = self._linear_input(q.shape[0], shape.q_size, for_linear)
        q = q.view(q.shape[0], shape.num_heads, shape.head_dim)
        program.attention(q, kv.native, scale, window or 0, soft_cap or 0.0, out.packed, out.tensor)
        self._finish(program, batch.num_tokens, batch)
        return out

    def gated_linear(
        self, x: LinearInput, gate_up: PreparedLinear, activation: Activation, for_linear: PreparedLinear | None = None
    ) -> CpuLinearInput:
        assert isinstance(x, CpuLinearInput)
        linear = expect_cpu_linear(gate_up)
        program = self._program(None, linear)
        inputs = self._inputs(program, x, linear)
        between = self._empty(x.num_rows, linear.out_features)
        out = self._linear_input(x.num_rows, linear.out_features // 2, for_linear)
        program.gated_linear(linear.parts, inputs, between, activation, out.packed, out.tensor)
        self._finish(program, x.num_rows)
        return out

    def moe(self, x: LinearInput, experts: PreparedExperts, activation: Activation) -> Tensor:
        assert isinstance(x, CpuLinearInput)
        mixture = expect_cpu_experts(experts)
        routing, program = mixture.routing, self._program(None, mixture)
        x = self._as_packed(program, x, mixture)
        y = self._empty(x.num_rows, mixture.out_features)
        program.moe(
            mixture.router.parts,
            self._inputs(program, x, mixture.router),
            x.packed,
            [(gate_up.parts, down.parts[0]) for gate_up, down in mixture.experts],
            routing.num_active,
            routing.renormalize,
            routing.shared,
            activation,
            y,
        )
        self._finish(program, x.num_rows)
        return y

    def pick_rows(
        self, x: LinearInput, residual: Tensor, batch: ForwardBatch, for_linear: PreparedLinear | None = None
    ) -> tuple[CpuLinearInput, Tensor]:
        assert isinstance(x, CpuLinearInput)
        if x.tensor is None:
            raise ValueError("pick_rows: expected what an op made for no linear: rows are picked before packing")
        program = self._program(batch)
        num_rows = batch.max_rows if self._recording else batch.num_rows
        picked = self._empty(num_rows, residual.shape[1])
        out = self._linear_input(num_rows, x.tensor.shape[1], for_linear)
        program.pick_rows(x.tensor, residual, picked, out.packed, out.tensor)
        self._finish(program, batch.num_tokens, batch)
        return out, picked

    def logits(self, hidden: LinearInput, head: PreparedLinear, soft_cap: float | None = None) -> Tensor:
        assert isinstance(hidden, CpuLinearInput)
        linear = expect_cpu_linear(head)
        program = self._program(None, linear)
        inputs = self._inputs(program, hidden, linear)
        y = self._empty(hidden.num_rows, linear.out_features)
        program.logits(linear.parts, inputs, soft_cap or 0.0, y)
        self._finish(program, hidden.num_rows)
        return y

    # After it.
    def sample(self, logits: Tensor, sampling: SamplingBatch) -> SampledRows:
        num_rows = logits.shape[0]
        token_ids = torch.empty(num_rows, dtype=torch.int32)
        finite = torch.empty(num_rows, dtype=torch.bool)
        _native.sample(self._pool, logits, self._sampling_buffers(sampling), token_ids, finite)
        return SampledRows(token_ids, finite)

    def _sampling_buffers(self, sampling: SamplingBatch) -> _native.SamplingBuffers:
        """The batch's buffers as native code knows them; an engine has one batch for all its steps."""
        if self._sampling is None or self._sampling[0] is not sampling:
            buffers = _native.SamplingBuffers(
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
                sampling.min_p,
                sampling.typical_p,
                sampling.seed,
                sampling.index,
            )
            self._sampling = sampling, buffers
        return self._sampling[1]

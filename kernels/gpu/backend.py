"""The Triton back end: what kernels/backend.py asks for, on one GPU.

A step is one copy to the device, one graph (decodes) or the ops one by one (steps with prefill), sampling, and one copy back.
Activations are 16 bit, the residual stream and all sums fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

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
    Penalties,
    PreparedEmbedding,
    PreparedExperts,
    PreparedLinear,
    QKNorm,
    RotaryTable,
    Routing,
)
from kernels.batch import FORWARD_BUFFERS, SAMPLING_BUFFERS, ForwardBatch, SamplingBatch
from kernels.format import AwqWeight, DenseWeight
from kernels.gpu import attention, awq_gemm, fused, moe, sampling
from kernels.gpu.autotune import cache_path, choose, load
from kernels.gpu.awq_gemm import PackedAwq
from kernels.gpu.device import Device, Staging
from kernels.gpu.program import Extent, GpuProgram
from kernels.gpu.tensors import GpuEmbedding, GpuInput, GpuKVCache, GpuLinear, GpuSampledRows, Workspace
from kernels.gpu.tuning import (
    MAX_PARTIAL_ROWS,
    GemmConfig,
    attention_config,
    attention_segment,
    dense_tile,
    expert_config,
    gemm_config,
    graph_bucket,
    regimes,
)

logger = logging.getLogger(__name__)

_DTYPES = {"auto": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KV_DTYPES = ("auto", "fp16", "int8")


class GpuBackend:
    """`kernels.backend.Backend` over Triton kernels on `device`."""

    name = "gpu"

    def __init__(self, options: BackendOptions, device: Device) -> None:
        if options.kv_cache_dtype not in _KV_DTYPES:
            raise ValueError(f"kv_cache_dtype {options.kv_cache_dtype!r}: expected one of {', '.join(_KV_DTYPES)}")
        if options.dtype not in _DTYPES:
            raise ValueError(f"dtype {options.dtype!r}: expected one of {', '.join(_DTYPES)}")
        if options.dtype == "bfloat16" and device.chip.arch == "sm_75":
            raise ValueError(f"dtype 'bfloat16': {device.chip.name} has no bfloat16; use float16")
        self.options, self.gpu = options, device
        self.device = device.torch_device
        self.dtype = _DTYPES[options.dtype]
        self.workspace = Workspace(self.device)
        self.extent: Extent | None = None  # of the bucket being captured
        self._staging: Staging | None = None
        self._result: tuple[Tensor, Tensor] | None = None
        self._quantized_shapes: set[tuple[int, int, int]] = set()  # N, K, group size
        self._expert_shapes: set[tuple[int, int, int]] = set()  # experts of a token, of a layer, group size
        self._dtype_name = str(self.dtype).removeprefix("torch.")
        self.tuned = load(cache_path(device.chip))
        logger.info(
            "gpu back end: %s (%s, %d multiprocessors), %s%s, %d tuned products",
            device.chip.name,
            device.chip.arch,
            device.chip.num_sms,
            self._dtype_name,
            ", batch invariant" if options.batch_invariant else "",
            len(self.tuned),
        )

    # Preparation.
    def prepare_linear(self, weights: Sequence[AwqWeight | DenseWeight], bias: Tensor | None) -> GpuLinear:
        parts = _fuse([self._prepare(weight) for weight in weights])
        for part in parts:
            if isinstance(part, PackedAwq):
                self._quantized_shapes.add((part.out_features, part.in_features, part.group_size))
        placed = self.gpu.place(bias.float()) if bias is not None else None
        return GpuLinear(parts, weights[0].in_features, sum(weight.out_features for weight in weights), placed)

    def _prepare(self, weight: AwqWeight | DenseWeight) -> PackedAwq | Tensor:
        if isinstance(weight, DenseWeight):
            return self.gpu.place(weight.weight).to(self.dtype).contiguous()
        place = self.gpu.place
        placed = AwqWeight(
            weight.name, place(weight.qweight), place(weight.qzeros), place(weight.scales), weight.group_size
        )
        if awq_gemm.can_pack(placed):
            return awq_gemm.pack(placed, self.dtype)
        logger.warning("%s: group size %d is not a multiple of 32: expanded to 16 bit", weight.name, weight.group_size)
        return placed.dequantize(self.dtype)

    def prepare_experts(
        self, router: DenseWeight, experts: Iterable[ExpertWeights], routing: Routing
    ) -> moe.GpuExperts:
        prepared = moe.prepare(self, router, experts, routing)
        if prepared.stacked is not None:
            gate_up, down = prepared.stacked
            for part in (*gate_up, down):
                self._expert_shapes.add((routing.num_active, down.num_experts, part.group_size))
        return prepared

    def prepare_head(self, weight: DenseWeight | AwqWeight) -> GpuLinear:
        return self.prepare_linear([weight], None)

    def prepare_embedding(self, weight: DenseWeight) -> GpuEmbedding:
        return GpuEmbedding(self.gpu.place(weight.weight).to(self.dtype).contiguous())

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return self.gpu.place(weight.float()).contiguous()

    def prepare_rotary(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        return RotaryTable(self.gpu.place(cos.float()).contiguous(), self.gpu.place(sin.float()).contiguous())

    def allocate_kv(self, spec: KVCacheSpec) -> list[KVCache]:
        dtype = self._kv_dtype(spec)
        shape = (spec.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)

        def layer() -> GpuKVCache:
            pools = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2)]
            if dtype != torch.int8:
                return GpuKVCache(*pools)
            scales = [torch.zeros(shape[:3], dtype=torch.float32, device=self.device) for _ in range(2)]
            return GpuKVCache(*pools, *scales)

        return [layer() for _ in range(spec.num_layers)]

    def kv_block_nbytes(self, spec: KVCacheSpec) -> int:
        dtype = self._kv_dtype(spec)
        per_head = spec.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * spec.num_layers * spec.block_size * spec.num_kv_heads * per_head

    def _kv_dtype(self, spec: KVCacheSpec) -> torch.dtype:
        name = self.options.kv_cache_dtype if spec.dtype == "auto" else spec.dtype
        if name not in _KV_DTYPES:
            raise ValueError(f"kv_cache_dtype {name!r}: expected one of {', '.join(_KV_DTYPES)}")
        return torch.int8 if name == "int8" else self.dtype

    def workspace_nbytes(
        self, max_tokens: int, max_rows: int, hidden_size: int, intermediate_size: int, vocab_size: int
    ) -> int:
        # Live at once: two residuals in fp32, a norm's output, the widest projection and what is made of it; the logits, twice
        # with a copy in 16 bit; a weight expanded for prefill; attention's partial sums, of heads that together may be twice as
        # wide as the residual; the products' and graphs.
        per_token = 2 * 4 * hidden_size + 2 * hidden_size + 2 * 3 * intermediate_size
        logits = 3 * max_rows * vocab_size * 4
        partials = MAX_PARTIAL_ROWS * 4 * 2 * hidden_size
        return max_tokens * per_token + logits + 2 * self._largest_quantized() + partials + (512 << 20)

    def _largest_quantized(self) -> int:
        return max((n * k for n, k, _ in self._quantized_shapes), default=0)

    def memory(self) -> tuple[int, int]:
        return self.gpu.memory()

    def allocate_batches(
        self, max_tokens: int, max_sequences: int, max_blocks_per_sequence: int, max_rows: int
    ) -> tuple[ForwardBatch, SamplingBatch]:
        forward = ForwardBatch.allocate(
            max_tokens, max_sequences, max_blocks_per_sequence, max_rows, torch.device("meta")
        )
        sampling_batch = SamplingBatch.allocate(max_rows, torch.device("meta"))
        owners: list[tuple[ForwardBatch | SamplingBatch, tuple[str, ...]]] = [
            (forward, FORWARD_BUFFERS),
            (sampling_batch, SAMPLING_BUFFERS),
        ]
        shapes = [getattr(owner, name) for owner, names in owners for name in names]
        staging = Staging(self.gpu, [(tuple(tensor.shape), tensor.dtype) for tensor in shapes])
        pairs = iter(staging.pairs)
        for owner, names in owners:
            owner.staged = {}
            for name in names:
                owner.staged[name], placed = next(pairs)
                setattr(owner, name, placed)
        self._staging = staging
        self._result = (
            torch.zeros(2, max_rows, dtype=torch.int32, device=self.device),
            self.gpu.host_buffer((2, max_rows), torch.int32),
        )
        return forward, sampling_batch

    def upload(self) -> None:
        if self._staging is not None:
            self._staging.upload()

    # One forward pass.
    def record(self, forward: Callable[[], Tensor], batch: ForwardBatch) -> GpuProgram:
        return GpuProgram(self, forward, batch)

    def run_once(self, forward: Callable[[], Tensor]) -> Tensor:
        self.upload()
        return forward()

    def _extent(self, batch: ForwardBatch) -> Extent:
        return self.extent or Extent.of(batch)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def embed(self, batch: ForwardBatch, embedding: PreparedEmbedding, scale: float = 1.0) -> Tensor:
        assert isinstance(embedding, GpuEmbedding)
        num_tokens = self._extent(batch).num_tokens
        out = self._empty(num_tokens, embedding.weight.shape[1])
        fused.embed(batch.input_ids[:num_tokens], embedding.weight, scale, out)
        return out

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        unit_offset: bool = False,
        for_linear: PreparedLinear | None = None,
        x_weight: Tensor | None = None,
    ) -> tuple[GpuInput, Tensor]:
        out, total = self._empty(*x.shape), self._empty(*x.shape, dtype=torch.float32)
        fused.add_rms_norm(x, residual, x_weight, weight, out, total, eps, unit_offset)
        return GpuInput(out), total

    def linear(self, x: LinearInput, weight: PreparedLinear) -> Tensor:
        assert isinstance(x, GpuInput) and isinstance(weight, GpuLinear)
        return self.product(x.tensor, weight, self._empty(x.tensor.shape[0], weight.out_features))

    def product(self, x: Tensor, weight: GpuLinear, out: Tensor) -> Tensor:
        """out, [rows, N] in 16 bit or fp32, of x [rows, K]."""
        if x.shape[0] == 0:  # a step of prompts' middles picks no rows
            return out
        first = 0
        for part in weight.parts:
            last = first + (part.out_features if isinstance(part, PackedAwq) else part.shape[0])
            columns = out[:, first:last]
            bias = weight.bias[first:last] if weight.bias is not None else None
            if isinstance(part, PackedAwq):
                self._quantized(x, part, bias, columns)
            else:
                # AMD's library has no product of 16 bit operands with fp32 results: ours is better than operands widened first.
                own = self.options.batch_invariant or (out.dtype == torch.float32 and not self.gpu.use_ptx)
                tile, num_warps = dense_tile(self.gpu.chip) if own else (0, 4)
                fused.dense(x, part, bias, columns, tile, num_warps)
            first = last
        return out

    def _quantized(self, x: Tensor, part: PackedAwq, bias: Tensor | None, out: Tensor) -> None:
        n, k, rows = part.out_features, part.in_features, x.shape[0]
        config = self._config(rows, n, k, part.group_size)
        if config.dequantize:
            dense = self.workspace.take("dequantized", self._largest_quantized(), self.dtype)[: n * k].view(n, k)
            awq_gemm.dequantize(part, dense, self.gpu.use_ptx)
            fused.dense(x, dense, bias, out, 0, 4)
            return
        partials = self.workspace.take("partials", config.partials(rows, n), torch.float32)
        arrivals = self.workspace.take("arrivals", config.arrivals(rows, n), torch.int32)
        awq_gemm.gemm(x, part, bias, out, partials, arrivals, config, self.gpu.use_ptx)

    def _config(self, rows: int, n: int, k: int, group_size: int) -> GemmConfig:
        if self.options.batch_invariant:
            return gemm_config(self.gpu.chip, rows, n, k, group_size, batch_invariant=True)
        return choose(self.gpu.chip, self.tuned, rows, n, k, group_size, self._dtype_name)

    def expert_config(self, num_rows: int, num_experts: int, group_size: int) -> GemmConfig:
        return expert_config(self.gpu.chip, num_rows, num_experts, group_size, self.options.batch_invariant)

    def reserve(self, max_rows: int) -> list[int]:
        """Makes the workspaces that products of up to max_rows rows may ask for. Returns row counts that between them run every
        configuration of every product."""
        partials = arrivals = 0

        def configs(rows: int) -> tuple[GemmConfig, ...]:
            nonlocal partials, arrivals
            found = [(n, self._config(rows, n, k, group_size)) for n, k, group_size in self._quantized_shapes]
            partials = max([partials, *(config.partials(rows, n) for n, config in found)])
            arrivals = max([arrivals, *(config.arrivals(rows, n) for n, config in found)])
            grouped = [self.expert_config(rows * active, count, size) for active, count, size in self._expert_shapes]
            return (*(config for _, config in found), *grouped)

        tried = regimes(configs, max_rows)
        self.workspace.take("partials", partials, torch.float32)
        self.workspace.take("arrivals", arrivals, torch.int32)
        return tried

    def rope_and_store(
        self,
        qkv: Tensor,
        shape: AttentionShape,
        qk_norm: QKNorm | None,
        rotary: RotaryTable | None,
        batch: ForwardBatch,
        kv: KVCache,
    ) -> Tensor:
        assert isinstance(kv, GpuKVCache)
        q = self._empty(qkv.shape[0], shape.num_heads, shape.head_dim)
        fused.rope_and_store(
            qkv,
            q,
            kv.keys,
            kv.values,
            kv.key_scales,
            kv.value_scales,
            qk_norm.q_weight if qk_norm else None,
            qk_norm.k_weight if qk_norm else None,
            rotary.cos if rotary else None,
            rotary.sin if rotary else None,
            batch.positions,
            batch.slot_mapping,
            batch.counts,
            qk_norm.eps if qk_norm else 0.0,
            qk_norm.unit_offset if qk_norm else False,
        )
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
    ) -> GpuInput:
        assert isinstance(kv, GpuKVCache)
        if window is not None and window < 1:
            raise ValueError(f"window: expected 1 or more, found {window}")
        extent, invariant = self._extent(batch), self.options.batch_invariant
        out = self._empty(q.shape[0], shape.q_size)
        max_keys = batch.block_tables.shape[1] * kv.keys.shape[2]
        # By bucket also in a step without a graph, so that it meets no length of segments for the first time.
        num_sequences = batch.max_sequences if invariant else graph_bucket(extent.num_sequences, batch.max_sequences)
        segment = attention_segment(self.gpu.chip, num_sequences, shape.num_kv_heads, max_keys, invariant)
        group, int8 = shape.num_heads // shape.num_kv_heads, kv.key_scales is not None
        tile = attention_config(self.gpu.chip, shape.head_dim, group, invariant, int8)
        cache = (kv.keys, kv.values, kv.key_scales, kv.value_scales)
        lists = (batch.block_tables, batch.seq_lens, batch.query_starts, batch.counts)
        if extent.decodes:
            num_segments = -(-max_keys // segment)
            sizes = attention.workspace_sizes(extent.num_sequences, shape.num_heads, shape.head_dim, num_segments)
            acc = self.workspace.take("attention", sizes[0], torch.float32)
            stats = self.workspace.take("attention_stats", sizes[1], torch.float32)
            attention.decode(
                q, *cache, *lists, acc, stats, out, extent.num_sequences, num_segments, segment, scale, window or 0,
                soft_cap or 0.0, tile.key_block, tile.decode_warps, tile.num_stages,
            )  # fmt: skip
        if extent.prefills:
            attention.prefill(
                q, *cache, *lists, out, segment if invariant else 0, scale, window or 0, soft_cap or 0.0, tile.key_block,
                tile.rows, tile.prefill_warps, tile.num_stages,
            )  # fmt: skip
        return GpuInput(out)

    def gated_linear(
        self, x: LinearInput, gate_up: PreparedLinear, activation: Activation, for_linear: PreparedLinear | None = None
    ) -> GpuInput:
        return self.act_and_mul(self.linear(x, gate_up), activation)

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> GpuInput:
        out = self._empty(gate_up.shape[0], gate_up.shape[1] // 2)
        fused.act_and_mul(gate_up, out, activation == "gelu_tanh")
        return GpuInput(out)

    def moe(self, x: LinearInput, experts: PreparedExperts, activation: Activation) -> Tensor:
        assert isinstance(x, GpuInput) and isinstance(experts, moe.GpuExperts)
        return moe.compute(self, x.tensor, experts, activation)

    def pick_rows(
        self, x: LinearInput, residual: Tensor, batch: ForwardBatch, for_linear: PreparedLinear | None = None
    ) -> tuple[GpuInput, Tensor]:
        assert isinstance(x, GpuInput)
        num_rows = self._extent(batch).num_rows
        picked = self._empty(num_rows, x.tensor.shape[1])
        picked_residual = self._empty(num_rows, residual.shape[1], dtype=torch.float32)
        fused.gather_rows(x.tensor, batch.logit_rows, batch.counts, picked)
        fused.gather_rows(residual, batch.logit_rows, batch.counts, picked_residual)
        return GpuInput(picked), picked_residual

    def logits(self, hidden: LinearInput, head: PreparedLinear, soft_cap: float | None = None) -> Tensor:
        assert isinstance(hidden, GpuInput) and isinstance(head, GpuLinear)
        out = self._empty(hidden.tensor.shape[0], head.out_features, dtype=torch.float32)
        self.product(hidden.tensor, head, out)
        if soft_cap is not None:
            fused.soft_cap(out, soft_cap)
        return out

    # After it.
    def sample(self, logits: Tensor, sampling_batch: SamplingBatch) -> GpuSampledRows:
        s, num_rows = sampling_batch, logits.shape[0]
        if self._result is None or self._result[0].shape[1] < num_rows:
            self._result = (
                torch.zeros(2, num_rows, dtype=torch.int32, device=self.device),
                self.gpu.host_buffer((2, num_rows), torch.int32),
            )
        result, host = self._result
        sampling.sample(logits, s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p, s.seed, s.index, result)
        ticket = self.gpu.download(host, result)
        return GpuSampledRows(result[0, :num_rows], result[1, :num_rows], self.gpu, host, ticket)

    def add_bias(self, logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], values: Sequence[float]) -> None:
        if not rows:
            return
        count = len(rows)
        # Rows of a multiple of 16 bytes, whatever the count: Triton compiles by alignment, and this is one kernel for all.
        entries = torch.zeros(3, -(-count // 4) * 4, dtype=torch.int32)
        entries[0, :count], entries[1, :count] = torch.tensor(rows), torch.tensor(token_ids)
        entries[2, :count] = torch.tensor(values, dtype=torch.float32).view(torch.int32)
        entries = self._uploaded(entries)
        sampling.add_bias(logits, entries[0, :count], entries[1, :count], entries[2, :count].view(torch.float32))

    def prepare_penalties(self, history: Tensor, repetition: float, presence: float, frequency: float) -> Penalties:
        factors = torch.tensor([repetition, presence, frequency], dtype=torch.float32).view(torch.int32)
        return Penalties(self._uploaded(history), *self._uploaded(factors).view(torch.float32).split(1))

    def adjust_row(self, row: Tensor, penalties: Penalties | None, allowed: Tensor | None) -> None:
        mask = None if allowed is None else self._uploaded(allowed[None])
        if penalties is None:
            sampling.adjust_logits(row[None], None, None, None, None, mask)
        else:
            p = penalties
            sampling.adjust_logits(row[None], p.history[None], p.repetition, p.presence, p.frequency, mask)

    def _uploaded(self, values: Tensor) -> Tensor:
        """An int32 tensor on the device, by way of pinned memory: without waiting."""
        host = self.gpu.host_buffer(tuple(values.shape), torch.int32)
        host.copy_(values)
        target = torch.empty(values.shape, dtype=torch.int32, device=self.device)
        self.gpu.upload(target, host)
        return target


def _fuse(parts: list[PackedAwq | Tensor]) -> tuple[PackedAwq | Tensor, ...]:
    """Neighbours along N as one, where their layouts can be joined: whole tiles of one group size, or dense rows."""
    fused_parts: list[PackedAwq | Tensor] = []
    for part in parts:
        last = fused_parts[-1] if fused_parts else None
        if isinstance(part, Tensor) and isinstance(last, Tensor):
            fused_parts[-1] = torch.cat((last, part))
        elif (
            isinstance(part, PackedAwq)
            and isinstance(last, PackedAwq)
            and last.out_features % awq_gemm.TILE == 0
            and (last.group_size, last.scale_bf16) == (part.group_size, part.scale_bf16)
        ):
            fused_parts[-1] = PackedAwq(
                torch.cat((last.words, part.words)),
                torch.cat((last.groups, part.groups)),
                last.out_features + part.out_features,
                part.in_features,
                part.group_size,
                part.scale_bf16,
            )
        else:
            fused_parts.append(part)
    return tuple(fused_parts)

"""Every op in plain PyTorch: the oracle of the tests and the back end of last resort.

Weights, activations and the KV cache are fp32. A row's result does not depend on the batch around it: linears are computed
TILE_ROWS rows at a time, always the same product, since libraries sum in another order for another number of rows; attention's
small matmuls are padded to a multiple of ROW_MULTIPLE rows, and its sums have an order fixed by position. SiLU, GELU and
sigmoid go through float64: torch computes what is left of a vector, or of a thread's part, by another function with other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
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
from kernels.format import AwqWeight, DenseWeight
from kernels.host import HostBackend, HostExperts

TILE_ROWS = 16
"""Rows of a linear that are computed at once. Products of whatever M is at hand would be about twice as fast; with AVX-512 both
oneDNN and MKL then split K by M and by the number of threads, so that a row's bits depend on its neighbours."""
ROW_MULTIPLE = 8
"""Rows that attention's matmuls are padded to: the least for which the BLAS gives each row the same bits in any batch."""
KEY_BLOCK = 64
"""Keys per step of the online softmax, aligned to position 0."""
KEY_SEGMENT = 256
"""Keys whose partial softmax is computed on its own; segments are merged in order."""
QUERY_CHUNK = 256
"""Query tokens of one sequence handled at once: bounds the memory of the scores."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@dataclass(frozen=True, slots=True)
class DenseInput:
    """A `LinearInput` that is just the values, fp32 [rows, K]."""

    tensor: Tensor

    def dense(self) -> Tensor:
        return self.tensor


class DenseLinear:
    """An fp32 weight [N, K], dequantized once and, where torch is built with oneDNN, kept in oneDNN's blocked layout: a matmul
    of few rows then reads it at twice the speed."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.bias = bias
        self._packed = None if not _HAS_ONEDNN else torch.ops.mkldnn._reorder_linear_weight(weight, TILE_ROWS)
        self._plain = weight if self._packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] to fp32 [M, N]. A row's bits do not depend on M."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS)).contiguous()
        tiles = [self._multiply(tile) for tile in padded.split(TILE_ROWS)]
        product = (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[: x.shape[0]]
        return product if self.bias is None else product + self.bias

    def _multiply(self, tile: Tensor) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(tile, self._packed, None, "none", [], "")
        assert self._plain is not None
        return tile @ self._plain.t()


@dataclass(frozen=True, slots=True)
class DenseExperts(HostExperts[DenseLinear]):
    """A mixture in fp32."""


@dataclass(frozen=True, slots=True)
class DenseEmbedding:
    weight: Tensor  # fp32 [vocabulary, hidden]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class DenseKVCache:
    """fp32 keys and values, [num_slots, num_kv_heads, head_dim] each."""

    keys: Tensor
    values: Tensor
    block_size: int

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, slots=True)
class EagerProgram:
    """No recording: every run calls the model."""

    forward: Callable[[], Tensor]

    @torch.inference_mode()
    def run(self) -> Tensor:
        return self.forward()


class ReferenceBackend(HostBackend):
    """`kernels.backend.Backend` in plain PyTorch, in fp32."""

    name = "reference"

    def __init__(self, options: BackendOptions) -> None:
        if options.kv_cache_dtype not in ("auto", "float32"):
            raise ValueError(f"kv_cache_dtype {options.kv_cache_dtype!r}: the reference back end keeps it in float32")
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        self._work: tuple[ForwardBatch, int, dict[int | None, list[AttentionWork]]] | None = None

    # Preparation.
    def prepare_linear(self, weights: Sequence[AwqWeight | DenseWeight], bias: Tensor | None) -> DenseLinear:
        parts = [w.dequantize() if isinstance(w, AwqWeight) else w.weight.float() for w in weights]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        return DenseLinear(weight, bias.float() if bias is not None else None)

    def prepare_experts(self, router: DenseWeight, experts: Iterable[ExpertWeights], routing: Routing) -> DenseExperts:
        prepared = [
            (self.prepare_linear(expert.gate_up, None), self.prepare_linear([expert.down], None)) for expert in experts
        ]
        return DenseExperts(self.prepare_linear([router], None), prepared, routing)

    def prepare_embedding(self, weight: DenseWeight) -> DenseEmbedding:
        return DenseEmbedding(weight.weight.float())

    def prepare_head(self, weight: DenseWeight | AwqWeight) -> DenseLinear:
        return self.prepare_linear([weight], None)

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return weight.float()

    def prepare_rotary(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        return RotaryTable(cos.float(), sin.float())

    def allocate_kv(self, spec: KVCacheSpec) -> list[KVCache]:
        shape = (spec.num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)

        def pool() -> Tensor:
            # numpy's zeros come from calloc: pages that no token has been written to take no memory.
            return torch.from_numpy(np.zeros(shape, dtype=np.float32))

        return [DenseKVCache(pool(), pool(), spec.block_size) for _ in range(spec.num_layers)]

    def kv_block_nbytes(self, spec: KVCacheSpec) -> int:
        return spec.num_layers * spec.block_size * spec.num_kv_heads * spec.head_dim * 2 * 4

    def workspace_nbytes(
        self, max_tokens: int, max_rows: int, hidden_size: int, intermediate_size: int, vocab_size: int
    ) -> int:
        per_token = 4 * (6 * hidden_size + 4 * intermediate_size)
        return max_tokens * per_token + 2 * max_rows * vocab_size * 4

    # One forward pass.
    def record(self, forward: Callable[[], Tensor], batch: ForwardBatch) -> EagerProgram:
        return EagerProgram(forward)

    def embed(self, batch: ForwardBatch, embedding: PreparedEmbedding, scale: float = 1.0) -> Tensor:
        assert isinstance(embedding, DenseEmbedding)
        return embedding.weight[batch.input_ids[: batch.num_tokens].long()] * scale

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        unit_offset: bool = False,
        for_linear: PreparedLinear | None = None,
        x_weight: Tensor | None = None,
    ) -> tuple[DenseInput, Tensor]:
        term = x if x_weight is None else rms_norm(x, x_weight, eps, unit_offset)
        total = term if residual is None else term + residual
        return DenseInput(total if weight is None else rms_norm(total, weight, eps, unit_offset)), total

    def linear(self, x: LinearInput, weight: PreparedLinear) -> Tensor:
        assert isinstance(weight, DenseLinear)
        return weight(x.dense())

    def rope_and_store(
        self,
        qkv: Tensor,
        shape: AttentionShape,
        qk_norm: QKNorm | None,
        rotary: RotaryTable | None,
        batch: ForwardBatch,
        kv: KVCache,
    ) -> Tensor:
        assert isinstance(kv, DenseKVCache)
        q, k, v = qkv.split((shape.q_size, shape.kv_size, shape.kv_size), dim=-1)
        if qk_norm is not None:
            q = _norm_spans(q, qk_norm.q_weight, qk_norm)
            k = _norm_spans(k, qk_norm.k_weight, qk_norm)
        q = q.unflatten(-1, (shape.num_heads, shape.head_dim))
        k = k.unflatten(-1, (shape.num_kv_heads, shape.head_dim))
        if rotary is not None:
            positions = batch.positions[: batch.num_tokens].long()
            q, k = rotate(q, rotary, positions), rotate(k, rotary, positions)
        slots = batch.slot_mapping[: batch.num_tokens].long()
        kv.keys[slots] = k
        kv.values[slots] = v.unflatten(-1, (shape.num_kv_heads, shape.head_dim))
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
    ) -> DenseInput:
        assert isinstance(kv, DenseKVCache)
        output = torch.empty(batch.num_tokens, shape.q_size)
        for work in self._attention_work(batch, shape, kv.block_size, window):
            keys, values = kv.keys[work.slots], kv.values[work.slots]
            attended = segmented_attention(q[work.tokens], keys, values, work.visible, shape, scale, soft_cap)
            output[work.tokens] = attended.flatten(2)
        return DenseInput(output)

    def _attention_work(
        self, batch: ForwardBatch, shape: AttentionShape, block_size: int, window: int | None
    ) -> list[AttentionWork]:
        """The step's attention in pieces, made once for all layers of one window."""
        if self._work is None or self._work[0] is not batch or self._work[1] != batch.generation:
            self._work = batch, batch.generation, {}
        by_window = self._work[2]
        if window not in by_window:
            by_window[window] = plan_attention(batch, shape, block_size, window)
        return by_window[window]

    def gated_linear(
        self, x: LinearInput, gate_up: PreparedLinear, activation: Activation, for_linear: PreparedLinear | None = None
    ) -> DenseInput:
        return self.act_and_mul(self.linear(x, gate_up), activation)

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> DenseInput:
        gate, up = gate_up.chunk(2, dim=-1)
        wide = gate.double()
        bent = (
            torch.nn.functional.silu(wide)
            if activation == "silu"
            else torch.nn.functional.gelu(wide, approximate="tanh")
        )
        return DenseInput(bent.float() * up)

    def moe(self, x: LinearInput, experts: PreparedExperts, activation: Activation) -> Tensor:
        assert isinstance(experts, DenseExperts)
        rows = x.dense()
        chosen, weights = route(experts.router(rows), experts.routing)
        outputs = torch.zeros(*chosen.shape, experts.out_features)  # of each token's experts, in their order
        for index, (gate_up, down) in enumerate(experts.experts):
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            if len(tokens):
                outputs[tokens, places] = down(self.act_and_mul(gate_up(rows[tokens]), activation).tensor)
        total = outputs[:, 0] * weights[:, :1]
        for place in range(1, chosen.shape[1]):
            total = total + outputs[:, place] * weights[:, place, None]
        return total

    def pick_rows(
        self, x: LinearInput, residual: Tensor, batch: ForwardBatch, for_linear: PreparedLinear | None = None
    ) -> tuple[DenseInput, Tensor]:
        rows = batch.logit_rows[: batch.num_rows].long()
        return DenseInput(x.dense()[rows]), residual[rows]

    def logits(self, hidden: LinearInput, head: PreparedLinear, soft_cap: float | None = None) -> Tensor:
        logits = self.linear(hidden, head)
        return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> SampledRows:
        n = sampling.num_rows
        finite = torch.isfinite(logits.amax(-1))  # a NaN anywhere is the maximum
        greedy = logits.argmax(-1)
        if sampling.all_greedy:
            return SampledRows(greedy.int(), finite)
        temperature = sampling.temperature[:n, None]
        sampled = sample_rows(
            logits / torch.where(temperature > 0, temperature, 1.0),
            sampling.top_k[:n, None].long() if sampling.any_filter else None,
            sampling.top_p[:n, None] if sampling.any_filter else None,
            sampling.min_p[:n, None],
            uniform(sampling.seed[:n], sampling.index[:n]),
            sampling.typical_p[:n, None] if sampling.any_typical else None,
        )
        return SampledRows(torch.where(temperature[:, 0] > 0, sampled, greedy).int(), finite)


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, both [rows, active], in the order of `Backend.moe`."""
    shared = logits[:, -1:].double().sigmoid().float() if routing.shared else logits[:, :0]
    logits = logits[:, :-1] if routing.shared else logits
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : routing.num_active]
    weights = logits.softmax(-1).gather(-1, chosen)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    last = torch.full_like(shared, logits.shape[1], dtype=torch.long)
    return torch.cat((chosen, last), dim=-1), torch.cat((weights, shared), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467); `unit_offset` multiplies by 1 + weight."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * (1.0 + weight if unit_offset else weight)


def _norm_spans(x: Tensor, weight: Tensor, norm: QKNorm) -> Tensor:
    """RMSNorm of x [num_tokens, width] over as many channels at a time as the weight has."""
    return rms_norm(x.unflatten(-1, (-1, weight.shape[0])), weight, norm.eps, norm.unit_offset).flatten(1)


def rotate(x: Tensor, rotary: RotaryTable, positions: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [num_tokens, heads, head_dim], halves layout."""
    half = rotary.cos.shape[1]
    cos, sin = rotary.cos[positions, None], rotary.sin[positions, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Queries that are attended together: S sequences with Q query tokens each over L keys, L a multiple of KEY_BLOCK."""

    tokens: Tensor  # [S, Q] indices into the step's tokens
    slots: Tensor  # [S, L] of the pool; those past a sequence's end hold rubbish
    visible: (
        Tensor  # bool [S, L / KEY_BLOCK, 1, rows, KEY_BLOCK], rows = Q * group padded to a multiple of ROW_MULTIPLE
    )


def plan_attention(
    batch: ForwardBatch, shape: AttentionShape, block_size: int, window: int | None
) -> list[AttentionWork]:
    """Decodes go together; sequences with several query tokens one by one, in chunks of QUERY_CHUNK."""
    starts = batch.query_starts.tolist()
    decodes = [sequence for sequence, length in enumerate(batch.host_query_lens) if length == 1]
    pieces = [(decodes, [starts[sequence] for sequence in decodes], 1)] if decodes else []
    for sequence, length in enumerate(batch.host_query_lens):
        for offset in range(0, length if length > 1 else 0, QUERY_CHUNK):
            pieces.append(([sequence], [starts[sequence] + offset], min(QUERY_CHUNK, length - offset)))
    work = []
    for sequences, first_tokens, num_queries in pieces:
        tokens = torch.tensor(first_tokens)[:, None] + torch.arange(num_queries)
        num_keys = max(batch.host_seq_lens[sequence] for sequence in sequences)
        keys = torch.arange(-(-num_keys // KEY_BLOCK) * KEY_BLOCK)
        tables = batch.block_tables[sequences].long()
        columns = (keys // block_size).clamp(max=tables.shape[1] - 1)
        slots = tables[:, columns] * block_size + keys % block_size
        rows = batch.positions[tokens].long().repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=1)
        padding = -rows.shape[1] % ROW_MULTIPLE
        rows = torch.nn.functional.pad(rows, (0, padding))
        distance = rows[:, None, None, :, None] - keys.view(-1, 1, 1, KEY_BLOCK)
        visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        work.append(AttentionWork(tokens, slots, visible))
    return work


def segmented_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    shape: AttentionShape,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """Causal attention as an online softmax (arXiv 1805.02867) over blocks of KEY_BLOCK keys within segments of KEY_SEGMENT.

    q [S, Q, num_heads, head_dim]; keys and values [S, L, num_kv_heads, head_dim]; `visible` as in AttentionWork. Returns
    [S, Q, num_heads, head_dim]. A masked block adds exact zeros, so a row's bits depend on its own keys alone.
    """
    num_sequences, num_queries = q.shape[:2]
    group, num_blocks = shape.num_heads // shape.num_kv_heads, visible.shape[1]
    rows, padded = num_queries * group, visible.shape[3]
    q = q.unflatten(2, (shape.num_kv_heads, group)).transpose(1, 2).reshape(num_sequences, shape.num_kv_heads, rows, -1)
    q = torch.nn.functional.pad(q * scale, (0, 0, 0, padded - rows))

    # [S, blocks, kv_heads, ...]: every block's product at once, then the softmax walks them in order.
    k = keys.unflatten(1, (num_blocks, KEY_BLOCK)).transpose(2, 3).transpose(3, 4)
    v = values.unflatten(1, (num_blocks, KEY_BLOCK)).transpose(2, 3)
    # What no row sees may be anything, also of another request whose numbers were none: 0 times that would not be 0.
    v = v.masked_fill(~visible.any(-2)[..., None], 0.0)
    lead = (num_sequences, num_blocks, shape.num_kv_heads)
    expanded = q[:, None].expand(*lead, padded, shape.head_dim).reshape(-1, padded, shape.head_dim)
    scores = torch.bmm(expanded, k.reshape(-1, shape.head_dim, KEY_BLOCK)).view(*lead, padded, KEY_BLOCK)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible, -torch.inf)

    block_max = scores.amax(-1)
    per_segment = KEY_SEGMENT // KEY_BLOCK
    running_max = block_max.clone()
    for block in range(num_blocks):
        if block % per_segment:
            running_max[:, block] = torch.maximum(running_max[:, block - 1], block_max[:, block])
    weights = torch.exp(scores - _finite(running_max)[..., None])
    sums = weights.sum(-1)
    products = torch.bmm(weights.view(-1, padded, KEY_BLOCK), v.reshape(-1, KEY_BLOCK, shape.head_dim))
    merged = _merge(running_max, sums, products.view(*lead, padded, shape.head_dim), per_segment)
    merged = merged[:, :, :rows].unflatten(2, (num_queries, group)).transpose(1, 2)
    return merged.reshape(num_sequences, num_queries, shape.num_heads, shape.head_dim)


def _finite(maximum: Tensor) -> Tensor:
    """A maximum to subtract: 0 where nothing was visible, so that exp(-inf - max) stays 0 and not NaN."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def _merge(running_max: Tensor, sums: Tensor, products: Tensor, per_segment: int) -> Tensor:
    """Folds the blocks [S, blocks, kv_heads, rows(, head_dim)] in order: within each segment, then segment by segment."""
    total: tuple[Tensor, Tensor, Tensor] | None = None
    for first in range(0, running_max.shape[1], per_segment):
        maximum, sum_, product = running_max[:, first], sums[:, first], products[:, first]
        for block in range(first + 1, min(first + per_segment, running_max.shape[1])):
            factor = torch.exp(maximum - _finite(running_max[:, block]))
            maximum = running_max[:, block]
            sum_ = sum_ * factor + sums[:, block]
            product = product * factor[..., None] + products[:, block]
        if total is None:
            total = maximum, sum_, product
            continue
        merged_max = torch.maximum(total[0], maximum)
        left, right = torch.exp(total[0] - _finite(merged_max)), torch.exp(maximum - _finite(merged_max))
        total = (
            merged_max,
            total[1] * left + sum_ * right,
            total[2] * left[..., None] + product * right[..., None],
        )
    assert total is not None
    return total[2] / total[1][..., None]


def is_typical(distances: Tensor, mass: Tensor, typical_p: Tensor) -> Tensor:
    """Which tokens locally typical sampling keeps. distances = z - max z and mass = exp of it, [R, V]; typical_p [R, 1]."""
    wide = mass.double()
    weighted = torch.where(mass > 0, wide * distances.double(), 0.0)
    mean = (weighted.sum(-1, keepdim=True) / wide.sum(-1, keepdim=True)).float()
    ordered, order = (distances - mean).abs().sort(dim=-1, stable=True)
    cumulative = wide.gather(-1, order).cumsum(-1)
    last = (cumulative >= typical_p.double() * cumulative[:, -1:]).long().argmax(-1, keepdim=True)
    within = torch.where(typical_p < 1, ordered.gather(-1, last), torch.inf)
    return (distances - mean).abs() <= within


def sample_rows(
    scores: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor,
    random: Tensor,
    typical_p: Tensor | None = None,
) -> Tensor:
    """`Backend.sample` for rows with a temperature. scores = logits / temperature [R, V]; the rest [R, 1], random fp64 [R].
    top_k and top_p are both None or both given. Returns int64 [R]."""
    distances = scores - scores.amax(-1, keepdim=True)
    mass = torch.exp(distances)
    if typical_p is not None:
        mass = torch.where(is_typical(distances, mass, typical_p), mass, 0.0)
    mass = torch.where(mass >= min_p, mass, 0.0)
    if top_k is not None and top_p is not None:
        ordered, order = scores.masked_fill(mass == 0, -torch.inf).sort(dim=-1, descending=True, stable=True)
        last = torch.where(top_k > 0, top_k, scores.shape[-1]).clamp(max=scores.shape[-1]) - 1
        kept = ordered >= ordered.gather(-1, last)
        ranked = torch.where(kept, mass.gather(-1, order), 0.0).double()
        cumulative = ranked.cumsum(-1)
        kept &= (cumulative - ranked) < top_p.double() * cumulative[:, -1:]
        mass = torch.zeros_like(mass).scatter(-1, order, torch.where(kept, ranked, 0.0).float())
    cumulative = mass.double().cumsum(-1)
    # The last kept token answers a u so close to 1 that rounding puts it past every entry.
    last_kept = (mass > 0).long().cumsum(-1).argmax(-1)
    chosen = (cumulative > random[:, None] * cumulative[:, -1:]).long().argmax(-1)
    return torch.where(cumulative[:, -1] > random * cumulative[:, -1], chosen, last_kept)


_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """One number in [0, 1) per (seed, index), both int64: Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and
    (index, 0) as counter; the first two words, high word first, give the 53 bits of an fp64."""
    key = [seed & _WORD, (seed >> 32) & _WORD]
    counter = [index & _WORD, (index >> 32) & _WORD, torch.zeros_like(index), torch.zeros_like(index)]
    for _ in range(10):
        high0, low0 = _multiply(counter[0], _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _PHILOX_MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + _PHILOX_WEYL[0]) & _WORD, (key[1] + _PHILOX_WEYL[1]) & _WORD]
    bits = (counter[0] << 21) | (counter[1] >> 11)
    return bits.double() * 2.0**-53


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of 32-bit words held in int64, without overflowing it."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & _WORD, total & _WORD

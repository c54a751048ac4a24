"""The boundary between models and kernels: what a back end prepares, computes and records.

A model calls these ops in order and never looks into what they return; a back end may therefore hand out plain tensors, int8
blocks or buffers of a recorded program. Everything that varies from step to step lies in the `ForwardBatch` and `SamplingBatch`
buffers, at fixed addresses, the row counts included, so that one recording of a forward pass replays every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kernels.batch import ForwardBatch, SamplingBatch
from kernels.format import AwqWeight, DenseWeight

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Head counts of one attention layer. Query head h reads KV head h // (num_heads // num_kv_heads)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin, fp32 [max_position, rotary_dim / 2], attention scaling folded in. Rotates halves (the NeoX layout):
    pairs are (i, i + rotary_dim / 2); channels past rotary_dim pass unchanged."""

    cos: Tensor
    sin: Tensor

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cos.shape[1]


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMSNorm of queries and keys before rotation: over each head with weights fp32 [head_dim], or over all heads of a token
    together with weights [q_size] and [kv_size]."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    unit_offset: bool = False


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """A paged pool: `num_blocks` blocks of `block_size` tokens for every layer. dtype "auto" is the back end's default."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "auto"


class PreparedLinear(Protocol):
    """One or several linears fused along N, in the back end's own layout."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert of a mixture: gate and up [I, K] as `prepare_linear` fuses them, in that order, and down [N, I]."""

    gate_up: Sequence[AwqWeight | DenseWeight]
    down: AwqWeight | DenseWeight


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts compute a token: those with the `num_active` largest router logits, weighted by the softmax over all
    experts' logits; with `renormalize`, by that softmax over its sum for the active ones.

    With `shared`, the router's last output is no expert's share: the last expert computes every token and is weighted by the
    sigmoid of that output.
    """

    num_active: int
    renormalize: bool
    shared: bool = False


class PreparedExperts(PreparedLinear, Protocol):
    """A mixture's router and experts. As an input's `for_linear` it stands for all linears that read the input."""

    @property
    def expert_nbytes(self) -> Sequence[int]:
        """Bytes of each expert, in order: what a token reads of those that compute it."""


class PreparedEmbedding(Protocol):
    @property
    def nbytes(self) -> int: ...


class KVCache(Protocol):
    """One layer's keys and values. Slot s of the pool is row s % block_size of block s // block_size."""

    @property
    def nbytes(self) -> int: ...


class LinearInput(Protocol):
    """The input of a linear, in whatever form the back end's linear takes."""

    def dense(self) -> Tensor:
        """The values as [rows, K], 16 or 32 bit."""


PROMPT_FLAG = 1 << 30
"""Added to a token's count in `Penalties.history` where the token is in the prompt."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """What a row's own past takes from its logits z, on the back end's device.

    history: int32 [vocabulary], how often each token was generated, plus PROMPT_FLAG. repetition, presence, frequency: fp32 [1].
    Tokens of prompt or output get z / repetition where z > 0, else z * repetition; then those of the output lose frequency times
    their count, and presence.
    """

    history: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What `Backend.sample` returns: token ids int32 [num_rows], and whether the row can be trusted, bool [num_rows]: no NaN,
    no +inf, and not everything -inf (which is how tokens are masked). Otherwise its token is arbitrary."""

    token_ids: Tensor
    finite: Tensor

    def to_host(self) -> tuple[list[int], list[bool]]:
        """Waits for the two and returns them. The only wait of a step."""
        return self.token_ids.tolist(), self.finite.tolist()


class Program(Protocol):
    """A recorded forward pass over one `ForwardBatch`."""

    def run(self) -> Tensor:
        """Computes the batch as its buffers stand; returns the logits, fp32 [num_rows, vocabulary], valid until the next run."""


class Backend(Protocol):
    """Kernels for one device. Chosen once per model; decides by shape, internally, which kernel runs.

    Weights: `prepare_*` takes on-disk tensors and makes the back end's own layout once. Ops: `x` and `residual` are what earlier
    ops returned, fp32 or 16 bit [num_tokens, ...]; an op with `for_linear` returns the input of that linear (quantized as it
    wants), or of none in particular when it is None. No op reads a tensor's value into Python.
    """

    name: str
    device: torch.device

    # Preparation, once per model.
    def prepare_linear(self, weights: Sequence[AwqWeight | DenseWeight], bias: Tensor | None) -> PreparedLinear:
        """Fuses `weights` along N in the order given. bias: [sum of N] or None."""

    def prepare_experts(
        self, router: DenseWeight, experts: Iterable[ExpertWeights], routing: Routing
    ) -> PreparedExperts:
        """router: [experts, K]. `experts` is read once, so that no more than one need be in memory as it was on disk; all but a
        shared one have one intermediate size."""

    def prepare_embedding(self, weight: DenseWeight) -> PreparedEmbedding: ...

    def prepare_head(self, weight: DenseWeight | AwqWeight) -> PreparedLinear:
        """The projection onto the vocabulary. Tied checkpoints pass the embedding's weight."""

    def prepare_norm(self, weight: Tensor) -> Tensor:
        """A norm's weight as the ops take it: fp32 on the device."""

    def prepare_rotary(self, cos: Tensor, sin: Tensor) -> RotaryTable: ...

    def allocate_kv(self, spec: KVCacheSpec) -> list[KVCache]:
        """One cache per layer."""

    def kv_block_nbytes(self, spec: KVCacheSpec) -> int:
        """Bytes that one block takes over all layers."""

    def workspace_nbytes(
        self, max_tokens: int, max_rows: int, hidden_size: int, intermediate_size: int, vocab_size: int
    ) -> int:
        """An upper estimate of what the ops' buffers take for the largest batch."""

    def memory(self) -> tuple[int, int] | None:
        """Bytes of the device, all and free; None where that is host memory."""

    def allocate_batches(
        self, max_tokens: int, max_sequences: int, max_blocks_per_sequence: int, max_rows: int
    ) -> tuple[ForwardBatch, SamplingBatch]:
        """The step's buffers. What `fill` wrote into both is with the device once the program runs."""

    # One forward pass.
    def record(self, forward: Callable[[], Tensor], batch: ForwardBatch) -> Program:
        """`forward` calls ops on `batch` and returns the logits. It is called while recording, or at every run."""

    def run_once(self, forward: Callable[[], Tensor]) -> Tensor:
        """What `forward` returns, its ops run as they are called, on what `fill` wrote: for passes too rare to record. Its buffers
        are made anew."""

    def embed(self, batch: ForwardBatch, embedding: PreparedEmbedding, scale: float = 1.0) -> Tensor:
        """The tokens' rows of the table, times `scale`."""

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        unit_offset: bool = False,
        for_linear: PreparedLinear | None = None,
        x_weight: Tensor | None = None,
    ) -> tuple[LinearInput, Tensor]:
        """(norm(total) * weight, total), with total = x + residual, or norm(x) * x_weight + residual where that is given.

        `unit_offset` multiplies by 1 + weight, both times. weight None: total itself. residual None counts as 0.
        """

    def linear(self, x: LinearInput, weight: PreparedLinear) -> Tensor: ...

    def rope_and_store(
        self,
        qkv: Tensor,
        shape: AttentionShape,
        qk_norm: QKNorm | None,
        rotary: RotaryTable | None,
        batch: ForwardBatch,
        kv: KVCache,
    ) -> Tensor:
        """Splits [num_tokens, q_size + 2 kv_size], norms and rotates queries and keys, writes keys and values to their slots;
        returns the queries. rotary None leaves positions out."""

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
    ) -> LinearInput:
        """Causal attention of every query token over its sequence's stored keys. With `window` w, a query at position p sees
        keys p - w + 1 to p. `soft_cap` c makes scores c * tanh(score / c)."""

    def gated_linear(
        self, x: LinearInput, gate_up: PreparedLinear, activation: Activation, for_linear: PreparedLinear | None = None
    ) -> LinearInput:
        """activation(gate) * up, [num_tokens, I], of a linear with the gates' I outputs first and then the ups'. One op, so that a
        back end need not write out what is between."""

    def moe(self, x: LinearInput, experts: PreparedExperts, activation: Activation) -> Tensor:
        """[num_tokens, N]: the weighted sum of down(activation(gate) * up) over the experts that `Routing` says, added up from the
        largest router logit down (of equal ones the lower index first), the shared expert last."""

    def pick_rows(
        self, x: LinearInput, residual: Tensor, batch: ForwardBatch, for_linear: PreparedLinear | None = None
    ) -> tuple[LinearInput, Tensor]:
        """x and residual of the tokens that `batch.logit_rows` picks, [num_rows, ...]; x was made for no linear. What the last
        layer does after its attention, and the head, is wanted for these alone. No op that takes `batch` comes after it."""

    def logits(self, hidden: LinearInput, head: PreparedLinear, soft_cap: float | None = None) -> Tensor:
        """fp32 logits [num_rows, vocabulary] of picked rows."""

    # After it.
    def sample(self, logits: Tensor, sampling: SamplingBatch) -> SampledRows:
        """One token per row: a pure function of (row, parameters, seed, index).

        Temperature 0: the lowest index among the largest logits. Otherwise, with p = exp(z - max z), z = logits / temperature:
        with typical_p under 1, let t be the least distance |z - m| from the mean m of z (weighted by p) within which tokens have
        typical_p of all mass, and keep |z - m| <= t (locally typical sampling, arXiv 2202.00666; distances in fp32);
        keep p >= min_p; of those keep z >= the k-th largest z (ties stay); of those keep each token for which the mass of the
        tokens ranked before it (by z, then lower index) is under top_p times their total; then take, in vocabulary order, the first
        kept token whose cumulative mass (fp64) exceeds u times the total, u = `kernels.reference.uniform(seed, index)`.
        """

    def add_bias(self, logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], values: Sequence[float]) -> None:
        """logits[rows[i], token_ids[i]] += values[i] for every i; -inf takes a token out. No pair comes twice; ids past
        the vocabulary are passed over."""

    def prepare_penalties(self, history: Tensor, repetition: float, presence: float, frequency: float) -> Penalties:
        """Once per request. history: int32 [vocabulary] in host memory, as `Penalties` has it."""

    def adjust_row(self, row: Tensor, penalties: Penalties | None, allowed: Tensor | None) -> None:
        """Changes one row of logits, fp32 [vocabulary], in place: penalties first, then -inf for what is not allowed.

        allowed: int32 [ceil(vocabulary / 32)] in host memory; bit i of word w stands for token 32 w + i.
        """


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What a user may choose of a back end. `num_threads` 0 means the physical cores this process may use."""

    num_threads: int = 0
    device: str = "auto"
    """auto: a GPU where there is one."""
    dtype: str = "auto"
    """Of activations on a GPU; "auto" is float16."""
    batch_invariant: bool = False
    """On a GPU: one partition of every sum whatever the batch. CPUs know no other."""
    kv_cache_dtype: str = "auto"
    cpu_activations: str = "int8"
    """Into quantized linears on the CPU: int8 with a scale per token and 32 channels, int16 with one per token and 128."""
    lm_head_dtype: str = "auto"
    """Of an unquantized lm_head on the CPU; "auto" is int8."""

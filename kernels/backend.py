"""The boundary between models and kernels: what a back end prepares, computes and records.

A model calls these ops in order and never looks into what they return; a back end may therefore hand out plain tensors, int8
blocks or buffers of a recorded program. Everything that varies from step to step lies in the `ForwardBatch` and `SamplingBatch`
buffers, at fixed addresses, the row counts included, so that one recording of a forward pass replays every batch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.format import AwqWeight, DenseWeight

logger = logging.getLogger(__name__)

Activation = Literal["silu", "gelu_tanh"]
BACKEND_NAMES = ("auto", "reference", "cpu", "gpu")


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
    """RMSNorm over each query and key head before rotation. Weights fp32 [head_dim]."""

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
    num_tokens: int = 0
    num_sequences: int = 0
    num_rows: int = 0
    generation: int = 0  # counts the fills: what was derived from the buffers at the same number is still right
    staged: dict[str, Tensor] | None = (
        None  # by name, where `fill` writes instead when the buffers are not in host memory
    )

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
        buffers = self.host_buffers()
        _write(buffers["input_ids"], input_ids)
        _write(buffers["positions"], positions)
        _write(buffers["slot_mapping"], slots)
        _write(buffers["query_starts"], list(itertools.accumulate(query_lens, initial=0)))
        _write(buffers["seq_lens"], seq_lens)
        _write(buffers["logit_rows"], logit_rows)
        for sequence, table in enumerate(block_tables):
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
SAMPLING_BUFFERS = ("temperature", "top_k", "top_p", "min_p", "seed", "index")


@dataclass(slots=True)
class SamplingBatch:
    """How each logits row is sampled, one entry per row at fixed addresses; the first `num_rows` mean something.

    A temperature of 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 are off. (`seed`, `index`) keys the row's one random number.
    """

    temperature: Tensor  # fp32 [max_rows]
    top_k: Tensor  # int32 [max_rows]
    top_p: Tensor  # fp32 [max_rows]
    min_p: Tensor  # fp32 [max_rows]
    seed: Tensor  # int64 [max_rows]
    index: Tensor  # int64 [max_rows] output index of the token being sampled
    num_rows: int = 0
    all_greedy: bool = True  # host-side knowledge that lets a back end skip work: no row samples at all;
    any_filter: bool = False  # some sampled row has top-k or top-p on
    staged: dict[str, Tensor] | None = None  # as in ForwardBatch

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
        )

    def fill(
        self,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        seed: Sequence[int],
        index: Sequence[int],
    ) -> None:
        """Writes one step's rows into the buffers."""
        self.num_rows = len(temperature)
        self.all_greedy = not any(temperature)
        self.any_filter = not self.all_greedy and (any(top_k) or min(top_p) < 1.0)
        buffers = self.staged or {name: getattr(self, name) for name in SAMPLING_BUFFERS}
        for name, values in zip(SAMPLING_BUFFERS, (temperature, top_k, top_p, min_p, seed, index), strict=True):
            _write(buffers[name], values)


def _write(buffer: Tensor, values: Sequence[int] | Sequence[float], row: int | None = None) -> None:
    """Writes to the front of a buffer, or of its `row`. On the CPU through numpy, which takes a list in a microsecond: every
    step makes a dozen of these."""
    if not values:
        return
    if buffer.device.type == "cpu" and type(buffer) is Tensor:  # not a fake one
        array = buffer.numpy()
        (array if row is None else array[row])[: len(values)] = values
    else:
        (buffer if row is None else buffer[row])[: len(values)] = torch.tensor(values, dtype=buffer.dtype)


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

    def embed(self, batch: ForwardBatch, embedding: PreparedEmbedding) -> Tensor: ...

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        unit_offset: bool = False,
        for_linear: PreparedLinear | None = None,
    ) -> tuple[LinearInput, Tensor]:
        """(norm(x + residual) * weight, x + residual); `unit_offset` multiplies by 1 + weight. residual None counts as 0."""

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


class HostBackend:
    """What back ends that compute in host memory share."""

    device = torch.device("cpu")

    def memory(self) -> None:
        return None

    def allocate_batches(
        self, max_tokens: int, max_sequences: int, max_blocks_per_sequence: int, max_rows: int
    ) -> tuple[ForwardBatch, SamplingBatch]:
        forward = ForwardBatch.allocate(max_tokens, max_sequences, max_blocks_per_sequence, max_rows, self.device)
        return forward, SamplingBatch.allocate(max_rows, self.device)

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


DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float16", "bfloat16")
CPU_ACTIVATIONS = ("int8", "int16")
LM_HEAD_DTYPES = ("auto", "int8", "int4", "fp16")


def create_backend(name: str, options: BackendOptions) -> Backend:
    """The back end called `name` (one of BACKEND_NAMES); "auto" takes the fastest that works here and logs why.

    Raises ValueError for an unknown name or a back end that cannot run here.
    """
    if name not in BACKEND_NAMES:
        raise ValueError(f"kernel backend {name!r}: expected one of {', '.join(BACKEND_NAMES)}")
    for option, value, allowed in (
        ("device", options.device, DEVICES),
        ("dtype", options.dtype, DTYPES),
        ("cpu_activations", options.cpu_activations, CPU_ACTIVATIONS),
        ("lm_head_dtype", options.lm_head_dtype, LM_HEAD_DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"{option} {value!r}: expected one of {', '.join(allowed)}")
    if options.device == "cuda" and name not in ("auto", "gpu"):
        raise ValueError(f"kernel backend {name!r} does not run on device 'cuda'")
    if options.device == "cpu" and name == "gpu":
        raise ValueError("kernel backend 'gpu' does not run on device 'cpu'")
    if name in ("auto", "gpu") and options.device != "cpu":
        backend, reason = _create_gpu(options)
        if backend is not None:
            return backend
        if name == "gpu" or options.device == "cuda":
            raise ValueError(f"kernel backend 'gpu': {reason}")
        # A GPU that is there and not used is worth a warning; that most machines have none is not.
        logger.log(logging.WARNING if torch.cuda.is_available() else logging.INFO, "no GPU kernels: %s", reason)
    if options.dtype != "auto":
        raise ValueError(f"dtype {options.dtype!r}: only GPU back ends have a choice of it")
    if name in ("auto", "cpu"):
        backend, reason = _create_cpu(options)
        if backend is not None:
            return backend
        if name == "cpu":
            raise ValueError(f"kernel backend 'cpu': {reason}")
        logger.warning(
            "native CPU kernels are missing (%s): every step runs in plain PyTorch, about 10 times slower", reason
        )
        name = "reference"
    if name == "reference":
        from kernels.reference import ReferenceBackend

        return ReferenceBackend(options)
    raise AssertionError(name)


def _create_gpu(options: BackendOptions) -> tuple[Backend | None, str]:
    """The Triton back end, or None and why not. Triton takes half a second to import: only where there is a GPU to use it on."""
    from kernels.gpu.device import open_device

    try:
        device = open_device()
        from kernels.gpu.backend import GpuBackend

        return GpuBackend(options, device), ""
    except ValueError as error:
        return None, str(error)
    except ImportError as error:
        return None, f"{error}; pip install triton"


def _create_cpu(options: BackendOptions) -> tuple[Backend | None, str]:
    """The native back end, or None and why not: it was not built, or not for this machine."""
    try:
        from kernels.cpu.backend import CpuBackend
    except ImportError as error:
        return None, f"{error}; install with a C++ compiler to build them"
    return CpuBackend(options), ""

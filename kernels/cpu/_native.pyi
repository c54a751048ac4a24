"""Types of the compiled module (csrc/bindings.cpp). Tensors are checked there: TypeError for a dtype, ValueError for a shape,
stride, device or size, IndexError for a value of a batch, each naming the argument, what was expected and what was found."""

from collections.abc import Sequence

from torch import Tensor

def current_isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def uniform(seed: int, index: int) -> float: ...
def measure_clock(seconds: float) -> float: ...
def measure_integer_peak(seconds: float) -> float: ...
def measure_read_bandwidth(pool: ThreadPool, data: Tensor, seconds: float) -> float: ...

class ThreadPool:
    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...

class ActivationLayout:
    @property
    def mode(self) -> str: ...
    @property
    def k(self) -> int: ...
    def nbytes(self, rows: int) -> int: ...
    def dequantize(self, packed: Tensor, out: Tensor) -> None: ...

class PackedLinear:
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def num_panels(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def activations(self) -> ActivationLayout: ...
    def unpack(self, out: Tensor) -> None: ...
    def run(self, packed: Tensor, y: Tensor, panel_begin: int, panel_end: int) -> None: ...

def pack_awq(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], group_size: int, activations: str, bias: Tensor | None = None
) -> PackedLinear: ...
def pack_dense(parts: Sequence[Tensor], type: str, activations: str, bias: Tensor | None = None) -> PackedLinear: ...

class KvCache:
    def __init__(
        self, keys: Tensor, values: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None
    ) -> None: ...

_Packed = Sequence[tuple[ActivationLayout, Tensor]]

class Program:
    def __init__(
        self,
        pool: ThreadPool,
        counts: Tensor = ...,
        input_ids: Tensor = ...,
        positions: Tensor = ...,
        slot_mapping: Tensor = ...,
        query_starts: Tensor = ...,
        seq_lens: Tensor = ...,
        block_tables: Tensor = ...,
        logit_rows: Tensor = ...,
    ) -> None: ...
    def embed(self, table: Tensor, scale: float, out: Tensor) -> None: ...
    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        x_weight: Tensor | None,
        weight: Tensor | None,
        eps: float,
        unit_offset: bool,
        total: Tensor,
        packed: _Packed,
        dense: Tensor | None,
    ) -> None: ...
    def quantize(self, x: Tensor, packed: _Packed) -> None: ...
    def linear(self, weights: Sequence[PackedLinear], inputs: Sequence[Tensor], y: Tensor) -> None: ...
    def gated_linear(
        self,
        weights: Sequence[PackedLinear],
        inputs: Sequence[Tensor],
        gate_up: Tensor,
        activation: str,
        packed: _Packed,
        dense: Tensor | None,
    ) -> None: ...
    def moe(
        self,
        router: Sequence[PackedLinear],
        router_inputs: Sequence[Tensor],
        inputs: _Packed,
        experts: Sequence[tuple[Sequence[PackedLinear], PackedLinear]],
        num_active: int,
        renormalize: bool,
        shared: bool,
        activation: str,
        y: Tensor,
    ) -> None: ...
    def rope_and_store(
        self,
        qkv: Tensor,
        num_heads: int,
        kv: KvCache,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        unit_offset: bool,
        cos: Tensor | None,
        sin: Tensor | None,
        q: Tensor,
    ) -> None: ...
    def attention(
        self,
        q: Tensor,
        kv: KvCache,
        scale: float,
        window: int,
        soft_cap: float,
        packed: _Packed,
        dense: Tensor | None,
    ) -> None: ...
    def pick_rows(
        self, x: Tensor, residual: Tensor, picked_residual: Tensor, packed: _Packed, dense: Tensor | None
    ) -> None: ...
    def logits(self, weights: Sequence[PackedLinear], inputs: Sequence[Tensor], soft_cap: float, y: Tensor) -> None: ...
    def run_batch(self) -> int: ...
    def run(self, num_tokens: int, num_sequences: int = 0, num_rows: int = 0) -> None: ...
    profiling: bool
    @property
    def num_experts_read(self) -> int: ...
    @property
    def seconds_by_kind(self) -> dict[str, float]: ...

class SamplingBuffers:
    def __init__(
        self,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        typical_p: Tensor,
        seed: Tensor,
        index: Tensor,
    ) -> None: ...

def sample(pool: ThreadPool, logits: Tensor, buffers: SamplingBuffers, token_ids: Tensor, finite: Tensor) -> None: ...

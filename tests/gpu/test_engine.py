"""Tiny models through the whole engine with the GPU back end in the interpreter, against the reference; and graphs, with a
stand-in."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import BackendOptions, KVCacheSpec
from kernels.batch import ForwardBatch
from kernels.gpu.backend import GpuBackend
from kernels.reference import ReferenceBackend
from server.config import EngineConfig, NgramSpeculation
from server.engine.drafts import Drafter
from server.engine.engine import Engine, build_engine
from server.model_config import load_model_config
from server.models.decoder import Decoder
from server.models.loader import load_decoder
from server.types import GenerateRequest, Pooling, PoolRequest, SamplingParams
from tests.awq_checkpoints import make_awq_checkpoint
from tests.gpu.devices import HostDevice
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables
from tests.tiny_models import TINY_MODELS, make_tiny_model

LOGIT_ERROR = {"float16": 0.02, "bfloat16": 0.15}
"""Largest error over the largest logit that 16-bit activations may cause in three layers of random weights."""

BATCH_INVARIANT_MODELS = ("llama-untied-biased", "mistral", "gemma2", "olmo2", "qwen2_moe")
"""Between them: biases, windows, soft caps, norms of every kind, odd head sizes, routed and shared experts."""


def tensors_of(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that prepared weights, caches and batches hold."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item, seen)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_of(getattr(value, name), seen)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    make_tiny_model(root / "source", "qwen3", intermediate_size=128, num_hidden_layers=2)
    make_awq_checkpoint(root / "source", root / "awq", root / "dense", 32, skip=("layers.1.self_attn.k_proj",))
    return root / "awq"


def gpu_backend(device: HostDevice | None = None, **options: Any) -> GpuBackend:
    return GpuBackend(BackendOptions(**options), device or HostDevice())


class Served:
    """One sequence through a decoder, teacher-forced, in steps of given sizes."""

    def __init__(self, directory: Path, backend: Any) -> None:
        self.config = load_model_config(directory)
        self.backend = backend
        self.decoder = load_decoder(directory, self.config, backend, 128)

    @torch.inference_mode()
    def logits(self, tokens: list[int], chunks: list[int]) -> Tensor:
        tables, num_blocks = make_tables([len(tokens)])
        config = self.config
        kv = self.backend.allocate_kv(
            KVCacheSpec(config.num_layers, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        )
        rows, start = [], 0
        for chunk in chunks:
            batch = make_batch([chunk], [start + chunk], tables, list(range(chunk)), tokens[start : start + chunk])
            rows.append(self.decoder.forward(batch, kv))
            start += chunk
        return torch.cat(rows)


def random_tokens(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"kv_cache_dtype": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_logits_equal_the_reference_teacher_forced(checkpoint: Path, options: dict[str, str]) -> None:
    tokens = random_tokens(40)
    expected = Served(checkpoint, ReferenceBackend(BackendOptions())).logits(tokens, [40])
    got = Served(checkpoint, gpu_backend(**options)).logits(tokens, [20, 1, 17, 2])
    scale = expected.abs().max()
    bound = LOGIT_ERROR[options.get("dtype", "float16")] * (2 if "kv_cache_dtype" in options else 1)
    error = ((got - expected).abs().max() / scale).item()
    assert error < bound, error
    top = expected.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 2 * bound * scale
    assert clear.any() and torch.equal(got.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "batch_invariant"),
    [*((kind, False) for kind in TINY_MODELS), *((kind, True) for kind in BATCH_INVARIANT_MODELS)],
)
def test_logits_of_every_architecture(kind: str, batch_invariant: bool, tmp_path: Path) -> None:
    """Windows shorter than the prompt, biases, tied embeddings, odd head sizes, norms of every kind, soft caps."""
    make_tiny_model(tmp_path / "source", kind)
    make_awq_checkpoint(tmp_path / "source", tmp_path / "awq", tmp_path / "dense", 32)
    tokens = random_tokens(40)
    expected = Served(tmp_path / "awq", ReferenceBackend(BackendOptions())).logits(tokens, [40])
    served = Served(tmp_path / "awq", gpu_backend(batch_invariant=batch_invariant))
    got = served.logits(tokens, [20, 1, 17, 2])
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert 0 < error < LOGIT_ERROR["float16"], error
    if batch_invariant:
        assert torch.equal(served.logits(tokens, [1, 30, 9]), got), "logits depend on the chunks"


def engine_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: HostDevice | None, **overrides: Any) -> Engine:
    """An engine with the GPU back end on `device`, or with the reference when it is None."""
    if device is not None:
        monkeypatch.setattr("kernels.gpu.device.open_device", lambda: device)
    config = EngineConfig(
        model=str(checkpoint),
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        kernel_backend="gpu" if device is not None else "reference",
        kv_cache_memory_bytes=1 << 20,
        seed=0,
        **overrides,
    )
    return build_engine(config)


REQUESTS = [(9, 0.0), (20, 0.0), (5, 0.8)]


def serve(engine: Engine, max_tokens: int = 4, **rules: Any) -> dict[str, list[int]]:
    outputs: dict[str, list[int]] = {}
    for index, (length, temperature) in enumerate(REQUESTS):
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=0.9,
            seed=index,
            min_tokens=max_tokens,
            ignore_eos=False,
            **rules,
        )
        engine.submit(GenerateRequest(str(index), random_tokens(length, index), params, time.monotonic()))
    while engine.has_work():
        for event in engine.step().events:
            outputs.setdefault(event.request_id, []).extend(event.token_ids)
    return outputs


@pytest.mark.slow
def test_drafts_change_nothing_where_the_batch_changes_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with drafts run op by op, beside graphs of decodes. Every second proposal ends in a token that cannot come."""
    rules = {"allowed_token_ids": (40, 41), "frequency_penalty": 0.5, "bad_words": ((40, 40, 40),)}
    plain = engine_of(checkpoint, monkeypatch, HostDevice(), batch_invariant=True)
    drafted = engine_of(
        checkpoint, monkeypatch, HostDevice(), batch_invariant=True, speculative=NgramSpeculation(3, 1, 2)
    )
    step, accepted = Engine.step, [0, 0]
    propose, proposals = Drafter.propose, itertools.count()

    def proposing(self: Drafter, *arguments: Any) -> list[int]:
        drafts = propose(self, *arguments)
        return [*drafts[:-1], 42] if drafts and next(proposals) % 2 else drafts

    def counting(self: Engine) -> Any:
        output = step(self)
        accepted[0] += output.stats.num_draft_tokens
        accepted[1] += sum(output.stats.num_accepted_per_position)
        return output

    monkeypatch.setattr(Drafter, "propose", proposing)
    monkeypatch.setattr(Engine, "step", counting)
    assert serve(drafted, 9, **rules) == serve(plain, 9, **rules)
    assert 2 <= accepted[1] < accepted[0]


@pytest.mark.slow
def test_embeddings_equal_the_reference(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a request that generates, in chunks."""

    def embed(device: HostDevice | None) -> dict[str, Tensor]:
        engine = engine_of(checkpoint, monkeypatch, device)
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        engine.submit(GenerateRequest("beside", random_tokens(9), params, time.monotonic()))
        for pooling in Pooling:
            engine.submit(PoolRequest(pooling.value, random_tokens(20, 2), pooling, time.monotonic()))
        events = []
        while engine.has_work():
            events += engine.step().events
        assert sum(len(event.token_ids) for event in events) == 4
        return {event.request_id: torch.tensor(event.embedding) for event in events if event.embedding is not None}

    expected, got = embed(None), embed(HostDevice())
    assert got.keys() == expected.keys() == {"mean", "last"}
    for name, embedding in expected.items():
        assert torch.dot(embedding, got[name]) > 0.999


def clear_prefix(checkpoint: Path, prompt: list[int], tokens: list[int]) -> int:
    """How many of the reference's greedy tokens come with a margin over what 16 bit may change."""
    served = Served(checkpoint, ReferenceBackend(BackendOptions()))
    logits = served.logits(prompt + tokens, [len(prompt) + len(tokens)])[len(prompt) - 1 : -1]
    top = logits.topk(2, dim=-1).values
    margins = (top[:, 0] - top[:, 1]) / logits.abs().amax(-1)
    unclear = (margins < 2 * LOGIT_ERROR["float16"]).nonzero()
    return int(unclear[0]) if len(unclear) else len(tokens)


def test_the_whole_engine_with_graphs_equals_the_reference(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = serve(engine_of(checkpoint, monkeypatch, None))
    static: list[Any] = []
    device = HostDevice(static=lambda: tensors_of(static))
    original = Decoder.forward

    def noting(self: Decoder, batch: ForwardBatch, kv: Any, **options: bool) -> Tensor:
        if self.backend.name == "gpu":
            static[:] = [self.weights, batch, kv, self.backend.workspace]
        return original(self, batch, kv, **options)

    monkeypatch.setattr(Decoder, "forward", noting)
    engine = engine_of(checkpoint, monkeypatch, device)
    assert engine.info.backend == "gpu" and len(device.graphs) == 2
    for graph in device.graphs:
        assert not graph.strangers, "a graph reads memory that is not fixed"
    device.waits = device.uploads = 0
    steps = 0
    step = Engine.step

    def counting(self: Engine) -> Any:
        nonlocal steps
        steps += 1
        return step(self)

    monkeypatch.setattr(Engine, "step", counting)
    got = serve(engine)
    # One more upload per step that bans tokens: all of these, for min_tokens.
    assert device.waits <= steps and device.uploads <= 2 * steps
    compared = 0
    for index, (length, temperature) in enumerate(REQUESTS):
        if temperature == 0:
            clear = clear_prefix(checkpoint, random_tokens(length, index), expected[str(index)])
            assert got[str(index)][:clear] == expected[str(index)][:clear]
            compared += clear
    assert compared >= 3


def graph_program(checkpoint: Path, plant: Any = None) -> tuple[Any, Any, list[Any]]:
    """A program with graphs over a decoder and a reference forward of the same batch."""
    holder: list[Any] = []
    device = HostDevice(static=lambda: tensors_of(holder))
    served = Served(checkpoint, gpu_backend(device))
    config = served.config
    batch, _ = served.backend.allocate_batches(8, 2, 4, 2)
    kv = served.backend.allocate_kv(KVCacheSpec(config.num_layers, 9, BLOCK_SIZE, config.num_kv_heads, config.head_dim))
    holder += [served.decoder.weights, batch, kv, served.backend.workspace]
    forward = functools.partial(served.decoder.forward, batch, kv)
    program = served.backend.record(plant(forward, batch) if plant else forward, batch)
    return program, batch, kv


def decode_steps(program: Any, batch: ForwardBatch, num_steps: int = 3) -> Tensor:
    """Two sequences decoding side by side from nothing."""
    logits = []
    for position in range(num_steps):
        batch.fill(
            [5 + position, 9], [position] * 2, [16 + position, 48 + position], [1, 1], [position + 1] * 2,
            [[1], [3]], [0, 1],
        )  # fmt: skip
        logits.append(program.run().clone())
    return torch.stack(logits)


@pytest.mark.slow
@torch.inference_mode()
def test_replayed_graphs_equal_the_ops_one_by_one(checkpoint: Path) -> None:
    program, batch, _ = graph_program(checkpoint)
    replayed = decode_steps(program, batch)
    assert program._graphs and replayed.isfinite().all()
    eager, batch, _ = graph_program(checkpoint)
    eager._is_warm = True  # no graphs: every step op by op
    assert torch.equal(decode_steps(eager, batch), replayed)


@torch.inference_mode()
def test_a_swapped_static_buffer_is_caught(checkpoint: Path) -> None:
    """The stand-in's own test: positions read from another buffer than the one that `fill` writes."""

    program, batch, _ = graph_program(checkpoint)
    right = decode_steps(program, batch)

    outside: list[Tensor] = []

    def plant_outside(forward: Any, batch: ForwardBatch) -> Any:
        outside.append(torch.zeros_like(batch.positions))

        def planted() -> Tensor:
            fixed, batch.positions = batch.positions, outside[0]
            try:
                return forward()
            finally:
                batch.positions = fixed

        return planted

    wrong, batch, _ = graph_program(checkpoint, plant_outside)
    got = decode_steps(wrong, batch)
    assert not torch.equal(got, right)
    assert all(outside[0].data_ptr() in graph.strangers for graph in wrong._backend.gpu.graphs)

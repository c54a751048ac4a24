"""Recorded programs of the native back end: a replay equals the ops one by one, whatever was in the buffers before; bad arguments
and bad batches are exceptions that say what and where; the pool sleeps when idle."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import AttentionShape, Backend, BackendOptions, KVCache, KVCacheSpec, QKNorm
from kernels.batch import ForwardBatch
from kernels.choice import create_backend
from kernels.format import AwqWeight, DenseWeight, pack_int4
from kernels.reference import ReferenceBackend
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables

_native = pytest.importorskip("kernels.cpu._native", reason="the native kernels are not built")

from kernels.cpu.backend import CpuBackend, CpuProgram  # noqa: E402
from kernels.cpu.buffers import BufferPool, map_zeros  # noqa: E402
from kernels.cpu.linear import CpuLinearInput  # noqa: E402
from kernels.cpu.threads import cgroup_quota, usable_cores  # noqa: E402

HIDDEN, INTERMEDIATE, VOCABULARY = 128, 192, 203
SHAPE = AttentionShape(4, 2, 32)
MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS = 96, 5, 24


def awq(in_features: int, out_features: int, generator: torch.Generator) -> AwqWeight:
    def integers(rows: int) -> Tensor:
        return pack_int4(torch.randint(0, 16, (rows, out_features), generator=generator))

    scales = (torch.rand(in_features // 32, out_features, generator=generator) * 0.01 + 0.01).half()
    return AwqWeight(f"w{in_features}x{out_features}", integers(in_features), integers(in_features // 32), scales, 32)


class Model:
    """Two layers over any back end, with what real ones have: fused and mixed projections, qk-norm, a window, a soft cap."""

    def __init__(self, backend: Backend, window: int | None = 40) -> None:
        self.window = window  # of the second layer
        generator = torch.Generator().manual_seed(1)

        def dense(rows: int, columns: int) -> DenseWeight:
            return DenseWeight("dense", (torch.randn(rows, columns, generator=generator) * 0.1).half())

        self.backend = backend
        embedding = dense(VOCABULARY, HIDDEN)
        self.embedding, self.head = backend.prepare_embedding(embedding), backend.prepare_head(embedding)
        angles = torch.rand(MAX_BLOCKS * BLOCK_SIZE, 16, generator=generator)
        self.rotary = backend.prepare_rotary(angles.cos(), angles.sin())
        self.norms = [torch.rand(HIDDEN, generator=generator) + 0.5 for _ in range(5)]
        self.layers = []
        for _ in range(2):
            qkv_bias = torch.randn(256, generator=generator)
            self.layers.append(
                (
                    backend.prepare_linear([awq(HIDDEN, n, generator) for n in (128, 64)] + [dense(64, 128)], qkv_bias),
                    backend.prepare_linear([awq(128, HIDDEN, generator)], None),
                    backend.prepare_linear([awq(HIDDEN, INTERMEDIATE, generator) for _ in range(2)], None),
                    backend.prepare_linear([awq(INTERMEDIATE, HIDDEN, generator)], None),
                )
            )
        self.qk_norm = QKNorm(torch.rand(32, generator=generator), torch.rand(32, generator=generator), 1e-6)

    def forward(self, batch: ForwardBatch, kv: Sequence[KVCache]) -> Tensor:
        backend = self.backend
        x = backend.embed(batch, self.embedding)
        hidden, residual = backend.add_rms_norm(x, None, self.norms[0], 1e-5, for_linear=self.layers[0][0])
        for i, (qkv, o, gate_up, down) in enumerate(self.layers):
            fused = backend.linear(hidden, qkv)
            q = backend.rope_and_store(fused, SHAPE, self.qk_norm if i else None, self.rotary, batch, kv[i])
            attended = backend.attention(
                q, SHAPE, kv[i], batch, 0.2, self.window if i else None, None, None if i else o
            )
            if i:
                attended, residual = backend.pick_rows(attended, residual, batch, for_linear=o)
            hidden, residual = backend.add_rms_norm(
                backend.linear(attended, o), residual, self.norms[1], 1e-5, True, for_linear=gate_up
            )
            activated = backend.gated_linear(hidden, gate_up, "silu", for_linear=down)
            following = self.layers[1][0] if i == 0 else self.head
            hidden, residual = backend.add_rms_norm(
                backend.linear(activated, down), residual, self.norms[2], 1e-5, for_linear=following
            )
        return backend.logits(hidden, self.head, 20.0)


def copy_batch(source: ForwardBatch, target: ForwardBatch) -> None:
    """The same step in another batch's buffers."""
    for name in ("input_ids", "positions", "slot_mapping", "query_starts", "seq_lens", "logit_rows", "counts"):
        getattr(target, name)[: getattr(source, name).shape[0]] = getattr(source, name)
    rows, columns = source.block_tables.shape
    target.block_tables[:rows, :columns] = source.block_tables
    for name in ("num_tokens", "num_sequences", "num_rows", "host_query_lens", "host_seq_lens"):
        setattr(target, name, getattr(source, name))


class Recorded:
    """A model, its cache, and its program over a large batch."""

    def __init__(
        self, backend: CpuBackend, num_blocks: int = 80, max_sequences: int = MAX_SEQUENCES, window: int | None = 40
    ) -> None:
        self.model = Model(backend, window)
        spec = KVCacheSpec(2, num_blocks, BLOCK_SIZE, SHAPE.num_kv_heads, SHAPE.head_dim)
        self.kv = backend.allocate_kv(spec)
        self.batch = ForwardBatch.allocate(MAX_TOKENS, max_sequences, MAX_BLOCKS, max_sequences, torch.device("cpu"))
        self.program: CpuProgram = backend.record(lambda: self.model.forward(self.batch, self.kv), self.batch)

    def run(self, batch: ForwardBatch) -> Tensor:
        copy_batch(batch, self.batch)
        return self.program.run().clone()


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    return CpuBackend(BackendOptions(num_threads=2))


@pytest.fixture(scope="module")
def recorded(backend: CpuBackend) -> Recorded:
    return Recorded(backend)


def steps() -> list[ForwardBatch]:
    """Chunks of prompts beside decodes, a full batch, one token alone."""
    tables, _ = make_tables([60, 37, 9], seed=3)

    def ids(n: int) -> list[int]:
        return [(7 * i + n) % VOCABULARY for i in range(n)]

    shapes = [([30, 20], [30, 20], 2), ([30, 16, 5], [60, 36, 5], 3), ([1, 4], [37, 9], 0), ([1], [60], 1)]
    batches = []
    for query_lens, seq_lens, choice in shapes:
        chosen = {0: tables[1:], 1: tables[:1], 2: tables[:2], 3: tables}[choice]
        batches.append(make_batch(query_lens, seq_lens, chosen, input_ids=ids(sum(query_lens))))
    return batches


def test_replay_equals_the_ops_one_by_one(backend: CpuBackend, recorded: Recorded) -> None:
    eager_kv = backend.allocate_kv(KVCacheSpec(2, 80, BLOCK_SIZE, SHAPE.num_kv_heads, SHAPE.head_dim))
    for batch in steps():
        # Whatever lies in the buffers, NaN here, an op writes all that a later one reads.
        for buffer in recorded.program.buffers.buffers:
            buffer.fill_(0xFF)
        eager = recorded.model.forward(batch, eager_kv)
        replayed = recorded.run(batch)
        assert torch.isfinite(eager).all() and torch.equal(replayed, eager)


def test_recorded_model_agrees_with_the_reference() -> None:
    exact = CpuBackend(BackendOptions(num_threads=2, cpu_activations="int16", lm_head_dtype="fp16"))
    recorded, reference = Recorded(exact), ReferenceBackend(BackendOptions())
    model = Model(reference)
    kv = reference.allocate_kv(KVCacheSpec(2, 80, BLOCK_SIZE, SHAPE.num_kv_heads, SHAPE.head_dim))
    for batch in steps():
        torch.testing.assert_close(recorded.run(batch), model.forward(batch, kv), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("options", [{}, {"cpu_activations": "int16"}, {"kv_cache_dtype": "int8"}], ids=str)
def test_logits_do_not_depend_on_batch_chunks_or_threads(options: dict[str, str]) -> None:
    prompt = [(5 * i * i + 3) % VOCABULARY for i in range(80)]
    other = [(11 * i + 1) % VOCABULARY for i in range(33)]
    tables, _ = make_tables([80, 33], seed=5)

    def last_logits(recorded: Recorded, chunks: list[int], with_other: bool) -> list[Tensor]:
        """After each chunk of the prompt; the other sequence's tokens, if any, come one per step before it."""
        results, done = [], 0
        for step, chunk in enumerate(chunks):
            queries, lengths, used = [chunk], [done + chunk], tables[:1]
            ids = prompt[done : done + chunk]
            if with_other and step < len(other):
                queries, lengths, used = [1, chunk], [step + 1, done + chunk], [tables[1], tables[0]]
                ids = [other[step], *ids]
            done += chunk
            results.append(recorded.run(make_batch(queries, lengths, used, input_ids=ids))[-1])
        return results

    two, one = (Recorded(CpuBackend(BackendOptions(num_threads=n, **options))) for n in (2, 1))  # type: ignore[arg-type]
    expected = last_logits(two, [80], False)[-1]
    for recorded, chunks, with_other in (
        (one, [80], False),
        (two, [1, 63, 15, 1], False),
        (two, [17, 30, 33], True),
        (one, [2] * 40, True),
    ):
        assert torch.equal(last_logits(recorded, chunks, with_other)[-1], expected)


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}], ids=str)
def test_many_decodes_equal_each_alone(options: dict[str, str]) -> None:
    """5 to 16 rows, whose linears read the next attention's cache ahead, with blocks anywhere and prefixes in common."""
    recorded = Recorded(CpuBackend(BackendOptions(num_threads=2, **options)), max_sequences=16, window=None)  # type: ignore[arg-type]
    shuffled = torch.randperm(80, generator=torch.Generator().manual_seed(6)).tolist()
    tables = [shuffled[4 * i : 4 * i + 4] for i in range(16)]
    lengths = [3 + 5 * i % 44 for i in range(16)]
    like = list(range(16))  # whose first 32 tokens a sequence has
    for i in (2, 3, 4, 9):
        tables[i][:2], lengths[i], like[i] = tables[2][:2], 32 + i, 2
    for i, length in enumerate(lengths):
        ids = [(p * p + 7 * (like[i] if p < 32 else i)) % VOCABULARY for p in range(length)]
        recorded.run(make_batch([length], [length], tables[i : i + 1], input_ids=ids))

    def decode(chosen: range) -> Tensor:
        ids = [(11 * i + 1) % VOCABULARY for i in chosen]
        seq_lens = [lengths[i] + 1 for i in chosen]
        return recorded.run(make_batch([1] * len(chosen), seq_lens, [tables[i] for i in chosen], input_ids=ids))

    alone = torch.cat([decode(range(i, i + 1)) for i in range(16)])
    for chosen in (range(5), range(3, 16), range(16)):
        assert torch.equal(decode(chosen), alone[chosen.start : chosen.stop])


def test_memory_of_a_recording_is_reused(recorded: Recorded) -> None:
    widest = MAX_TOKENS * 4 * 2 * INTERMEDIATE
    assert recorded.program.buffers.nbytes < 6 * widest


def test_buffers_return_when_their_tensor_dies() -> None:
    pool = BufferPool()
    first = pool.empty((4, 4), torch.float32)
    second = pool.empty((4, 4), torch.float32)
    address = first.data_ptr()
    assert second.data_ptr() != address
    del first
    assert pool.empty((2, 8), torch.float32).data_ptr() == address
    assert map_zeros((3, 0), torch.float16).shape == (3, 0)


BAD_BATCHES = [
    ("input_ids", 2, VOCABULARY, r"input_ids\[2\]: expected 0..202, found 203"),
    ("input_ids", 0, -1, r"input_ids\[0\]: expected 0..202, found -1"),
    ("positions", 1, 5000, r"positions\[1\]: expected 0..383, found 5000"),
    ("positions", 3, 4, r"positions\[3\]: expected 3..3, found 4"),
    ("slot_mapping", 4, 80 * BLOCK_SIZE, r"slot_mapping\[4\]: expected 0..1279"),
    ("query_starts", 1, 500, r"query_starts\[1\]"),
    ("query_starts", 0, 1, r"query_starts\[0\]"),
    ("seq_lens", 0, 3, r"seq_lens\[0\]"),
    ("seq_lens", 0, 10**6, r"seq_lens\[0\]"),
    ("logit_rows", 0, 5, r"logit_rows\[0\]: expected 0..4, found 5"),
    ("counts", 0, MAX_TOKENS + 1, "num_tokens: expected 0..96, found 97"),
    ("counts", 1, -1, "num_sequences"),
    ("counts", 2, MAX_SEQUENCES + 1, "num_rows"),
]


@pytest.mark.parametrize(("field", "entry", "value", "message"), BAD_BATCHES)
def test_a_bad_batch_is_an_error(recorded: Recorded, field: str, entry: int, value: int, message: str) -> None:
    copy_batch(make_batch([5], [5], [[0]]), recorded.batch)
    recorded.program.run()
    getattr(recorded.batch, field)[entry] = value
    with pytest.raises(IndexError, match=message):
        recorded.program.run()
    copy_batch(make_batch([5], [5], [[0]]), recorded.batch)
    recorded.batch.block_tables[0, 0] = 80
    with pytest.raises(IndexError, match=r"block_tables\[0\]\[0\]: expected 0..79, found 80"):
        recorded.program.run()


def test_arguments_are_checked(backend: CpuBackend) -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    with pytest.raises(TypeError, match="x: expected dtype float32, found float16"):
        backend.add_rms_norm(x.half(), None, weight, 1e-5)
    with pytest.raises(ValueError, match=r"weight: expected shape \[64\], found \[63\]"):
        backend.add_rms_norm(x, None, weight[:63].contiguous(), 1e-5)
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        backend.add_rms_norm(torch.randn(64, 4).t(), None, weight, 1e-5)
    with pytest.raises(ValueError, match=r"residual: expected shape \[4, 64\]"):
        backend.add_rms_norm(x, x[:3], weight, 1e-5)
    with pytest.raises(ValueError, match="multiple of 8"):
        backend.add_rms_norm(torch.randn(4, 20), None, torch.randn(20), 1e-5)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        backend.add_rms_norm(x.to("meta"), None, weight, 1e-5)
    gate_up = backend.prepare_linear([DenseWeight("gate_up", torch.randn(64, 64))], None)
    rows = CpuLinearInput(4, x, ())
    with pytest.raises(ValueError, match="activation: expected silu or gelu_tanh, found relu"):
        backend.gated_linear(rows, gate_up, "relu")  # type: ignore[arg-type]
    odd = backend.prepare_linear([DenseWeight("odd", torch.randn(40, 64))], None)
    with pytest.raises(ValueError, match="gate_up: columns: expected a positive multiple of 16, found 40"):
        backend.gated_linear(rows, odd, "silu")
    head = backend.prepare_head(DenseWeight("lm_head", torch.randn(10, 64)))
    with pytest.raises(ValueError, match="expected 32 input features, found 64"):
        backend.gated_linear(rows, gate_up, "silu", for_linear=head)
    packed, _ = backend.add_rms_norm(x, None, weight, 1e-5, for_linear=head)
    batch = make_batch([4], [4], [[0]])
    with pytest.raises(ValueError, match="pick_rows: expected what an op made for no linear"):
        backend.pick_rows(packed, x, batch)
    with pytest.raises(ValueError, match=r"residual: expected shape \[4, any\], found \[3, 64\]"):
        backend.pick_rows(rows, x[:3], batch)
    other = backend.prepare_linear([DenseWeight("dense", torch.randn(10, 64))], None)
    with pytest.raises(ValueError, match="made for another linear"):
        backend.linear(packed, other)


def test_caches_are_checked(backend: CpuBackend) -> None:
    for spec, field in (
        (KVCacheSpec(1, 4, 12, 2, 64), "block_size"),
        (KVCacheSpec(1, 4, 16, 2, 36), "head_dim"),
        (KVCacheSpec(1, 4, 16, 2, 64, "fp8"), "kv_cache_dtype"),
    ):
        with pytest.raises(ValueError, match=field):
            backend.allocate_kv(spec)
    keys = torch.zeros(2, 1, 8, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"values: expected shape \[2, 1, 16, 8\]"):
        _native.KvCache(keys, keys)
    with pytest.raises(ValueError, match="int8 needs both"):
        _native.KvCache(keys.to(torch.int8), keys.to(torch.int8).transpose(2, 3).contiguous())
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        CpuBackend(BackendOptions(kv_cache_dtype="float8"))


def test_kv_blocks_cost_what_is_said(backend: CpuBackend) -> None:
    for dtype in ("auto", "int8"):
        spec = KVCacheSpec(3, 10, BLOCK_SIZE, 2, 64, dtype)
        assert sum(cache.nbytes for cache in backend.allocate_kv(spec)) == 10 * backend.kv_block_nbytes(spec)


def test_a_recording_takes_its_own_batch_only(backend: CpuBackend, recorded: Recorded) -> None:
    other = ForwardBatch.allocate(4, 1, 1, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="another batch"):
        backend.record(lambda: recorded.model.forward(other, recorded.kv), recorded.batch)
    backend.record(lambda: recorded.model.forward(recorded.batch, recorded.kv), recorded.batch)  # none is left open


def test_an_empty_batch_is_no_work(recorded: Recorded) -> None:
    recorded.batch.counts.zero_()
    recorded.batch.query_starts.zero_()
    assert recorded.program.run().shape == (0, VOCABULARY)


def test_profile_names_the_ops(recorded: Recorded) -> None:
    copy_batch(make_batch([5], [5], [[0]]), recorded.batch)
    seconds = recorded.program.profile(recorded.program.run)
    assert {"embed", "norm", "linear", "rope", "attention", "logits"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values())


def test_an_idle_pool_uses_no_processor(recorded: Recorded) -> None:
    copy_batch(make_batch([5], [5], [[0]]), recorded.batch)
    recorded.program.run()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    # Python's own housekeeping is allowed for; a spinning thread would take the whole half second.
    assert time.process_time() - before < 0.2


def _run_after_fork(recorded: Recorded, connection: object) -> None:
    try:
        recorded.program.run()
        connection.send("ran")  # type: ignore[attr-defined]
    except RuntimeError as error:
        connection.send(str(error))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told(recorded: Recorded) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_after_fork, args=(recorded, sender))
    process.start()
    assert receiver.poll(20) and "fork" in receiver.recv()
    process.join(20)
    assert process.exitcode == 0


def test_cores_come_from_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores()[0] <= len(os.sched_getaffinity(0))
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    assert cgroup_quota(tmp_path, membership) is None
    (group / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota(tmp_path, membership) == 1.5
    monkeypatch.setattr("kernels.cpu.threads.cgroup_quota", lambda: 0.5)
    assert usable_cores()[0] == 1


def test_auto_takes_the_native_back_end_and_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert create_backend("auto", BackendOptions()).name == "cpu"
    monkeypatch.setitem(__import__("sys").modules, "kernels.cpu.backend", None)
    with caplog.at_level("WARNING"):
        assert create_backend("auto", BackendOptions()).name == "reference"
    assert "slower" in caplog.text
    with pytest.raises(ValueError, match="kernel backend 'cpu'"):
        create_backend("cpu", BackendOptions())

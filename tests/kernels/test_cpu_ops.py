"""The native ops against the reference, op by op, and their laws: a row's bits do not depend on the batch, the chunking, the
thread count or its place in a tile; what is not finite shows in its own row and in no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.backend import AttentionShape, BackendOptions, KVCacheSpec, QKNorm, RotaryTable
from kernels.batch import SamplingBatch
from kernels.format import DenseWeight
from kernels.reference import ReferenceBackend
from kernels.reference import uniform as reference_uniform
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables

_native = pytest.importorskip("kernels.cpu._native", reason="the native kernels are not built")

from kernels.cpu.backend import CpuBackend, CpuKVCache  # noqa: E402
from kernels.cpu.linear import CpuLinearInput  # noqa: E402

REFERENCE = ReferenceBackend(BackendOptions())


@pytest.fixture(scope="module", params=_native.available_isas())
def backend(request: pytest.FixtureRequest) -> Iterator[CpuBackend]:
    before = _native.current_isa()
    _native.select_isa(request.param)
    yield CpuBackend(BackendOptions(num_threads=2))
    _native.select_isa(before)


def one_thread() -> CpuBackend:
    return CpuBackend(BackendOptions(num_threads=1))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 67])
@pytest.mark.parametrize("hidden", [8, 72, 576])
def test_norm(backend: CpuBackend, rows: int, hidden: int) -> None:
    torch.manual_seed(rows)
    x, residual, weight = torch.randn(rows, hidden) * 3, torch.randn(rows, hidden), torch.randn(hidden)
    x_weight = torch.randn(hidden)
    for unit_offset in (False, True):
        for other, of_x, of_total in [(None, None, weight), (residual, None, weight), (residual, x_weight, weight),
                                      (None, x_weight, weight), (residual, x_weight, None)]:  # fmt: skip
            out, total = backend.add_rms_norm(x, other, of_total, 1e-5, unit_offset, x_weight=of_x)
            expected, expected_total = REFERENCE.add_rms_norm(x, other, of_total, 1e-5, unit_offset, x_weight=of_x)
            exact = {"rtol": 0, "atol": 0} if of_x is None else {"rtol": 2e-6, "atol": 2e-6}
            torch.testing.assert_close(total, expected_total, **exact)
            torch.testing.assert_close(out.dense(), expected.dense(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_activation(backend: CpuBackend, activation: str, rows: int) -> None:
    gate_up = torch.randn(rows, 2 * 88) * 4
    gate_up[0, :8] = torch.tensor([-1e4, -200.0, -88.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    identity = backend.prepare_linear([DenseWeight("identity", torch.eye(2 * 88))], None)
    out = backend.gated_linear(CpuLinearInput(rows, gate_up, ()), identity, activation).dense()  # type: ignore[arg-type]
    expected = REFERENCE.act_and_mul(gate_up, activation).dense()  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_embedding(backend: CpuBackend, dtype: torch.dtype) -> None:
    table = torch.randn(50, 36).to(dtype)
    table[3, :4] = torch.tensor([0.0, -0.0, 6e-8, 65504.0]).to(dtype)
    batch = make_batch([5, 1], [5, 1], [[0], [1]], input_ids=[3, 49, 0, 3, 7, 11])
    out = backend.embed(batch, backend.prepare_embedding(DenseWeight("embed_tokens", table)))
    expected = table[[3, 49, 0, 3, 7, 11]].float()
    if dtype == torch.float32:
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-7)
    else:
        assert torch.equal(out, expected)
        scaled = backend.embed(batch, backend.prepare_embedding(DenseWeight("embed_tokens", table)), 7.3)
        assert torch.equal(scaled, expected * 7.3)


def test_an_embedding_beyond_fp16_keeps_its_range(backend: CpuBackend) -> None:
    table = torch.tensor([[1e6, -1e6, 1.0, 2.0]])
    assert torch.isfinite(backend.prepare_embedding(DenseWeight("embed_tokens", table)).weight).all()


def exact_rows(num_rows: int, width: int, dtype: str) -> torch.Tensor:
    """Rows that the KV cache stores without rounding, so that the reference, which keeps fp32, sees the same."""
    if dtype == "float16":
        return torch.randn(num_rows, width).half().float()
    rows = torch.randint(-127, 128, (num_rows, width)).float()
    rows[:, ::8] = 127.0  # every head's largest: its scale is exactly 1/64
    return rows / 64


SHAPES = [
    AttentionShape(9, 3, 64),
    AttentionShape(4, 4, 80),
    AttentionShape(8, 1, 96),
    AttentionShape(4, 2, 128),
    AttentionShape(2, 1, 256),
    AttentionShape(5, 1, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (37, None), (None, 2.0), (300, 5.0)])
def test_attention(
    backend: CpuBackend, shape: AttentionShape, kv_dtype: str, window: int | None, soft_cap: float | None
) -> None:
    torch.manual_seed(0)
    seq_lens, query_lens = [1, 70, 333, 513], [1, 7, 1, 2]
    tables, num_blocks = make_tables(seq_lens)
    spec = KVCacheSpec(1, num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    (kv,) = backend.allocate_kv(KVCacheSpec(*_fields(spec), kv_dtype))
    (reference_kv,) = REFERENCE.allocate_kv(spec)
    full = make_batch(seq_lens, seq_lens, tables)
    qkv = exact_rows(full.num_tokens, shape.q_size + 2 * shape.kv_size, kv_dtype)
    q = backend.rope_and_store(qkv, shape, None, None, full, kv)
    reference_q = REFERENCE.rope_and_store(qkv, shape, None, None, full, reference_kv)
    assert torch.equal(q, reference_q)
    arguments = (shape.head_dim**-0.5, window, soft_cap)
    out = backend.attention(q, shape, kv, full, *arguments).dense()
    expected = REFERENCE.attention(reference_q, shape, reference_kv, full, *arguments).dense()
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=1e-5)
    # The same queries a few at a time: decodes, a chunk's end, another thread count.
    starts = [sum(seq_lens[:s]) for s in range(len(seq_lens))]
    rows = [
        start + length - query + i
        for start, length, query in zip(starts, seq_lens, query_lens, strict=True)
        for i in range(query)
    ]
    batch = make_batch(query_lens, seq_lens, tables)
    for other in (backend, one_thread()):
        assert torch.equal(other.attention(q[rows], shape, kv, batch, *arguments).dense(), out[rows])


def _fields(spec: KVCacheSpec) -> tuple[int, int, int, int, int]:
    return spec.num_layers, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim


def test_long_sequences_split_among_threads_keep_their_bits(backend: CpuBackend) -> None:
    shape, length = AttentionShape(6, 2, 64), 3000
    tables, num_blocks = make_tables([length, 300])
    (kv,) = backend.allocate_kv(KVCacheSpec(1, num_blocks, BLOCK_SIZE, 2, 64))
    full = make_batch([length], [length], tables[:1])
    qkv = torch.randn(length, 10 * 64)
    q = backend.rope_and_store(qkv, shape, None, None, full, kv)
    whole = one_thread().attention(q, shape, kv, full, 0.125, 1000).dense()
    for query in (1, 5, 40):
        batch = make_batch([query, 1], [length, 300], tables)
        rows = torch.cat((q[-query:], torch.randn(1, 6, 64)))
        assert torch.equal(backend.attention(rows, shape, kv, batch, 0.125, 1000).dense()[:query], whole[-query:])


@pytest.mark.parametrize("head_dim", [64, 80, 8])
@pytest.mark.parametrize("norm_over", [None, "each head", "all heads"])
@pytest.mark.parametrize("rotary_dim", [None, 8, 64])
def test_rope_and_store(backend: CpuBackend, head_dim: int, norm_over: str | None, rotary_dim: int | None) -> None:
    shape = AttentionShape(4, 2, head_dim)
    rotary = None
    if rotary_dim is not None:
        angles = torch.rand(64, min(rotary_dim, head_dim) // 2) * 6
        rotary = backend.prepare_rotary(angles.cos(), angles.sin())
    norm = None
    if norm_over is not None:
        widths = (shape.q_size, shape.kv_size) if norm_over == "all heads" else (head_dim, head_dim)
        norm = QKNorm(torch.randn(widths[0]), torch.randn(widths[1]), 1e-6, unit_offset=True)
    seq_lens = [19, 33]
    tables, num_blocks = make_tables(seq_lens)
    batch = make_batch(seq_lens, seq_lens, tables)
    spec = KVCacheSpec(1, num_blocks, BLOCK_SIZE, 2, head_dim)
    (kv,), (reference_kv,) = backend.allocate_kv(spec), REFERENCE.allocate_kv(spec)
    qkv = torch.randn(batch.num_tokens, 8 * head_dim)
    q = backend.rope_and_store(qkv, shape, norm, rotary, batch, kv)
    expected = REFERENCE.rope_and_store(qkv, shape, norm, rotary, batch, reference_kv)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=2e-6)
    assert isinstance(kv, CpuKVCache)
    slots = batch.slot_mapping.long()
    keys = kv.keys.permute(0, 3, 1, 2).reshape(-1, 2, head_dim)[slots].float()
    values = kv.values.permute(0, 2, 1, 3).reshape(-1, 2, head_dim)[slots].float()
    torch.testing.assert_close(keys, reference_kv.keys[slots], rtol=1e-3, atol=1e-5)  # type: ignore[attr-defined]
    assert torch.equal(values, reference_kv.values[slots].half().float())  # type: ignore[attr-defined]


@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_attention_reads_no_slot_that_was_not_written(backend: CpuBackend, kv_dtype: str) -> None:
    """Stale NaN in the pool, in blocks of others and past a sequence's end, changes nothing."""
    shape, seq_lens = AttentionShape(6, 2, 64), [20, 130]
    tables, num_blocks = make_tables(seq_lens)
    batch = make_batch(seq_lens, seq_lens, tables)
    qkv = torch.randn(batch.num_tokens, 10 * 64)
    results = []
    for poison in (False, True):
        (kv,) = backend.allocate_kv(KVCacheSpec(1, num_blocks, BLOCK_SIZE, 2, 64, kv_dtype))
        assert isinstance(kv, CpuKVCache)
        if poison:
            for tensor in (kv.keys, kv.values, *kv.scales):
                tensor.view(torch.uint8).fill_(0xFF)
        q = backend.rope_and_store(qkv, shape, None, None, batch, kv)
        results.append(backend.attention(q, shape, kv, batch, 0.125, 50).dense())
    assert torch.isfinite(results[0]).all() and torch.equal(*results)


@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["key", "value"])
def test_what_is_not_finite_shows_where_it_is_seen_only(
    backend: CpuBackend, kv_dtype: str, bad: float, part: str
) -> None:
    shape, length, at = AttentionShape(6, 2, 64), 90, 41
    tables, num_blocks = make_tables([length])
    batch = make_batch([length], [length], tables)
    clean = torch.randn(length, 10 * 64)
    dirty = clean.clone()
    dirty[at, (6 if part == "key" else 8) * 64 + 3] = bad  # of KV head 0
    results = []
    for qkv in (clean, dirty):
        (kv,) = backend.allocate_kv(KVCacheSpec(1, num_blocks, BLOCK_SIZE, 2, 64, kv_dtype))
        q = backend.rope_and_store(qkv, shape, None, None, batch, kv)
        results.append(backend.attention(q, shape, kv, batch, 0.125).dense().view(length, 6, 64))
    expected, found = results
    assert torch.equal(found[:at], expected[:at])  # earlier tokens do not see it, though they share its tile
    assert torch.equal(found[:, 3:], expected[:, 3:])  # nor does the other KV head
    # An infinite key may drive its weight to 0; every other way it shows.
    if part == "value" or bad != bad:
        assert not torch.isfinite(found[at:, :3]).all(-1).any()


def test_packed_rows_do_not_depend_on_their_tile(backend: CpuBackend) -> None:
    weight = torch.randn(24, 576)
    linear = backend.prepare_linear([DenseWeight("dense", weight)], None)
    head = backend.prepare_head(DenseWeight("lm_head", weight))
    x, norm = torch.randn(13, 576), torch.rand(576)
    for target in (linear, head):
        whole = backend.linear(backend.add_rms_norm(x, None, norm, 1e-5, for_linear=target)[0], target)
        for start, rows in ((0, 1), (1, 1), (2, 4), (3, 9), (12, 1)):
            part = x[start : start + rows].clone()
            out = backend.linear(backend.add_rms_norm(part, None, norm, 1e-5, for_linear=target)[0], target)
            assert torch.equal(out, whole[start : start + rows])


@pytest.mark.parametrize("soft_cap", [None, 10.0])
def test_logits_of_picked_rows(backend: CpuBackend, soft_cap: float | None) -> None:
    weight = torch.randn(101, 64).half()
    batch = make_batch([5, 1, 3], [5, 1, 3], [[0], [1], [2]], logit_rows=[8, 0, 5])
    hidden, residual = torch.randn(9, 64), torch.randn(9, 24)
    exact = CpuBackend(BackendOptions(num_threads=2, lm_head_dtype="fp16"))
    head = exact.prepare_head(DenseWeight("lm_head", weight))
    picked, picked_residual = exact.pick_rows(CpuLinearInput(9, hidden, ()), residual, batch)
    assert torch.equal(picked.dense(), hidden[[8, 0, 5]]) and torch.equal(picked_residual, residual[[8, 0, 5]])
    out = exact.logits(picked, head, soft_cap)
    packed, _ = exact.pick_rows(CpuLinearInput(9, hidden, ()), residual, batch, for_linear=head)
    assert torch.equal(exact.logits(packed, head, soft_cap), out)
    expected = hidden[[8, 0, 5]] @ weight.float().t()
    if soft_cap is not None:
        expected = soft_cap * torch.tanh(expected / soft_cap)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)


def test_random_numbers_are_the_references() -> None:
    for seed, index in ((0, 0), (1, 2), (-1, 2**40), (2**62 + 5, 7)):
        expected = reference_uniform(torch.tensor([seed]), torch.tensor([index])).item()
        assert _native.uniform(seed, index) == expected


@pytest.mark.parametrize("vocab_size", [7, 1000, 5003])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_sampling(backend: CpuBackend, vocab_size: int, spread: float) -> None:
    torch.manual_seed(vocab_size)
    settings = [  # temperature, top_k, top_p, min_p, typical_p
        (0.0, 0, 1.0, 0.0, 0.5),
        (1.0, 0, 1.0, 0.0, 1.0),
        (0.7, 5, 1.0, 0.0, 1.0),
        (1.0, 0, 0.9, 0.0, 1.0),
        (1.5, 50, 0.95, 0.0, 1.0),
        (1.0, 0, 1.0, 0.2, 1.0),
        (0.9, 3, 0.3, 0.05, 1.0),
        (2.0, 10**6, 1e-6, 0.0, 1.0),
        (1.0, 0, 1.0, 0.0, 0.5),
        (1.7, 0, 1.0, 0.0, 0.95),
        (1.0, 20, 0.9, 0.001, 0.4),
        (1.0, 0, 0.5, 0.0, 1e-6),
    ]
    sampling = SamplingBatch.allocate(len(settings), torch.device("cpu"))
    differences = 0
    for trial in range(25):
        logits = torch.randn(len(settings), vocab_size) * spread
        columns = zip(*settings, strict=True)
        temperature, top_k, top_p, min_p, typical_p = map(list, columns)
        numbers = [trial] * len(settings), list(range(len(settings)))
        sampling.fill(temperature, top_k, top_p, min_p, *numbers, typical_p)  # type: ignore[arg-type]
        found, expected = backend.sample(logits, sampling), REFERENCE.sample(logits, sampling)
        assert found.finite.all()
        assert torch.equal(found.token_ids[0], expected.token_ids[0])
        differences += int((found.token_ids != expected.token_ids).sum())
    # A random number within rounding of a boundary may fall on its other side.
    assert differences <= 2


def test_sampling_takes_the_first_maximum_and_reports_what_is_not_finite(backend: CpuBackend) -> None:
    logits = torch.zeros(6, 37)
    logits[0, [9, 30, 36]] = 5.0
    logits[1, 36] = 1.0
    logits[2, 11] = float("nan")
    logits[3, 35] = float("inf")
    logits[4] = float("-inf")
    logits[5, :36] = float("-inf")  # tokens that may not come
    sampling = SamplingBatch.allocate(6, torch.device("cpu"))
    sampling.fill([0.0, 0.0, 1.0, 0.0, 0.0, 1.0], [0] * 6, [1.0] * 6, [0.0] * 6, [0] * 6, [0] * 6)
    rows = backend.sample(logits, sampling)
    assert rows.token_ids[[0, 1, 5]].tolist() == [9, 36, 36]
    assert rows.finite.tolist() == [True, True, False, False, False, True]
    assert (rows.token_ids >= 0).all() and (rows.token_ids < 37).all()


def test_top_k_keeps_ties(backend: CpuBackend) -> None:
    logits = torch.full((64, 50), -1.0)
    logits[:, [4, 17, 40]] = 2.0
    sampling = SamplingBatch.allocate(64, torch.device("cpu"))
    sampling.fill([1.0] * 64, [1] * 64, [1.0] * 64, [0.0] * 64, list(range(64)), [0] * 64)
    assert set(backend.sample(logits, sampling).token_ids.tolist()) == {4, 17, 40}


def test_rotary_tables_are_made_contiguous(backend: CpuBackend) -> None:
    table = backend.prepare_rotary(torch.rand(8, 64)[:, :32], torch.rand(32, 8).t())
    assert isinstance(table, RotaryTable) and table.cos.is_contiguous() and table.sin.is_contiguous()

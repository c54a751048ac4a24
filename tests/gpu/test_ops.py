"""Norms, rotation with the KV write, activations, gathering and sampling in the interpreter, against the reference back end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.backend import PROMPT_FLAG, AttentionShape, BackendOptions, KVCacheSpec, QKNorm, RotaryTable
from kernels.batch import SamplingBatch
from kernels.gpu import fused, sampling
from kernels.gpu.backend import GpuBackend
from kernels.reference import DenseKVCache, ReferenceBackend
from tests.gpu.devices import HostDevice
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables

DTYPES = [torch.float16, torch.bfloat16]
REFERENCE = ReferenceBackend(BackendOptions())


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}[got.dtype]
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 576, 1500])
def test_norm_activation_and_embedding(width: int, dtype: torch.dtype) -> None:
    x, weight, x_weight = torch.randn(3, width).to(dtype), torch.randn(width), torch.randn(width)
    for residual, of_x, of_total in [(None, None, weight), (torch.randn(3, width), None, weight),
                                     (torch.randn(3, width), x_weight, weight), (None, x_weight, None)]:  # fmt: skip
        for unit_offset in (False, True):
            out, total = torch.empty_like(x), torch.empty(3, width)
            fused.add_rms_norm(x, residual, of_x, of_total, out, total, 1e-5, unit_offset)
            expected, sums = REFERENCE.add_rms_norm(x.float(), residual, of_total, 1e-5, unit_offset, x_weight=of_x)
            close(out, expected.dense())
            torch.testing.assert_close(total, sums, rtol=0 if of_x is None else 2e-6, atol=0 if of_x is None else 1e-6)
    gate_up = torch.randn(3, 2 * width).to(dtype) * 3
    for name in ("silu", "gelu_tanh"):
        out = torch.empty(3, width, dtype=dtype)
        fused.act_and_mul(gate_up, out, name == "gelu_tanh")
        close(out, REFERENCE.act_and_mul(gate_up.float(), name).dense())  # type: ignore[arg-type]
    table, ids = torch.randn(10, width).to(dtype), torch.tensor([9, 0, 4], dtype=torch.int32)
    out = torch.empty(3, width, dtype=dtype)
    for scale in (1.0, 24.0):
        fused.embed(ids, table, scale, out)
        close(out, table[ids.long()].float() * scale)
    fused.embed(ids, table, 1.0, out)
    assert torch.equal(out, table[ids.long()])


def test_large_activations_saturate_without_nan() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -20000.0, 1.0, 1.0, 1.0]]).half()
    for gelu in (False, True):
        out = torch.empty(1, 3, dtype=torch.float16)
        fused.act_and_mul(gate_up, out, gelu)
        assert out.tolist() == [[0.0, 200.0, 0.0]]
    logits = torch.tensor([[-1000.0, 0.0, 1000.0]])
    fused.soft_cap(logits, 30.0)
    assert logits.tolist() == [[-30.0, 0.0, 30.0]]


def test_gathered_rows_past_the_count_read_row_0() -> None:
    x = torch.randn(5, 40).half()
    out = torch.empty(4, 40, dtype=torch.float16)
    fused.gather_rows(x, torch.tensor([3, 1, 99, 99]).int(), torch.tensor([5, 2, 2]).int(), out)
    assert torch.equal(out, x[[3, 1, 0, 0]])


def quantized_rows(values: Tensor, block_size: int) -> Tensor:
    """[blocks, kv heads, block_size, ...] as [slots, kv heads, ...]."""
    return values.transpose(1, 2).flatten(0, 1)


ROPE_SHAPES = [
    (AttentionShape(4, 2, 32), 32, None),
    (AttentionShape(3, 1, 24), 16, "plain"),
    (AttentionShape(2, 2, 80), 80, "offset"),
    (AttentionShape(2, 1, 64), 0, "plain"),
    (AttentionShape(6, 2, 24), 16, "all heads"),
]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("shape", "rotary_dim", "norm"), ROPE_SHAPES)
def test_rotation_and_kv_write(shape: AttentionShape, rotary_dim: int, norm: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths, d = [7, 20], shape.head_dim
    tables, num_blocks = make_tables(lengths)
    batch = make_batch(lengths, lengths, tables)
    rotary, qk_norm = None, None
    if rotary_dim:
        angles = torch.rand(20, rotary_dim // 2) * 6
        rotary = RotaryTable(angles.cos(), angles.sin())
    if norm:
        widths = (shape.q_size, shape.kv_size) if norm == "all heads" else (d, d)
        qk_norm = QKNorm(*(torch.rand(width) + 0.5 for width in widths), 1e-6, norm == "offset")
    qkv = torch.randn(27, shape.q_size + 2 * shape.kv_size).to(dtype)
    (reference,) = REFERENCE.allocate_kv(KVCacheSpec(1, num_blocks, BLOCK_SIZE, shape.num_kv_heads, d))
    assert isinstance(reference, DenseKVCache)
    expected_q = REFERENCE.rope_and_store(qkv.float(), shape, qk_norm, rotary, batch, reference)
    pool = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, d)
    for int8 in (False, True):
        keys, values = (torch.zeros(pool, dtype=torch.int8 if int8 else dtype) for _ in range(2))
        scales = [torch.zeros(pool[:3]) for _ in range(2)] if int8 else [None, None]
        q = torch.empty(27, shape.num_heads, d, dtype=dtype)
        fused.rope_and_store(
            qkv, q, keys, values, *scales,
            qk_norm.q_weight if qk_norm else None, qk_norm.k_weight if qk_norm else None,
            rotary.cos if rotary else None, rotary.sin if rotary else None,
            batch.positions, batch.slot_mapping, batch.counts, 1e-6, norm == "offset",
        )  # fmt: skip
        close(q, expected_q)
        for cache, scale, rows in zip((keys, values), scales, (reference.keys, reference.values), strict=True):
            stored = quantized_rows(cache, BLOCK_SIZE).float()
            if scale is None:
                close(stored.to(dtype), rows)
                continue
            step = quantized_rows(scale, BLOCK_SIZE)[..., None]
            assert ((stored * step - rows).abs() <= step * 0.502 + 1e-6).all(), "rounded to the nearest step"
            written = rows.abs().sum((1, 2)) > 0
            assert (stored[written].abs().amax(-1) == 127).all()


def test_kv_is_not_written_past_the_count() -> None:
    shape = AttentionShape(1, 1, 16)
    keys, values = torch.zeros(2, 1, 16, 16).half(), torch.zeros(2, 1, 16, 16).half()
    slots = torch.tensor([3, 20, 21, 22]).int()
    q = torch.empty(4, 1, 16).half()
    fused.rope_and_store(
        torch.ones(4, 48).half(), q, keys, values, None, None, None, None, None, None,
        torch.zeros(4).int(), slots, torch.tensor([2, 1, 1]).int(), 0.0, False,
    )  # fmt: skip
    assert shape.kv_size * 2 == keys.sum() == values.sum()


# Sampling.


def reference_tokens(logits: Tensor, **params: list) -> tuple[Tensor, Tensor, SamplingBatch]:
    batch = SamplingBatch.allocate(len(params["seed"]), torch.device("cpu"))
    batch.fill(**params)  # type: ignore[arg-type]
    rows = REFERENCE.sample(logits, batch)
    return rows.token_ids, rows.finite, batch


def device_tokens(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    result = torch.full((2, logits.shape[0] + 3), -7, dtype=torch.int32)
    sampling.sample(
        logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.typical_p, batch.seed, batch.index, result
    )  # fmt: skip
    assert (result[:, logits.shape[0] :] == -7).all()
    return result[0, : logits.shape[0]], result[1, : logits.shape[0]].bool()


SETTINGS = [
    # temperature, top_k, top_p, min_p, typical_p
    (0.0, 0, 1.0, 0.0, 0.5),
    (1.0, 0, 1.0, 0.0, 1.0),
    (0.7, 5, 1.0, 0.0, 1.0),
    (1.3, 0, 0.8, 0.0, 1.0),
    (1.0, 0, 1.0, 0.1, 1.0),
    (1.5, 12, 0.9, 0.02, 1.0),
    (0.3, 1, 0.5, 0.0, 1.0),
    (2.0, 1000, 0.01, 0.5, 1.0),
    (1.0, 0, 1.0, 0.0, 0.5),
    (1.8, 8, 0.9, 0.01, 0.8),
]


@pytest.mark.parametrize("vocabulary", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_sampled_tokens_equal_the_reference(vocabulary: int) -> None:
    rows = 3 * len(SETTINGS)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    # Quantized to few values, so that top-k and top-p cut through ties; and with masked tokens.
    logits[rows // 3 : 2 * rows // 3] = logits[rows // 3 : 2 * rows // 3].round()
    logits[:, ::7] = -torch.inf
    params = list(zip(*(SETTINGS * 3), strict=True))
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator).tolist()
    expected, finite, batch = reference_tokens(
        logits, temperature=list(params[0]), top_k=list(params[1]), top_p=list(params[2]), min_p=list(params[3]),
        seed=seeds, index=[7 * row + (row % 2 << 33) for row in range(rows)], typical_p=list(params[4]),
    )  # fmt: skip
    got, sound = device_tokens(logits, batch)
    assert got.tolist() == expected.tolist() and sound.tolist() == finite.tolist()


def test_ties_are_cut_by_index() -> None:
    """Rows of ties alone: top-k keeps all, top-p cuts by index. One token more or less would change what is sampled."""
    logits = torch.zeros(12, 8)
    params = {"temperature": [1.0] * 12, "top_k": [3] * 12, "top_p": [0.5] * 12, "min_p": [0.0] * 12}
    expected, _, batch = reference_tokens(logits, **params, seed=list(range(12)), index=[0] * 12)
    got, _ = device_tokens(logits, batch)
    assert got.tolist() == expected.tolist() and set(got.tolist()) == set(range(4))


def test_rows_that_cannot_be_trusted_are_marked() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, 5, 5], [1, nan, 2], [1, inf, 2], [-inf, -inf, -inf], [-inf, 0, -inf], [nan, nan, nan]])
    for temperature in (0.0, 1.0):
        batch = SamplingBatch.allocate(6, torch.device("cpu"))
        batch.fill([temperature] * 6, [0] * 6, [1.0] * 6, [0.0] * 6, [0] * 6, [0] * 6)
        tokens, sound = device_tokens(logits, batch)
        assert sound.tolist() == [True, False, False, False, True, False]
        assert tokens[4] == 1 and (temperature or tokens[0] == 1)


@pytest.mark.parametrize("vocabulary", [70, 1000])
def test_rules_equal_the_host_back_ends(vocabulary: int) -> None:
    gpu = GpuBackend(BackendOptions(), HostDevice())
    history = torch.randint(0, 3, (vocabulary,)).int() + (torch.rand(vocabulary) < 0.2).int() * PROMPT_FLAG
    allowed = torch.randint(-(2**31), 2**31, (-(-vocabulary // 32),)).int()
    logits = torch.randn(3, vocabulary) * 4
    logits[1, 5] = -torch.inf
    expected = logits.clone()
    for backend, rows in ((REFERENCE, expected), (gpu, logits)):
        backend.add_bias(rows, [0, 1, 2, 2], [5, 5, 69, vocabulary], [2.5, 1.0, -torch.inf, 1.0])
        backend.adjust_row(rows[0], backend.prepare_penalties(history.clone(), 1.3, 0.5, -0.7), allowed)
        backend.adjust_row(rows[1], backend.prepare_penalties(history.clone(), 0.8, 0.0, 0.0), None)
        backend.adjust_row(rows[2], None, allowed)
    torch.testing.assert_close(logits, expected)
    bits = [bool(int(allowed[token // 32]) >> token % 32 & 1) for token in range(vocabulary)]
    assert expected[2].isneginf().tolist() == [not bit or token == 69 for token, bit in enumerate(bits)]


def test_penalties_masks_and_bias() -> None:
    torch.manual_seed(0)
    rows, vocabulary = 3, 70
    logits = torch.randn(rows, vocabulary)
    generated = torch.randint(0, 3, (rows, vocabulary))
    in_prompt = torch.rand(rows, vocabulary) < 0.2
    repetition, presence, frequency = torch.tensor([1.0, 1.3, 0.8]), torch.tensor([0.5, 0.0, -1.0]), torch.rand(3)
    allowed = torch.rand(rows, vocabulary) < 0.7
    words = torch.zeros(rows, 3, dtype=torch.int64)
    for token in range(vocabulary):
        words[:, token // 32] |= allowed[:, token].long() << (token % 32)
    mask = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    seen = (generated > 0) | in_prompt
    r = repetition[:, None]
    expected = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    expected = expected - generated * frequency[:, None] - (generated > 0) * presence[:, None]
    expected = expected.masked_fill(~allowed, -torch.inf)
    expected[1, 5] += 2.5
    expected[2, 69] += -torch.inf
    history = (generated + (in_prompt.long() << 30)).int()
    sampling.adjust_logits(logits, history, repetition, presence, frequency, mask)
    entries = ([1, 2, 0], [5, 69, 70], [2.5, -torch.inf, 1.0])
    sampling.add_bias(logits, *(torch.tensor(entry, dtype=dtype) for entry, dtype in zip(
        entries, (torch.int32, torch.int32, torch.float32), strict=True)))  # fmt: skip
    torch.testing.assert_close(logits, expected)

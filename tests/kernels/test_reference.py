"""The reference back end against independent formulas, and its law: a row's bits do not depend on the batch around it."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.backend import Activation, AttentionShape, BackendOptions, KVCacheSpec, QKNorm, RotaryTable
from kernels.batch import SamplingBatch
from kernels.format import DenseWeight
from kernels.reference import DenseInput, DenseLinear, ReferenceBackend, sample_rows, uniform
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    return ReferenceBackend(BackendOptions())


def test_random_numbers_are_philox() -> None:
    """The known answers of the Random123 distribution for Philox4x32-10 with counter and key 0, and with all bits set."""
    zero = torch.tensor([0])
    assert uniform(zero, zero).item() == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) * 2.0**-53
    # One number per (seed, index): all different, spread evenly.
    seeds = torch.arange(100).repeat_interleave(100)
    numbers = uniform(seeds, torch.arange(100).repeat(100))
    assert numbers.unique().numel() == 10_000 and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 0.015
    negative = uniform(torch.tensor([-1, -(2**63)]), torch.tensor([5, 5]))
    assert torch.isfinite(negative).all() and negative[0] != negative[1]


@pytest.mark.parametrize("out_features", [96, 333, 3072])
@pytest.mark.parametrize("in_features", [64, 72, 576, 1536])
def test_matmul_rows_do_not_depend_on_the_batch(in_features: int, out_features: int) -> None:
    x, weight = torch.randn(130, in_features), torch.randn(out_features, in_features)
    linear = DenseLinear(weight, None)
    whole = linear(x)
    # Sums of random products of both signs: the rounding grows with the root of their number, whatever comes out.
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5 * in_features**0.5)
    for start, rows in (
        (0, 1),
        (3, 1),
        (5, 2),
        (1, 3),
        (2, 4),
        (9, 6),
        (7, 15),
        (10, 16),
        (20, 17),
        (64, 66),
        (30, 100),
    ):
        assert torch.equal(linear(x[start : start + rows].clone()), whole[start : start + rows])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_of_a_row_do_not_depend_on_the_batch(backend: ReferenceBackend, activation: Activation) -> None:
    """With two threads, between whose parts of a large batch vectors are cut."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for width in (80, 96, 160, 176):
            gate_up = 3 * torch.randn(1501, 2 * width)
            whole = backend.act_and_mul(gate_up, activation).dense()
            for start, rows in ((0, 1), (3, 1), (7, 2), (20, 17), (500, 701), (740, 30)):
                part = backend.act_and_mul(gate_up[start : start + rows].clone(), activation).dense()
                assert torch.equal(part, whole[start : start + rows])
    finally:
        torch.set_num_threads(num_threads)


def attention_case(
    backend: ReferenceBackend, query_lens: list[int], seq_lens: list[int], shape: AttentionShape, **options: float | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention through the paged cache, and by the formula on contiguous keys."""
    torch.manual_seed(sum(seq_lens))
    tables, num_blocks = make_tables(seq_lens)
    (kv,) = backend.allocate_kv(KVCacheSpec(1, num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim))
    full = make_batch(seq_lens, seq_lens, tables)
    qkv = torch.randn(full.num_tokens, shape.q_size + 2 * shape.kv_size)
    q = backend.rope_and_store(qkv, shape, None, None, full, kv)
    batch = make_batch(query_lens, seq_lens, tables)
    picked, expected, first = [], [], 0
    for query, length in zip(query_lens, seq_lens, strict=True):
        picked += range(first + length - query, first + length)
        rows = qkv[first : first + length]
        first += length
        heads = rows[:, : shape.q_size].unflatten(1, (shape.num_heads, shape.head_dim))[length - query :]
        keys, values = (
            part.unflatten(1, (shape.num_kv_heads, shape.head_dim)).repeat_interleave(
                shape.num_heads // shape.num_kv_heads, dim=1
            )
            for part in rows[:, shape.q_size :].chunk(2, dim=1)
        )
        scores = torch.einsum("qhd,khd->hqk", heads.double(), keys.double()) * 0.125
        if "soft_cap" in options:
            scores = options["soft_cap"] * torch.tanh(scores / options["soft_cap"])
        distance = torch.arange(length - query, length)[:, None] - torch.arange(length)
        visible = (distance >= 0) & (distance < options.get("window", math.inf))
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, values.double()).flatten(1))
    got = backend.attention(q[picked], shape, kv, batch, 0.125, **options).dense()  # type: ignore[arg-type]
    return got, torch.cat(expected).float()


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"soft_cap": 2.0}, {"window": 70, "soft_cap": 5.0}])
@pytest.mark.parametrize("shape", [AttentionShape(4, 2, 16), AttentionShape(3, 3, 80), AttentionShape(9, 3, 64)])
def test_attention_equals_the_formula(backend: ReferenceBackend, shape: AttentionShape, options: dict) -> None:
    got, expected = attention_case(backend, [1, 37, 1, 300], [1, 64, 257, 530], shape, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_attention_rows_do_not_depend_on_chunking_or_neighbours(backend: ReferenceBackend) -> None:
    shape = AttentionShape(6, 2, 32)
    torch.manual_seed(0)
    lengths = [300, 41, 5]
    tables, num_blocks = make_tables(lengths)
    (kv,) = backend.allocate_kv(KVCacheSpec(1, num_blocks, BLOCK_SIZE, 2, 32))
    full = make_batch(lengths, lengths, tables)
    q = backend.rope_and_store(torch.randn(346, shape.q_size + 2 * shape.kv_size), shape, None, None, full, kv)
    whole = backend.attention(q, shape, kv, full, 0.2).dense()
    for length in (1, 2, 63, 64, 65, 256, 257, 300):
        for query in {1, min(17, length), length}:
            alone = make_batch([query], [length], tables[:1])
            rows = slice(length - query, length)
            assert torch.equal(backend.attention(q[rows], shape, kv, alone, 0.2).dense(), whole[rows]), (length, query)


def test_norm_rotation_and_activation_equal_their_formulas(backend: ReferenceBackend) -> None:
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    for unit_offset in (False, True):
        normed, total = backend.add_rms_norm(x, residual, weight, 1e-5, unit_offset)
        expected = torch.nn.functional.rms_norm(x + residual, (32,), weight + unit_offset, 1e-5)
        torch.testing.assert_close(normed.dense(), expected)
        assert torch.equal(total, x + residual)
        of_x = torch.nn.functional.rms_norm(x, (32,), weight + unit_offset, 1e-5)
        plain, total = backend.add_rms_norm(x, residual, None, 1e-5, unit_offset, x_weight=weight)
        torch.testing.assert_close(total, of_x + residual)
        assert torch.equal(plain.dense(), total)
    gate, up = torch.randn(5, 16), torch.randn(5, 16)
    for name, function in (("silu", torch.nn.functional.silu), ("gelu_tanh", torch.nn.GELU("tanh"))):
        got = backend.act_and_mul(torch.cat((gate, up), 1), name).dense()  # type: ignore[arg-type]
        torch.testing.assert_close(got, function(gate) * up)


def test_rotation_turns_pairs_by_their_angle(backend: ReferenceBackend) -> None:
    shape, head_dim, rotary_dim = AttentionShape(2, 1, 12), 12, 8
    angles = torch.rand(40, rotary_dim // 2) * 6
    rotary = RotaryTable(angles.cos(), angles.sin())
    norm = QKNorm(torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5, 1e-6)
    tables, num_blocks = make_tables([40])
    (kv,) = backend.allocate_kv(KVCacheSpec(1, num_blocks, BLOCK_SIZE, 1, head_dim))
    qkv = torch.randn(40, shape.q_size + 2 * shape.kv_size)
    q = backend.rope_and_store(qkv, shape, norm, rotary, make_batch([40], [40], tables), kv)
    raw = torch.nn.functional.rms_norm(qkv[7, 12:24], (12,), norm.q_weight, 1e-6)
    for pair in range(4):
        turned = torch.complex(raw[pair], raw[pair + 4]) * torch.exp(1j * angles[7, pair])
        torch.testing.assert_close(q[7, 1, pair], turned.real)
        torch.testing.assert_close(q[7, 1, pair + 4], turned.imag)
    torch.testing.assert_close(q[7, 1, 8:], raw[8:])
    over_all = QKNorm(torch.rand(24) + 0.5, torch.rand(12) + 0.5, 1e-6)
    q = backend.rope_and_store(qkv, shape, over_all, None, make_batch([40], [40], tables), kv)
    torch.testing.assert_close(q.flatten(1), torch.nn.functional.rms_norm(qkv[:, :24], (24,), over_all.q_weight, 1e-6))


def test_rows_are_picked(backend: ReferenceBackend) -> None:
    tables, _ = make_tables([6, 3])
    batch = make_batch([6, 3], [6, 3], tables, logit_rows=[8, 2])
    x, residual = torch.randn(9, 8), torch.randn(9, 4)
    picked, picked_residual = backend.pick_rows(DenseInput(x), residual, batch)
    assert torch.equal(picked.dense(), x[[8, 2]]) and torch.equal(picked_residual, residual[[8, 2]])


def test_logits_may_be_capped(backend: ReferenceBackend) -> None:
    weight, hidden = torch.randn(50, 8), torch.randn(2, 8)
    head = backend.prepare_head(DenseWeight("lm_head", weight))
    expected = hidden @ weight.t()
    torch.testing.assert_close(backend.logits(DenseInput(hidden), head), expected)
    capped = backend.logits(DenseInput(hidden), head, soft_cap=1.5)
    torch.testing.assert_close(capped, 1.5 * torch.tanh(expected / 1.5))


# Sampling.


def typical_tokens(p: torch.Tensor, typical_p: float) -> set[int]:
    """Those whose information is nearest to the distribution's entropy, until they have the mass: the paper's definition."""
    entropy = -sum(float(value) * math.log(value) for value in p)
    mass, kept = 0.0, set()
    for token in sorted(range(len(p)), key=lambda token: abs(-math.log(p[token]) - entropy)):
        if mass >= typical_p:
            break
        kept.add(token)
        mass += float(p[token])
    return kept


def exact_distribution(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float = 1.0
) -> torch.Tensor:
    """Probabilities by a plain loop over tokens in order of rank."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = sorted(range(len(p)), key=lambda token: (-float(p[token]), token))
    typical = typical_tokens(p, typical_p) if typical_p < 1 else set(order)
    kept = [token for token in order if p[token] >= min_p * p.max() and token in typical]
    if top_k:
        kept = kept[:top_k]
    total, mass, nucleus = sum(float(p[t]) for t in kept), 0.0, []
    for token in kept:
        if mass < top_p * total:
            nucleus.append(token)
        mass += float(p[token])
    result = torch.zeros_like(p)
    result[nucleus] = p[nucleus]
    return result / result.sum()


SAMPLING = [
    (1.0, 0, 1.0, 0.0, 1.0),
    (0.7, 5, 1.0, 0.0, 1.0),
    (1.3, 0, 0.8, 0.0, 1.0),
    (1.0, 0, 1.0, 0.1, 1.0),
    (1.5, 12, 0.9, 0.02, 1.0),
    (1.0, 0, 1.0, 0.0, 0.5),
    (1.4, 0, 1.0, 0.0, 0.9),
    (1.2, 6, 0.8, 0.02, 0.7),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p", "typical_p"), SAMPLING)
def test_sampling_follows_the_exact_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    """Chi-square at p = 1e-4 over 20,000 draws with fixed seeds, and nothing outside the support."""
    torch.manual_seed(3)
    logits = torch.randn(40) * 2
    draws = 20_000
    tokens = sample_rows(
        (logits / temperature).expand(draws, -1),
        torch.full((draws, 1), top_k),
        torch.full((draws, 1), top_p),
        torch.full((draws, 1), min_p),
        uniform(torch.arange(draws), torch.full((draws,), 9)),
        torch.full((draws, 1), typical_p),
    )
    expected = exact_distribution(logits, temperature, top_k, top_p, min_p, typical_p) * draws
    counts = torch.bincount(tokens, minlength=40).double()
    assert not counts[expected == 0].any()
    usual = expected >= 5
    statistic = ((counts - expected)[usual] ** 2 / expected[usual]).sum().item()
    degrees = int(usual.sum()) - 1
    # Wilson-Hilferty's approximation of the chi-square quantile at 1 - 1e-4.
    limit = max(degrees, 1) * (1 - 2 / (9 * max(degrees, 1)) + 3.719 * math.sqrt(2 / (9 * max(degrees, 1)))) ** 3
    assert statistic < limit, (statistic, limit, degrees)


def test_sampled_rows_depend_on_themselves_alone(backend: ReferenceBackend) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 100) * 3
    params = {
        "temperature": [0.0, 1.0, 0.8, 2.0, 1.0, 0.0],
        "top_k": [0, 0, 10, 0, 3, 5],
        "top_p": [1.0, 0.5, 0.9, 1.0, 1.0, 0.3],
        "min_p": [0.0, 0.0, 0.0, 0.1, 0.0, 0.0],
        "seed": [1, 2, 3, 4, -5, 6],
        "index": [0, 10, 20, 30, 40, 50],
        "typical_p": [0.5, 1.0, 0.3, 0.9, 1.0, 1.0],
    }
    batch = SamplingBatch.allocate(8, torch.device("cpu"))
    batch.fill(**params)
    together = backend.sample(logits, batch).token_ids
    assert together[0] == logits[0].argmax() and together[5] == logits[5].argmax()
    for row in range(6):
        batch.fill(**{name: [values[row]] for name, values in params.items()})  # type: ignore[arg-type]
        assert backend.sample(logits[row : row + 1], batch).token_ids.item() == together[row]


def test_ties_and_non_finite_rows(backend: ReferenceBackend) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [0.0, math.nan, 1.0, 2.0], [0.0, math.inf, 1.0, 2.0]])
    batch = SamplingBatch.allocate(3, torch.device("cpu"))
    batch.fill([0.0] * 3, [0] * 3, [1.0] * 3, [0.0] * 3, [0] * 3, [0] * 3)
    rows = backend.sample(logits, batch)
    assert rows.token_ids[0] == 1 and rows.finite.tolist() == [True, False, False]


def test_finite_ignores_masked_tokens(backend: ReferenceBackend) -> None:
    logits = torch.tensor([[1.0, -math.inf, 5.0, 0.0]])
    batch = SamplingBatch.allocate(1, torch.device("cpu"))
    batch.fill([0.0], [0], [1.0], [0.0], [0], [0])
    assert backend.sample(logits, batch).finite.tolist() == [True]

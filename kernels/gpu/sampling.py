"""Sampling on the device: one program per row, nothing sorted, nothing read back.

The same tokens as `kernels.reference.sample_rows`: thresholds of top-k and top-p are found by a search over the bits of the
ordered values, so that ties are told apart exactly as there; masses are summed in fp64, as there; the random number is the
same Philox.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import launch
from kernels.gpu.library import define, expect

_LARGE = tl.constexpr(2147483647)


@triton.jit
def exact_double(word):
    """uint32 to fp64 without an integer conversion: set into the mantissa of 2^52."""
    bits = word.to(tl.int64) | 0x4330000000000000
    return bits.to(tl.float64, bitcast=True) - 4503599627370496.0


@triton.jit
def uniform(seed, index):
    """The number in [0, 1) of `kernels.reference.uniform`."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low * 0
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    return exact_double(first) * 2.3283064365386963e-10 + exact_double(second >> 11) * 1.1102230246251565e-16


@triton.jit
def ordered_key(z):
    """A uint32 that orders as z does; -0 counts as 0."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def load_scores(row_ptr, offsets, vocabulary, temperature, largest, mean):
    """Of a chunk: z, exp(z - max z), and a key that falls with the distance of z - max z from `mean`."""
    logits = tl.load(row_ptr + offsets, mask=offsets < vocabulary, other=float("-inf"))
    z = tl.div_rn(logits, temperature)
    return z, tl.exp(z - largest), ordered_key(-tl.abs((z - largest) - mean))


@triton.jit
def load_mass(row_ptr, offsets, vocabulary, temperature, largest, min_p, mean, typical):
    """Ordered key and mass of a chunk: exp(z - max z), 0 where min-p drops it or its distance's key is under `typical`."""
    z, mass, nearness = load_scores(row_ptr, offsets, vocabulary, temperature, largest, mean)
    return ordered_key(z), tl.where((mass >= min_p) & (nearness >= typical), mass, 0.0)


@triton.jit
def search(
    row_ptr, vocabulary, temperature, largest, min_p, mean, typical, floor, wanted, COUNT: tl.constexpr,
    NEARNESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key t such that the tokens with key >= t, of those with key >= floor, weigh `wanted` or more: by number
    (COUNT) or by mass. With NEARNESS, keys are those of distances from the mean, and all tokens count. Two bits per pass."""
    found = floor * 0
    for step in range(16):
        one = (floor * 0 + 1) << (30 - 2 * step)
        weight1 = wanted * 0.0
        weight2 = wanted * 0.0
        weight3 = wanted * 0.0
        for start in range(0, vocabulary, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            if NEARNESS:
                _, mass, key = load_scores(row_ptr, offsets, vocabulary, temperature, largest, mean)
            else:
                key, mass = load_mass(row_ptr, offsets, vocabulary, temperature, largest, min_p, mean, typical)
            mass = tl.where(key >= floor, mass, 0.0)
            if COUNT:
                mass = tl.where(mass > 0, 1.0, 0.0)
            weight = mass.to(tl.float64)
            weight1 += tl.sum(tl.where(key >= found + one, weight, 0.0), 0)
            weight2 += tl.sum(tl.where(key >= found + 2 * one, weight, 0.0), 0)
            weight3 += tl.sum(tl.where(key >= found + 3 * one, weight, 0.0), 0)
        if weight3 >= wanted:
            found += 3 * one
        elif weight2 >= wanted:
            found += 2 * one
        elif weight1 >= wanted:
            found += one
    return found


@triton.jit
def keep(key, mass, floor, cut, above, limit, ties):
    """fp64 mass of a chunk after top-k and top-p, and which of its entries tie at the cut. `ties` counts those of earlier
    chunks."""
    wide = tl.where(key >= floor, mass, 0.0).to(tl.float64)
    tied = tl.where((key == cut) & (wide > 0), 1.0, 0.0).to(tl.float64)
    rank = ties + tl.cumsum(tied, 0) - tied
    at_cut = above + rank * wide < limit
    inside = (key > cut) | ((key == cut) & at_cut)
    return tl.where(inside, wide, 0.0), tied


@triton.jit
def sample_kernel(
    logits_ptr,  # fp32 [rows, vocabulary]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    typical_p_ptr,
    seed_ptr,
    index_ptr,
    result_ptr,  # int32 [2, max rows]: token, and 1 where the row is sound
    row_stride,
    result_stride,
    vocabulary,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    num_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        offsets = start + lanes
        value = tl.load(row_ptr + offsets, mask=offsets < vocabulary, other=float("-inf"))
        num_nan += (value != value).to(tl.int32)
        better = value > best
        best_at = tl.where(better, offsets, best_at)
        best = tl.where(better, value, best)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, best_at, _LARGE), 0)
    sound = (tl.sum(num_nan, 0) == 0) & (top < float("inf")) & (top > float("-inf"))
    tl.store(result_ptr + result_stride + row, sound.to(tl.int32))
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0.0) & sound:
        min_p = tl.load(min_p_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        largest = tl.div_rn(top, temperature)
        floor = ordered_key(largest) * 0
        mean = largest * 0.0
        typical = floor
        typical_p = tl.load(typical_p_ptr + row)
        if typical_p < 1.0:
            total = tl.sum(tl.zeros((BLOCK,), tl.float64), 0)
            weighted = total
            for start in range(0, vocabulary, BLOCK):
                z, mass, _ = load_scores(row_ptr, start + lanes, vocabulary, temperature, largest, mean)
                wide = mass.to(tl.float64)
                total += tl.sum(wide, 0)
                distance = tl.where(mass > 0, z - largest, 0.0)
                weighted += tl.sum(wide * distance.to(tl.float64), 0)
            mean = (weighted / total).to(tl.float32)
            wanted = total * typical_p.to(tl.float64)
            typical = search(
                row_ptr, vocabulary, temperature, largest, min_p, mean, floor, floor, wanted, False, True, BLOCK
            )  # fmt: skip
        if (top_k > 0) & (top_k < vocabulary):
            wanted = exact_double(top_k.to(tl.uint32))
            floor = search(
                row_ptr, vocabulary, temperature, largest, min_p, mean, typical, floor, wanted, True, False, BLOCK
            )  # fmt: skip
        total = tl.sum(tl.zeros((BLOCK,), tl.float64), 0)
        for start in range(0, vocabulary, BLOCK):
            key, mass = load_mass(row_ptr, start + lanes, vocabulary, temperature, largest, min_p, mean, typical)
            total += tl.sum(tl.where(key >= floor, mass, 0.0).to(tl.float64), 0)
        # Tokens above the cut are in; those at it, in order of index, while the mass before them is under the limit.
        cut = floor
        above = total * 0.0
        limit = total * 2.0
        if top_p < 1.0:
            limit = total * top_p.to(tl.float64)
            cut = search(
                row_ptr, vocabulary, temperature, largest, min_p, mean, typical, floor, limit, False, False, BLOCK
            )  # fmt: skip
            for start in range(0, vocabulary, BLOCK):
                key, mass = load_mass(row_ptr, start + lanes, vocabulary, temperature, largest, min_p, mean, typical)
                above += tl.sum(tl.where((key >= floor) & (key > cut), mass, 0.0).to(tl.float64), 0)
        kept = total * 0.0
        ties = total * 0.0
        for start in range(0, vocabulary, BLOCK):
            key, mass = load_mass(row_ptr, start + lanes, vocabulary, temperature, largest, min_p, mean, typical)
            mass, tied = keep(key, mass, floor, cut, above, limit, ties)
            ties += tl.sum(tied, 0)
            kept += tl.sum(mass, 0)
        goal = uniform(tl.load(seed_ptr + row), tl.load(index_ptr + row)) * kept
        before = total * 0.0
        ties = total * 0.0
        chosen = token * 0 + _LARGE
        last = token * 0
        for start in range(0, vocabulary, BLOCK):
            offsets = start + lanes
            key, mass = load_mass(row_ptr, offsets, vocabulary, temperature, largest, min_p, mean, typical)
            mass, tied = keep(key, mass, floor, cut, above, limit, ties)
            reached = (before + tl.cumsum(mass, 0)) > goal
            chosen = tl.minimum(chosen, tl.min(tl.where(reached & (mass > 0), offsets, _LARGE), 0))
            last = tl.maximum(last, tl.max(tl.where(mass > 0, offsets, 0), 0))
            ties += tl.sum(tied, 0)
            before += tl.sum(mass, 0)
        # Rounding can leave a number close to 1 past every entry: then the last kept token answers.
        token = tl.where(chosen == _LARGE, last, chosen)
    tl.store(result_ptr + row, token)


@triton.jit
def adjust_kernel(
    logits_ptr,  # fp32 [rows, vocabulary], in place
    history_ptr,  # int32 [rows, vocabulary]: how often each token was generated, + 2^30 if it is in the prompt; or None
    repetition_ptr,  # fp32 [rows]
    presence_ptr,
    frequency_ptr,
    mask_ptr,  # int32 [rows, ceil(vocabulary / 32)], bit i of word w allows token 32 w + i; or None
    row_stride,
    history_stride,
    mask_stride,
    vocabulary,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < vocabulary
    logits = tl.load(logits_ptr + row * row_stride + offsets, mask=inside, other=0.0)
    if history_ptr is not None:
        history = tl.load(history_ptr + row * history_stride + offsets, mask=inside, other=0)
        generated = history & 0x3FFFFFFF
        repetition = tl.load(repetition_ptr + row)
        penalized = tl.where(logits > 0, logits / repetition, logits * repetition)
        logits = tl.where(history != 0, penalized, logits)
        # Counts are under 2^23: exact in fp32 by way of its mantissa.
        count = (generated | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        logits -= count * tl.load(frequency_ptr + row)
        logits -= tl.where(generated > 0, tl.load(presence_ptr + row), 0.0)
    if mask_ptr is not None:
        word = tl.load(mask_ptr + row * mask_stride + offsets // 32, mask=inside, other=0)
        logits = tl.where(((word >> (offsets % 32)) & 1) != 0, logits, float("-inf"))
    tl.store(logits_ptr + row * row_stride + offsets, logits, mask=inside)


@triton.jit
def bias_kernel(logits_ptr, rows_ptr, tokens_ptr, bias_ptr, row_stride, vocabulary):
    """logits[rows[i], tokens[i]] += bias[i]. No pair (row, token) comes twice."""
    entry = tl.program_id(0)
    token = tl.load(tokens_ptr + entry)
    if token < vocabulary:
        target = logits_ptr + tl.load(rows_ptr + entry).to(tl.int64) * row_stride + token
        tl.store(target, tl.load(target) + tl.load(bias_ptr + entry))


def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    typical_p: Tensor,
    seed: Tensor,
    index: Tensor,
    result: Tensor,
) -> None:
    rows, vocabulary = logits.shape
    expect(result.shape[1] >= rows, "sample", f"result holds {result.shape[1]} rows, not {rows}")
    launch(
        sample_kernel, (rows,), logits, temperature, top_k, top_p, min_p, typical_p, seed, index, result,
        logits.stride(0), result.stride(0), vocabulary,
        BLOCK=min(2048, triton.next_power_of_2(vocabulary)), num_warps=8, num_stages=1,
    )  # fmt: skip


def _adjust(
    logits: Tensor,
    history: Tensor | None,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    mask: Tensor | None,
) -> None:
    rows, vocabulary = logits.shape
    launch(
        adjust_kernel, (rows, -(-vocabulary // 1024)), logits, history, repetition, presence, frequency, mask,
        logits.stride(0), history.stride(0) if history is not None else 0, mask.stride(0) if mask is not None else 0,
        vocabulary, BLOCK=1024, num_warps=4, num_stages=1,
    )  # fmt: skip


def _add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor) -> None:
    launch(bias_kernel, (tokens.shape[0],), logits, rows, tokens, bias, logits.stride(0), logits.shape[1], num_warps=1)


sample = define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor typical_p, Tensor seed, "
    "Tensor index, Tensor(a!) result) -> ()",
    _sample,
)
adjust_logits = define(
    "adjust_logits(Tensor(a!) logits, Tensor? history, Tensor? repetition, Tensor? presence, Tensor? frequency, "
    "Tensor? mask) -> ()",
    _adjust,
)
add_bias = define("add_bias(Tensor(a!) logits, Tensor rows, Tensor tokens, Tensor bias) -> ()", _add_bias)

"""`python -m kernels.gpu.selftest`: on the GPU at hand, every op against the reference back end, graphs against ops one by
one, run-to-run and batch-invariant bits. What the checks without a GPU cannot see: races, caches, barriers, real rounding."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.backend import AttentionShape, BackendOptions, KVCacheSpec, QKNorm
from kernels.batch import ForwardBatch
from kernels.format import AwqWeight, DenseWeight
from kernels.gpu.backend import GpuBackend
from kernels.gpu.device import CudaDevice
from kernels.gpu.tensors import GpuInput
from kernels.reference import DenseInput, ReferenceBackend

BOUND = {"float16": 4e-3, "bfloat16": 3e-2}
BLOCK_SIZE = 16


def make_weight(n: int, k: int, group_size: int) -> AwqWeight:
    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, n // 8), dtype=torch.int64).to(torch.int32)

    groups = k // group_size
    return AwqWeight("w", words(k), words(groups), (0.002 + 0.02 * torch.rand(groups, n)).half(), group_size)


def error_of(got: Tensor, expected: Tensor) -> float:
    return ((got.float().cpu() - expected).abs().max() / expected.abs().max()).item()


def check_linears(gpu: GpuBackend, reference: ReferenceBackend, dtype: str) -> Iterator[tuple[str, float]]:
    for (n, k), group_size in itertools.product(((4096, 4096), (1032, 2880), (256, 14336)), (32, 64, 128, -1)):
        size = k if group_size == -1 else group_size
        if k % size:
            continue
        weight = make_weight(n, k, size)
        bias = torch.randn(n)
        ours, theirs = gpu.prepare_linear([weight], bias), reference.prepare_linear([weight], bias)
        for rows in (1, 7, 16, 31, 64, 100, 700, 2000):
            x = torch.randn(rows, k).to(gpu.dtype)
            placed = GpuInput(x.to(gpu.device))
            got = gpu.linear(placed, ours)
            expected = reference.linear(DenseInput(x.float()), theirs)
            yield f"linear {n}x{k} g{group_size} M{rows}", error_of(got, expected) / BOUND[dtype]
            for _ in range(20):  # a race in the reduction would show sooner or later
                same = torch.equal(gpu.linear(placed, ours), got)
                if not same:
                    yield f"linear {n}x{k} g{group_size} M{rows}: runs differ", float("inf")
                    break


def make_batch(gpu: GpuBackend, query_lens: list[int], seq_lens: list[int]) -> tuple[ForwardBatch, ForwardBatch, int]:
    """The same step for the GPU and for the reference, over a shuffled pool."""
    counts = [-(-length // BLOCK_SIZE) for length in seq_lens]
    order = torch.randperm(sum(counts)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    positions: list[int] = []
    slots: list[int] = []
    for query, length, table in zip(query_lens, seq_lens, tables, strict=True):
        positions += range(length - query, length)
        slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length - query, length)]
    sizes = (len(positions), len(query_lens), max(counts), len(query_lens))
    ours, _ = gpu.allocate_batches(*sizes)
    theirs = ForwardBatch.allocate(*sizes, torch.device("cpu"))
    for batch in (ours, theirs):
        batch.fill([0] * len(positions), positions, slots, query_lens, seq_lens, tables, range(len(query_lens)))
    gpu.upload()
    return ours, theirs, sum(counts)


def check_attention(gpu: GpuBackend, reference: ReferenceBackend, dtype: str) -> Iterator[tuple[str, float]]:
    int8 = gpu.options.kv_cache_dtype == "int8"
    for head_dim, (heads, kv_heads), window in itertools.product(
        (64, 80, 96, 128, 256), ((8, 2), (7, 1), (4, 4)), (None, 300)
    ):
        shape = AttentionShape(heads, kv_heads, head_dim)
        seq_lens = [1, 900, 257, 2000, 33]
        ours, theirs, num_blocks = make_batch(gpu, seq_lens, seq_lens)
        spec = KVCacheSpec(1, num_blocks, BLOCK_SIZE, kv_heads, head_dim)
        (kv,), (dense_kv,) = gpu.allocate_kv(spec), reference.allocate_kv(spec)
        qkv = torch.randn(theirs.num_tokens, shape.q_size + 2 * shape.kv_size).to(gpu.dtype)
        norm = QKNorm(torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5, 1e-6)
        placed = QKNorm(norm.q_weight.to(gpu.device), norm.k_weight.to(gpu.device), 1e-6)
        angles = torch.rand(2000, head_dim // 2) * 6
        q = gpu.rope_and_store(
            qkv.to(gpu.device), shape, placed, gpu.prepare_rotary(angles.cos(), angles.sin()), ours, kv
        )
        rotary = reference.prepare_rotary(angles.cos(), angles.sin())
        expected_q = reference.rope_and_store(qkv.float(), shape, norm, rotary, theirs, dense_kv)
        bound = BOUND[dtype] * (8 if int8 else 4)
        yield f"rope {shape}", error_of(q, expected_q) / BOUND[dtype]
        got = gpu.attention(q, shape, kv, ours, 0.1, window).dense()
        expected = reference.attention(expected_q, shape, dense_kv, theirs, 0.1, window).dense()
        yield f"prefill {shape} window {window}", error_of(got, expected) / bound
        # The last token of every sequence, decoded over the same cache.
        ours.query_starts.copy_(torch.arange(len(seq_lens) + 1))
        ours.host_query_lens, ours.num_tokens = [1] * len(seq_lens), len(seq_lens)
        last = torch.tensor(seq_lens).cumsum(0) - 1
        decoded = gpu.attention(q[last.to(gpu.device)].contiguous(), shape, kv, ours, 0.1, window).dense()
        yield f"decode {shape} window {window}", error_of(decoded, expected[last]) / bound
        if gpu.options.batch_invariant and not torch.equal(decoded, got[last.to(gpu.device)]):
            yield f"attention {shape}: decoded and prefilled bits differ", float("inf")


def check_invariance(gpu: GpuBackend) -> Iterator[tuple[str, float]]:
    """Rows of a large product equal the same rows alone."""
    for weight in (make_weight(4096, 4096, 128), DenseWeight("w", torch.randn(1000, 2048).half())):
        linear = gpu.prepare_linear([weight], None)
        x = torch.randn(600, weight.in_features, device=gpu.device).to(gpu.dtype)
        whole = gpu.linear(GpuInput(x), linear)
        for rows in (1, 5, 64, 65, 300):
            same = torch.equal(gpu.linear(GpuInput(x[:rows].contiguous()), linear), whole[:rows])
            yield f"batch invariant {type(weight).__name__} M{rows}", 0.0 if same else float("inf")


def check_sampling(gpu: GpuBackend, reference: ReferenceBackend) -> Iterator[tuple[str, float]]:
    rows, vocabulary = 64, 128256
    ours = gpu.allocate_batches(rows, rows, 1, rows)[1]
    logits = torch.randn(rows, vocabulary) * 3
    settings = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 50, 1.0, 0.0), (1.2, 0, 0.9, 0.0), (1.0, 40, 0.8, 0.05)]
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*(settings * 13)[:rows], strict=True))
    theirs = type(ours).allocate(rows, torch.device("cpu"))
    for batch in (ours, theirs):
        batch.fill(temperature, top_k, top_p, min_p, list(range(rows)), [5] * rows)
    gpu.upload()
    tokens, finite = gpu.sample(logits.to(gpu.device), ours).to_host()
    expected = reference.sample(logits, theirs).token_ids.tolist()
    # exp differs in the last bit between devices: a token may change where the random number falls on an edge.
    differing = sum(a != b for a, b in zip(tokens, expected, strict=True))
    yield f"sampling: {differing} of {rows} tokens differ", 0.0 if all(finite) and differing <= 1 else float("inf")


def main() -> int:
    device, reference = CudaDevice(), ReferenceBackend(BackendOptions())
    worst, failed = 0.0, 0
    dtypes = ["float16"] if device.chip.arch == "sm_75" else ["float16", "bfloat16"]
    torch.manual_seed(0)
    with torch.inference_mode():
        for dtype, kv, invariant in itertools.product(dtypes, ("auto", "int8"), (False, True)):
            options = BackendOptions(dtype=dtype, kv_cache_dtype=kv, batch_invariant=invariant)
            gpu = GpuBackend(options, device)
            checks = [check_attention(gpu, reference, dtype)]
            if kv == "auto":
                checks += [check_linears(gpu, reference, dtype), check_sampling(gpu, reference)]
                checks += [check_invariance(gpu)] if invariant else []
            for name, ratio in itertools.chain(*checks):
                worst = max(worst, ratio)
                failed += not ratio < 1
                if not ratio < 1:
                    print(
                        f"FAILED {dtype} kv {kv} invariant {invariant}: {name} ({ratio:.2f} of its bound)", flush=True
                    )
    print(f"{device.chip.name}: {failed} failures; the largest error was {worst:.2f} of its bound")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

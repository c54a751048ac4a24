"""`python -m kernels.bench --device cuda`: the quantized product per shape and number of rows, beside cuBLAS in 16 bit and,
where they are installed, Marlin (vLLM's) and GemLite. Time, weight bytes per second, percent of the chip's memory and tensor
peaks. The last line is JSON.

Each product is timed in a captured graph of many calls that walk through copies of the weight larger than the L2 cache
together, so that weights come from memory as they do when serving. `--tune` searches configurations for the shapes first and
keeps them on disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kernels.format import AwqWeight
from kernels.gpu import autotune, awq_gemm, fused
from kernels.gpu.awq_gemm import PackedAwq
from kernels.gpu.device import Device, open_device
from kernels.gpu.tuning import Chip, GemmConfig

SHAPES: dict[str, list[tuple[str, int, int]]] = {
    "llama-3.1-8b": [
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate_up", 28672, 4096),
        ("down", 4096, 14336),
    ],
    "qwen2.5-7b": [
        ("qkv", 4608, 3584),
        ("o", 3584, 3584),
        ("gate_up", 37888, 3584),
        ("down", 3584, 18944),
    ],
    "llama-3.3-70b": [
        ("qkv", 10240, 8192),
        ("o", 8192, 8192),
        ("gate_up", 57344, 8192),
        ("down", 8192, 28672),
    ],
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
_CYCLED_NBYTES = 256 << 20  # of weight copies: over twice the largest L2 cache
_CALLS = 20

Product = Callable[[Tensor, int], Tensor]
"""x and the index of a weight copy to x @ W^T."""


@dataclass(frozen=True, slots=True)
class Result:
    """`others` in seconds by name. GB/s counts the packed weight once; a share of 1 is the vendor's peak."""

    model: str
    name: str
    out_features: int
    in_features: int
    rows: int
    seconds: float
    gigabytes_per_second: float
    share_of_memory_peak: float
    share_of_tensor_peak: float
    others: dict[str, float]


def random_weight(n: int, k: int, group_size: int, device: torch.device) -> AwqWeight:
    return AwqWeight(
        "weight",
        torch.randint(-(2**31), 2**31, (k, n // 8), device=device, dtype=torch.int64).to(torch.int32),
        torch.randint(-(2**31), 2**31, (k // group_size, n // 8), device=device, dtype=torch.int64).to(torch.int32),
        (0.001 + 0.01 * torch.rand(k // group_size, n, device=device)).half(),
        group_size,
    )


def time_in_graph(device: Device, run: Callable[[int], None], calls: int = _CALLS, repetitions: int = 10) -> float:
    """Seconds per call: the best of several replays of a graph of `calls` calls."""
    for index in range(2):
        run(index)
    torch.cuda.synchronize()

    def run_all() -> None:
        for index in range(calls):
            run(index)

    graph = device.capture(run_all)
    best = float("inf")
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / calls)
    return best


class Ours:
    """Copies of one packed weight and the buffers of its product."""

    def __init__(self, device: Device, weight: AwqWeight, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.packed = awq_gemm.pack(weight, dtype)
        copies = max(1, -(-_CYCLED_NBYTES // self.packed.nbytes))
        self.copies = [self.packed] + [_copy(self.packed) for _ in range(copies - 1)]
        n, k = self.packed.out_features, self.packed.in_features
        self.dense = torch.empty(n, k, dtype=dtype, device=device.torch_device)

    def runner(self, x: Tensor, config: GemmConfig) -> Callable[[int], None]:
        rows, n = x.shape[0], self.packed.out_features
        out = torch.empty(rows, n, dtype=self.dtype, device=x.device)
        partials = torch.empty(max(1, config.partials(rows, n)), device=x.device)
        arrivals = torch.zeros(config.tiles(rows, n), dtype=torch.int32, device=x.device)

        def run(index: int) -> None:
            weight = self.copies[index % len(self.copies)]
            if config.dequantize:
                awq_gemm.dequantize(weight, self.dense, self.device.use_ptx)
                fused.dense(x, self.dense, None, out, 0, 4)
            else:
                awq_gemm.gemm(x, weight, None, out, partials, arrivals, config, self.device.use_ptx)

        return run


def _copy(packed: PackedAwq) -> PackedAwq:
    return PackedAwq(
        packed.words.clone(),
        packed.groups.clone(),
        packed.out_features,
        packed.in_features,
        packed.group_size,
        packed.scale_bf16,
    )


def marlin(weight: AwqWeight, dtype: torch.dtype) -> Product:
    """vLLM's Marlin on the same checkpoint tensors. Raises whatever its absence or another version raises."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    n, k, groups = weight.out_features, weight.in_features, weight.num_groups
    packed = ops.awq_marlin_repack(weight.qweight, size_k=k, size_n=n, num_bits=4)
    scales = marlin_utils.marlin_permute_scales(
        weight.scales.to(dtype), size_k=k, size_n=n, group_size=weight.group_size
    )
    zeros = marlin_utils.awq_to_marlin_zero_points(weight.qzeros, size_k=groups, size_n=n, num_bits=4)
    workspace = marlin_utils.marlin_make_workspace_new(packed.device)
    empty = marlin_utils.marlin_make_empty_g_idx(packed.device)
    copies = [packed] + [packed.clone() for _ in range(max(0, _CYCLED_NBYTES // packed.nbytes))]

    def run(x: Tensor, index: int) -> Tensor:
        return marlin_utils.apply_awq_marlin_linear(
            input=x,
            weight=copies[index % len(copies)],
            weight_scale=scales,
            weight_zp=zeros,
            g_idx=empty,
            g_idx_sort_indices=empty,
            workspace=workspace,
            quant_type=scalar_types.uint4,
            output_size_per_partition=n,
            input_size_per_partition=k,
        )

    return run


def gemlite(weight: AwqWeight, dtype: torch.dtype) -> Product:
    """GemLite on the same integers. Raises whatever its absence or another version raises."""
    from gemlite.core import DType, GemLiteLinearTriton

    q, zeros = weight.unpack()
    kind = DType.FP16 if dtype == torch.float16 else DType.BF16
    layers = []
    for _ in range(max(1, _CYCLED_NBYTES // weight.qweight.nbytes)):
        layer = GemLiteLinearTriton(4, weight.group_size, weight.in_features, weight.out_features, kind, kind)
        layer.pack(q.t().contiguous(), weight.scales.t().to(dtype).contiguous(), zeros.t().to(dtype).contiguous(), None)
        layers.append(layer)
    return lambda x, index: layers[index % len(layers)](x)


def others(weight: AwqWeight, dtype: torch.dtype, missing: dict[str, str]) -> dict[str, Product]:
    """The products to compare with; those that cannot be had are noted in `missing`."""
    dense = weight.dequantize(dtype)
    copies = [dense] + [dense.clone() for _ in range(max(0, _CYCLED_NBYTES // dense.nbytes))]
    found: dict[str, Product] = {"cublas": lambda x, index: torch.nn.functional.linear(x, copies[index % len(copies)])}
    for name, make in (("marlin", marlin), ("gemlite", gemlite)):
        if name in missing:
            continue
        try:
            found[name] = make(weight, dtype)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found


def measure_shape(
    device: Device, model: str, shape: tuple[str, int, int], options: argparse.Namespace, missing: dict[str, str]
) -> list[Result]:
    name, n, k = shape
    dtype, chip = getattr(torch, options.dtype), device.chip
    weight = random_weight(n, k, options.group_size, device.torch_device)
    ours = Ours(device, weight, dtype)
    compared = others(weight, dtype, missing)
    reference = weight.dequantize()
    tuned = autotune.load(autotune.cache_path(chip))
    results = []
    for rows in options.rows:
        x = torch.randn(rows, k, device=device.torch_device).to(dtype)
        config = autotune.choose(chip, tuned, rows, n, k, options.group_size, options.dtype)
        seconds = time_in_graph(device, ours.runner(x, config))
        times: dict[str, float] = {}
        for other, product in compared.items():
            wanted, got = x.float() @ reference.t(), product(x, 0).float()
            if ((got - wanted).abs().max() / wanted.abs().max()).item() > 0.02:
                missing[other] = "its results differ from the dequantized weight's"
                continue

            def run(index: int, product: Product = product, x: Tensor = x) -> None:
                product(x, index)

            times[other] = time_in_graph(device, run)
        results.append(result_of(chip, model, name, ours.packed, rows, seconds, times))
        print(show(results[-1]), flush=True)
    return results


def result_of(
    chip: Chip, model: str, name: str, packed: PackedAwq, rows: int, seconds: float, times: dict[str, float]
) -> Result:
    n, k = packed.out_features, packed.in_features
    rate = packed.nbytes / seconds
    return Result(
        model=model,
        name=name,
        out_features=n,
        in_features=k,
        rows=rows,
        seconds=seconds,
        gigabytes_per_second=rate / 1e9,
        share_of_memory_peak=rate / (chip.memory_gb_per_second * 1e9),
        share_of_tensor_peak=2 * n * k * rows / seconds / (chip.tensor_tflops * 1e12),
        others=times,
    )


def show(result: Result) -> str:
    compared = "".join(f"{name:>10} {seconds / result.seconds:5.2f} x" for name, seconds in result.others.items())
    return (
        f"{result.model:<15}{result.name:<9}{result.out_features:>6} x{result.in_features:>6}{result.rows:>6}"
        f"{result.seconds * 1e6:>10.1f} us{result.gigabytes_per_second:>8.0f} GB/s"
        f"{100 * result.share_of_memory_peak:>5.0f}%{100 * result.share_of_tensor_peak:>5.0f}%{compared}"
    )


def tune_shapes(device: Device, options: argparse.Namespace) -> None:
    """Measures candidates for every shape asked for and adds the fastest to the file."""
    dtype = getattr(torch, options.dtype)
    prepared: dict[tuple[int, int, int], Ours] = {}

    def measure(config: GemmConfig, rows: int, n: int, k: int, group_size: int) -> float:
        if (n, k, group_size) not in prepared:
            prepared.clear()
            prepared[(n, k, group_size)] = Ours(device, random_weight(n, k, group_size, device.torch_device), dtype)
        x = torch.randn(rows, k, device=device.torch_device).to(dtype)
        try:
            return time_in_graph(device, prepared[(n, k, group_size)].runner(x, config))
        except Exception as error:  # more shared memory than there is, for one
            print(f"  {config}: {type(error).__name__}", file=sys.stderr)
            return float("inf")

    shapes = sorted({(n, k, options.group_size) for model in options.models for _, n, k in SHAPES[model]})
    path = autotune.cache_path(device.chip)
    autotune.save(path, autotune.tune(device.chip, shapes, options.dtype, measure))
    print(f"tuned {len(shapes)} shapes: {path}")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench --device cuda", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M")
    parser.add_argument("--group-size", type=int, choices=[32, 64, 128], default=128)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--tune", action="store_true", help="search configurations first, and keep them for serving")
    options = parser.parse_args(arguments)
    if min(options.rows) < 1:
        parser.error(f"--rows: expected 1 or more, found {min(options.rows)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    try:
        device = open_device()
    except ValueError as error:
        print(f"kernels.bench: {error}", file=sys.stderr)
        return 1
    chip, missing = device.chip, {}  # type: Chip, dict[str, str]
    print(
        f"{chip.name}: {chip.arch}, {chip.num_sms} multiprocessors; peaks taken as {chip.memory_gb_per_second:.0f} GB/s and "
        f"{chip.tensor_tflops:.0f} TFLOP/s; {options.dtype}, group {options.group_size}; 'x' is the other's time over ours"
    )
    if options.tune:
        tune_shapes(device, options)
    results = [
        result
        for model in options.models
        for shape in SHAPES[model]
        for result in measure_shape(device, model, shape, options, missing)
    ]
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    print(json.dumps({"chip": asdict(chip), "missing": missing, "results": [asdict(result) for result in results]}))
    return 0

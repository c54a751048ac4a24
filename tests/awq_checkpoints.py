"""Tiny AWQ checkpoints in the standard gemm layout, rounded to nearest here, by a packing loop of its own: what is read back by
`kernels.format` was not written by it. And the same checkpoint dequantized, for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEARS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    *("w1", "w2", "w3"),
)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: Tensor) -> Tensor:
    """uint8 [rows, N] to int32 [rows, N/8], nibble by nibble."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(ORDER):
        words |= values[:, column::8].long() << (4 * nibble)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def quantize(weight: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The three tensors of weight [N, K], and the weight they stand for."""
    n, k = weight.shape
    group_size = k if group_size == -1 else group_size
    groups = weight.float().t().reshape(k // group_size, group_size, n)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).to(scale_dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    q = ((groups / scales.float()[:, None]).round() + zeros[:, None]).clamp(0, 15)
    dense = ((q - zeros[:, None]) * scales.float()[:, None]).reshape(k, n).t().contiguous()
    tensors = {"qweight": pack(q.reshape(k, n).byte()), "qzeros": pack(zeros.byte()), "scales": scales}
    return tensors, dense


def make_awq_checkpoint(
    source: Path,
    awq: Path,
    dense: Path,
    group_size: int,
    skip: tuple[str, ...] = (),
    scale_dtype: torch.dtype = torch.float16,
) -> None:
    """Reads the unquantized checkpoint `source`; writes it as AWQ to `awq`, and dequantized in fp32 to `dense`. Modules whose
    name contains one of `skip` stay as they are."""
    tensors = load_file(source / "model.safetensors")
    quantized, plain = {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.split(".")[-1] in LINEARS and not any(part in name for part in skip):
            parts, weight = quantize(tensor, group_size, scale_dtype)
            quantized |= {f"{module}.{key}": part.contiguous() for key, part in parts.items()}
            plain[name] = weight
        else:
            quantized[name] = plain[name] = tensor
    config = json.loads((source / "config.json").read_text())
    for directory in (awq, dense):
        shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(quantized, awq / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skip) or None,
    }
    (awq / "config.json").write_text(json.dumps(config))

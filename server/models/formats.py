"""Quantized modules of a checkpoint, in each layout that is read: the tensors to expect, and the AWQ weight they stand for."""

from __future__ import annotations

from torch import Tensor

from kernels.format import PACK_FACTOR, AwqWeight, FormatError
from kernels.packed_formats import from_compressed_tensors, from_gptq
from server.model_config import ModelError, QuantizationConfig
from server.models.checkpoint import Checkpoint

SCALE_DTYPES = ("F16", "BF16")
_MARKERS = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}
"""The tensor that says that a module is quantized."""


def is_quantized(checkpoint: Checkpoint, module: str) -> bool:
    return any(f"{module}.{marker}" in checkpoint for marker in _MARKERS.values())


def check_module(
    checkpoint: Checkpoint, quantization: QuantizationConfig | None, module: str, out_features: int, in_features: int
) -> list[str]:
    """Checks the headers of one quantized module's tensors; returns their names."""
    if quantization is None:
        marker = next(marker for marker in _MARKERS.values() if f"{module}.{marker}" in checkpoint)
        raise ModelError(f"config.json: has no quantization_config, but the checkpoint has {module}.{marker}")
    group_size = in_features if quantization.group_size == -1 else quantization.group_size
    if out_features % PACK_FACTOR or in_features % group_size:
        raise FormatError(
            f"{module}: [{out_features}, {in_features}] cannot be {quantization.method}: outputs must be a multiple of "
            f"{PACK_FACTOR} and inputs of the group size {group_size}"
        )
    if quantization.method != "awq" and in_features % PACK_FACTOR:
        raise FormatError(f"{module}: {in_features} input features are not a multiple of {PACK_FACTOR}")
    groups = in_features // group_size
    words_in, words_out = in_features // PACK_FACTOR, out_features // PACK_FACTOR
    required: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
    optional: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    if quantization.method == "compressed-tensors":
        required = {
            "weight_packed": ((out_features, words_in), ("I32",)),
            "weight_scale": ((out_features, groups), SCALE_DTYPES),
            "weight_shape": ((2,), ("I64", "I32")),
        }
        if not quantization.symmetric:
            required["weight_zero_point"] = ((words_out, groups), ("I32",))
        optional["weight_g_idx"] = ((in_features,), ("I32", "I64"))
    else:
        packed = (words_in, out_features) if quantization.method == "gptq" else (in_features, words_out)
        required = {
            "qweight": (packed, ("I32",)),
            "qzeros": ((groups, words_out), ("I32",)),
            "scales": ((groups, out_features), SCALE_DTYPES),
        }
        if quantization.method == "gptq":
            (required if quantization.activation_order else optional)["g_idx"] = ((in_features,), ("I32", "I64"))
    present = {key: entry for key, entry in optional.items() if f"{module}.{key}" in checkpoint}
    for key, (shape, dtypes) in (required | present).items():
        checkpoint.expect(f"{module}.{key}", shape, dtypes)
    return [f"{module}.{key}" for key in required | present]


def read_module(checkpoint: Checkpoint, quantization: QuantizationConfig, module: str) -> AwqWeight:
    """Reads one quantized module. FormatError for what the headers do not show: activation order, foreign shapes."""
    keys = {
        "awq": ("qweight", "qzeros", "scales"),
        "gptq": ("qweight", "qzeros", "scales", "g_idx"),
        "compressed-tensors": (
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_g_idx",
            *(() if quantization.symmetric else ("weight_zero_point",)),
        ),
    }[quantization.method]
    tensors: dict[str, Tensor] = {
        key: checkpoint.read(f"{module}.{key}") for key in keys if f"{module}.{key}" in checkpoint
    }
    if quantization.method == "gptq":
        return from_gptq(module, tensors, quantization.group_size, quantization.stores_zero_less_one)
    if quantization.method == "compressed-tensors":
        return from_compressed_tensors(module, tensors, quantization.group_size)
    return AwqWeight.from_tensors(module, tensors, quantization.group_size)

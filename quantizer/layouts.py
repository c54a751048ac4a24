"""The layouts a checkpoint is written in and read back from: AWQ gemm and compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from kernels.format import AWQ_TENSORS, AwqWeight, FormatError
from kernels.packed_formats import from_compressed_tensors, to_compressed_tensors
from quantizer.config import QuantConfig, QuantizeError, QuantizeOptions

COMPRESSED_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_KINDS = {"awq": AWQ_TENSORS, "compressed-tensors": COMPRESSED_TENSORS}


def packed_tensors(weight: AwqWeight, layout: str) -> dict[str, Tensor]:
    """What is written for a quantized linear, under full names."""
    tensors = {key: getattr(weight, key) for key in AWQ_TENSORS} if layout == "awq" else to_compressed_tensors(weight)
    return {f"{weight.name}.{key}": tensor for key, tensor in tensors.items()}


def quantization_json(options: QuantizeOptions, linears: Collection[str]) -> dict[str, Any]:
    """config.json's quantization_config. linears: full names of the decoder layers' linears."""
    config = options.quant_config
    if options.format == "awq":
        return config.to_dict()
    dense = [name for name in linears if not config.converts(name)]
    # A tied head is a module too, though it has no tensor of its own.
    return config.to_compressed_tensors(["lm_head", *dense])


def parse_quantization(data: Mapping[str, Any]) -> tuple[str, QuantConfig]:
    """Layout and settings of a quantization_config. QuantizeError names what is not one of the layouts written here."""
    if data.get("quant_method") == "compressed-tensors":
        return "compressed-tensors", QuantConfig.from_compressed_tensors(data)
    return "awq", QuantConfig.from_dict(data)


def quantized_modules(names: Collection[str], layout: str) -> dict[str, list[str]]:
    """Modules with at least one packed tensor, and the kinds each of them has."""
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        if kind in _KINDS[layout]:
            modules.setdefault(module, []).append(kind)
    return modules


def read_packed(
    module: str, kinds: Collection[str], load: Callable[[str], Tensor], layout: str, group_size: int
) -> AwqWeight:
    """QuantizeError if a tensor is missing or is not what the layout says."""
    missing = sorted(set(_KINDS[layout]) - set(kinds))
    if missing:
        raise QuantizeError(f"{module}: missing tensor {module}.{missing[0]}")
    tensors = {kind: load(f"{module}.{kind}") for kind in kinds}
    try:
        if layout == "awq":
            return AwqWeight.from_tensors(module, tensors, group_size)
        return from_compressed_tensors(module, tensors, group_size)
    except FormatError as error:
        raise QuantizeError(str(error)) from error

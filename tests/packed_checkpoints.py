"""Tiny GPTQ and compressed-tensors checkpoints made of AWQ ones, value by value: what `kernels.packed_formats` reads was not
packed by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.format import AWQ_TENSORS, AwqWeight


def pack_rows(values: Tensor) -> Tensor:
    """uint8 [rows, columns] to int32 [rows, ceil(columns / 8)], nibble i of word c being column 8c + i."""
    words = torch.zeros(values.shape[0], -(-values.shape[1] // 8), dtype=torch.int64)
    for column in range(values.shape[1]):
        words[:, column // 8] |= values[:, column].long() << (4 * (column % 8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq_tensors(weight: AwqWeight, zero_less: int) -> dict[str, Tensor]:
    integers, zeros = weight.unpack()
    return {
        "qweight": pack_rows(integers.t()).t().contiguous(),
        "qzeros": pack_rows((zeros.int() - zero_less).remainder(16).byte()),
        "scales": weight.scales.clone(),
        "g_idx": (torch.arange(weight.in_features) // weight.group_size).int(),
    }


def compressed_tensors(weight: AwqWeight, symmetric: bool) -> dict[str, Tensor]:
    integers, zeros = weight.unpack()
    tensors = {
        "weight_packed": pack_rows(integers.t()),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_rows(zeros).t().contiguous()
    return tensors


GPTQ_CONFIG: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}


def compressed_config(group_size: int, symmetric: bool, **weights: Any) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = {"num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def set_symmetric(weight: AwqWeight) -> AwqWeight:
    """The same integers and scales around a zero point of 8."""
    eights = pack_rows(torch.full((weight.num_groups, weight.out_features), 8, dtype=torch.uint8))
    return AwqWeight(weight.name, weight.qweight, eights, weight.scales, weight.group_size)


def repack(awq: Path, layout: str, symmetric: bool = False) -> None:
    """Rewrites the AWQ checkpoint `awq` in place. layout: gptq, gptq_v2 or compressed-tensors."""
    config = json.loads((awq / "config.json").read_text())
    group_size = config["quantization_config"]["group_size"]
    tensors = load_file(awq / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = {key: tensors.pop(f"{module}.{key}") for key in AWQ_TENSORS}
        weight = AwqWeight.from_tensors(module, parts, group_size)
        if layout == "compressed-tensors":
            packed = compressed_tensors(weight, symmetric)
        else:
            packed = gptq_tensors(weight, zero_less=int(layout == "gptq"))
        tensors |= {f"{module}.{key}": tensor for key, tensor in packed.items()}
    config["quantization_config"] = (
        compressed_config(group_size, symmetric)
        if layout == "compressed-tensors"
        else {**GPTQ_CONFIG, "group_size": group_size, "checkpoint_format": layout}
    )
    save_file(tensors, awq / "model.safetensors", metadata={"format": "pt"})
    (awq / "config.json").write_text(json.dumps(config))

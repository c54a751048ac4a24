"""How a checkpoint says that its weights are quantized: config.json's `quantization_config`, in every form that is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """A checkpoint that cannot be served; the message names file, field or tensor, what was expected and what was found."""


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """4-bit weights as declared. `modules_to_not_convert` is informative: which modules are dense shows in their tensors."""

    group_size: int  # -1: a whole row
    modules_to_not_convert: tuple[str, ...]
    method: str = "awq"  # or "gptq" or "compressed-tensors"
    symmetric: bool = False  # compressed-tensors: no zero points are stored
    stores_zero_less_one: bool = False  # gptq's first version
    activation_order: bool = False  # gptq: declared so, which g_idx must then confute


def read_json(path: Path, required: bool) -> dict[str, Any]:
    """The object in a file; an empty one where a file that is not required is missing."""
    if not path.is_file():
        if required:
            raise ModelError(f"{path.name}: not found in {path.parent}")
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value


def read_quantization(model_dir: Path, raw: Mapping[str, Any]) -> QuantizationConfig | None:
    """config.json's `quantization_config`, or AutoAWQ's older quant_config.json; None for a dense checkpoint."""
    declared, file = raw.get("quantization_config"), "config.json: quantization_config"
    if declared is None:
        declared, file = read_json(model_dir / "quant_config.json", required=False), "quant_config.json"
        if not declared:
            return None
        declared = {"quant_method": "awq", **declared}
    method = declared.get("quant_method")
    if method not in _QUANTIZATIONS:
        raise ModelError(f"{file}: quant_method {method!r} is not supported; supported: {', '.join(_QUANTIZATIONS)}")
    return _QUANTIZATIONS[method](declared, file)


def _awq(declared: Mapping[str, Any], file: str) -> QuantizationConfig:
    _only(file, "bits", declared.get("bits", declared.get("w_bit")), 4)
    # gemv, gemv_fast and llm-awq hold other integers in other orders under the same names.
    _only(file, "version", str(declared.get("version", "gemm")).lower(), "gemm")
    if declared.get("backend") == "llm-awq":
        raise ModelError(f"{file}: backend 'llm-awq' is not supported; supported: autoawq's gemm layout")
    _only(file, "zero_point", declared.get("zero_point", True), True)
    group_size = _group_size(file, declared.get("group_size", declared.get("q_group_size")))
    return QuantizationConfig(group_size, tuple(declared.get("modules_to_not_convert") or ()))


def _gptq(declared: Mapping[str, Any], file: str) -> QuantizationConfig:
    _only(file, "bits", declared.get("bits"), 4)
    if declared.get("dynamic"):
        raise ModelError(f"{file}: dynamic (settings per module) is not supported")
    version = declared.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise ModelError(f"{file}: checkpoint_format {version!r} is not supported; supported: gptq, gptq_v2")
    return QuantizationConfig(
        _group_size(file, declared.get("group_size")),
        tuple(declared.get("modules_to_not_convert") or ()),
        method="gptq",
        stores_zero_less_one=version == "gptq",
        activation_order=bool(declared.get("desc_act", False)),
    )


def _compressed_tensors(declared: Mapping[str, Any], file: str) -> QuantizationConfig:
    _only(file, "format", declared.get("format"), "pack-quantized")
    groups = list((declared.get("config_groups") or {}).values())
    if not groups or any(group.get("weights") != groups[0].get("weights") for group in groups):
        raise ModelError(f"{file}: config_groups: expected one way to store weights, found {len(groups)} groups")
    for group in groups:
        _only(file, "config_groups: input_activations", group.get("input_activations"), None)
        _only(file, "config_groups: output_activations", group.get("output_activations"), None)
    _only(file, "kv_cache_scheme", declared.get("kv_cache_scheme"), None)
    for field in ("transform_config", "sparsity_config"):
        value = declared.get(field)
        if value and value.get("format") != "dense":
            raise ModelError(f"{file}: {field} {value!r} is not supported")
    weights = groups[0].get("weights") or {}
    _only(file, "config_groups: num_bits", weights.get("num_bits"), 4)
    _only(file, "config_groups: type", weights.get("type", "int"), "int")
    actorder = weights.get("actorder")
    if actorder in ("group", "dynamic", True):  # "weight" and "static" leave the groups as they are
        raise ModelError(f"{file}: config_groups: actorder {actorder!r} (activation order) is not supported")
    strategy = weights.get("strategy", "group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise ModelError(f"{file}: config_groups: strategy {strategy!r} is not supported; supported: group, channel")
    group_size = -1 if strategy == "channel" else _group_size(file, weights.get("group_size"))
    return QuantizationConfig(
        group_size,
        tuple(declared.get("ignore") or ()),
        method="compressed-tensors",
        symmetric=bool(weights.get("symmetric", True)),
    )


_QUANTIZATIONS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}


def _only(file: str, field: str, value: object, supported: object) -> None:
    if value != supported or isinstance(value, bool) is not isinstance(supported, bool):
        shown = str(supported).lower() if isinstance(supported, bool) else supported
        raise ModelError(f"{file}: {field} {value!r} is not supported; supported: {shown}")


def _group_size(file: str, value: object) -> int:
    if not isinstance(value, int) or (value <= 0 and value != -1):
        raise ModelError(f"{file}: group_size must be a positive integer or -1, found {value!r}")
    return value

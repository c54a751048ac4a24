"""What a quantization is asked to do, and what the checkpoint says was done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

GROUP_SIZES = (32, 64, 128, -1)
"""Inputs that share one scale and zero point; -1 is the whole row."""

METHODS = ("awq", "rtn")
FORMATS = ("awq", "compressed-tensors")
ROUNDINGS = ("nearest", "feedback")
DTYPES = ("auto", "float16", "bfloat16")
_DEVICE_NAME = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Effort:
    """How finely to search and on how much text."""

    samples: int
    """Calibration sequences, unless `samples` says otherwise."""
    search_rows: int
    """Rows of the weights that the scale search looks at, evenly spread: a scale is shared by all, so a sample ranks it."""
    exponent_steps: int
    """Exponents of a coarse pass over (0, 1]; a finer one goes around its best."""
    shrink_steps: int
    """Candidates for a clipped range, evenly spread from half of the full one."""
    sweeps: int = 0
    """Passes of coordinate descent over the rounded integers and scales (with rounding `feedback`)."""


EFFORTS = {
    "fast": Effort(samples=8, search_rows=256, exponent_steps=4, shrink_steps=5),
    "default": Effort(samples=28, search_rows=512, exponent_steps=8, shrink_steps=10),
    "high": Effort(samples=64, search_rows=1024, exponent_steps=16, shrink_steps=20, sweeps=8),
}


class QuantizeError(ValueError):
    """Something the user can mend: a source, an option or a tensor that cannot be quantized as asked."""


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The `quantization_config` of an AWQ gemm checkpoint's config.json."""

    group_size: int
    modules_to_not_convert: tuple[str, ...] = ()
    bits: int = 4
    zero_point: bool = True
    version: str = "gemm"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; an empty list of unconverted modules is null, as other tools write it."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": self.version,
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """Parses a checkpoint's quantization_config; QuantizeError names the field that is not the AWQ gemm format."""
        expected = {"quant_method": ("awq",), "bits": (4,), "zero_point": (True,), "version": ("gemm", "GEMM")}
        for field, allowed in expected.items():
            value = data.get(field, allowed[0] if field == "version" else None)
            if value not in allowed:
                raise QuantizeError(f"quantization_config.{field}: expected {allowed[0]!r}, found {value!r}")
        group_size = data.get("group_size")
        if not isinstance(group_size, int) or (group_size != -1 and group_size <= 0):
            raise QuantizeError(
                f"quantization_config.group_size: expected a positive integer or -1, found {group_size!r}"
            )
        return cls(group_size, tuple(data.get("modules_to_not_convert") or ()))

    def to_compressed_tensors(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The same as compressed-tensors says it. ignored: full names of the linears that stay dense."""
        whole_rows = self.group_size == -1
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "channel" if whole_rows else "group",
            "group_size": None if whole_rows else self.group_size,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }

    @classmethod
    def from_compressed_tensors(cls, data: Mapping[str, Any]) -> QuantConfig:
        """Parses what `to_compressed_tensors` gives; QuantizeError names the field that is of another kind."""
        groups = list((data.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
        found = {"format": data.get("format"), **{key: weights.get(key) for key in ("num_bits", "type", "symmetric")}}
        expected = {"format": "pack-quantized", "num_bits": 4, "type": "int", "symmetric": False}
        for field, value in expected.items():
            if found[field] != value:
                raise QuantizeError(f"quantization_config.{field}: expected {value!r}, found {found[field]!r}")
        return cls(weights.get("group_size") or -1, tuple(data.get("ignore") or ()))

    def converts(self, module: str) -> bool:
        """Whether the linear of this full name is quantized. Names match by substring, as in every AWQ loader."""
        return not any(skipped in module for skipped in self.modules_to_not_convert)


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Everything that decides the written integers, apart from the source. Defaults are the command's."""

    group_size: int = 128
    format: str = "awq"
    method: str = "awq"
    effort: str = "default"
    scales: bool = True
    unscaled_modules: tuple[str, ...] = ()
    """Linears whose inputs get no scale: those whose full name contains one of these."""
    clip: bool = True
    rounding: str = "feedback"
    calibration: str = "builtin"
    samples: int | None = None
    """Calibration sequences; None is what the effort says."""
    sequence_length: int = 512
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    """What it is computed on: `auto`, `cpu`, `cuda` or `cuda:N`."""
    modules_to_not_convert: tuple[str, ...] = ()
    max_shard_bytes: int = 4_000_000_000

    def __post_init__(self) -> None:
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("format", self.format, FORMATS)
        _one_of("method", self.method, METHODS)
        _one_of("effort", self.effort, tuple(EFFORTS))
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("dtype", self.dtype, DTYPES)
        check_device_name(self.device)
        for field, minimum in (("samples", 1), ("sequence_length", 8), ("max_shard_bytes", 1)):
            value = getattr(self, field)
            if value is not None and value < minimum:
                raise QuantizeError(f"{field}: {value} is below the minimum of {minimum}")

    @property
    def quant_config(self) -> QuantConfig:
        """What config.json will say. A non-empty list must name lm_head too: readers take the list as complete."""
        skipped = self.modules_to_not_convert
        if skipped and "lm_head" not in skipped:
            skipped = (*skipped, "lm_head")
        return QuantConfig(self.group_size, skipped)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resolved(self) -> QuantizeOptions:
        """Everything written out: the effort's samples; method `rtn` as no scales, no clip and nearest rounding."""
        resolved = replace(self, samples=self.samples or EFFORTS[self.effort].samples)
        if self.method == "rtn":
            resolved = replace(resolved, scales=False, clip=False, rounding="nearest")
        return resolved


def check_device_name(name: str) -> None:
    """QuantizeError for what is no device, whether there is such a one or not."""
    if not _DEVICE_NAME.fullmatch(name):
        raise QuantizeError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N")


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise QuantizeError(f"{field}: {value!r} is not one of {', '.join(map(str, allowed))}")

"""Optional tuning of the quantized products on the GPU at hand, kept on disk. `python -m kernels.bench --device cuda --tune`
makes the file; serving only reads it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from kernels.gpu.tuning import DECODE_ROWS, Chip, GemmConfig, gemm_config

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the file and of the kernels that it speaks of: raised when either changes so that old entries mislead."""

Tuned = Mapping[str, GemmConfig]


def cache_path(chip: Chip) -> Path:
    """Where the tuning of this chip is kept: under $XDG_CACHE_HOME, or ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(letter if letter.isalnum() else "-" for letter in chip.name.lower())
    return root / "awq-serve" / f"tuning-{name}-{chip.arch}-{chip.num_sms}.json"


def key_of(block_m: int, out_features: int, in_features: int, group_size: int, dtype: str) -> str:
    return f"{block_m} {out_features}x{in_features} g{group_size} {dtype}"


def candidates(chip: Chip, rows: int, out_features: int, in_features: int, group_size: int) -> Iterator[GemmConfig]:
    """The policy's choice first, then its neighbours: other partitions of K, stages, and places of the scale."""
    base = gemm_config(chip, rows, out_features, in_features, group_size)
    yield base
    if base.dequantize:
        return
    num_k = -(-in_features // 128)
    parts = {base.num_parts, *(count for count in (1, 2, 3, 4, 6, 8, 12, 16) if count <= num_k // 2)}
    for count in sorted(-(-num_k // -(-num_k // count)) for count in parts):
        for stages in (2, 3, 4, 5):
            for scale_after in (True, False) if rows <= 32 else (base.scale_after,):
                config = replace(base, num_parts=count, num_stages=stages, scale_after=scale_after)
                if config != base:
                    yield config


def tune(
    chip: Chip,
    shapes: list[tuple[int, int, int]],
    dtype: str,
    measure: Callable[[GemmConfig, int, int, int, int], float],
) -> dict[str, GemmConfig]:
    """The fastest configuration per (N, K, group size) and row tile. `measure(config, rows, N, K, group)` gives seconds,
    infinity for a configuration that does not run here."""
    found = {}
    for n, k, group_size in shapes:
        for rows in DECODE_ROWS:
            choices = list(candidates(chip, rows, n, k, group_size))
            seconds = [measure(config, rows, n, k, group_size) for config in choices]
            found[key_of(rows, n, k, group_size, dtype)] = choices[seconds.index(min(seconds))]
    return found


def save(path: Path, tuned: Tuned) -> None:
    """Adds to what the file holds."""
    entries = {**load(path), **tuned}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    content = {"version": VERSION, "configs": {key: asdict(config) for key, config in sorted(entries.items())}}
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def load(path: Path) -> dict[str, GemmConfig]:
    """What the file holds; nothing, with a line in the log, when it is missing, damaged or of another version."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            logger.warning("%s: version %r, expected %d: not used", path, content["version"], VERSION)
            return {}
        return {key: GemmConfig(**config) for key, config in content["configs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: not a tuning file (%s): not used", path, error)
        return {}


def choose(
    chip: Chip, tuned: Tuned, rows: int, out_features: int, in_features: int, group_size: int, dtype: str
) -> GemmConfig:
    """The tuned configuration where there is one, else the policy's."""
    if tuned and rows <= DECODE_ROWS[-1]:
        block_m = next(size for size in DECODE_ROWS if rows <= size)
        config = tuned.get(key_of(block_m, out_features, in_features, group_size, dtype))
        if config is not None:
            return config
    return gemm_config(chip, rows, out_features, in_features, group_size)

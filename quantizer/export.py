"""Writing a checkpoint as it is made, putting it in place only when it is whole, and reading it back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from kernels.format import AWQ_TENSORS, AwqWeight
from quantizer.config import QuantConfig, QuantizeError
from quantizer.sources import Source

REPORT_FILE = "quantization_report.json"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointWriter:
    """Collects tensors into shards in a folder beside `out`, and renames it to `out` when all is written and checked.

    Until then nothing is at `out`. Use it as a context manager: whatever goes wrong, the folder beside is removed.
    """

    def __init__(self, out: Path, max_shard_bytes: int, overwrite: bool = False) -> None:
        self.out = out.absolute()
        self.overwrite = overwrite
        self.max_shard_bytes = max_shard_bytes
        self.staging = self.out.with_name(f".{self.out.name}.partial")
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._digests: dict[str, str] = {}
        self.total_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        check_output(self.out, self.overwrite)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Queues one tensor; a full shard goes to disk at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        if name in self._digests:
            raise QuantizeError(f"{name}: written twice")
        self._pending[name] = tensor.contiguous()
        self._digests[name] = _digest(tensor)
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        part = self._part(len(self._shards))
        save_file(self._pending, part, metadata={"format": "pt"})
        # safetensors writes for the owner alone; a server often runs as someone else.
        part.chmod(self.staging.stat().st_mode & 0o666)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self.staging / f"part-{index:05d}"

    def finish(self, source: Source, quant_config: QuantConfig, dtype: torch.dtype, report: dict[str, Any]) -> None:
        """Writes index, config, report and side files, reads everything back, and moves it to `out`."""
        if self._pending:
            self._flush()
        self._name_shards()
        config = checkpoint_config(source, quant_config, dtype)
        (self.staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (self.staging / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
        source.write_side_files(self.staging)
        verify(self.staging, self._digests)
        if self.out.exists():
            check_output(self.out, self.overwrite)
            shutil.rmtree(self.out)
        self.staging.rename(self.out)

    def _name_shards(self) -> None:
        total = len(self._shards)
        if total == 1:
            self._part(0).rename(self.staging / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{total:05d}.safetensors"
            self._part(index).rename(self.staging / file)
            weight_map |= dict.fromkeys(names, file)
        index_json = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.staging / INDEX_FILE).write_text(json.dumps(index_json, indent=2) + "\n")


def check_output(out: Path, overwrite: bool) -> None:
    """QuantizeError if something is at `out` that the user did not say to replace."""
    if out.exists() and not out.is_dir():
        raise QuantizeError(f"{out}: exists and is not a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise QuantizeError(f"{out}: is not empty; pass --overwrite to replace it")
        # A mistyped OUT must not cost the user a folder that was never a model.
        if not (out / "config.json").is_file():
            raise QuantizeError(f"{out}: is not a checkpoint (no config.json), so --overwrite will not replace it")


def checkpoint_config(source: Source, quant_config: QuantConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json with the dtype of the unquantized parts and the quantization_config."""
    config = dict(source.config_json)
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quant_config.to_dict()
    return config


def verify(folder: Path, digests: dict[str, str]) -> None:
    """Reads a written checkpoint back: every tensor's bytes, every AWQ triple's format, and that the config loads."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quant_config = QuantConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors: dict[str, dict[str, Tensor]] = {}
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in list(handle.keys()):
                tensor = handle.get_tensor(name)
                if _digest(tensor) != digests.get(name):
                    raise QuantizeError(f"{path}: tensor {name} is not what was written")
                found.add(name)
                module, _, kind = name.rpartition(".")
                if kind in AWQ_TENSORS:
                    triple = tensors.setdefault(module, {})
                    triple[kind] = tensor
                    if len(triple) == len(AWQ_TENSORS):
                        AwqWeight.from_tensors(module, tensors.pop(module), quant_config.group_size)
    if found != digests.keys():
        raise QuantizeError(f"{folder}: tensor {min(digests.keys() ^ found)} was lost in writing")
    if tensors:
        raise QuantizeError(f"{folder}: {min(tensors)} lacks one of {', '.join(AWQ_TENSORS)}")
    if not any(f"{config.num_hidden_layers - 1}." in name for name in found):
        raise QuantizeError(f"{folder}: the last of {config.num_hidden_layers} layers is not there")


def _digest(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()

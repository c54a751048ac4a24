"""From finished parts to a checkpoint: shards, config and report put together, read back, and moved to OUT in one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from quantizer import html_report
from quantizer.config import QuantizeError
from quantizer.files import (
    exchange,
    num_bytes,
    read_entries,
    sync_folder,
    sync_tree,
    tensor_digest,
    write_atomically,
    write_json,
    write_safetensors,
)
from quantizer.layouts import parse_quantization, quantized_modules, read_packed
from quantizer.sources import Source
from quantizer.work_folder import CHECKPOINT_FOLDER, DONE_FILE, REPLACED_FOLDER, WorkFolder, load_tensor

REPORT_FILE = "quantization_report.json"
HTML_FILE = "quantization_report.html"
INDEX_FILE = "model.safetensors.index.json"
SUMS_FILE = "SHA256SUMS"


def assemble(
    work: WorkFolder, source: Source, config: dict[str, Any], report: dict[str, Any], max_shard_bytes: int
) -> Path:
    """Puts the parts together in the work folder, reads everything back, and returns the folder that is to be OUT.

    Made anew after every stop: it takes seconds. The index comes last, then the mark that all is there.
    """
    done, folder = work.path / DONE_FILE, work.path / CHECKPOINT_FOLDER
    done.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    index = _write_shards(work, folder, max_shard_bytes)
    write_json(folder / "config.json", config)
    write_report(folder, report)
    source.write_side_files(folder)
    verify(folder, work.digests())
    if index is not None:
        write_json(folder / INDEX_FILE, index)
    write_sums(folder)
    sync_tree(folder)
    write_json(done, {"bytes": report["bytes"], "inode": folder.stat().st_ino})
    return folder


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """The report as JSON and as a page."""
    write_json(folder / REPORT_FILE, report, indent=1)
    page = html_report.render(json.loads(json.dumps(report)))
    write_atomically(folder / HTML_FILE, lambda file: file.write(page.encode()))


def write_sums(folder: Path) -> None:
    """SHA-256 of each safetensors file, as `sha256sum` writes them and `sha256sum --check` reads them."""
    lines = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    write_atomically(folder / SUMS_FILE, lambda file: file.write("".join(lines).encode()))


def _write_shards(work: WorkFolder, folder: Path, max_shard_bytes: int) -> dict[str, Any] | None:
    """Tensors in order of the parts, a new file wherever one would grow past the limit; returns the index, if one is needed."""
    parts = {name: path for path in work.parts() for name in read_entries(path)}
    entries = {name: entry for path in work.parts() for name, entry in read_entries(path).items()}
    shards: list[list[str]] = [[]]
    total = size = 0
    for name, entry in entries.items():
        tensor_size = num_bytes(*entry)
        if size and size + tensor_size > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + tensor_size, total + tensor_size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(
            folder / file,
            {name: entries[name] for name in shard},
            lambda name: load_tensor(parts[name], name),
            {"format": "pt"},
        )
    if len(shards) == 1:
        return None
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def publish(work: WorkFolder, folder: Path, out: Path, overwrite: bool) -> None:
    """Moves the checkpoint to `out` and removes the work folder. If that is stopped, the next run goes on.

    What is at `out` already swaps names with the new one. Where the file system cannot do that in one step it waits in the work
    folder meanwhile, and the next run puts it back if this one stops there.
    """
    out = out.absolute()
    if not out.exists():
        os.replace(folder, out)
    else:
        check_output(out, overwrite)
        if not exchange(folder, out):
            replaced = work.path / REPLACED_FOLDER
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(out, replaced)
            os.replace(folder, out)
    sync_folder(out.parent)
    work.remove()


def is_published(work: WorkFolder, out: Path) -> bool:
    """Whether an earlier run was stopped after it had moved the checkpoint to `out`: only cleaning up is left."""
    done = work.path / DONE_FILE
    if not done.is_file() or not out.is_dir():
        return False
    # After an exchange the folder that was replaced lies where the checkpoint was.
    moved = not (work.path / CHECKPOINT_FOLDER).exists()
    return moved or out.stat().st_ino == json.loads(done.read_text())["inode"]


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


def checkpoint_config(source: Source, quantization: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json with the dtype of the unquantized parts and the quantization_config."""
    config = dict(source.config_json)
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quantization
    return config


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Reads a written checkpoint back: every tensor's bytes, every quantized linear's format, and that the config loads."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    layout, quant_config = parse_quantization(json.loads((folder / "config.json").read_text())["quantization_config"])
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name in read_entries(path):
            if tensor_digest(load_tensor(path, name)) != digests.get(name):
                raise QuantizeError(f"{path}: tensor {name} is not what was written")
            files[name] = path
    if files.keys() != digests.keys():
        raise QuantizeError(f"{folder}: tensor {min(digests.keys() ^ files.keys())} was lost in writing")
    for module, kinds in quantized_modules(files, layout).items():
        read_packed(module, kinds, lambda name: load_tensor(files[name], name), layout, quant_config.group_size)
    if not any(f"{config.num_hidden_layers - 1}." in name for name in files):
        raise QuantizeError(f"{folder}: the last of {config.num_hidden_layers} layers is not there")

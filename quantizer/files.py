"""Files that appear whole or not at all, and safetensors written one tensor at a time."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
"""What a quantization writes, as a safetensors header spells it."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_HEADER_ALIGNMENT = 8


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes beside `path`, flushes to the disk and renames: `path` holds what it held before, or all of the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    write_atomically(path, lambda file: file.write(f"{json.dumps(value, indent=indent)}\n".encode()))


def sync_folder(folder: Path) -> None:
    """Makes the folder's renames last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def exchange(first: Path, second: Path) -> bool:
    """Two paths that exist swap names in one step, so that at no moment either is missing.

    False where the C library, the kernel or the file system cannot; nothing is changed then. OSError if it fails otherwise.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def sync_tree(folder: Path) -> None:
    """Flushes every file and folder below, and the folder itself: also those that other packages wrote."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def write_safetensors(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes the tensors of `entries`, asking for one at a time; safetensors' own writer needs all of them in memory, twice.

    Larger dtypes come first, so that every tensor is aligned to its element size.
    """
    names = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        dtype, shape = entries[name]
        size = num_bytes(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)

    def write(file: BinaryIO) -> None:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            tensor = load(name)
            assert (tensor.dtype, tuple(tensor.shape)) == entries[name], name
            file.write(tensor_bytes(tensor))

    write_atomically(path, write)


def read_entries(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor in a file that `write_safetensors` wrote, from its header."""
    with safe_open(path, framework="pt") as handle:
        slices = {name: handle.get_slice(name) for name in sorted(handle.keys())}
        return {name: (_DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(torch.Size(shape).numel())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values in memory order, little-endian as safetensors wants them; not a copy where they lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def files_digest(paths: list[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()

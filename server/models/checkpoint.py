"""The tensors of a safetensors checkpoint: found and described from the file headers, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.checkpoint_files import safetensors_files
from server.model_config import ModelError

_SCALES = (".scales", ".weight_scale")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what its header says, without reading it."""

    file: str
    stored_name: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """All tensors of the safetensors files in a directory, sharded or not.

    `rename` makes a tensor's name of the one it is stored under, or None where it is passed over; `ignored` counts those. Reads
    no data until `read`. Raises ModelError, naming the file, for missing, truncated or foreign files.
    """

    def __init__(self, model_dir: Path, rename: Callable[[str], str | None] = str) -> None:
        self.model_dir = model_dir
        self.ignored = 0
        self.tensors: dict[str, TensorInfo] = {}
        self._read: set[str] = set()
        self._files: dict[str, safe_open] = {}
        for file in safetensors_files(model_dir):
            handle = self._open(file)
            for stored_name in handle.keys():  # noqa: SIM118 (not a mapping)
                name = rename(stored_name)
                if name is None:
                    self.ignored += 1
                    continue
                part = handle.get_slice(stored_name)
                if name in self.tensors:
                    raise ModelError(f"{file}: tensor {name} is also in {self.tensors[name].file}")
                self.tensors[name] = TensorInfo(file, stored_name, part.get_dtype(), tuple(part.get_shape()))

    def _open(self, file: str) -> safe_open:
        if file not in self._files:
            try:
                self._files[file] = safe_open(str(self.model_dir / file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: not a complete safetensors file ({error})") from None
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def expect(self, name: str, shape: tuple[int, ...] | None = None, dtypes: Iterable[str] = ()) -> TensorInfo:
        """The tensor's description, checked against shape and dtypes (safetensors' names) without reading it."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.model_dir.name}: tensor {name} is missing")
        if shape is not None and info.shape != shape:
            raise ModelError(f"{info.file}: tensor {name}: expected shape {list(shape)}, found {list(info.shape)}")
        allowed = tuple(dtypes)
        if allowed and info.dtype not in allowed:
            raise ModelError(f"{info.file}: tensor {name}: expected dtype {' or '.join(allowed)}, found {info.dtype}")
        return info

    def read(self, name: str) -> Tensor:
        """Raises ModelError also for scales of quantized weights that are not finite: nothing but rubbish would come of them."""
        info = self.expect(name)
        self._read.add(name)
        try:
            tensor = self._open(info.file).get_tensor(info.stored_name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{info.file}: tensor {name} cannot be read ({error})") from None
        if name.endswith(_SCALES) and not bool(tensor.isfinite().all()):
            raise ModelError(f"{info.file}: tensor {name}: holds a scale that is not finite")
        return tensor

    def close(self) -> None:
        """Lets go of the files' mappings."""
        self._files.clear()

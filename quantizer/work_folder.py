"""What a quantization has finished so far, kept beside OUT, so that the same command goes on where it was stopped.

The folder holds `state.json` (all that decides the output), one safetensors file per finished part with its tensors' digests
and, for a layer, its report in the metadata, and the hidden states that enter the next layer. A layer is finished when its
file is in place; the hidden states after it are in place before that.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantizer.config import QuantizeError
from quantizer.files import tensor_digest, write_json, write_safetensors

STATE_FILE = "state.json"
DONE_FILE = "done"
"""Beside the assembled checkpoint: it is whole, verified, and may be moved to OUT."""
CHECKPOINT_FOLDER = "checkpoint"
"""What is to become OUT."""
REPLACED_FOLDER = "replaced"
"""What was at OUT, for a moment."""
_LOCK_FILE = "lock"


class WorkFolder:
    """A context manager: locked while open, removed by `remove`, and kept when an exception passes if there is anything in it
    to go on from.

    fingerprint: JSON values of everything the output depends on. QuantizeError names what differs from a work folder that is
    already there; `restart` discards that folder instead, as is one without a finished layer.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], restart: bool = False) -> None:
        self.path, self._out = work_folder_path(out), out
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._restart = restart

    def __enter__(self) -> WorkFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise QuantizeError(f"{self.path}: another awq-quantize is at work there") from None
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        if exception_type is not None and self.path.exists() and not _is_begun(self.path):
            self.remove()
        self._lock.close()

    def _open(self) -> None:
        replaced = self.path / REPLACED_FOLDER
        if replaced.exists() and not self._out.exists():
            os.replace(replaced, self._out)
        state = self.path / STATE_FILE
        if state.is_file() and _is_begun(self.path) and not self._restart:
            self._compare(json.loads(state.read_text()))
        else:
            self._clear(kept=(_LOCK_FILE,))
            write_json(state, self._fingerprint)
        for path in self.path.glob("*.tmp"):
            path.unlink()

    def _compare(self, found: dict[str, Any]) -> None:
        before, now = _flat(found), _flat(self._fingerprint)
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if differing:
            name = differing[0]
            more = f" ({', '.join(differing[1:])} too)" if differing[1:] else ""
            raise QuantizeError(
                f"{self.path}: begun with {name} {before.get(name)!r}, now {now.get(name)!r}{more}; give the command that began "
                f"it, on the same machine, to go on after {self.num_layers} finished layers, or --restart to discard them"
            )

    @property
    def num_layers(self) -> int:
        """Layers finished, all of them from the first on."""
        count = 0
        while self._layer(count).is_file():
            count += 1
        return count

    def _layer(self, index: int) -> Path:
        return _layer_file(self.path, index)

    def _hidden(self, index: int) -> Path:
        return self.path / f"hidden-{index:05d}.safetensors"

    def hidden(self, index: int) -> Tensor:
        """The hidden states that enter layer `index`: fp32 [sequences, length, hidden size]."""
        # Copied: memory of torch's own, aligned as in a run without a stop, so that sums come out the same.
        return load_file(self._hidden(index))["hidden"].clone()

    def add_layer(self, index: int, tensors: Mapping[str, Tensor], report: Any, hidden: Tensor | None) -> None:
        """hidden: what enters the layer after it, None after the last."""
        if hidden is not None:
            _write(self._hidden(index + 1), {"hidden": hidden}, {})
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        _write(self._layer(index), tensors, {"digests": json.dumps(digests), "report": json.dumps(report)})
        self._hidden(index).unlink(missing_ok=True)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor outside the layers."""
        _write(self._other(name), {name: tensor}, {"digests": json.dumps({name: tensor_digest(tensor)})})

    def has_tensor(self, name: str) -> bool:
        return self._other(name).is_file()

    def _other(self, name: str) -> Path:
        return self.path / f"other-{name}.safetensors"

    def parts(self) -> list[Path]:
        """All finished files, layers first."""
        return [*sorted(self.path.glob("layer-*.safetensors")), *sorted(self.path.glob("other-*.safetensors"))]

    def digests(self) -> dict[str, str]:
        """Of every tensor, as it was before it was written."""
        return {
            name: digest for path in self.parts() for name, digest in json.loads(_metadata(path)["digests"]).items()
        }

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(_metadata(self._layer(index))["report"]) for index in range(self.num_layers)]

    def remove(self) -> None:
        """The marks go last: stopped in between, the folder still says that the checkpoint was moved to OUT."""
        self._clear(kept=(_LOCK_FILE, STATE_FILE, DONE_FILE))
        (self.path / DONE_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.path)

    def _clear(self, kept: Collection[str]) -> None:
        for path in self.path.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def work_folder_path(out: Path) -> Path:
    out = out.absolute()
    return out.with_name(f".{out.name}.partial")


def is_begun(out: Path) -> bool:
    """Whether an earlier run left anything beside OUT to go on from."""
    return _is_begun(work_folder_path(out))


def _is_begun(work: Path) -> bool:
    return (work / DONE_FILE).is_file() or _layer_file(work, 0).is_file()


def _layer_file(work: Path, index: int) -> Path:
    return work / f"layer-{index:05d}.safetensors"


def reusable_bytes(out: Path) -> int:
    """Bytes on disk of finished parts and of a checkpoint being made of them."""
    work = work_folder_path(out)
    paths = [*work.glob("*.safetensors"), *(work / CHECKPOINT_FOLDER).rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, entries, lambda name: tensors[name], metadata)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata())
    except (SafetensorError, OSError) as error:
        raise QuantizeError(f"{path}: cannot be read ({error}); --restart begins anew") from error


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{prefix}.{key}".lstrip(".")).items()
    }


def load_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a finished part."""
    with safe_open(path, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor

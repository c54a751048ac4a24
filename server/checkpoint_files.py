"""Which safetensors files make a checkpoint, and whether they are what the quantizer wrote. Reads no tensor.

`awq-quantize` leaves SHA256SUMS beside them, in the format of `sha256sum`. Checkpoints without it are served unverified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from server.model_config import ModelError

INDEX_FILE = "model.safetensors.index.json"
SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_CHUNK = 1 << 20
_LENGTH_SIZE = 8  # bytes before a safetensors header, which say how long it is


def safetensors_files(model_dir: Path) -> list[str]:
    """Names, sorted. Raises ModelError."""
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: not a directory")
    index = model_dir / INDEX_FILE
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{INDEX_FILE}: expected a JSON object with weight_map") from None
        for file in files:
            if Path(file).name != file or not (model_dir / file).is_file():
                raise ModelError(f"{INDEX_FILE}: names {file}, which is not in {model_dir}")
        return files
    files = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if files:
        return files
    foreign = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in model_dir.glob(pattern))
    found = f"found {', '.join(foreign[:3])}" if foreign else "found none"
    raise ModelError(f"{model_dir}: no *.safetensors files ({found}); only safetensors checkpoints are served")


def check_lengths(model_dir: Path) -> None:
    """Raises ModelError for a file that is shorter or longer than its header says."""
    for name in safetensors_files(model_dir):
        path = model_dir / name
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH_SIZE), "little")
                size = path.stat().st_size
                header = json.loads(file.read(length)) if _LENGTH_SIZE + length <= size else None
            assert header is not None
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError) as error:
            what = error.strerror if isinstance(error, OSError) else "its header cannot be read"
            raise ModelError(f"{name}: not a complete safetensors file ({what})") from None
        if _LENGTH_SIZE + length + end != size:
            expected = _LENGTH_SIZE + length + end
            raise ModelError(f"{name}: not a complete safetensors file ({size} bytes, its header says {expected})")


def read_sums(model_dir: Path) -> dict[str, str]:
    """SHA-256 in hexadecimal digits by file name; empty where the checkpoint has none. Raises ModelError."""
    path = model_dir / SUMS_FILE
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{SUMS_FILE}: cannot be read ({error})") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise ModelError(f"{SUMS_FILE}: line {number}: expected a SHA-256 in 64 hexadecimal digits and a file name")
        sums[parts[2]] = parts[1].lower()
    return sums


def verify_sums(model_dir: Path) -> int:
    """Raises ModelError for a safetensors file whose SHA-256 is not the one in SHA256SUMS. Returns how many were compared."""
    sums = read_sums(model_dir)
    files = [name for name in safetensors_files(model_dir) if name in sums]
    for name in files:
        digest = hashlib.sha256()
        try:
            with (model_dir / name).open("rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise ModelError(f"{name}: cannot be read ({error.strerror})") from None
        if digest.hexdigest() != sums[name]:
            raise ModelError(
                f"{name}: damaged: its SHA-256 is {digest.hexdigest()}, {SUMS_FILE} says {sums[name]} "
                "(--no-verify-checksums loads it all the same)"
            )
    return len(files)


@contextlib.contextmanager
def verified(model_dir: Path) -> Iterator[None]:
    """Verifies in a thread while the block loads; raises ModelError for a damaged file also where the block trips over it first."""
    errors: list[ModelError] = []

    def verify() -> None:
        try:
            verify_sums(model_dir)
        except ModelError as error:
            errors.append(error)

    thread = threading.Thread(target=verify, name="checksums", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        thread.join()
        if errors:
            raise errors[0] from error
        raise
    thread.join()
    if errors:
        raise errors[0]

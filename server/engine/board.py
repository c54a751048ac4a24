"""What the engine is at, in memory that outlives it: written by its loop, read by the API process at any moment, also when the
engine has crashed in the middle of a step or hangs.

Two slots are filled in turn, and then one word says which of them counts: a reader never sees half an entry.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

_CURRENT = struct.Struct("<Q")  # the serial number of the entry that counts; its slot is the number's parity
_ENTRY = struct.Struct("<QdII")  # serial number, predicted seconds, length of the names, whether all names are there
_SLOT_SIZE = 1 << 16
_SIZE = _CURRENT.size + 2 * _SLOT_SIZE


@dataclass(frozen=True, slots=True)
class BoardEntry:
    """`serial` grows with everything the engine does. `request_ids`: of the
    step under way, or the request that is being taken in; None where they are not known."""

    serial: int
    predicted_seconds: float
    request_ids: frozenset[str] | None


class Board:
    """One writer, one reader. Shared with a process that is started with it as an argument."""

    def __init__(self, is_shared: bool) -> None:
        self._memory: Any = bytearray(_SIZE)
        if is_shared:
            self._file = _unnamed_file()
            os.ftruncate(self._file, _SIZE)
            self._memory = mmap.mmap(self._file, _SIZE)

    def __getstate__(self) -> Any:
        return DupFd(self._file)

    def __setstate__(self, state: Any) -> None:
        self._file = state.detach()
        self._memory = mmap.mmap(self._file, _SIZE)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def write(self, request_ids: Sequence[str] = (), predicted_seconds: float = 0.0) -> None:
        """Something is done for these requests, which is to take so long; without any: the engine rests, or prepares a step."""
        (serial,) = _CURRENT.unpack_from(self._memory, 0)
        serial += 1
        begin = _CURRENT.size + serial % 2 * _SLOT_SIZE
        names = "\n".join(request_ids).encode()
        is_whole = len(names) <= _SLOT_SIZE - _ENTRY.size
        if not is_whole:
            names = b""
        _ENTRY.pack_into(self._memory, begin, serial, predicted_seconds, len(names), is_whole)
        begin += _ENTRY.size
        self._memory[begin : begin + len(names)] = names
        _CURRENT.pack_into(self._memory, 0, serial)

    def read(self) -> BoardEntry:
        while True:
            (current,) = _CURRENT.unpack_from(self._memory, 0)
            begin = _CURRENT.size + current % 2 * _SLOT_SIZE
            _, predicted, length, is_whole = _ENTRY.unpack_from(self._memory, begin)
            names = bytes(self._memory[begin + _ENTRY.size : begin + _ENTRY.size + length])
            if not current:
                return BoardEntry(0, 0.0, frozenset())  # nothing was written yet
            if (current,) == _CURRENT.unpack_from(self._memory, 0):  # else the writer may have come round to this slot
                break
        return BoardEntry(current, predicted, frozenset(names.decode().split("\n")) - {""} if is_whole else None)


def _unnamed_file() -> int:
    """A descriptor of memory that no path leads to: a container may have neither /dev/shm nor a folder that can be written."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("awq-serve board")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

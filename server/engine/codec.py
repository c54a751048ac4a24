"""How protocol messages cross the pipe: one byte for the message's class, then the dataclass as MessagePack."""

from __future__ import annotations

import contextlib
import os
import socket
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from server.types import (
    AbortRequest,
    EngineFailure,
    EngineInfo,
    EngineInput,
    EngineOutput,
    GenerateRequest,
    PoolRequest,
    Shutdown,
    StepOutput,
)

# A message's index here is its first byte. Both processes come from one installation, so the order is free to change.
_MESSAGES: tuple[type[Any], ...] = (
    GenerateRequest,
    PoolRequest,
    AbortRequest,
    Shutdown,
    StepOutput,
    EngineInfo,
    EngineFailure,
)
_TAGS = {message: bytes([tag]) for tag, message in enumerate(_MESSAGES)}
_DECODERS = tuple(msgspec.msgpack.Decoder(message) for message in _MESSAGES)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: EngineInput | EngineOutput) -> bytes:
    """The message as bytes; KeyError for anything that is not a protocol message."""
    return _TAGS[type(message)] + _ENCODER.encode(message)


def decode(data: bytes) -> Any:
    """The message that `encode` made `data` from. Raises ValueError (msgspec's errors are) for bytes that are none."""
    if not data or data[0] >= len(_DECODERS):
        raise ValueError(f"not an engine message: starts with {data[:1]!r}")
    return _DECODERS[data[0]].decode(memoryview(data)[1:])


def hang_up(connection: Connection) -> None:
    """End the pipe for both sides, and for threads that wait on it here, which `Connection.close` alone does not wake.

    Close only after those threads have ended: the descriptor's number may belong to another pipe a moment later.
    """
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as pipe:
        pipe.shutdown(socket.SHUT_RDWR)

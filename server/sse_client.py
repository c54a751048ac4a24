"""A streaming HTTP/1.1 client for load generators: a fraction of a general client's processor time per chunk.

A load generator that takes more time per token than the server does measures itself. This one speaks just what a streamed
completion needs: one POST per connection, plain or chunked bodies, server-sent events.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

_MAX_LINE = 2**22  # bytes of one header or event line


class ClientError(Exception):
    """The connection failed, was cut, or was silent for too long."""


class HttpError(ClientError):
    """An answer that is not 200."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:500]}")


class SseClient:
    """Posts to one server; each post has a connection of its own. `timeout`: seconds of silence."""

    def __init__(self, base_url: str, headers: Mapping[str, str], timeout: float) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{base_url}: not a http:// or https:// URL")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._head = f"Host: {host}:{self._port}\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers.items()
        )
        self._timeout = timeout

    async def post(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """The payload of each `data:` line but `[DONE]`, as it arrives. Raises ClientError."""
        try:
            async with asyncio.timeout(self._timeout) as deadline:
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_MAX_LINE)
                try:
                    writer.write(
                        f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
                        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                        + body
                    )
                    await writer.drain()
                    status, chunked = await _read_head(reader)
                    chunks = _read_chunks(reader) if chunked else _read_plain(reader)
                    if status != 200:
                        raise HttpError(status, b"".join([chunk async for chunk in chunks]).decode(errors="replace"))
                    rest = b""
                    async for chunk in chunks:
                        deadline.reschedule(asyncio.get_running_loop().time() + self._timeout)
                        *lines, rest = (rest + chunk).split(b"\n")
                        for line in lines:
                            if line.startswith(b"data:") and (payload := line[5:].strip()) != b"[DONE]":
                                yield payload
                finally:
                    writer.close()
                    with contextlib.suppress(OSError, ssl.SSLError):
                        await writer.wait_closed()
        except TimeoutError:
            raise ClientError(f"nothing came for {self._timeout:g} s") from None
        except asyncio.IncompleteReadError:
            raise ClientError("the server closed the connection in the middle of its answer") from None
        except (OSError, ValueError) as error:  # ValueError: a line over the limit, or no HTTP
            raise ClientError(f"{type(error).__name__}: {error}") from None


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body is chunked."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *header_lines = head.split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in header_lines)}
    return int(status_line.split(" ", 2)[1]), headers.get("transfer-encoding", "").lower() == "chunked"


async def _read_chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _read_plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Up to the end of the connection, which the request asked for."""
    while data := await reader.read(2**16):
        yield data

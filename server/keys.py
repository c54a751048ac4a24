"""API keys: read from options and a file, kept as names and hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SECRET = re.compile(r"[!-~]+")
_SHORT_SECRET = 16  # characters; shorter ones can be guessed


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: what it is called in logs and metrics, and the SHA-256 of its secret, which nothing else needs."""

    name: str
    digest: bytes = field(repr=False)
    is_short: bool = False


def parse_keys(texts: Iterable[str], source: str) -> list[ApiKey]:
    """Keys as NAME:SECRET or SECRET. Raises ValueError, which tells no secret."""
    keys = []
    for number, text in enumerate(texts, 1):
        name, colon, secret = text.partition(":")
        if not colon:
            name, secret = f"key-{number}", text
        if not _KEY_NAME.fullmatch(name):
            raise ValueError(
                f"{source}: the name of key {number} is not 1 to 64 letters, digits, '_', '.' or '-' before a colon"
            )
        if not _SECRET.fullmatch(secret):
            raise ValueError(f"{source}: the secret of key {name} is empty or not printable ASCII without spaces")
        keys.append(ApiKey(name, hashlib.sha256(secret.encode()).digest(), len(secret) < _SHORT_SECRET))
    return keys


def load_keys(texts: Sequence[str], file: str | None) -> tuple[ApiKey, ...]:
    """All keys, of options and of the file. Raises ValueError naming what is wrong."""
    keys = parse_keys(texts, "--api-key")
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ValueError(f"--api-key-file {file}: {reason}") from None
        stripped = [line.strip() for line in lines]
        found = parse_keys([line for line in stripped if line and not line.startswith("#")], f"--api-key-file {file}")
        if not found:
            raise ValueError(f"--api-key-file {file}: there is no key in it")
        keys += found
    names = [key.name for key in keys]
    if len({key.digest for key in keys}) < len(keys):
        raise ValueError("--api-key: two keys have the same secret")
    if len(set(names)) < len(names):
        raise ValueError("--api-key: two keys have the same name")
    return tuple(keys)

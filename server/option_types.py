"""What an option is: its name, the field that it fills, and how the text of its value is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from server.config import EngineConfig, ServerConfig


class OptionError(ValueError):
    """A wrong option; the message names it, its value and what was expected."""


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise OptionError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise OptionError(f"{value} is not in {low}..{high}" if high < 2**63 - 1 else f"{value} is less than {low}")
        return value

    return parse


_SIZE_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def size(text: str) -> int:
    """A positive whole number; k, m, g stand for powers of 1000 and K, M, G of 1024, as in vLLM ("8k", "1.5G")."""
    factor = _SIZE_SUFFIXES.get(text[-1:], 1)
    number = text if factor == 1 else text[:-1]
    try:
        value = int(number) if factor == 1 else int(float(number) * factor)
    except (ValueError, OverflowError):
        raise OptionError(f"{text!r} is not a size (a whole number, or one with k, m, g, K, M or G)") from None
    if value < 1:
        raise OptionError(f"{value} is less than 1")
    return value


def number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise OptionError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise OptionError(f"{text} is not in {low:g}..{high:g}")
        return value

    return parse


def choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise OptionError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def text_value(text: str) -> str:
    if not text:
        raise OptionError("is empty")
    return text


def flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise OptionError(f"{text!r} is neither true nor false")
    return values[text.lower()]


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `field` is of EngineConfig or ServerConfig, which hold the defaults; `parse` takes the text of its value."""

    name: str  # as the flag has it, without the dashes
    field: str
    parse: Callable[[str], Any]
    help: str
    metavar: str = ""
    is_list: bool = False  # more than one value; a flag that comes again adds to them
    one_each: bool = False  # of a list: one value to a flag
    aliases: tuple[str, ...] = ()

    @property
    def is_flag(self) -> bool:
        return self.parse is flag

    @property
    def default(self) -> Any:
        defaults = {item.name: item.default for config in (EngineConfig, ServerConfig) for item in fields(config)}
        return defaults[self.field]

    def from_text(self, text: str) -> Any:
        if self.is_list:
            return tuple(text_value(part.strip()) for part in text.split(","))
        return self.parse(text)

    def from_yaml(self, value: Any) -> Any:
        """YAML's own types where they say the same as the text would."""
        if self.is_list and isinstance(value, list):
            return tuple(text_value(str(part)) for part in value)
        if isinstance(value, bool) != self.is_flag or not isinstance(value, str | int | float):
            raise OptionError(
                f"{value!r} is a {type(value).__name__}; expected {'true or false' if self.is_flag else 'a value'}"
            )
        return self.from_text(str(value))

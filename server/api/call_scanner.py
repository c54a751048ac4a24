"""Calls read out of JSON as it comes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum

_MAX_NAME = 1024  # characters of a function's name, as JSON: longer values are none


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call number `index` to `name` begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the text of call `index`'s arguments."""

    index: int
    text: str


class _State(Enum):
    OUTSIDE = 0  # before, between and after the objects of calls
    KEY = 1  # before a key
    IN_KEY = 2
    COLON = 3
    BEFORE_VALUE = 4
    IN_VALUE = 5


class CallScanner:
    """Reads calls out of JSON that comes in pieces: objects with a name and arguments (or parameters), in a list or not.

    With `names`, objects with other names are no calls. Time and memory are linear in the text: it may be long.
    """

    def __init__(self, first_index: int = 0, names: frozenset[str] | None = None) -> None:
        self.index = first_index - 1  # of the call that is being read
        self._names = names
        self._state = _State.OUTSIDE
        self._key: list[str] = []
        self._value: list[str] = []  # of what is no argument, up to _MAX_NAME characters
        self._is_value_begun = False
        self._name: str | None = None
        self._waiting: list[str] = []  # arguments that came before the name
        self._is_argument = False  # whether the value that is being read is the arguments
        self._has_arguments = False
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._events: list[CallStart | CallArguments] = []

    def feed(self, text: str) -> list[CallStart | CallArguments]:
        for char in text:
            self._step(char)
        self._flush()
        events, self._events = self._events, []
        return events

    def _flush(self) -> None:
        """Makes one event of the characters of arguments that have come."""
        if self._name is not None and self._waiting:
            self._events.append(CallArguments(self.index, "".join(self._waiting)))
            self._waiting = []

    def _step(self, char: str) -> None:
        state = self._state
        if state is _State.OUTSIDE:
            if char == "{":
                self._state, self._name, self._waiting, self._has_arguments = _State.KEY, None, [], False
        elif state is _State.KEY:
            if char == '"':
                self._state, self._key = _State.IN_KEY, []
            elif char == "}":
                self._end_call()
        elif state is _State.IN_KEY:
            if char == '"':
                self._state = _State.COLON
            else:
                self._key.append(char)
        elif state is _State.COLON:
            if char == ":":
                self._state = _State.BEFORE_VALUE
        elif state is _State.BEFORE_VALUE:
            if not char.isspace():
                self._state, self._value, self._depth = _State.IN_VALUE, [], 0
                self._is_value_begun = self._in_string = self._is_escaped = False
                self._is_argument = "".join(self._key) in ("arguments", "parameters")
                self._has_arguments = self._has_arguments or self._is_argument
                self._step(char)
        else:
            self._step_in_value(char)

    def _step_in_value(self, char: str) -> None:
        if not self._in_string and self._depth == 0 and (char in ",}" or char.isspace()) and self._is_value_begun:
            self._end_value()  # of a number or word, which nothing closes
            self._step(char)
            return
        self._is_value_begun = True
        if self._is_argument:
            self._waiting.append(char)
        elif len(self._value) < _MAX_NAME:
            self._value.append(char)
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._depth == 0 and not self._in_string and char in '}]"':
            self._end_value()

    def _end_value(self) -> None:
        self._state = _State.KEY
        if self._name is not None or "".join(self._key) != "name":
            return
        try:
            name = json.loads("".join(self._value))
        except ValueError:
            return
        if isinstance(name, str) and (self._names is None or name in self._names):
            self._name = name
            self.index += 1
            self._events.append(CallStart(self.index, name))
            self._flush()

    def _end_call(self) -> None:
        if self._name is not None and not self._has_arguments:
            self._waiting.append("{}")
        self._flush()
        self._state = _State.OUTSIDE

"""Tool calls in a model's output: found as the text comes, and told in pieces of name and arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from server.api.schemas import FunctionDefinition, Tool


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


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls: JSON behind `opening`, up to `closing` or the end of the output.

    `is_bare`: an output that begins with a brace is a call as well. `is_named`: `name{arguments}` may stand for the object.
    """

    name: str
    opening: str
    closing: str | None = None
    is_bare: bool = False
    is_named: bool = False


TOOL_FORMATS = {
    known.name: known
    for known in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>"),  # Hermes, Qwen
        ToolFormat("mistral", "[TOOL_CALLS]", is_named=True),
        ToolFormat("llama3", "<|python_tag|>", is_bare=True),
    )
}
_SIGNS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "<|start_header_id|>"}


def detect_format(template_source: str) -> ToolFormat | None:
    """The format that a chat template asks its model for; None for a template without tools or of another family."""
    if "tools" not in template_source:
        return None
    return next((TOOL_FORMATS[name] for name, sign in _SIGNS.items() if sign in template_source), None)


class _State(Enum):
    OUTSIDE = 0  # before, between and after the objects of calls
    KEY = 1  # before a key
    IN_KEY = 2
    COLON = 3
    BEFORE_VALUE = 4
    IN_VALUE = 5


class CallScanner:
    """Reads calls out of JSON that comes in pieces: objects with a name and arguments (or parameters), in a list or not."""

    def __init__(self, first_index: int = 0) -> None:
        self.index = first_index - 1  # of the call that is being read
        self._state = _State.OUTSIDE
        self._key = self._value = ""
        self._name: str | None = None
        self._waiting = ""  # arguments that came before the name
        self._has_arguments = False
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._events: list[CallStart | CallArguments] = []

    def feed(self, text: str) -> list[CallStart | CallArguments]:
        for char in text:
            self._step(char)
        events, self._events = self._events, []
        merged: list[CallStart | CallArguments] = []
        for event in events:
            last = merged[-1] if merged else None
            if isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
                merged[-1] = CallArguments(event.index, last.text + event.text)
            else:
                merged.append(event)
        return merged

    def _step(self, char: str) -> None:
        state = self._state
        if state is _State.OUTSIDE:
            if char == "{":
                self._state, self._name, self._waiting, self._has_arguments = _State.KEY, None, "", False
        elif state is _State.KEY:
            if char == '"':
                self._state, self._key = _State.IN_KEY, ""
            elif char == "}":
                self._end_call()
        elif state is _State.IN_KEY:
            if char == '"':
                self._state = _State.COLON
            else:
                self._key += char
        elif state is _State.COLON:
            if char == ":":
                self._state = _State.BEFORE_VALUE
        elif state is _State.BEFORE_VALUE:
            if not char.isspace():
                self._state, self._value, self._depth = _State.IN_VALUE, "", 0
                self._in_string = self._is_escaped = False
                self._step(char)
        else:
            self._step_in_value(char)

    def _step_in_value(self, char: str) -> None:
        if not self._in_string and self._depth == 0 and (char in ",}" or char.isspace()) and self._value:
            self._end_value()  # of a number or word, which nothing closes
            self._step(char)
            return
        self._take(char)
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

    def _take(self, char: str) -> None:
        self._value += char
        if self._key in ("arguments", "parameters"):
            self._has_arguments = True
            if self._name is None:
                self._waiting += char
            else:
                self._events.append(CallArguments(self.index, char))

    def _end_value(self) -> None:
        self._state = _State.KEY
        if self._key == "name" and self._name is None:
            try:
                name = json.loads(self._value)
            except ValueError:
                return
            if isinstance(name, str):
                self._name = name
                self.index += 1
                self._events.append(CallStart(self.index, name))
                if self._waiting:
                    self._events.append(CallArguments(self.index, self._waiting))

    def _end_call(self) -> None:
        if self._name is not None and not self._has_arguments:
            self._events.append(CallArguments(self.index, "{}"))
        self._state = _State.OUTSIDE


def split_at(text: str, tag: str) -> tuple[str, bool, str]:
    """Text before the tag, whether it was found, and what follows it; or else what could be the tag's beginning."""
    position = text.find(tag)
    if position >= 0:
        return text[:position], True, text[position + len(tag) :]
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length], False, text[-length:]
    return text, False, ""


class ToolReader:
    """Divides an output into content and calls. What looks like a call and has no name is content after all."""

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._buffer = ""
        self._raw = ""  # of what is being read as calls
        self._spaces = ""  # held back: those between content and calls belong to neither
        self._scanner: CallScanner | None = None
        self._num_calls = self._num_calls_before = 0
        self._pending_name = ""
        self._has_content = False
        self._is_unsure = False  # name{...} or JSON

    def feed(self, text: str) -> tuple[str, list[CallStart | CallArguments]]:
        """Content and call events that these characters add."""
        self._buffer += text
        content, events = "", list[CallStart | CallArguments]()
        while True:
            if self._scanner is None:
                if self._form.is_bare and not self._has_content and self._buffer.lstrip()[:1] == "{":
                    self._open()
                    continue
                before, found, self._buffer = split_at(self._buffer, self._form.opening)
                content += self._content(before)
                if not found:
                    return content, events
                self._raw = self._form.opening
                self._open()
            else:
                tag = self._form.closing or self._form.opening
                before, found, self._buffer = split_at(self._buffer, tag)
                events += self._scan(before)
                if not found:
                    return content, events
                if self._form.closing is None:
                    content += self._close("")
                    self._raw = tag
                    self._open()
                else:
                    content += self._close(tag)

    def finish(self) -> tuple[str, list[CallStart | CallArguments]]:
        """What was held back: the output has ended."""
        rest, self._buffer = self._buffer, ""
        if self._scanner is None:
            content = self._content(rest)
            return (content if self._num_calls else content + self._spaces), []
        events = self._scan(rest)
        return self._close(""), events

    def _open(self) -> None:
        self._scanner = CallScanner(self._num_calls)
        self._num_calls_before = self._num_calls
        self._is_unsure = self._form.is_named
        self._pending_name = ""

    def _scan(self, text: str) -> list[CallStart | CallArguments]:
        assert self._scanner is not None
        self._raw += text
        if self._is_unsure:
            self._pending_name += text
            start = self._pending_name.lstrip()
            if not start or (start[0] not in "[{" and "{" not in start):
                return []
            self._is_unsure = False
            text = start
            if start[0] not in "[{":
                name, brace, rest = start.partition("{")
                name = name.split("[")[0].strip()  # [CALL_ID] and [ARGS] may stand between
                text = f'{{"name": {json.dumps(name)}, "arguments": {brace}{rest}'
        events = self._scanner.feed(text)
        self._num_calls = self._scanner.index + 1
        return events

    def _close(self, tag: str) -> str:
        """Ends what was read as calls. The text, where it was none."""
        self._scanner = None
        raw, self._raw = self._raw, ""
        if self._num_calls > self._num_calls_before:
            self._spaces = ""
            return ""
        return self._content(raw + tag)

    def _content(self, text: str) -> str:
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        self._has_content = self._has_content or bool(shown)
        return shown


class NamedReader:
    """For `tool_choice` with a name: the whole output is the call's arguments."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> tuple[str, list[CallStart | CallArguments]]:
        events: list[CallStart | CallArguments] = []
        if text:
            if self._name is not None:
                events.append(CallStart(0, self._name))
                self._name = None
            events.append(CallArguments(0, text))
        return "", events

    def finish(self) -> tuple[str, list[CallStart | CallArguments]]:
        return "", []


REQUIRED_FORMAT = ToolFormat("required", "[", "\0")  # JSON has no such character: no end but the output's
"""For `tool_choice` "required": a list of calls, as `required_schema` has it."""


def arguments_schema(function: FunctionDefinition) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def required_schema(tools: list[Tool], at_most_one: bool) -> dict[str, Any]:
    """A JSON schema of one or more calls. Definitions that the tools' schemas refer to move to its root."""
    definitions: dict[str, Any] = {}
    calls = []
    for index, tool in enumerate(tools):
        parameters = _moved(arguments_schema(tool.function), f"tool{index}.")
        if isinstance(parameters, dict):
            for key in ("$defs", "definitions"):
                moved = parameters.pop(key, None) or {}
                definitions |= {f"tool{index}.{name}": definition for name, definition in moved.items()}
        properties = {"name": {"const": tool.function.name}, "parameters": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if at_most_one:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def _moved(schema: Any, prefix: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, prefix) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str):
        for start in ("#/$defs/", "#/definitions/"):
            if reference.startswith(start):
                moved["$ref"] = "#/$defs/" + prefix + reference[len(start) :]
    return moved

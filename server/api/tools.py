"""Tool calls in a model's output: found as the text comes, and told in pieces of name and arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from server.api.call_scanner import CallArguments, CallScanner, CallStart
from server.api.schemas import FunctionDefinition, Tool


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

    def __init__(self, form: ToolFormat, names: frozenset[str] = frozenset()) -> None:
        """`names` are those of the tools: what has no sign but its braces is a call to one of them, or none."""
        self._form = form
        self._names = names if form.is_bare else None
        self._buffer = ""
        self._raw: list[str] = []  # of what is being read as calls
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
                self._raw = [self._form.opening]
                self._open()
            else:
                tag = self._form.closing or self._form.opening
                before, found, self._buffer = split_at(self._buffer, tag)
                events += self._scan(before)
                if not found:
                    return content, events
                if self._form.closing is None:
                    content += self._close("")
                    self._raw = [tag]
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
        self._scanner = CallScanner(self._num_calls, self._names)
        self._num_calls_before = self._num_calls
        self._is_unsure = self._form.is_named
        self._pending_name = ""

    def _scan(self, text: str) -> list[CallStart | CallArguments]:
        assert self._scanner is not None
        self._raw.append(text)
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
        raw, self._raw = "".join(self._raw), []
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
    """A JSON schema of one or more calls. The tools' own schemas are its definitions, and what they refer to moves along."""
    definitions: dict[str, Any] = {}
    calls = []
    for index, tool in enumerate(tools):
        place = f"#/$defs/tool{index}"
        definitions[f"tool{index}"] = _moved(arguments_schema(tool.function), place)
        properties = {"name": {"const": tool.function.name}, "parameters": {"$ref": place}}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    if at_most_one:
        schema["maxItems"] = 1
    return schema


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references are to itself, to be put at `place` of another."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved

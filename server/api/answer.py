"""A chat answer's text divided into reasoning, content and tool calls, as it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.api.call_scanner import CallArguments, CallStart
from server.api.tools import REQUIRED_FORMAT, NamedReader, ToolFormat, ToolReader, split_at
from server.grammar import THINK, THINK_END, Reasoning


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How an answer is to be read. `reasoning`: not looked for, possible, or begun already by the prompt."""

    tools: Literal["none", "auto", "required", "named"] = "none"
    tool_format: ToolFormat | None = None  # for auto
    tool_name: str = ""  # for named
    tool_names: frozenset[str] = frozenset()  # of all that are offered
    reasoning: Reasoning = "none"
    include_reasoning: bool = True
    at_most_one_call: bool = False


PLAIN_ANSWER = AnswerOptions()


@dataclass(slots=True)
class AnswerPiece:
    """What some text adds to an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallStart | CallArguments] = field(default_factory=list)


class ReasoningReader:
    """Text between <think> at the very beginning, or in the prompt, and </think> is reasoning."""

    def __init__(self, has_begun: bool) -> None:
        self._state: Literal["before", "opened", "inside", "closed", "after"] = "opened" if has_begun else "before"
        self._buffer = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and content that these characters add."""
        self._buffer += text
        reasoning = content = ""
        if self._state == "before":
            start = self._buffer.lstrip()
            if not start or (len(start) < len(THINK) and THINK.startswith(start)):
                return "", ""
            if start.startswith(THINK):
                self._state, self._buffer = "opened", start[len(THINK) :]
            else:
                self._state = "after"
        if self._state == "opened":  # the line breaks next to tags belong to neither
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._state = "inside"
        if self._state == "inside":
            reasoning, found, self._buffer = split_at(self._buffer, THINK_END)
            if found:
                self._state = "closed"
        if self._state == "closed":
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._state = "after"
        if self._state == "after":
            content, self._buffer = self._buffer, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        rest, self._buffer = self._buffer, ""
        return (rest, "") if self._state == "inside" else ("", rest)


class AnswerReader:
    """Reads one choice's text."""

    def __init__(self, options: AnswerOptions) -> None:
        self._options = options
        self._reasoning = None if options.reasoning == "none" else ReasoningReader(options.reasoning == "begun")
        self._tools: ToolReader | NamedReader | None = None
        if options.tools == "named":
            self._tools = NamedReader(options.tool_name)
        elif options.tools == "required":
            self._tools = ToolReader(REQUIRED_FORMAT)
        elif options.tools == "auto" and options.tool_format is not None:
            self._tools = ToolReader(options.tool_format, options.tool_names)
        self.num_calls = 0

    def feed(self, text: str, is_last: bool) -> AnswerPiece:
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        if is_last and self._reasoning is not None:
            more_reasoning, more_content = self._reasoning.finish()
            reasoning, content = reasoning + more_reasoning, content + more_content
        calls: list[CallStart | CallArguments] = []
        if self._tools is not None:
            content, calls = self._tools.feed(content)
            if is_last:
                more_content, more_calls = self._tools.finish()
                content, calls = content + more_content, calls + more_calls
        if self._options.at_most_one_call:
            calls = [call for call in calls if call.index == 0]
        self.num_calls += sum(isinstance(call, CallStart) for call in calls)
        return AnswerPiece(content, reasoning if self._options.include_reasoning else "", calls)

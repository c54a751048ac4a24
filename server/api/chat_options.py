"""What a request's structured-output and tool fields come to: a grammar, tools for the prompt, and how to read the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal

from server.api.answer import AnswerOptions
from server.api.context import ApiContext
from server.api.errors import RequestError
from server.api.schemas import ChatRequest, GenerationFields, NamedToolChoice, SchemaFormat, Tool
from server.api.tools import arguments_schema, required_schema
from server.grammar import THINK, THINK_END, GrammarError, GrammarSource, Reasoning


@dataclass(frozen=True, slots=True)
class FieldSource:
    """A grammar's source, and the field that it came by."""

    field: str
    source: GrammarSource


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """`offered` are the tools that the prompt tells of."""

    mode: Literal["none", "auto", "required", "named"] = "none"
    offered: list[Tool] | None = None
    name: str = ""
    grammar: FieldSource | None = None


def grammar_source(body: GenerationFields) -> FieldSource | None:
    """Raises RequestError for fields that do not go together."""
    asked = body.structured_outputs
    if asked is None:
        return _format_source(body)
    if body.response_format is not None and body.response_format.type != "text":
        raise RequestError("structured_outputs: not together with response_format", param="structured_outputs")
    schema = asked.json_schema
    sources: list[GrammarSource] = []
    if schema is not None:
        sources.append(GrammarSource("json", schema if isinstance(schema, str) else json.dumps(schema)))
    if asked.json_object:
        sources.append(GrammarSource("json", _ANY_OBJECT))
    if asked.regex is not None:
        sources.append(GrammarSource("regex", asked.regex))
    if asked.choice is not None:
        sources.append(GrammarSource("choice", json.dumps(asked.choice)))
    if asked.grammar is not None:
        sources.append(GrammarSource("grammar", asked.grammar))
    if len(sources) != 1:
        raise RequestError(
            f"structured_outputs: needs exactly one of json, json_object, regex, choice and grammar (got {len(sources)})",
            param="structured_outputs",
        )
    return FieldSource("structured_outputs", sources[0])


_ANY_OBJECT = json.dumps({"type": "object"})


def _format_source(body: GenerationFields) -> FieldSource | None:
    asked = body.response_format
    if isinstance(asked, SchemaFormat):
        schema = json.dumps(asked.json_schema.json_schema)
        return FieldSource("response_format", GrammarSource("json", schema))
    if asked is None or asked.type == "text":
        return None
    return FieldSource("response_format", GrammarSource("json", _ANY_OBJECT))


async def compile_grammar(asked: FieldSource | None, context: ApiContext, reasoning: Reasoning = "none") -> str | None:
    """Raises RequestError naming the field whose grammar cannot be used."""
    if asked is None:
        return None
    if context.grammars is None:
        raise RequestError(f"{asked.field}: this server has no grammars", param=asked.field)
    try:
        return await context.grammars.compile(replace(asked.source, reasoning=reasoning))
    except GrammarError as error:
        raise RequestError(f"{asked.field}: {error}", param=asked.field, code="invalid_grammar") from None


def tool_choice(body: ChatRequest, context: ApiContext) -> ToolPlan:
    """Raises RequestError for a choice that the tools or the model do not allow."""
    tools, choice = body.tools or [], body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice: needs tools", param="tool_choice")
        return ToolPlan()
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("tools: names must differ", param="tools")
    if choice == "none":
        return ToolPlan()
    if choice not in (None, "auto") and grammar_source(body) is not None:
        raise RequestError(
            "tool_choice: a call that must be made leaves no room for structured output", param="tool_choice"
        )
    if isinstance(choice, NamedToolChoice):
        chosen = next((tool for tool in tools if tool.function.name == choice.function.name), None)
        if chosen is None:
            raise RequestError(
                f"tool_choice: no tool is named {choice.function.name!r} (there are {', '.join(names)})",
                param="tool_choice",
            )
        source = GrammarSource("call", json.dumps(arguments_schema(chosen.function)))
        return ToolPlan("named", tools, choice.function.name, FieldSource("tools", source))
    if choice == "required":
        schema = required_schema(tools, body.parallel_tool_calls is False)
        return ToolPlan("required", tools, grammar=FieldSource("tools", GrammarSource("call", json.dumps(schema))))
    if grammar_source(body) is not None:
        raise RequestError(
            'tools: not together with structured output, which leaves no room for calls, unless tool_choice is "none"',
            param="tools",
        )
    if context.tool_format is None:
        raise RequestError(
            "tools: this model's chat template has no known format of calls; start the server with --tool-call-parser, "
            'or send tool_choice "required"',
            param="tools",
        )
    return ToolPlan("auto", tools)


def find_reasoning(body: ChatRequest, context: ApiContext, prompt: str) -> Reasoning:
    """Whether reasoning may come in the answer to this prompt, or has begun in it."""
    if not context.parses_reasoning:
        return "none"
    if body.continue_final_message:
        text = body.messages[-1].text()
        return "begun" if text.rfind(THINK) > text.rfind(THINK_END) else "none"
    end = prompt.rstrip()
    return "begun" if end.endswith(THINK) else "none" if end.endswith(THINK_END) else "possible"


def answer_options(body: ChatRequest, context: ApiContext, plan: ToolPlan, reasoning: Reasoning) -> AnswerOptions:
    return AnswerOptions(
        tools=plan.mode,
        tool_format=context.tool_format,
        tool_name=plan.name,
        tool_names=frozenset(tool.function.name for tool in plan.offered or ()),
        reasoning=reasoning,
        include_reasoning=body.include_reasoning is not False,
        at_most_one_call=body.parallel_tool_calls is False,
    )


def are_tags_special(answer: AnswerOptions, context: ApiContext) -> bool:
    """Whether what an answer's parts are known by are special tokens, which its text must then show."""
    tags = [] if answer.reasoning == "none" else [THINK, THINK_END]
    if answer.tools == "auto" and answer.tool_format is not None:
        tags += [answer.tool_format.opening, answer.tool_format.closing or ""]
    return any(context.tokenizer.is_special(tag) for tag in tags)

"""Tool calls and reasoning: found however the text is cut, and required ones made, through the whole server."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.answer import AnswerOptions, AnswerReader
from server.api.call_scanner import CallStart
from server.api.chat_template import ChatTemplate
from server.api.schemas import Tool
from server.api.tools import TOOL_FORMATS, detect_format, required_schema
from tests.server.fakes import byte_level_tokenizer, running_edge, sse_events
from tests.server.real_edge import real_edge, tiny_checkpoint

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for message in messages %}[{{ message.role }}] "
    "{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}"
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]

Call = tuple[str, str]
CASES: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", "no calls <b>, {1}\n", "no calls <b>, {1}\n", []),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {"c": null}]}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "g"}</tool_call>',
        "I look.",
        [("f", '{"a": "}\\"{", "b": [1, {"c": null}]}'), ("g", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", "<tool_call>not JSON</tool_call> then", "<tool_call>not JSON</tool_call> then", []),
    ("hermes", 'x <tool_call>{"name": "f", "arguments": {"a": 1', "x", [("f", '{"a": 1')]),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]', "",
     [("f", '{"a": [1]}'), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{"b": {"c": 2}}', "", [("f", '{"a": 1}'), ("g", '{"b": {"c": 2}}')]),
    ("llama3", '{"name": "f", "parameters": {"a": "x"}}', "", [("f", '{"a": "x"}')]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [("f", "{}"), ("g", "{}")]),
    ("llama3", "It is {sunny}.", "It is {sunny}.", []),
    ("llama3", '{"sunny": true}', '{"sunny": true}', []),
    ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
]  # fmt: skip


def read(options: AnswerOptions, pieces: list[str]) -> tuple[str, str, list[Call]]:
    reader = AnswerReader(options)
    content = reasoning = ""
    calls: list[list[str]] = []
    for index, text in enumerate(pieces):
        piece = reader.feed(text, is_last=index == len(pieces) - 1)
        content += piece.content
        reasoning += piece.reasoning
        for event in piece.calls:
            if isinstance(event, CallStart):
                assert event.index == len(calls)
                calls.append([event.name, ""])
            else:
                assert event.index == len(calls) - 1
                calls[event.index][1] += event.text
    return content, reasoning, [(name, arguments) for name, arguments in calls]


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 200), max_size=12), by_character=st.booleans())
def test_calls_are_found_however_the_text_is_cut(
    case: tuple[str, str, str, list[Call]], cuts: list[int], by_character: bool
) -> None:
    name, text, content, calls = case
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = list(text) if by_character else [text[a:b] for a, b in itertools.pairwise(ends)]
    options = AnswerOptions("auto", TOOL_FORMATS[name], tool_names=frozenset("fg"))
    assert read(options, pieces) == (content, "", calls)


def test_long_arguments_take_time_in_proportion() -> None:
    """Half a megabyte: a second or two, where copying what has come with every character would take minutes."""
    text = '{"name": "f", "arguments": {"a": "' + "x" * 500_000 + '"}}'
    began = time.perf_counter()
    for pieces in ([text], [text[start : start + 500] for start in range(0, len(text), 500)]):
        options = AnswerOptions("auto", TOOL_FORMATS["hermes"])
        _, _, [(name, arguments)] = read(options, ["<tool_call>", *pieces, "</tool_call>"])
        assert name == "f" and len(json.loads(arguments)["a"]) == 500_000
    assert time.perf_counter() - began < 15


def test_required_calls_keep_what_schemas_refer_to() -> None:
    tree = {
        "type": "object",
        "properties": {
            "value": {"$ref": "#/$defs/Value"},
            "left": {"$ref": "#"},
            "same": {"$ref": "#/properties/value"},
        },
        "$defs": {"Value": {"type": "integer"}},
    }
    tools = [Tool.model_validate({"type": "function", "function": {"name": name, "parameters": tree}}) for name in "fg"]
    schema = required_schema(tools, at_most_one=False)
    jsonschema.Draft202012Validator.check_schema(schema)
    for arguments, is_valid in (
        ({"left": {"left": {"value": 1}}, "same": 2}, True),
        ({"left": {"left": {"value": "x"}}}, False),
        ({"same": "x"}, False),
        ({"left": [{"name": "f", "parameters": {}}]}, False),
    ):
        calls = [{"name": "g", "parameters": arguments}]
        assert jsonschema.Draft202012Validator(schema).is_valid(calls) == is_valid


@pytest.mark.parametrize(
    ("state", "text", "reasoning", "content"),
    [
        ("possible", "<think>\nhm</think>\n\nyes", "hm", "yes"),
        ("possible", "yes <think>", "", "yes <think>"),
        ("possible", "<thin", "", "<thin"),
        ("begun", "hm\n</think>yes</think>", "hm\n", "yes</think>"),
        ("begun", "hm </thi", "hm </thi", ""),
        ("none", "<think>a</think>", "", "<think>a</think>"),
    ],
)
def test_reasoning_is_told_apart(state: Any, text: str, reasoning: str, content: str) -> None:
    options = AnswerOptions(reasoning=state)
    assert read(options, [text])[:2] == (content, reasoning)
    assert read(options, [*text, ""])[:2] == (content, reasoning)
    assert read(AnswerOptions(reasoning=state, include_reasoning=False), [text])[:2] == (content, "")


def test_formats_are_known_by_their_templates() -> None:
    assert detect_format(TEMPLATE) is TOOL_FORMATS["hermes"]
    assert detect_format("{{ tools }} [TOOL_CALLS]") is TOOL_FORMATS["mistral"]
    assert detect_format("{{ tools }} <|start_header_id|>") is TOOL_FORMATS["llama3"]
    assert detect_format("<tool_call>") is None and detect_format("{{ tools }}") is None


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "the weather"}], "tools": TOOLS} | fields


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_required_and_named_calls_are_made_with_valid_arguments(model: Path, is_streamed: bool) -> None:
    named = {"type": "function", "function": {"name": "weather"}}

    async def ask(http: Any, **fields: Any) -> tuple[list[Call], str]:
        body = chat(max_tokens=300, temperature=1.5, stream=is_streamed, **fields)
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        if not is_streamed:
            [choice] = response.json()["choices"]
            assert choice["message"]["content"] is None
            made = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"]["tool_calls"]]
            return made, choice["finish_reason"]
        calls: list[list[str]] = []
        chunks = [chunk["choices"][0] for chunk in sse_events(response.text)]
        for chunk in chunks:
            for call in chunk["delta"].get("tool_calls", []):
                if "name" in call["function"]:
                    assert call["id"].startswith("call_") and call["type"] == "function"
                    calls.append([call["function"]["name"], ""])
                assert call["index"] == len(calls) - 1
                calls[-1][1] += call["function"]["arguments"]
        assert len(chunks) > 4
        return [(name, arguments) for name, arguments in calls], chunks[-1]["finish_reason"]

    async def check() -> None:
        async with real_edge(model, chat_template=ChatTemplate(TEMPLATE)) as http:
            for seed in range(4):
                calls, reason = await ask(http, tool_choice=named, seed=seed)
                assert reason == "stop" and [name for name, _ in calls] == ["weather"]
                jsonschema.validate(json.loads(calls[0][1]), WEATHER)
                calls, reason = await ask(http, tool_choice="required", parallel_tool_calls=False, seed=seed)
                assert reason == "tool_calls" and len(calls) == 1
                name, arguments = calls[0]
                jsonschema.validate(json.loads(arguments), {"weather": WEATHER, "now": {"maxProperties": 0}}[name])

    asyncio.run(check())


def test_auto_calls_in_the_models_own_format() -> None:
    """The engine echoes its prompt, so the prompt says what the model says."""
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    length = len(byte_level_tokenizer().encode("fox " + call))
    body = chat(messages=[{"role": "user", "content": call}], max_tokens=length)

    async def check() -> None:
        template = ChatTemplate("{% if tools %}fox {% endif %}{{ messages[0].content }}")
        async with running_edge(chat_template=template, tool_format=TOOL_FORMATS["hermes"]) as edge:
            [choice] = (await edge.http.post("/v1/chat/completions", json=body)).json()["choices"]
            message = choice["message"]
            assert message["content"] == "fox"
            assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
            plain = (await edge.http.post("/v1/chat/completions", json=body | {"tool_choice": "none"})).json()
            assert "tool_calls" not in plain["choices"][0]["message"]
            assert plain["choices"][0]["message"]["content"].startswith("<tool_call>")

    asyncio.run(check())


def test_tools_that_cannot_be_honoured_are_refused_by_name() -> None:
    bad = [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tool is named 'x'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "must differ"),
        ({"tool_choice": "auto"}, "tools", "--tool-call-parser"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "no room"),
        ({"response_format": {"type": "json_object"}}, "tools", "structured output"),
        ({"tool_choice": "sometimes"}, "tool_choice", "input should be"),
        (
            {"continue_final_message": True, "add_generation_prompt": True, "tools": None},
            "continue_final_message",
            "not",
        ),
    ]

    async def check() -> None:
        async with running_edge(chat_template=ChatTemplate(TEMPLATE)) as edge:
            for fields, param, part in bad:
                response = await edge.http.post("/v1/chat/completions", json=chat(**fields))
                error = response.json()["error"]
                assert response.status_code == 400 and error["param"] == param and part in error["message"], error
        async with running_edge() as edge:
            error = (await edge.http.post("/v1/chat/completions", json=chat(tool_choice="required"))).json()["error"]
            assert error["message"] == "tools: the model's chat template does not know tools"

    asyncio.run(check())


def test_tool_messages_and_continued_ones_reach_the_prompt() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "fox", "tool_call_id": "1"},
        {"role": "assistant", "content": "a quick "},
    ]

    async def check() -> None:
        async with running_edge(chat_template=ChatTemplate(TEMPLATE + "END")) as edge:
            tokenizer = edge.context.tokenizer
            for continues in (False, True):
                body = {"messages": messages, "continue_final_message": continues, "return_token_strs": True}
                answer = (await edge.http.post("/tokenize", json=body)).json()
                expected = '[user] the dog[assistant] <tool_call>{"a": 1}[tool] fox[assistant] a quick '
                text = tokenizer.decode(answer["tokens"])
                assert text == expected + ("" if continues else "END")
                assert answer["count"] == len(answer["tokens"]) and "".join(answer["token_strs"]) == text

    asyncio.run(check())


def test_an_answer_goes_on_where_its_text_ends_whatever_follows_it() -> None:
    """The text may stand in what the template puts after it."""
    template = ChatTemplate(
        "{% for message in messages %}<|im_start|>{{ message.content | trim }}<|im_end|>{% endfor %}"
    )
    messages = [{"role": "user", "content": "in"}, {"role": "assistant", "content": "i"}]

    async def check() -> None:
        async with running_edge(chat_template=template) as edge:
            body = {"messages": messages, "continue_final_message": True}
            tokens = (await edge.http.post("/tokenize", json=body)).json()["tokens"]
            assert edge.context.tokenizer.decode(tokens) == "<|im_start|>in<|im_end|><|im_start|>i"
        for source, content in (("{{ messages[0].content }}", "i"), ("{{ messages[-1].content }}", "")):
            async with running_edge(chat_template=ChatTemplate(source)) as edge:
                messages[-1]["content"] = content
                answer = await edge.http.post("/tokenize", json=body)
                assert answer.status_code == 400 and "last message" in answer.json()["error"]["message"]

    asyncio.run(check())


def test_tokenize_and_detokenize() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            text = "The fox, 你好 🙂"
            answer = (await edge.http.post("/tokenize", json={"prompt": text})).json()
            assert answer["tokens"] == edge.context.tokenizer.encode(text) and answer["max_model_len"] == 512
            assert answer["token_strs"] is None
            back = (await edge.http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
            assert back == {"prompt": text}
            for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []}),
                               ("/detokenize", {"tokens": [400]}), ("/detokenize", {"tokens": [-1]})):  # fmt: skip
                assert (await edge.http.post(path, json=body)).status_code == 400

    asyncio.run(check())

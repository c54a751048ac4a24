"""Structured output through the whole server: what comes out parses, whatever the temperature."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import tokenizers
import torch

from server.api.chat_template import ChatTemplate
from tests.kernels.cpu_support import needs_native
from tests.server.fakes import CHAT_TEMPLATE
from tests.server.real_edge import real_edge, tiny_checkpoint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


async def complete(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "the quick", "max_tokens": 400, "temperature": 2, "ignore_eos": True} | fields
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def random_schema(random_: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "enum", "const"] + ["object", "array"] * (2 if depth else 0)
    kind = random_.choice(kinds)
    if kind == "string":
        return {"type": "string", "minLength": random_.randrange(2), "maxLength": random_.randrange(2, 9)}
    if kind == "integer":
        low = random_.randrange(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + random_.randrange(2000)}
    if kind == "number":
        return {"type": "number", "minimum": -5, "maximum": 5}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "enum":
        return {"enum": random_.sample(["ä", "x y", 'a"b', 3, 1.5, None, True], 3)}
    if kind == "const":
        return {"const": random_.choice(["c", 7, None])}
    if kind == "array":
        return {"type": "array", "items": random_schema(random_, depth - 1), "minItems": 1, "maxItems": 2}
    names = random_.sample("abcdef", random_.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(random_, depth - 1) for name in names},
        "required": names[: random_.randrange(len(names) + 1)],
        "additionalProperties": False,
    }


def check_random_schemas(model: Path, num: int) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(num)]

    async def check() -> None:
        num_finished = 0
        async with real_edge(model) as http:
            for start in range(0, num, 16):
                some = schemas[start : start + 16]
                formats = [{"type": "json_schema", "json_schema": {"name": "x", "schema": s}} for s in some]
                choices = await asyncio.gather(
                    *(complete(http, response_format=f, seed=i) for i, f in enumerate(formats))
                )
                for schema, choice in zip(some, choices, strict=True):
                    if choice["finish_reason"] == "stop":
                        num_finished += 1
                        jsonschema.validate(json.loads(choice["text"]), schema)
                    else:
                        assert choice["finish_reason"] == "length"
        assert num_finished > 0.7 * num

    asyncio.run(check())


def test_outputs_validate_for_random_schemas_at_temperature_2(model: Path) -> None:
    check_random_schemas(model, 48)


@pytest.mark.slow
def test_outputs_validate_for_many_random_schemas(model: Path) -> None:
    check_random_schemas(model, 512)


def test_regex_choice_and_grammar(model: Path) -> None:
    grammar = 'root ::= "(" inner ")"\ninner ::= "x" | root'

    async def check() -> None:
        async with real_edge(model) as http:
            for seed in range(3):
                text = (await complete(http, structured_outputs={"regex": "[a-c]{2,5}[0-9]+!"}, seed=seed))["text"]
                assert re.fullmatch("[a-c]{2,5}[0-9]+!", text)
                choices = ["yes", 'no "way"\n', "ünï"]
                choice = await complete(http, structured_outputs={"choice": choices}, seed=seed)
                assert choice["text"] in choices and choice["finish_reason"] == "stop"
                text = (await complete(http, structured_outputs={"grammar": grammar}, seed=seed))["text"]
                assert re.fullmatch(r"\(+x\)+", text) and text.count("(") == text.count(")")
            text = (await complete(http, structured_outputs={"json_object": True}, max_tokens=450))["text"]
            assert text.startswith("{")
            # A grammar goes before min_tokens, and an end of the model's choosing is no part of the text.
            choice = await complete(http, structured_outputs={"choice": ["a"]}, min_tokens=20, ignore_eos=False)
            assert choice["text"] == "a"
            # Where it leaves a choice, min_tokens takes the end out of it.
            ends = {"structured_outputs": {"regex": "[a-z ]*"}, "logit_bias": {"2": 100}, "ignore_eos": False}
            assert (await complete(http, **ends))["text"] == ""
            choice = await complete(http, **ends, min_tokens=12, return_token_ids=True)
            assert choice["token_ids"].index(2) == len(choice["token_ids"]) - 1 == 12

    asyncio.run(check())


def test_grammars_do_not_disturb_the_others_and_go_with_rules(model: Path) -> None:
    async def check() -> None:
        plain = {"temperature": 0, "max_tokens": 30}
        async with real_edge(model) as http:
            alone = await complete(http, **plain)
            guided = {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}
            answers = await asyncio.gather(
                complete(http, **guided, frequency_penalty=1, logit_bias={"40": 3}, logprobs=1), complete(http, **plain)
            )
            assert answers[1] == alone
            if answers[0]["finish_reason"] == "stop":
                jsonschema.validate(json.loads(answers[0]["text"]), PERSON)
            impossible = {"structured_outputs": {"choice": ["abc"]}, "allowed_token_ids": [200], "prompt": "the"}
            refused = await http.post("/v1/completions", json=impossible)
            assert refused.status_code == 400 and "leave no token" in refused.json()["error"]["message"]

    asyncio.run(check())


def test_chat_streams_structured_output(model: Path) -> None:
    body = {
        "messages": [{"role": "user", "content": "the dog"}], "max_tokens": 400, "temperature": 1.5, "seed": 1, "stream": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}},
    }  # fmt: skip

    async def check() -> None:
        async with real_edge(model, chat_template=ChatTemplate(CHAT_TEMPLATE)) as http:
            lines = (await http.post("/v1/chat/completions", json=body)).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), PERSON)

    asyncio.run(check())


def test_grammars_that_cannot_be_used_are_refused_by_name(model: Path) -> None:
    bad = [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
            "type must be",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "not"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "look-around"),
        ({"structured_outputs": {"grammar": "root ::= missing"}}, "missing"),
        ({"structured_outputs": {"json": "{"}}, "EOF"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "longer than"),
    ]

    async def check() -> None:
        async with real_edge(model) as http:
            for fields, part in bad:
                answer = await http.post("/v1/completions", json={"prompt": "a", **fields})
                error = answer.json()["error"]
                assert answer.status_code == 400, (fields, error)
                assert error["param"] in fields and part in error["message"], error

    asyncio.run(check())


@pytest.mark.parametrize("tags", ["tokens", "special"])
@pytest.mark.parametrize("is_begun", [False, True])
def test_grammars_apply_after_reasoning(tmp_path: Path, tags: str, is_begun: bool) -> None:
    """Whether their tags are special tokens or plain ones, and whether the prompt opens the reasoning or the model may."""
    model = tiny_checkpoint(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    freed = [tokenizer.id_to_token(token_id) for token_id in (300, 301)]
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for old, new in zip(freed, ("<think>", "</think>"), strict=True):
        content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != old]
        token_id = vocabulary.pop(old)
        vocabulary[new] = token_id
        content["added_tokens"].append(
            {"id": token_id, "content": new, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": tags == "special"}
        )  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(content))
    template = ChatTemplate(CHAT_TEMPLATE + ("<think>\n" if is_begun else ""))
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    # Reasoning would end by chance alone: the bias brings its end, and its beginning.
    bias = {"300": 10, "301": 6}
    body = {
        "messages": [{"role": "user", "content": "the dog"}], "max_tokens": 200, "temperature": 1.5, "logit_bias": bias,
        "response_format": schema,
    }  # fmt: skip

    async def check() -> None:
        num_reasoned = num_answered = 0
        async with real_edge(model, chat_template=template, parses_reasoning=True) as http:
            for seed in range(6):
                answer = await http.post("/v1/chat/completions", json=body | {"seed": seed})
                [choice] = answer.json()["choices"]
                message = choice["message"]
                num_reasoned += bool(message.get("reasoning_content"))
                if choice["finish_reason"] == "stop":
                    num_answered += 1
                    assert "think>" not in message["content"]
                    jsonschema.validate(json.loads(message["content"]), PERSON)
        assert num_answered >= 3 and num_reasoned >= 3

    asyncio.run(check())


@needs_native
def test_the_cpu_back_end_follows_grammars_and_bans_too(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, torch.float16)

    async def check() -> None:
        async with real_edge(model, "cpu") as http:
            for temperature in (0, 1):
                choice = await complete(http, structured_outputs={"choice": ["fox", "dog"]}, temperature=temperature)
                assert choice["text"] in ("fox", "dog")
                allowed = {"allowed_token_ids": [40, 41, 2], "min_tokens": 5, "max_tokens": 6, "return_token_ids": True}
                choice = await complete(http, **allowed, temperature=temperature, ignore_eos=False)
                assert set(choice["token_ids"][:5]) <= {40, 41}
                bias = {"min_tokens": 5, "logit_bias": {"2": 100}, "ignore_eos": False, "return_token_ids": True}
                choice = await complete(http, **bias, temperature=temperature)
                assert choice["token_ids"].index(2) == len(choice["token_ids"]) - 1 == 5

    asyncio.run(check())

"""What surrounds an answer: its id, its times, its limits, and how it ends when the server does."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from server.api.chat_template import ChatTemplate
from server.api.messages_schemas import MessagesRequest, chat_fields
from server.api.tools import TOOL_FORMATS
from server.config import NgramSpeculation
from server.engine.drafts import StepTime
from server.text import Tokenizer
from server.types import AbortReason
from tests.server.fakes import CHAT_TEMPLATE, byte_level_tokenizer, echo_engine, running_edge, sse_events
from tests.server.real_edge import completion, real_edge, tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_every_response_has_an_id(caplog: pytest.LogCaptureFixture) -> None:
    body: dict[str, Any] = {"prompt": "The dog", "max_tokens": 3}

    async def check() -> None:
        async with running_edge() as edge:
            sent = {"X-Request-Id": "my~id/1"}
            for path, fields, status in (
                ("/v1/completions", body, 200),
                ("/v1/completions", body | {"stream": True}, 200),
                ("/v1/completions", {"prompt": 5}, 400),
                ("/v1/messages", {}, 400),
                ("/nowhere", {}, 404),
                ("/live", {}, 405),
            ):
                answer = await edge.http.post(path, json=fields, headers=sent)
                assert answer.status_code == status and answer.headers.get_list("x-request-id") == ["my~id/1"], path
                assert (answer.headers.get("request-id") == "my~id/1") == (path == "/v1/messages")
            made = {(await edge.http.get("/live")).headers["x-request-id"] for _ in range(3)}
            assert len(made) == 3 and all(len(name) == 32 for name in made)
            for wrong in ("", "a b", "ä".encode(), "a" * 129, "a\tb"):
                answer = await edge.http.post("/v1/completions", json=body, headers={"X-Request-Id": wrong})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Request-Id"
                assert len(answer.headers["x-request-id"]) == 32
            twice = await edge.http.get("/live", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
            assert twice.status_code == 400

    asyncio.run(check())


def test_a_fault_of_ours_is_logged_with_its_id(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with running_edge() as edge:
            monkeypatch.setattr(Tokenizer, "encode", lambda *_: 1 / 0)
            with caplog.at_level(logging.ERROR):
                answer = await edge.http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "it"})
            assert answer.status_code == 500 and answer.headers["x-request-id"] == "it"
            assert "/v1/completions failed (X-Request-Id it)" in caplog.text

    asyncio.run(check())


def test_metrics_of_a_request(model: Path) -> None:
    def check_metrics(metrics: dict[str, Any], has_later_tokens: bool) -> None:
        assert 0 <= metrics["queue_time_ms"] <= metrics["time_to_first_token_ms"] < 60_000
        assert metrics["num_preemptions"] == 0
        later = metrics["mean_itl_ms"], metrics["tokens_per_second"]
        assert all(value > 0 for value in later) if has_later_tokens else later == (None, None)

    async def check() -> None:
        async with real_edge(model, chat_template=ChatTemplate(CHAT_TEMPLATE)) as http:
            whole = await completion(http, "the dog", include_metrics=True, n=2)
            check_metrics(whole["metrics"], True)
            assert "metrics" not in await completion(http, "the dog")
            single = await completion(http, "the dog", include_metrics=True, max_tokens=1)
            check_metrics(single["metrics"], False)
            stopped = await completion(http, "the dog", include_metrics=True, stop=whole["choices"][0]["text"][3:5])
            assert stopped["choices"][0]["finish_reason"] == "stop"
            check_metrics(stopped["metrics"], stopped["usage"]["completion_tokens"] > 1)
            nothing = await completion(http, "the dog", include_metrics=True, echo=True, max_tokens=0)
            assert nothing["metrics"]["time_to_first_token_ms"] is None
            chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "include_metrics": True,
                    "ignore_eos": True}  # fmt: skip
            check_metrics((await http.post("/v1/chat/completions", json=chat)).json()["metrics"], True)
            for path, fields in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "a", **chat})):
                fields = {key: value for key, value in fields.items() if "chat" in path or key != "messages"}
                for options in (None, {"include_usage": True}):
                    answer = await http.post(path, json=fields | {"stream": True, "stream_options": options})
                    *chunks, last = sse_events(answer.text)
                    assert last["choices"] == [] and ("usage" in last) == (options is not None)
                    check_metrics(last["metrics"], True)
                    assert not any("metrics" in chunk for chunk in chunks)

    asyncio.run(check())


def test_continuous_usage_is_on_every_chunk_of_a_chat() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            body = {"messages": [{"role": "user", "content": "The dog"}], "max_tokens": 4, "stream": True,
                    "stream_options": {"continuous_usage_stats": True}}  # fmt: skip
            chunks = sse_events((await edge.http.post("/v1/chat/completions", json=body)).text)
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts[0] == 0 and counts[-1] == 4 and counts == sorted(counts)

    asyncio.run(check())


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_that_was_not_scored_in_time_is_told_as_such(max_tokens: int, streamed: bool) -> None:
    """The server ends while the request waits."""

    body = {"prompt": "The dog", "echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": streamed}

    async def check() -> None:
        engine = echo_engine()

        def end_all() -> None:
            for request in engine.submitted:
                engine.abort(request.request_id, AbortReason.CLIENT)

        engine.before_step = end_all
        async with running_edge(engine) as edge:
            answer = await edge.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            choice = (sse_events(answer.text)[-1] if streamed else answer.json())["choices"][0]
            assert choice["finish_reason"] == "abort" and choice["logprobs"]["tokens"] == []

    asyncio.run(check())


def test_choices_and_tokens_have_bounds() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            body = {"prompt": [[5]] * 100, "n": 21, "max_tokens": 1}
            error = (await edge.http.post("/v1/completions", json=body)).json()["error"]
            assert error["param"] == "n" and "2048 (got 2100)" in error["message"] and not edge.engine.submitted
            answer = await edge.http.post("/detokenize", json={"tokens": [5] * (2**17 + 1)})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "tokens"
            body = {"prompt": [5] * 600, "truncate_prompt_tokens": -1, "max_tokens": 10**6, "return_token_ids": True}
            [choice] = (await edge.http.post("/v1/completions", json=body)).json()["choices"]
            assert len(choice["prompt_token_ids"]) == 511 and len(choice["token_ids"]) == 1
            # Text far longer than the context is cut as well, not refused unread.
            body |= {"prompt": "The lazy dog. " * 4000, "truncate_prompt_tokens": 9, "max_tokens": 1}
            [choice] = (await edge.http.post("/v1/completions", json=body)).json()["choices"]
            tokens = await edge.context.tokenizer.encode_all([body["prompt"]], add_special_tokens=True)
            assert choice["prompt_token_ids"] == tokens[0][-9:]
            del body["truncate_prompt_tokens"]
            assert (await edge.http.post("/v1/completions", json=body)).status_code == 400

    asyncio.run(check())


def test_tool_results_that_are_errors_say_so_and_unoffered_tools_are_not_counted() -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": "no such city", "is_error": True}
    body = {"model": "echo", "max_tokens": 5, "messages": [{"role": "user", "content": [result]}]}
    messages = chat_fields(MessagesRequest.model_validate(body))["messages"]
    assert messages == [{"role": "tool", "tool_call_id": "1", "content": "Error: no such city"}]
    template = ChatTemplate("{{ tools | tojson if tools else '' }}{{ messages[-1].content }}")
    tools = {"tools": [{"name": "now", "input_schema": {"type": "object"}}]}
    asked = {"model": "echo", "messages": [{"role": "user", "content": "The dog"}]} | tools

    async def check() -> None:
        async with running_edge(chat_template=template, tool_format=TOOL_FORMATS["hermes"]) as edge:
            counts = []
            for choice in ("auto", "none"):
                answer = await edge.http.post(
                    "/v1/messages/count_tokens", json=asked | {"tool_choice": {"type": choice}}
                )
                counts.append(answer.json()["input_tokens"])
            assert counts[0] > counts[1] == len(byte_level_tokenizer().encode("The dog"))

    asyncio.run(check())


def test_answers_are_those_of_the_document(model: Path) -> None:
    everything = {"max_tokens": 4, "ignore_eos": True, "return_token_ids": True, "include_metrics": True, "n": 2}
    usage = {"include_usage": True}
    chat = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1} | everything
    text = {"prompt": "the", "echo": True, "logprobs": 1} | everything

    async def check() -> None:
        async with real_edge(model, chat_template=ChatTemplate(CHAT_TEMPLATE)) as http:
            document = (await http.get("/openapi.json")).json()
            for path, body in (("/v1/completions", text), ("/v1/chat/completions", chat)):
                content = document["paths"][path]["post"]["responses"]["200"]["content"]
                event, failure, _ = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
                whole, events = (
                    jsonschema.Draft202012Validator({**schema, "components": document["components"]})
                    for schema in (content["application/json"]["schema"], event["contentSchema"])
                )
                assert failure["contentSchema"]["$ref"].endswith("ErrorAnswer")
                answer = (await http.post(path, json=body | {"prompt_logprobs": 1})).json()
                whole.validate(answer)
                assert not whole.is_valid(answer | {"choices": [{"index": "x"}]})
                streamed = await http.post(path, json=body | {"stream": True, "stream_options": usage})
                for event in sse_events(streamed.text):
                    events.validate(event)

    asyncio.run(check())


def plain_events(text: str) -> list[dict[str, Any]]:
    """Of streams that end without [DONE]."""
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_timeout_ends_an_answer_as_it_is(model: Path, streamed: bool) -> None:
    fields = {"timeout": 0.2, "ignore_eos": True, "stream": streamed}
    chat = {"messages": [{"role": "user", "content": "the dog"}]}

    async def check() -> None:
        async with real_edge(model, chat_template=ChatTemplate(CHAT_TEMPLATE)) as http:
            # Long enough for the deadline to come first: others keep the engine busy.
            others = [asyncio.create_task(completion(http, f"the {i}", max_tokens=450)) for i in range(6)]
            for path, body in (("completions", {"prompt": "the dog", "n": 2}), ("chat/completions", chat)):
                answer = await http.post(f"/v1/{path}", json=fields | body)
                assert answer.status_code == 200, answer.text
                chunks = sse_events(answer.text) if streamed else [answer.json()]
                reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
                assert [reason for reason in reasons if reason] == ["timeout"] * body.get("n", 1)
            short = {"timeout": 0.02, "stream": streamed, "temperature": 0}
            answer = await http.post("/v1/responses", json=short | {"input": "the dog"})
            response = plain_events(answer.text)[-1]["response"] if streamed else answer.json()
            assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "timeout"}
            answer = await http.post("/v1/messages", json=short | chat | {"model": "tiny", "max_tokens": 450})
            message = plain_events(answer.text)[-2]["delta"] if streamed else answer.json()
            assert message["stop_reason"] == "pause_turn"
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            metrics = (await http.get("/metrics")).text
            assert (
                'awqserve_request_success_total{engine="0",finished_reason="timeout",model_name="tiny"} 5.0' in metrics
            )
            for wrong in (0, -1, "1", 1e6):
                answer = await http.post("/v1/completions", json={"prompt": "a", "timeout": wrong})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "timeout"

    asyncio.run(check())


def test_answers_are_the_same_with_several_tokens_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are right come together: stop strings among them, log probabilities, usage, min_tokens, grammars, streams."""
    always_worth_it = StepTime(1e9, 1.0)  # whatever they cost here
    monkeypatch.setattr("server.engine.runner.StepTime", lambda fixed, per_row: always_worth_it)
    few = {"allowed_token_ids": [67, 68, 69, 70], "seed": 1, "max_tokens": 60, "ignore_eos": True}
    bodies: list[dict[str, Any]] = [
        {"temperature": 1, "logprobs": 2, "return_token_ids": True},
        {"temperature": 0.5, "stop": ["ba", "dcd"], "min_tokens": 9},
        {"temperature": 1, "stop": "cab", "include_stop_str_in_output": True, "logprobs": 0, "n": 2},
        {"temperature": 0, "frequency_penalty": 1.0, "bad_words": ["ab"]},
        {"temperature": 1, "stop_token_ids": [69], "min_tokens": 20},
        {"temperature": 1, "structured_outputs": {"regex": "(ab|cd){6,9}"}, "allowed_token_ids": None},
    ]

    async def answers(speculative: NgramSpeculation | None) -> tuple[list[Any], str]:
        found = []
        async with real_edge(model, speculative=speculative) as http:
            for body in bodies:
                whole = await http.post("/v1/completions", json={"prompt": "abcd abcd ab"} | few | body)
                assert whole.status_code == 200, whole.text
                options = {"stream": True, "stream_options": {"include_usage": True}}
                stream = await http.post("/v1/completions", json={"prompt": "abcd abcd ab"} | few | body | options)
                chunks = sse_events(stream.text)
                texts: dict[int, str] = {}
                reasons = {}
                for chunk in chunks[:-1]:
                    [choice] = chunk["choices"]
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                    reasons[choice["index"]] = choice["finish_reason"], choice["stop_reason"]
                choices = whole.json()["choices"]
                assert texts == {choice["index"]: choice["text"] for choice in choices}
                assert reasons == {c["index"]: (c["finish_reason"], c["stop_reason"]) for c in choices}
                usage = whole.json()["usage"]
                assert chunks[-1]["usage"]["completion_tokens"] == usage["completion_tokens"]
                found.append((choices, usage["completion_tokens"]))
            return found, (await http.get("/metrics")).text

    async def check() -> None:
        plain, _ = await answers(None)
        drafted, metrics = await answers(NgramSpeculation(6, 1, 3))
        assert drafted == plain
        accepted = re.search(r"spec_decode_num_accepted_tokens_total\{.*\} (\S+)", metrics)
        assert accepted is not None and float(accepted[1]) > 50
        count = re.search(r"inter_token_latency_seconds_count\{.*\} (\S+)", metrics)
        tokens = re.search(r"generation_tokens_total\{.*\} (\S+)", metrics)
        requests = re.search(r"request_generation_tokens_count\{.*\} (\S+)", metrics)
        assert count and tokens and requests and float(count[1]) == float(tokens[1]) - float(requests[1])

    asyncio.run(check())

"""POST /v1/completions over an engine that echoes its prompt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.api.context import SamplingDefaults
from server.types import AbortReason
from tests.server.fakes import END, END_ID, Edge, byte_level_tokenizer, echo_engine, running_edge, sse_events

TOKENIZER = byte_level_tokenizer()
TEXT = "The quick brown fox jumps over the lazy dog, and Zürich 你好世界 🙂 too."


async def post(edge: Edge, **body: Any) -> dict[str, Any]:
    response = await edge.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(edge: Edge, **body: Any) -> list[dict[str, Any]]:
    response = await edge.http.post("/v1/completions", json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return sse_events(response.text)


def texts_of(chunks: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_response_has_openais_shape() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            answer = await post(edge, model="alias", prompt=TEXT, max_tokens=5)
            num_prompt = len(TOKENIZER.encode(TEXT))
            assert answer.pop("id").startswith("cmpl-")
            assert answer.pop("created") > 1_700_000_000
            assert answer == {
                "object": "text_completion",
                "model": "alias",
                "choices": [
                    {
                        "index": 0,
                        "text": TOKENIZER.decode(TOKENIZER.encode(TEXT)[:5]),
                        "logprobs": None,
                        "finish_reason": "length",
                        "stop_reason": None,
                    }
                ],
                "usage": {
                    "prompt_tokens": num_prompt,
                    "completion_tokens": 5,
                    "total_tokens": num_prompt + 5,
                    "prompt_tokens_details": {"cached_tokens": num_prompt - 1},
                },
            }

    asyncio.run(check())


@pytest.mark.parametrize(
    "prompt",
    [TEXT, [TEXT, "another"], TOKENIZER.encode(TEXT), [TOKENIZER.encode(TEXT), [5, 6, 7]]],
    ids=["text", "texts", "ids", "id lists"],
)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_stream_says_what_the_whole_response_says(prompt: Any, n: int, echo: bool) -> None:
    body = {"prompt": prompt, "max_tokens": 40, "n": n, "echo": echo, "seed": 3}

    async def check() -> None:
        async with running_edge(echo_engine(step_seconds=0.001)) as edge:
            whole = await post(edge, **body)
            chunks = await stream(edge, **body, stream_options={"include_usage": True})
            usage_chunk = chunks.pop()
            assert usage_chunk["choices"] == []
            assert usage_chunk["usage"] == whole["usage"]
            assert all(chunk["usage"] is None for chunk in chunks)
            assert len({chunk["id"] for chunk in chunks}) == 1
            assert texts_of(chunks) == {choice["index"]: choice["text"] for choice in whole["choices"]}
            ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
            assert sorted(choice["index"] for choice in ends) == list(range(len(whole["choices"])))

    asyncio.run(check())


def test_choices_are_ordered_by_prompt_then_choice_with_seeds_that_count_up() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            answer = await post(
                edge, prompt=[[10, 11, 12], [20, 21, 22]], n=2, seed=1, max_tokens=2, return_token_ids=True
            )
            assert [choice["token_ids"] for choice in answer["choices"]] == [[11, 12], [12, 10], [21, 22], [22, 20]]
            assert [choice["prompt_token_ids"][0] for choice in answer["choices"]] == [10, 10, 20, 20]
            assert answer["usage"]["prompt_tokens"] == 6
            assert answer["usage"]["completion_tokens"] == 8
            groups = [request.group_id for request in edge.engine.submitted]
            assert groups[0] == groups[1] != groups[2] == groups[3]

    asyncio.run(check())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens_ends_the_choice_and_frees_the_engine(streamed: bool, include: bool) -> None:
    body = {"prompt": TEXT, "max_tokens": 400, "stop": ["azy d", "zzz"], "include_stop_str_in_output": include}
    expected = TEXT[: TEXT.index("azy d") + (5 if include else 0)]

    async def check() -> None:
        async with running_edge(echo_engine(step_seconds=0.001)) as edge:
            if streamed:
                chunks = await stream(edge, **body, return_token_ids=True, stream_options={"include_usage": True})
                usage = chunks.pop()["usage"]
                text, last = texts_of(chunks)[0], chunks[-1]["choices"][0]
                num_tokens = sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks)
            else:
                answer = await post(edge, **body, return_token_ids=True)
                usage, last = answer["usage"], answer["choices"][0]
                text, num_tokens = last["text"], len(last["token_ids"])
            assert text == expected
            assert (last["finish_reason"], last["stop_reason"]) == ("stop", "azy d")
            ids = TOKENIZER.encode(TEXT)
            needed = next(count for count in range(len(ids)) if "azy d" in TOKENIZER.decode(ids[:count]))
            assert usage["completion_tokens"] == num_tokens == needed
            await edge.client.drain(5)
            assert edge.engine.aborted == [(edge.engine.submitted[0].request_id, AbortReason.STOP_STRING)]
            assert not edge.engine.running

    asyncio.run(check())


def test_stop_strings_wait_for_min_tokens() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            answer = await post(edge, prompt="dog dog dog dog", stop="dog", min_tokens=3, max_tokens=50)
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] > 3
            assert answer["choices"][0]["text"].startswith("dog")

    asyncio.run(check())


def test_stop_tokens_are_counted_but_not_shown() -> None:
    comma = TOKENIZER.encode(",")[0]

    async def check() -> None:
        async with running_edge() as edge:
            [choice] = (await post(edge, prompt="dog, cat", stop_token_ids=[comma], return_token_ids=True))["choices"]
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("dog", "stop", comma)
            assert choice["token_ids"][-1] == comma
            shown = await post(edge, prompt="dog, cat", stop_token_ids=[comma], include_stop_str_in_output=True)
            assert shown["choices"][0]["text"] == "dog,"
            ids = [*TOKENIZER.encode("dog"), END_ID]
            [choice] = (await post(edge, prompt=ids, skip_special_tokens=False))["choices"]
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("dog", "stop", None)
            goes_on = await post(edge, prompt=ids, ignore_eos=True, skip_special_tokens=False, max_tokens=2 * len(ids))
            assert goes_on["choices"][0]["text"] == f"dog{END}dog{END}"

    asyncio.run(check())


def test_echo_alone_needs_no_engine() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            answer = await post(edge, prompt=[TOKENIZER.encode("dog"), TOKENIZER.encode(TEXT)], echo=True, max_tokens=0)
            assert [choice["text"] for choice in answer["choices"]] == ["dog", TEXT]
            assert answer["usage"]["completion_tokens"] == 0
            assert texts_of(await stream(edge, prompt="dog", echo=True, max_tokens=0)) == {0: "dog"}
            assert not edge.engine.submitted

    asyncio.run(check())


def test_return_token_ids_in_a_stream() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(step_seconds=0.001)) as edge:
            chunks = await stream(edge, prompt=[7, 8, 9], max_tokens=5, return_token_ids=True)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert [choices[0]["prompt_token_ids"]] == [
                c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c
            ]
            assert [token for choice in choices for token in choice["token_ids"]] == [7, 8, 9, 7, 8]

    asyncio.run(check())


def test_continuous_usage_counts_up() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(step_seconds=0.001)) as edge:
            chunks = await stream(edge, prompt="dog", max_tokens=6, stream_options={"continuous_usage_stats": True})
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts)
            assert counts[-1] == 6

    asyncio.run(check())


def test_sampling_fields_reach_the_engine_and_defaults_fill_the_rest() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=40, min_p=0.05)

    async def check() -> None:
        async with running_edge(defaults=defaults) as edge:
            await post(edge, prompt="dog")
            await post(
                edge, prompt="dog", temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=-1, cache_salt="a", max_tokens=3
            )
            await post(edge, prompt="dog", temperature=1e-6)
            first, second, third = edge.engine.submitted
            rest = 512 - len(TOKENIZER.encode("dog"))
            assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (0.6, 0.9, 40)
            assert (first.sampling.min_p, first.sampling.seed, first.sampling.max_tokens) == (0.05, None, rest)
            assert (second.sampling.temperature, second.sampling.top_p, second.sampling.top_k) == (0, 0.5, 0)
            assert (second.sampling.min_p, second.sampling.seed, second.cache_key) == (0.1, 2**63 - 1, "a")
            assert third.sampling.temperature == 0.01

    asyncio.run(check())


def test_max_tokens_is_clamped_to_the_context() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(max_model_len=32)) as edge:
            answer = await post(edge, prompt=[9] * 30, max_tokens=1000)
            assert answer["usage"]["completion_tokens"] == 2

    asyncio.run(check())


def test_values_that_ask_for_nothing_are_accepted() -> None:
    nothing = {
        "best_of": 1, "suffix": None, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "logit_bias": {}, "n": 1, "stop": None, "stream": False, "stream_options": None,
        "user": "someone", "prompt_logprobs": None, "use_beam_search": False, "length_penalty": 1, "priority": 0,
        "top_k": -1, "min_p": 0, "seed": None, "max_tokens": 16, "temperature": None, "echo": False,
    }  # fmt: skip

    async def check() -> None:
        async with running_edge() as edge:
            assert (await post(edge, prompt="dog", **nothing))["usage"]["completion_tokens"] == 16

    asyncio.run(check())


def test_long_prompts_are_tokenized_all_the_same() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(max_model_len=100_000)) as edge:
            answer = await post(edge, prompt=TEXT * 400, max_tokens=1, return_token_ids=True)
            assert answer["choices"][0]["prompt_token_ids"] == TOKENIZER.encode(TEXT * 400)

    asyncio.run(check())

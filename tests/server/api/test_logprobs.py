"""Log probabilities through the whole server, against transformers on the same weights."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from server.api.chat_template import ChatTemplate
from server.api.logprobs import CompletionLogprobsWriter
from tests.kernels.cpu_support import needs_native
from tests.server.fakes import CHAT_TEMPLATE, END_ID, byte_level_tokenizer, sse_events
from tests.server.real_edge import completion, real_edge, tiny_checkpoint
from tests.tiny_models import load_reference, reference_logits

PROMPT = [20, 31, 77, 140, 9, 260, 300, 41, 5, 66]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def reference_logprobs(model: Path, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]: row i is about token i + 1."""
    return reference_logits(load_reference(model), token_ids).log_softmax(-1)


def check_against(expected: torch.Tensor, token_ids: list[int], logprobs: list[float], first: int) -> None:
    for offset, logprob in enumerate(logprobs):
        position = first + offset
        assert abs(logprob - float(expected[position - 1, token_ids[position]])) < 1e-3


def test_output_logprobs_are_those_of_transformers_whatever_the_rules(model: Path) -> None:
    async def check() -> None:
        async with real_edge(model) as http:
            for rules in ({}, {"logit_bias": {"7": 5}, "frequency_penalty": 1.5, "temperature": 1.3, "seed": 3}):
                [choice] = (await completion(http, PROMPT, logprobs=3, **rules))["choices"]
                output, logprobs = choice["token_ids"], choice["logprobs"]
                expected = reference_logprobs(model, PROMPT + output)
                check_against(expected, PROMPT + output, logprobs["token_logprobs"], len(PROMPT))
                for index, top in enumerate(logprobs["top_logprobs"]):
                    row = expected[len(PROMPT) + index - 1]
                    assert len(top) in (3, 4) and logprobs["tokens"][index] in top
                    assert abs(max(top.values()) - float(row.max())) < 1e-3
                offsets = logprobs["text_offset"]
                assert offsets == sorted(offsets) and offsets[0] == 0

    asyncio.run(check())


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_tells_the_prompts_logprobs_too(model: Path, max_tokens: int) -> None:
    async def check() -> None:
        async with real_edge(model) as http:
            for _ in range(2):  # the second finds the prompt in the prefix cache, and computes it all the same
                answer = await completion(http, PROMPT * 5, echo=True, logprobs=2, max_tokens=max_tokens)
                [choice] = answer["choices"]
                tokens = PROMPT * 5 + choice["token_ids"]
                assert len(choice["token_ids"]) == max_tokens == answer["usage"]["completion_tokens"]
                logprobs = choice["logprobs"]
                assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
                assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(tokens)
                check_against(reference_logprobs(model, tokens), tokens, logprobs["token_logprobs"][1:], 1)

    asyncio.run(check())


@pytest.mark.parametrize("kv_bytes", [2**24, 420_000])
def test_prompt_logprobs_do_not_depend_on_the_company(model: Path, kv_bytes: int) -> None:
    """More prompt rows than a step has; beside requests that decode, and others that ask the same; with a pool that is too
    small for all, which preempts."""

    async def check() -> None:
        prompt = PROMPT * 6
        async with real_edge(model, kv_bytes=kv_bytes) as http:
            alone = await completion(http, prompt, prompt_logprobs=1, max_tokens=1)
            busy = [asyncio.ensure_future(completion(http, PROMPT, max_tokens=60)) for _ in range(6)]
            others = [
                asyncio.ensure_future(completion(http, prompt, prompt_logprobs=1, max_tokens=1)) for _ in range(5)
            ]
            together = await asyncio.gather(*others)
            await asyncio.gather(*busy)
            metrics = (await http.get("/metrics")).text
        preemptions = re.findall(r"^\S*preemptions_total\S* (\S+)$", metrics, re.MULTILINE)
        assert (float(preemptions[0]) > 0) == (kv_bytes < 2**20)
        [choice] = alone["choices"]
        assert all(other["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"] for other in together)
        scored = choice["prompt_logprobs"]
        assert scored[0] is None and len(scored) == len(prompt)
        expected = reference_logprobs(model, prompt)
        for position, entry in enumerate(scored[1:], 1):
            own = entry[str(prompt[position])]
            row = expected[position - 1]
            assert abs(own["logprob"] - float(row[prompt[position]])) < 1e-3
            assert min(value["rank"] for value in entry.values()) == 1

    asyncio.run(check())


def test_chat_logprobs_streamed_and_whole(model: Path) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "the dog"}],
        "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "ignore_eos": True,
    }  # fmt: skip

    async def check() -> None:
        async with real_edge(model, chat_template=ChatTemplate(CHAT_TEMPLATE)) as http:
            whole = (await http.post("/v1/chat/completions", json=body)).json()
            streamed = sse_events((await http.post("/v1/chat/completions", json=body | {"stream": True})).text)
        [choice] = whole["choices"]
        content = choice["logprobs"]["content"]
        assert len(content) == 6 and all(len(entry["top_logprobs"]) == 2 for entry in content)
        assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)  # greedy
        chunks = [chunk["choices"][0]["logprobs"] for chunk in streamed]
        assert [entry for chunk in chunks if chunk for entry in chunk["content"]] == content
        tokens = whole["prompt_token_ids"] + choice["token_ids"]
        logprobs = [entry["logprob"] for entry in content]
        check_against(reference_logprobs(model, tokens), tokens, logprobs, len(whole["prompt_token_ids"]))

    asyncio.run(check())


def test_offsets_are_into_the_text() -> None:
    tokenizer = byte_level_tokenizer()
    text = "The 🙂 Zürich 你好."
    token_ids = tokenizer.encode(text)
    cut = next(index for index, token_id in enumerate(token_ids) if _is_part(tokenizer.token_bytes(token_id))) + 1
    writer = CompletionLogprobsWriter(tokenizer, 0, tokenizer.special_token_ids)
    pieces = [token_ids[:cut], [END_ID], token_ids[cut:]]
    offsets = [offset for piece in pieces for offset in writer.write(piece, [None] * len(piece)).text_offset]
    del offsets[cut]  # of the token that the text does not show
    for index, offset in enumerate(offsets):
        before = b"".join(map(tokenizer.token_bytes, token_ids[:index]))
        assert offset == len(before.decode(errors="ignore"))
    assert len(set(offsets)) < len(offsets)  # some characters are of several tokens


def _is_part(data: bytes) -> bool:
    return "\ufffd" in data.decode(errors="replace")


@needs_native
def test_the_cpu_back_end_scores_too(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, torch.float16)

    async def check() -> None:
        async with real_edge(model, "cpu") as http:
            [choice] = (await completion(http, PROMPT * 3, echo=True, logprobs=1, max_tokens=3))["choices"]
            tokens = PROMPT * 3 + choice["token_ids"]
            scores = torch.tensor(choice["logprobs"]["token_logprobs"][1:])
            expected = reference_logprobs(model, tokens)
            exact = torch.stack([expected[i - 1, tokens[i]] for i in range(1, len(tokens))])
            assert (scores - exact).abs().mean() < 0.1 * exact.abs().mean()

    asyncio.run(check())

"""A request's rules on its logits against a plain reimplementation, and through the server."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import BackendOptions
from kernels.batch import SamplingBatch
from kernels.reference import ReferenceBackend
from server.engine.sampler import NOTHING_LEFT, Sampler
from server.engine.sequence import Sequence as EngineSequence
from server.engine.step import SamplingRow
from server.engine.token_mask import TokenMask
from server.types import GenerateRequest, SamplingParams
from tests.server.real_edge import completion, real_edge, tiny_checkpoint
from tests.tiny_models import load_reference, reference_logits

SIZE = 12
TOKEN = st.integers(0, SIZE - 1)
PROMPT = [20, 31, 77, 140, 9]


def plain(logits: list[float], sampling: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """The rules, token by token, from their definitions."""
    counts = Counter(output)
    changed = []
    for token, logit in enumerate(logits):
        is_bad = any(word[-1] == token and tuple(output[len(output) - len(word) + 1 :]) == word[:-1]
                     for word in sampling.bad_words if len(word) - 1 <= len(output))  # fmt: skip
        if (sampling.allowed_token_ids is not None and token not in sampling.allowed_token_ids) or is_bad:
            logit = -float("inf")
        logit += dict(sampling.logit_bias).get(token, 0.0)
        if token in counts or token in prompt:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        logit -= sampling.frequency_penalty * counts[token] + sampling.presence_penalty * (token in counts)
        changed.append(logit)
    return changed


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-10, 10, width=32), min_size=SIZE, max_size=SIZE),
    prompt=st.lists(TOKEN, min_size=1, max_size=6),
    output=st.lists(TOKEN, max_size=10),
    penalties=st.tuples(
        st.sampled_from([0.0, 0.5, -2.0]), st.sampled_from([0.0, 1.5]), st.sampled_from([1.0, 1.3, 0.5])
    ),
    bias=st.dictionaries(TOKEN, st.sampled_from([-100.0, 2.5])),
    allowed=st.none() | st.sets(TOKEN, min_size=1),
    words=st.lists(st.lists(TOKEN, min_size=1, max_size=3), max_size=4),
)
def test_rules_equal_their_definitions_at_every_length(
    logits: list[float], prompt: list[int], output: list[int], penalties: tuple[float, float, float],
    bias: dict[int, float], allowed: set[int] | None, words: list[list[int]],
) -> None:  # fmt: skip
    sampling = SamplingParams(
        max_tokens=1, presence_penalty=penalties[0], frequency_penalty=penalties[1], repetition_penalty=penalties[2],
        logit_bias=tuple(bias.items()), allowed_token_ids=None if allowed is None else tuple(allowed),
        bad_words=tuple(map(tuple, words)),
    )  # fmt: skip
    backend = ReferenceBackend(BackendOptions())
    sampler = Sampler(backend, SamplingBatch.allocate(2, backend.device), frozenset())
    request = GenerateRequest("", prompt, sampling, 0.0)
    sequence = EngineSequence(request, 0, list(prompt))
    for length in range(len(output) + 1):
        sequence.token_ids[len(prompt) :] = output[:length]
        rows = torch.tensor([logits, logits])
        bare = EngineSequence(GenerateRequest("", prompt, SamplingParams(max_tokens=1), 0.0), 0, list(prompt))
        errors = sampler.apply_rules([SamplingRow(bare), SamplingRow(sequence)], rows)
        expected = plain(logits, sampling, prompt, output[:length])
        assert rows[0].tolist() == logits
        assert errors == ({} if any(value > -float("inf") for value in expected) else {1: NOTHING_LEFT})
        if not errors:
            torch.testing.assert_close(rows[1], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_masks_are_sets_of_tokens() -> None:
    mask = TokenMask.of([0, 31, 32, 69, 70, 900], 70)
    assert (mask & TokenMask.of([31, 69], 70)).has_any_besides([31, 500])
    assert not (mask & TokenMask.of([31, 69], 70)).has_any_besides([31, 69])
    whole = TokenMask.from_bytes(b"\xff" * 12, 70)  # longer than the vocabulary
    assert not whole.has_any_besides(range(70)) and whole.has_any_besides(range(69))
    short = TokenMask.from_bytes(b"\x02", 70)
    assert not short.has_any_besides([1]) and short.to_tensor().tolist() == [2, 0, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_greedy_outputs_under_rules_are_those_of_the_definitions(model: Path) -> None:
    """And requests without rules in the same steps give what they give alone."""
    rules: list[dict[str, Any]] = [
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 0.05},
        {"logit_bias": {"17": 30.0, "18": 30.5}, "frequency_penalty": 1.0},
        {"allowed_token_ids": [40, 41, 42, 43], "presence_penalty": 1.0},
    ]
    reference = load_reference(model)

    def expected(fields: dict[str, Any]) -> list[int]:
        bias = tuple((int(key), value) for key, value in fields.get("logit_bias", {}).items())
        allowed = fields.get("allowed_token_ids")
        options = {key: value for key, value in fields.items() if key.endswith("_penalty")}
        sampling = SamplingParams(8, logit_bias=bias, allowed_token_ids=allowed and tuple(allowed), **options)
        output: list[int] = []
        for _ in range(8):
            logits = reference_logits(reference, PROMPT + output)[-1].tolist()
            row = plain(logits, sampling, PROMPT, output)
            output.append(row.index(max(row)))
        return output

    async def check() -> None:
        async with real_edge(model) as http:
            alone = (await completion(http, PROMPT))["choices"][0]["token_ids"]
            bare = [completion(http, PROMPT) for _ in rules]
            answers = await asyncio.gather(*(completion(http, PROMPT, **fields) for fields in rules), *bare)
        outputs = [answer["choices"][0]["token_ids"] for answer in answers]
        assert outputs[len(rules) :] == [alone] * len(rules)
        assert outputs[: len(rules)] == [expected(fields) for fields in rules]
        assert sum(output != alone for output in outputs[: len(rules)]) >= 3

    asyncio.run(check())


def test_bad_words_never_appear(model: Path) -> None:
    async def check() -> None:
        async with real_edge(model) as http:
            free = (await completion(http, "the dog", max_tokens=40, temperature=1, seed=5))["choices"][0]["text"]
            words = sorted({word for word in free.split() if word.isascii()}, key=len)[-3:]
            fields = {"max_tokens": 40, "temperature": 1, "seed": 5, "bad_words": words}
            text = (await completion(http, "the dog", **fields))["choices"][0]["text"]
        assert words and not any(word in text.split() for word in words)

    asyncio.run(check())


def test_rules_that_leave_nothing_are_the_requests_fault(model: Path) -> None:
    async def check() -> None:
        async with real_edge(model) as http:
            body = {"prompt": "the", "max_tokens": 5, "min_tokens": 3, "allowed_token_ids": [2]}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 400 and "leave no token" in answer.json()["error"]["message"]
            assert (await completion(http, "the", allowed_token_ids=[2], ignore_eos=False))["choices"][0]["text"] == ""

    asyncio.run(check())


def test_truncation_keeps_the_prompts_end(model: Path) -> None:
    async def check() -> None:
        async with real_edge(model) as http:
            prompt = [3 + i % 300 for i in range(700)]
            short = await completion(http, prompt, truncate_prompt_tokens=7)
            assert short["choices"][0]["prompt_token_ids"] == prompt[-7:]
            fitting = await completion(http, prompt, truncate_prompt_tokens=-1, max_tokens=6)
            assert fitting["choices"][0]["prompt_token_ids"] == prompt[-506:]
            assert fitting["usage"]["completion_tokens"] == 6

    asyncio.run(check())

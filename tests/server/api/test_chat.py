"""POST /v1/chat/completions, and the chat template under it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.api.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from server.api.context import SamplingDefaults
from tests.server.fakes import END, Edge, byte_level_tokenizer, echo_engine, running_edge, sse_events

TOKENIZER = byte_level_tokenizer()
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The lazy dog?"}]
PROMPT = f"[system] Be kind.{END}[user] The lazy dog?{END}[assistant]"


async def post(edge: Edge, **body: Any) -> dict[str, Any]:
    response = await edge.http.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_response_has_openais_shape() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            answer = await post(edge, return_token_ids=True)
            assert answer.pop("id").startswith("chatcmpl-")
            assert answer.pop("created") > 1_700_000_000
            prompt_ids = answer.pop("prompt_token_ids")
            assert TOKENIZER.decode(prompt_ids, skip_special_tokens=False) == PROMPT
            num_output = len(TOKENIZER.encode("[system] Be kind.")) + 1  # up to the end token of the echo
            token_ids = answer["choices"][0].pop("token_ids")
            assert token_ids == prompt_ids[:num_output]
            assert answer == {
                "object": "chat.completion",
                "model": "echo",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "[system] Be kind.", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": None,
                    }
                ],
                "usage": {
                    "prompt_tokens": len(prompt_ids),
                    "completion_tokens": num_output,
                    "total_tokens": len(prompt_ids) + num_output,
                    "prompt_tokens_details": {"cached_tokens": len(prompt_ids) - 1},
                },
            }

    asyncio.run(check())


@pytest.mark.parametrize("n", [1, 2])
def test_stream_says_what_the_whole_response_says(n: int) -> None:
    async def check() -> None:
        async with running_edge(echo_engine(step_seconds=0.001)) as edge:
            whole = await post(edge, n=n, seed=0, stop="kin")
            response = await edge.http.post(
                "/v1/chat/completions",
                json={
                    "messages": MESSAGES,
                    "n": n,
                    "seed": 0,
                    "stop": "kin",
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            )
            chunks = sse_events(response.text)
            assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
            assert chunks.pop()["usage"] == whole["usage"]
            roles = [chunk["choices"][0] for chunk in chunks[:n]]
            assert [choice["delta"] for choice in roles] == [{"role": "assistant", "content": ""}] * n
            for choice in whole["choices"]:
                mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
                assert "".join(c["delta"]["content"] for c in mine) == choice["message"]["content"]
                assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]

    asyncio.run(check())


def test_output_fills_the_context_unless_told_otherwise() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(max_model_len=200)) as edge:
            await post(edge, ignore_eos=True)
            room = 200 - len(edge.engine.submitted[0].prompt_token_ids)
            await post(edge, max_tokens=5, max_completion_tokens=7)
            await post(edge, max_tokens=5)
            assert [request.sampling.max_tokens for request in edge.engine.submitted] == [room, 7, 5]
        async with running_edge(defaults=SamplingDefaults(max_new_tokens=11)) as edge:
            await post(edge)
            assert edge.engine.submitted[0].sampling.max_tokens == 11

    asyncio.run(check())


def test_content_parts_developer_and_template_variables() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            parts = [{"type": "text", "text": "The lazy "}, {"type": "text", "text": "dog?"}]
            messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
            await post(edge, messages=messages, chat_template_kwargs={"suffix": " dog"})
            await post(edge, messages=messages, add_generation_prompt=False)
            prompts = [TOKENIZER.decode(request.prompt_token_ids, False) for request in edge.engine.submitted]
            assert prompts == [PROMPT + " dog", PROMPT.removesuffix("[assistant]")]

    asyncio.run(check())


def test_without_a_template_chat_is_refused_by_name() -> None:
    async def check() -> None:
        async with running_edge(chat_template=None) as edge:
            response = await edge.http.post("/v1/chat/completions", json={"messages": MESSAGES})
            assert response.status_code == 400
            assert "no chat template" in response.json()["error"]["message"]

    asyncio.run(check())


# -- the template --------------------------------------------------------------------------------------------------------


def test_template_helpers() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{% generation %}x{% endgeneration %}{{ tools is none }}{{ strftime_now('%Y') | length }}"
    )
    assert template.render([{"role": "user", "content": "<é>"}] * 2) == '{"role": "user", "content": "<é>"}xTrue4'


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no') }}", "{{ messages[9].role }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"],
)
def test_template_failures_are_the_users_to_see(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])


def test_template_sources_in_order(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = {
        "chat_template": [{"name": "default", "template": "list{{ bos_token }}"}, {"name": "rag", "template": ""}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": {"content": "<s>"}}))
    assert _render(tmp_path) == "list<s>"
    (tmp_path / "chat_template.jinja").write_text("file{{ bos_token }}")
    assert _render(tmp_path) == "file<s>"
    override = tmp_path / "mine.jinja"
    override.write_text("mine{{ bos_token }}")
    assert _render(tmp_path, override) == "mine<s>"
    with pytest.raises(ValueError, match=r"missing\.jinja"):
        load_chat_template(tmp_path, tmp_path / "missing.jinja")
    override.write_text("{% if %}")
    with pytest.raises(ValueError, match="not valid jinja"):
        load_chat_template(tmp_path, override)


def _render(directory: Path, override: Path | None = None) -> str:
    template = load_chat_template(directory, override)
    assert template is not None
    return template.render([{"role": "user", "content": "hi"}])

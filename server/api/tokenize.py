"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_body
from server.api.chat_prompt import render_prompt
from server.api.context import ApiContext
from server.api.errors import RequestError
from server.api.prompts import refuse_huge_text, refuse_unknown_ids
from server.api.responses import json_response
from server.api.schemas import ChatPromptFields, DetokenizeRequest, TokenizeRequest
from server.text import Tokenizer


async def tokenize(request: Request, context: ApiContext) -> Response:
    """The token ids of a prompt, or of the prompt that a chat's messages make."""
    body = await read_body(request, TokenizeRequest, context.max_request_bytes)
    context.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("needs exactly one of prompt and messages", param="prompt")
    if body.prompt is None:
        if body.add_special_tokens is not None:
            raise RequestError("add_special_tokens: only for prompts: templates add them", param="add_special_tokens")
        text, adds_special_tokens = render_prompt(body, context, body.tools), False
    else:
        for name in ChatPromptFields.model_fields.keys() - {"messages"}:
            if getattr(body, name) is not None:
                raise RequestError(f"{name}: only for messages", param=name)
        text, adds_special_tokens = body.prompt, body.add_special_tokens is not False
    refuse_huge_text(text, "messages" if body.prompt is None else "prompt")
    [token_ids] = await context.tokenizer.encode_all([text], adds_special_tokens)
    texts = None
    if body.return_token_strs:
        texts = await asyncio.to_thread(_token_texts, context.tokenizer, token_ids)
    return json_response(
        {"count": len(token_ids), "max_model_len": context.max_model_len, "tokens": token_ids, "token_strs": texts}
    )


def _token_texts(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in token_ids]


async def detokenize(request: Request, context: ApiContext) -> Response:
    """The text of token ids, special ones included."""
    body = await read_body(request, DetokenizeRequest, context.max_request_bytes)
    context.model_name(body.model)
    refuse_unknown_ids(body.tokens, context, "tokens")
    return json_response({"prompt": context.tokenizer.decode(body.tokens, skip_special_tokens=False)})

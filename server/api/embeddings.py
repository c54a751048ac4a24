"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_body
from server.api.context import ApiContext
from server.api.errors import RequestError
from server.api.generation import failure
from server.api.prompts import (
    log_prompts,
    refuse_longer_text,
    refuse_priority,
    refuse_unknown_ids,
    room_after,
    split_prompt,
)
from server.api.responses import Embedding, Embeddings, EmbeddingsUsage, PromptTokensDetails, json_response
from server.api.schemas import Integer, OnlyNull, Prompt, Schema
from server.api.sse import unless_disconnected
from server.engine.client import Mailbox
from server.record import Generated, current_key, note_generated
from server.types import AbortReason, FinishReason, Pooling, PoolRequest


class EmbeddingsRequest(Schema):
    input: Prompt = Field(description="One text or several; text or token ids.")
    model: str | None = Field(None, description="A served model's name; null is the server's.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Of each embedding: a list of numbers, or base64 of fp32, the lowest byte first."
    )
    pooling: Literal["last", "mean"] | None = Field(
        None, description="The last token's hidden state (the default), or the mean of all tokens'."
    )
    add_special_tokens: bool | None = Field(None, description="Whether the tokenizer may add its own; true.")
    cache_salt: str | None = Field(None, max_length=1024)
    priority: Integer | None = Field(None, ge=-1000, le=1000, description="As for completions.")
    user: str | None = Field(None, description="Accepted for compatibility; identifies your user to you.")
    dimensions: OnlyNull = None


@dataclass(frozen=True, slots=True)
class EmbeddingsJob:
    """What a request to embed asks for."""

    model: str
    prompts: list[list[int]]
    pooling: Pooling
    as_base64: bool
    cache_key: str
    priority: int


async def parse_embeddings(body: EmbeddingsRequest, context: ApiContext) -> EmbeddingsJob:
    model = context.model_name(body.model)
    refuse_priority(body.priority, context)
    texts, prompts = split_prompt(body.input)
    if texts is not None:
        refuse_longer_text(texts, context, "input")
        prompts = await context.tokenizer.encode_all(texts, body.add_special_tokens is not False)
        if not all(prompts):
            raise RequestError("input: must not be empty: this model adds no token of its own", param="input")
    for ids in prompts:
        refuse_unknown_ids(ids, context, "input")
        room_after(ids, context, needs_output=False, param="input")
    return EmbeddingsJob(
        model=model,
        prompts=prompts,
        pooling=Pooling(body.pooling or "last"),
        as_base64=body.encoding_format == "base64",
        cache_key=body.cache_salt or "",
        priority=body.priority or 0,
    )


async def create_embeddings(request: Request, context: ApiContext) -> Response:
    body = await read_body(request, EmbeddingsRequest, context.max_request_bytes)
    job = await parse_embeddings(body, context)
    return json_response(await unless_disconnected(request.receive, _embed(job, context)))


async def _embed(job: EmbeddingsJob, context: ApiContext) -> Embeddings:
    """Submits all prompts, and waits for all; whatever is left when one fails or the client leaves is aborted."""
    name, arrival = f"embd-{uuid.uuid4().hex}", time.monotonic()
    num_tokens = sum(map(len, job.prompts))
    note_generated(lambda: Generated("embeddings", name, job.model, num_prompt_tokens=num_tokens))
    context.admission.check(len(job.prompts), num_tokens)
    if context.num_logged_characters is not None:
        log_prompts(context.tokenizer, name, job.prompts, context.num_logged_characters, job.pooling)
    mailbox = Mailbox()
    answers: dict[int, Embedding] = {}
    num_cached_tokens = 0
    waiting: dict[str, int] = {}
    try:
        for index, token_ids in enumerate(job.prompts):
            request_id = f"{name}-{index}"
            request = PoolRequest(
                request_id, token_ids, job.pooling, arrival, job.cache_key, job.priority, client=current_key()
            )
            context.engine.submit(request, mailbox)
            waiting[request_id] = index
        while waiting:
            for event in await mailbox.get():
                if event.finish_reason is not None:
                    index = waiting.pop(event.request_id)
                    if event.finish_reason is FinishReason.ERROR or event.embedding is None:
                        raise failure(event)
                    num_cached_tokens += event.num_cached_tokens
                    answers[index] = Embedding(index=index, embedding=_encoded(event.embedding, job.as_base64))
    finally:
        for request_id in waiting:
            context.engine.abort(request_id, AbortReason.CLIENT)
    usage = EmbeddingsUsage(num_tokens, num_tokens, PromptTokensDetails(num_cached_tokens))
    return Embeddings(data=[answers[index] for index in range(len(job.prompts))], model=job.model, usage=usage)


def _encoded(embedding: list[float], as_base64: bool) -> list[float] | str:
    if not as_base64:
        return embedding
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()

"""The FastAPI application: routes, error shapes, and an OpenAPI document of the bodies that are really accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from server.api import answer_schemas as answers
from server.api import chat, completions, embeddings, messages, ops, page, responses_api, tokenize
from server.api.access import Access, ApiKey, KeyLimits
from server.api.context import ApiContext, ContextSource
from server.api.embeddings import EmbeddingsRequest
from server.api.errors import HANDLERS
from server.api.messages_schemas import CountTokensRequest, MessagesRequest
from server.api.request_id import RequestIds
from server.api.responses import ChatChunk, ChatCompletion, Completion, Embeddings
from server.api.responses_schemas import ResponsesRequest
from server.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, Schema, TokenizeRequest
from server.api.sse import ClientGone
from server.record import Recorder, current_record

_BODIES: tuple[type[Schema], ...] = (
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    EmbeddingsRequest,
    TokenizeRequest,
    DetokenizeRequest,
)

# Of each path the whole answer, and the events of a stream.
_ANSWERS: dict[str, tuple[Any, ...]] = {
    "/v1/completions": (Completion, Completion),
    "/v1/chat/completions": (ChatCompletion, ChatChunk),
    "/v1/responses": (answers.ResponseAnswer, answers.ResponseEvent),
    "/v1/messages": (answers.MessageAnswer, answers.MessageEvent),
    "/v1/messages/count_tokens": (answers.InputTokens,),
    "/v1/embeddings": (Embeddings,),
    "/tokenize": (answers.Tokens,),
    "/detokenize": (answers.Detokenized,),
    "/v1/models": (answers.ModelList,),
    "/v1/models/{model:path}": (answers.Model,),
    "/version": (answers.Version,),
    "/live": (answers.Status,),
    "/health": (answers.Status,),
    "/ready": (answers.Status,),
}
_ERRORS = (answers.ErrorAnswer, answers.MessageError)

_REFERENCE = "#/components/schemas/{name}"
_ANSWER_PREFIX = "answer."  # bodies and answers have parts of the same name
_ANSWER_REFERENCE = "#/components/schemas/" + _ANSWER_PREFIX + "{name}"

_ERROR_TEXTS = {
    "4XX": "The request cannot be served as it is; the message names the field.",
    "5XX": "The engine is loading, draining or down, or has failed.",
}

_Handler = Callable[[Request, ApiContext], Awaitable[Response]]
_Probe = Callable[[ContextSource], Awaitable[Response]]

_GENERATIONS: tuple[_Handler, ...] = (  # what takes a place in the engine's queue
    completions.create_completion,
    chat.create_chat_completion,
    responses_api.create_response,
    messages.create_message,
    embeddings.create_embeddings,
)

_CLIENT_CLOSED_REQUEST = 499  # nginx's number; the client is not there to read it


@dataclass(frozen=True, slots=True)
class Cors:
    """Whose pages may call from elsewhere, and how."""

    origins: tuple[str, ...]
    methods: tuple[str, ...] = ("GET", "POST")
    headers: tuple[str, ...] = ()
    credentials: bool = False


@dataclass(frozen=True, slots=True)
class Gate:
    """What lies around the routes. `on_refused` is told the reason of each request that access turns away."""

    keys: tuple[ApiKey, ...] = ()
    key_limits: KeyLimits | None = None
    cors: Cors | None = None
    recorders: tuple[Recorder, ...] = ()
    on_refused: Callable[[str], None] = lambda reason: None


class _App(FastAPI):
    gate: Gate

    def build_middleware_stack(self) -> ASGIApp:
        """From the outside: request ids and records, CORS (preflights bring no key), access; then all that FastAPI has."""
        app: ASGIApp = super().build_middleware_stack()
        app = Access(app, self.gate.keys, self.gate.key_limits, self.gate.on_refused)
        cors = self.gate.cors
        if cors is not None:
            app = CORSMiddleware(
                app,
                allow_origins=cors.origins,
                allow_methods=cors.methods,
                allow_headers=cors.headers,
                allow_credentials=cors.credentials,
                expose_headers=("X-Request-Id", "Retry-After"),
            )
        return RequestIds(app, self.gate.recorders)


def create_app(served: ApiContext | ContextSource, gate: Gate | None = None) -> FastAPI:
    """Over one model for good, or over whichever the source has at the moment."""
    source = served if isinstance(served, ContextSource) else ContextSource(served.engine, served.version, served)
    # No /docs pages: they load their scripts from outside.
    app = _App(title="awq-serve", version=source.version, docs_url=None, redoc_url=None, exception_handlers=HANDLERS)
    app.gate = gate or Gate()
    app.state.source = source
    app.state.large_bodies = asyncio.Lock()  # held by the one that is being parsed
    answer_schemas = _answer_schemas()

    def route(method: str, path: str, handler: _Handler, schema: type[Schema] | None = None) -> None:
        is_generation = handler in _GENERATIONS

        async def endpoint(request: Request) -> Response:
            record = current_record()
            if record is not None:
                record.route = path
            try:
                if method != "POST":
                    return await handler(request, source.current())
                if is_generation:
                    source.current().admission.refuse_if_full()
                async with source.entered() as context:
                    return await handler(request, context)
            except ClientGone:
                return Response(status_code=_CLIENT_CLOSED_REQUEST)

        extra = None if schema is None else {"requestBody": _request_body(schema)}
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            name=handler.__name__,
            description=handler.__doc__ or "",
            openapi_extra=extra,
            responses=_responses(path, answer_schemas),
            response_model=None,
            response_class=Response,
            include_in_schema=handler not in (page.index, page.static_file),  # for browsers
        )

    route("POST", "/v1/completions", completions.create_completion, CompletionRequest)
    route("POST", "/v1/chat/completions", chat.create_chat_completion, ChatRequest)
    route("POST", "/v1/responses", responses_api.create_response, ResponsesRequest)
    route("POST", "/v1/messages", messages.create_message, MessagesRequest)
    route("POST", "/v1/messages/count_tokens", messages.count_tokens, CountTokensRequest)
    route("POST", "/v1/embeddings", embeddings.create_embeddings, EmbeddingsRequest)
    route("POST", "/tokenize", tokenize.tokenize, TokenizeRequest)
    route("POST", "/detokenize", tokenize.detokenize, DetokenizeRequest)
    route("GET", "/v1/models", ops.list_models)
    route("GET", "/v1/models/{model:path}", ops.get_model)
    for path, probe in (("/live", ops.live), ("/health", ops.health), ("/ready", ops.health)):
        app.add_api_route(path, _probe(probe, source), name=probe.__name__, description=probe.__doc__ or "",
                          responses=_responses(path, answer_schemas), response_model=None, response_class=Response)  # fmt: skip
    route("GET", "/metrics", ops.metrics)
    route("GET", "/version", ops.version)
    route("GET", "/", page.index)
    route("GET", "/static/{name}", page.static_file)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def create_metrics_app(source: ContextSource, render: Callable[[], tuple[bytes, str]]) -> ASGIApp:
    """Metrics and probes alone, for a listener of their own: without keys."""

    def route(path: str, probe: _Probe) -> Route:
        async def endpoint(_: Request) -> Response:
            return await probe(source)

        return Route(path, endpoint, methods=["GET"])

    async def metrics(_: Request) -> Response:
        body, content_type = render()
        return Response(body, media_type=content_type)

    probes = [route("/live", ops.live), route("/health", ops.health), route("/ready", ops.health)]
    return Starlette(routes=[Route("/metrics", metrics, methods=["GET"]), *probes], exception_handlers=HANDLERS)


def _probe(handler: _Probe, source: ContextSource) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return await handler(source)

    return endpoint


def _answer_schemas() -> dict[Any, dict[str, Any]]:
    """The schema of each type of answer; those of parts are references."""
    types = list(dict.fromkeys(kind for kinds in (*_ANSWERS.values(), _ERRORS) for kind in kinds))
    schemas, _ = msgspec.json.schema_components(types, ref_template=_ANSWER_REFERENCE)
    return dict(zip(types, schemas, strict=True))


def _responses(path: str, schemas: dict[Any, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """What is answered, whole and as the events of a stream, and the errors, which a stream ends with as well."""
    error = schemas[_ERRORS[path.startswith("/v1/messages")]]
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": description, "content": {"application/json": {"schema": error}}}
        for status, description in _ERROR_TEXTS.items()
    }
    kinds = _ANSWERS.get(path, ())
    content = {"application/json": {"schema": schemas[kinds[0]]}} if kinds else {}
    if len(kinds) > 1:
        content["text/event-stream"] = {"schema": _event_schema(schemas[kinds[1]], error, path)}
    if path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    if content:
        found[200] = {"description": "The answer.", "content": content}
    return found


def _event_schema(event: dict[str, Any], error: dict[str, Any], path: str) -> dict[str, Any]:
    """Of each server-sent event, whose data is JSON; the older streams end with a word, and may end with an error."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": event}
    if not path.endswith("completions"):
        return {
            "type": "object",
            "required": ["event", "data"],
            "properties": {"event": {"type": "string"}, "data": data},
        }
    failed = data | {"contentSchema": error}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [data, failed, {"const": "[DONE]"}]}},
    }


def _request_body(schema: type[Schema]) -> dict[str, Any]:
    reference = {"$ref": _REFERENCE.format(name=schema.__name__)}
    return {"required": True, "content": {"application/json": {"schema": reference}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document that FastAPI makes of the routes, with the schemas of what the handlers read and write themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(schema, "validation") for schema in _BODIES],
            ref_template=_REFERENCE.format(name="{model}"),
        )
        types = list(_answer_schemas())
        _, components = msgspec.json.schema_components(types, ref_template=_ANSWER_REFERENCE)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        schemas.update({_ANSWER_PREFIX + name: answer for name, answer in components.items()})
        app.openapi_schema = document
    return app.openapi_schema

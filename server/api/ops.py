"""What operators and load balancers ask: health, readiness, metrics, version; and the model list."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.context import ApiContext, ContextSource
from server.api.errors import RequestError, error_response, unavailable
from server.api.responses import json_response


async def live(source: ContextSource) -> Response:
    """200 for as long as this process answers."""
    return json_response({"status": "ok"})


async def health(source: ContextSource) -> Response:
    """200 while requests are taken; 503 while the engine loads, restarts, drains or is down."""
    if source.is_ready:
        return json_response({"status": "ok"})
    return error_response(unavailable(f"the engine is {source.state}", source.engine.retry_after))


async def metrics(request: Request, context: ApiContext) -> Response:
    body, content_type = context.render_metrics()
    return Response(body, media_type=content_type)


async def version(request: Request, context: ApiContext) -> Response:
    return json_response({"version": context.version})


async def list_models(request: Request, context: ApiContext) -> Response:
    return json_response({"object": "list", "data": [_model(name, context) for name in context.model_names]})


async def get_model(request: Request, context: ApiContext) -> Response:
    name = request.path_params["model"]
    if name not in context.model_names:
        raise RequestError(f"The model `{name}` does not exist.", status=404, param="model", code="model_not_found")
    return json_response(_model(name, context))


def _model(name: str, context: ApiContext) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "awq-serve",
        "root": context.model_names[0],
        "parent": None,
        "max_model_len": context.max_model_len,
        "vocab_size": context.vocab_size,
    }

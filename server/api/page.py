"""The page at `/`: chat with the model and watch the server. Plain files, nothing of which comes from elsewhere."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from server.api.context import ApiContext
from server.api.errors import RequestError

_DIRECTORY = Path(__file__).parent / "static"
_INDEX = "index.html"
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # The page may load and call this server alone, and nobody may frame it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for anew with its ETag: an upgraded server shows its own page
}


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Content and ETag by name. Only these names are ever served: a path from outside is never opened."""
    contents = {path.name: path.read_bytes() for path in _DIRECTORY.iterdir() if path.suffix in _CONTENT_TYPES}
    return {name: (body, f'"{hashlib.sha256(body).hexdigest()[:32]}"') for name, body in contents.items()}


async def index(request: Request, context: ApiContext) -> Response:
    """The page."""
    return _answer(request, _INDEX)


async def static_file(request: Request, context: ApiContext) -> Response:
    """A file of the page."""
    name = request.path_params["name"]
    if name == _INDEX or name not in _files():
        raise RequestError(f"unknown file: {name}", status=404, code="unknown_url")
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    body, etag = _files()[name]
    headers = _HEADERS | {"ETag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=_CONTENT_TYPES[Path(name).suffix], headers=headers)

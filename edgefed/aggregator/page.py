"""The page that shows a run in a browser: files of the package, without any data of the run.

They are answered without the token. The page asks for the token, or takes it from the fragment of its address
(``/#token=...``), which a browser sends to nobody, and fetches STATUS and COVERAGE with it. The content security policy
lets the page load its own files and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from edgefed.aggregator.wire import Handler
from edgefed.protocol import routes

STATIC = Path(__file__).parent / "static"
INDEX = "page.html"
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def page_handlers() -> dict[str, Handler]:
    """Route of the page and of each of its files, with its handler."""
    files = {routes.PAGE: INDEX, **{f"{routes.PAGE}{name}": name for name in routes.PAGE_FILES}}
    return {path: functools.partial(_answer, STATIC / name) for path, name in files.items()}


async def _answer(path: Path, request: Request) -> Response:
    """A file of the page, or 304 if the browser has it."""
    content, tag = _load(path)
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=MEDIA_TYPES[path.suffix])


@functools.cache
def _load(path: Path) -> tuple[bytes, str]:
    """Content and entity tag of a file; it is read once."""
    content = path.read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'

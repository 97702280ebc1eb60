"""A site on this machine with the model behind it.

Nobody else is answered. The server listens on a loopback address; a request under another host name
(DNS rebinding), from a page of another origin, or a piece of another page (which could read
somebody's pictures and data out of scripts) is refused. What is sent is limited in size, and
pictures are decoded by the reader that opens all others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clipsteer.browse.explained import Explained
from clipsteer.browse.files import is_complete
from clipsteer.browse.live import Live
from clipsteer.io.files import FileFormatError

MOST_BYTES = 16 << 20
_MOST_TEXT = 64 << 10
_HEADERS = {
    "content-security-policy": "frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}

_Scope = dict[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]


def serve(
    out: str | Path,
    explained: Explained,
    dataset: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a site until it is interrupted.

    Args:
        out: the folder that ``build_site`` wrote.
        explained: the SAE at its place in the model; dataset: the images, as the site was built.
        host: a loopback address or localhost. From another machine: ``ssh -L 8000:127.0.0.1:8000``.
        port: 0 takes a free one.
        ready: is called with the address once it can be opened; by default it is written out.

    Raises:
        ValueError: a host that others can reach, a folder without a whole site, or one of another
            SAE. RuntimeError: starlette or uvicorn is missing, the port is taken.
    """
    uvicorn = _library("uvicorn")
    out = Path(out)
    if not _is_loopback(host):
        raise ValueError(
            f"serve: host must be a loopback address such as 127.0.0.1, got {host!r}; from another "
            "machine, ssh -L 8000:127.0.0.1:8000 brings the port there"
        )
    if not is_complete(out):
        raise ValueError(f"serve: {out} holds no site that was built to its end")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
        except (OSError, OverflowError) as error:
            raise RuntimeError(
                f"serve: {host} port {port} cannot be had ({error}); choose another port, or 0 for "
                "any that is free"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{door.getsockname()[1]}/"
        with ThreadPoolExecutor(1, "model") as model:
            live = model.submit(Live, out, explained, dataset).result()
            settings = {"log_level": "warning", "lifespan": "off", "ws": "none"}
            config = uvicorn.Config(build_app(out, live, model), limit_concurrency=64, **settings)
            door.listen(config.backlog)  # who comes before the loop runs waits
            (ready or _announce)(address)
            uvicorn.Server(config).run(sockets=[door])


def _announce(address: str) -> None:
    sys.stdout.write(f"{address}  (Ctrl-C ends it)\n")
    sys.stdout.flush()


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(
            f"serve: needs {name}; pip install 'clipsteer[serve]', or open index.html of the site "
            "from disk, without live steering"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_app(out: Path, live: Live, model: ThreadPoolExecutor) -> _App:
    """The ASGI application; ``model`` has one thread, in which all calls of ``live`` are made."""
    _library("starlette")
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    async def body(request: Request, most: int) -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise HTTPException(413, f"more than {most:,} bytes")
        return bytes(content)

    async def run(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(model, function, *arguments)

    async def answer(function: Callable[..., Any], *arguments: Any) -> Response:
        try:
            return JSONResponse(await run(function, *arguments))
        except (ValueError, FileFormatError) as error:
            raise HTTPException(400, str(error)) from error

    async def steer(request: Request) -> Response:
        asked = _asked(await body(request, _MOST_TEXT))
        if asked is None:
            raise HTTPException(400, 'expected {"feature": 12, "strength": 2.5, "images": [0]}')
        return await answer(live.steer, *asked)

    async def picture(request: Request) -> Response:
        return await answer(live.describe, await body(request, MOST_BYTES))

    async def about(request: Request) -> Response:
        text = json.dumps({**live.site, "live": True})
        return Response(f'clipsteer.put("site",{text});\n', media_type="text/javascript")

    async def thumb(request: Request) -> Response:
        path = out / "thumbs" / f"{request.path_params['name']}.webp"
        if not (request.path_params["name"].isalnum() and path.is_file()):
            raise HTTPException(404, "no such picture")
        return FileResponse(path, media_type="image/webp")

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    routes = [
        Route("/api/steer", steer, methods=["POST"]),
        Route("/api/picture", picture, methods=["POST"]),
        Route("/data/site.js", about),
        Route("/thumbs/{name}.webp", thumb),
        Mount("/", StaticFiles(directory=out, html=True)),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: failed})
    return OnlyHere(app)


def _asked(content: bytes) -> tuple[int, float, Sequence[int], str | None] | None:
    """Feature, strength, rows and own picture out of a request; None where they are not there."""
    try:
        asked = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    feature: Any = asked.get("feature")
    strength: Any = asked.get("strength")
    rows: Any = asked.get("images", [])
    own: Any = asked.get("own")
    whole = isinstance(rows, list) and all(type(value) is int for value in [feature, *rows])
    real = type(strength) in (int, float)
    if not (whole and real and isinstance(own, str | None)):
        return None
    try:
        return feature, float(strength), rows, own
    except OverflowError:
        return None


class OnlyHere:
    """Lets requests of this site's own pages through, and navigation to them; says no to others."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return

        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *given]
            await send(message)

        reason = refusal(scope)
        if reason is None:
            await self.app(scope, receive, sent)
            return
        content = json.dumps({"error": reason}).encode()
        headers = [(b"content-type", b"application/json")]
        await sent({"type": "http.response.start", "status": 403, "headers": headers})
        await sent({"type": "http.response.body", "body": content})


def refusal(scope: _Scope) -> str | None:
    """Why a request is not answered; None where it is."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    if any(len(values) > 1 for name, values in headers.items() if name in ("host", "origin")):
        return "a header is given twice"
    host = headers.get("host", [""])[0]
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    if not _is_loopback(name.strip("[]")):
        return "this server answers under 127.0.0.1 and localhost alone"
    origin = headers.get("origin", [None])[0]
    if origin is not None and origin != f"http://{host}":
        return "the request is of another origin"
    site = headers.get("sec-fetch-site", ["none"])[0]
    opened = headers.get("sec-fetch-mode", [""])[0] == "navigate" and scope["method"] == "GET"
    if site not in ("none", "same-origin") and not opened:
        return "the request is of another site"
    return None

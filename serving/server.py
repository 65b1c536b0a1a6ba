"""The demo's pages, its websocket and the download, as one ASGI application."""

# annotations are no strings here: FastAPI reads those of its handlers, and their types are imported in a function

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serving.connection import Connection, Format
from serving.frames import Kept
from serving.guard import Guard
from serving.limits import Limits
from serving.scheduler import Scheduler

if TYPE_CHECKING:
    from fastapi import FastAPI

_PAGE = Path(__file__).parent / "page"
# all files that can be asked for: what a visitor sends is a key of this table, never a path
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/player.js": ("player.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
TRY_LATER = 1013  # websocket close code of IANA's registry


@dataclass(frozen=True)
class Site:
    """What the page says of the run.

    title: the run's name.
    examples: prompts to choose from.
    size: height and width of a frame.
    steps: denoising steps.
    format: how videos are made and kept.
    """

    title: str
    examples: tuple[str, ...]
    size: tuple[int, int]
    steps: int
    format: Format


def make_app(scheduler: Scheduler, limits: Limits, site: Site, names: Iterable[str] = ()) -> "FastAPI":
    """The application; the scheduler runs while it does. names: host names by which browsers may ask, see `Guard`."""
    from fastapi import FastAPI, Response, WebSocket

    from serving.download import Downloads

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, names=tuple(names))
    videos: dict[str, Kept] = {}
    open_sockets: set[WebSocket] = set()
    downloads = Downloads(videos, limits)

    def add_file(url: str, content: bytes, kind: str) -> None:
        @app.get(url)
        async def file() -> Response:
            return Response(content, headers={"Content-Type": kind})

    for url, (name, kind) in FILES.items():
        add_file(url, (_PAGE / name).read_bytes(), kind)

    @app.get("/config")
    async def config() -> dict[str, object]:
        return {
            "title": site.title, "examples": site.examples, "height": site.size[0], "width": site.size[1],
            "steps": site.steps, "fps": site.format.fps, "ahead": limits.ahead, "max_frames": limits.max_frames,
            "prompt_chars": limits.prompt_chars,
        }  # fmt: skip

    @app.get("/video/{token}")
    async def video(token: str) -> Response:
        return downloads.of(token)

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        if len(open_sockets) >= limits.connections:
            await socket.close(TRY_LATER, "too many visitors: try again in a minute")
            return
        open_sockets.add(socket)
        connection = Connection(socket, scheduler, limits, site.format, videos)
        try:
            leave = await connection.serve()
        finally:
            open_sockets.remove(socket)
        if leave is not None:
            await connection.part(leave)

    return app

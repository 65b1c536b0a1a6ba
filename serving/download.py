"""Videos as files: made one at a time, sent in pieces as they are read, with a limit on downloads at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.frames import Kept
from serving.limits import Limits
from serving.wire import abort
from utils.logging import console
from utils.reading import reason

PIECE = 2**16  # bytes


class Downloads:
    """videos: token -> video that can be downloaded."""

    def __init__(self, videos: dict[str, Kept], limits: Limits) -> None:
        self._videos, self.limits = videos, limits
        self.muxing = asyncio.Semaphore(1)  # they share the processor with the device's thread
        self.open = 0

    def of(self, token: str) -> Response:
        """The video of this token, or a response that says why there is none."""
        kept = self._videos.get(token)
        if kept is None or not kept.images:
            return Response("no such video: it is gone a little after its page\n", 404)
        return _Download(self, kept)


class _Download(Response):
    """Counts as open until its last piece is sent, so that unread downloads cannot pile up in memory."""

    def __init__(self, downloads: Downloads, kept: Kept) -> None:
        super().__init__(media_type="video/mp4", headers={"Content-Disposition": 'attachment; filename="fewstep.mp4"'})
        self._downloads, self._kept = downloads, kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refused := self._refusal():
            return await Response(f"{refused}\n", 429)(scope, receive, send)
        self._kept.busy = True
        self._downloads.open += 1
        try:
            with contextlib.ExitStack() as folder:
                try:
                    path = Path(folder.enter_context(tempfile.TemporaryDirectory()), "video.mp4")
                    async with self._downloads.muxing:
                        await asyncio.to_thread(self._kept.mp4, path)
                except OSError as problem:
                    console.warning("demo: a download could not be made on this disk: %s", reason(problem))
                    return await Response("no video: the server's disk takes no file\n", 507)(scope, receive, send)
                async with asyncio.timeout(self._downloads.limits.download_seconds):
                    await self._send(path, send)
        except TimeoutError:
            abort(scope)
        finally:
            self._downloads.open -= 1
            self._kept.busy = False

    def _refusal(self) -> str:
        if self._kept.busy:
            return "this video is being made already: wait for it"
        if self._downloads.open >= self._downloads.limits.downloads:
            return "too many videos are being fetched: try again in a minute"
        return ""

    async def _send(self, path: Path, send: Send) -> None:
        size = str(os.path.getsize(path)).encode()
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"content-length", size)]})
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

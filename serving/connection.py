"""One visitor: its messages in, its frames and their status out."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.frames import Kept, encode
from serving.limits import Limits
from serving.protocol import MAX_SEED, Rate, Shown, Start, Stop, Switch, frame_message, one_line, parse
from serving.scheduler import Full, Scheduler, Session, State
from serving.wire import abort

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

POLICY, UNSUPPORTED, NORMAL = 1008, 1003, 1000  # codes of RFC 6455, section 7.4.1


class Leave(Exception):
    """The connection is to be closed, with this code and these words."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


@dataclass(frozen=True)
class Format:
    """How videos are made and kept.

    fps: frames a second.
    scale: whole factor by which the download is enlarged.
    seed: of videos that ask for none; None draws one for each.
    """

    fps: int
    scale: int
    seed: int | None = None


class Connection:
    """A visitor's websocket.

    socket: the visitor's.
    scheduler: makes the videos.
    limits: bounds of the server.
    format: how videos are made and kept.
    videos: the server's table of videos that can be fetched, by their tokens.
    """

    def __init__(
        self, socket: WebSocket, scheduler: Scheduler, limits: Limits, format: Format, videos: dict[str, Kept]
    ) -> None:
        self._socket, self._scheduler, self._limits, self._format = socket, scheduler, limits, format
        self._videos, self._kept = videos, Kept(format.fps, format.scale)
        self._session: Session | None = None
        self._number, self._prompt, self._mistakes = 0, "", 0
        self._state: State | None = None
        self._news, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._active = self._loop.time()  # when somebody was last seen to watch, or could not have watched

    async def serve(self) -> Leave | None:
        """Serves until the visitor leaves, or until there is a reason to end it, which is returned for `part`.

        Other exceptions are defects of the server and are raised.
        """
        from starlette.websockets import WebSocketDisconnect

        # the watch is a task of its own: one that is stuck in sending cannot look at the clock
        tasks = [asyncio.create_task(part) for part in (self._listen(), self._tell(), self._watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leave()
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            self._forget(self._kept)
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, Leave | WebSocketDisconnect):
                raise end
        return next((end for end in ends if isinstance(end, Leave)), None)

    async def part(self, leave: Leave) -> None:
        """Tells the visitor why the connection ends. Called after everything that the visitor held was given back."""
        from starlette.websockets import WebSocketDisconnect

        try:
            await self._say("error", message=str(leave), goes_on=False)
            await self._sent(self._socket.close(leave.code, str(leave)[:100]))
        except WebSocketDisconnect:
            return

    # ------------------------------------------------------------------------------------------------- from the visitor

    async def _listen(self) -> None:
        """Obeys messages. Raises Leave for a visitor who breaks the rules, WebSocketDisconnect for one who is gone."""
        from starlette.websockets import WebSocketDisconnect

        rate = Rate(self._limits.messages_per_second)
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", NORMAL))
            if not rate.allows():
                raise Leave(POLICY, f"more than {self._limits.messages_per_second} messages a second: reload the page")
            text = message.get("text")
            if text is None:
                raise Leave(UNSUPPORTED, "message: bytes, where a JSON text belongs: reload the page")
            try:
                if len(text.encode()) > self._limits.message_bytes:  # the server's own limit closes with 1009 before
                    raise ValueError(f"message: more than {self._limits.message_bytes} bytes")
                self._obey(parse(text, self._limits))
            except ValueError as problem:
                await self._mistake(one_line(problem))
            except Full:
                await self._refuse("every place is taken, and the line for one too: try again in a minute")

    async def _watch(self) -> None:
        """Raises Leave if nobody seems to watch."""
        while True:
            patience = self._limits.idle_seconds if self._goes_on else self._limits.rest_seconds
            if self._goes_on and not self._is_owed:  # in line, or before a slow block: there is nothing to watch
                self._active = self._loop.time()
            left = self._active + patience - self._loop.time()
            if left <= 0:
                raise Leave(NORMAL, f"nobody watched for {patience} s: start again")
            await asyncio.sleep(min(left, 1))

    @property
    def _is_owed(self) -> bool:
        """Frames have been sent, and the visitor has not said that they have been shown."""
        return self._session is not None and self._scheduler.is_owed(self._session)

    async def _mistake(self, words: str) -> None:
        self._mistakes += 1
        if self._mistakes >= self._limits.mistakes:
            raise Leave(POLICY, f"{words}; closed after {self._mistakes} wrong messages")
        await self._refuse(words)

    async def _refuse(self, words: str) -> None:
        """Says why something was not done, and whether a video is going on all the same."""
        await self._say("error", message=words, goes_on=self._goes_on)

    @property
    def _goes_on(self) -> bool:
        session = self._session
        return session is not None and self._scheduler.view(session).state in (State.waiting, State.running)

    def _obey(self, message: Start | Switch | Shown | Stop) -> None:
        """Raises ValueError for what cannot be done now, Full if there is no place."""
        session = self._session
        if isinstance(message, Shown):
            if session is not None and self._scheduler.shown(session, message.frames):
                self._active = self._loop.time()
            return
        if not self._goes_on:  # a visitor with a place keeps it only by watching
            self._active = self._loop.time()
        if isinstance(message, Start):
            self._start(message)
            self._active = self._loop.time()
        elif isinstance(message, Stop):
            if session is not None:
                self._scheduler.leave(session)
                self._active = self._loop.time()
        elif session is None or not self._goes_on:
            raise ValueError("prompt: no video is being made: press Start")
        else:
            self._scheduler.switch(session, message.prompt)

    def _start(self, message: Start) -> None:
        self._leave()  # its place may be the one that is free
        seed = self._format.seed if message.seed is None else message.seed
        seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed
        session = self._scheduler.join(message.prompt, seed, self._changed)
        self._forget(self._kept)
        self._kept = Kept(self._format.fps, self._format.scale)
        self._videos[self._kept.token] = self._kept
        self._session, self._prompt, self._state, self._mistakes = session, "", None, 0
        self._number += 1
        self._news.set()

    def _leave(self) -> None:
        if self._session is not None:
            self._scheduler.leave(self._session)

    def _forget(self, kept: Kept) -> None:
        """Takes its video out of the table after `grace_seconds`; until then it can be fetched."""
        self._loop.call_later(self._limits.grace_seconds, self._videos.pop, kept.token, None)

    # --------------------------------------------------------------------------------------------------- to the visitor

    def _changed(self) -> None:
        """There is news of the session: called from any thread."""
        with suppress(RuntimeError):  # the loop was closed: the server ended by force, and nobody wants news
            self._loop.call_soon_threadsafe(self._news.set)

    async def _tell(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            session, kept, number = self._session, self._kept, self._number
            if session is None:
                continue
            view = self._scheduler.view(session)  # before its blocks are taken: an ended session makes no later ones
            # no more than the view knows of: blocks made as fast as they are sent would put off the status for ever
            while (
                session is self._session
                and len(kept.images) < view.made
                and (block := self._scheduler.take(session)) is not None
            ):
                images = await asyncio.to_thread(encode, block.frames)
                if session is not self._session:
                    break
                if block.prompt != self._prompt:
                    self._prompt = block.prompt
                    await self._say("prompt", video=number, frame=block.first, prompt=block.prompt)
                for index, image in enumerate(images, block.first):
                    kept.images.append(image)
                    self._active = self._loop.time()
                    await self._sent(self._socket.send_bytes(frame_message(number, index, image)))
            if session is not self._session:
                continue
            if notice := self._scheduler.notice(session):
                await self._refuse(notice)
            if self._state is not view.state:
                self._active = self._loop.time()
            self._state = view.state
            await self._say(
                "status", video=number, state=view.state.value, place=view.place, frames=len(kept.images),
                first=view.pace.first, fps=view.pace.fps, token=kept.token if kept.images else None, seed=session.seed,
                error=view.error,
            )  # fmt: skip

    async def _say(self, kind: str, **values: object) -> None:
        await self._sent(self._socket.send_json({"type": kind, **values}))

    async def _sent(self, sending: Awaitable[None]) -> None:
        """Waits until it is sent. Raises WebSocketDisconnect for a visitor who reads nothing, or who is gone.

        Such a connection is dropped: closing it would wait until the visitor has read everything.
        """
        from starlette.websockets import WebSocketDisconnect, WebSocketState

        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await sending
        except TimeoutError:
            abort(self._socket.scope)
            raise WebSocketDisconnect(1006) from None
        except RuntimeError:
            if self._socket.application_state is not WebSocketState.DISCONNECTED:
                raise
            raise WebSocketDisconnect(1006) from None  # another task was the first to find the visitor gone

"""uvicorn's protocols with bounds that uvicorn lacks: on silent connections, on their number, on frames that carry no
message, and on peers that read nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from serving.guard import App, Receive, Scope, Send
from serving.limits import Limits
from serving.protocol import Rate
from serving.wire import ABORT

if TYPE_CHECKING:
    from h11 import Request
    from websockets.frames import Frame

MAX_UNREAD = 4 * 2**20  # bytes that a websocket has been sent and not yet read


def protocols(limits: Limits) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """For `http=` and `ws=` of uvicorn's Config, which gives them no place for our limits."""
    bounds = {"limits": limits}
    return type("Http", (BoundedHttp,), bounds), type("Ws", (BoundedWebSocket,), bounds)


def _abortable(protocol: H11Protocol | WebSocketsSansIOProtocol) -> Any:
    """The protocol's application, with the end of its connection in its scope."""
    app = cast(App, protocol.app)

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        scope[ABORT] = protocol.transport.abort
        await app(scope, receive, send)

    return called


class BoundedHttp(H11Protocol):
    """Drops a connection that makes no request, or no further one, within `send_seconds`.

    When all connections are taken, the oldest silent one is dropped for a new one, so silent connections keep nobody
    out.
    """

    limits: ClassVar[Limits]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = _abortable(self)
        self._seen: object = None  # what was being answered when the clock was last looked at
        self._timer: asyncio.TimerHandle | None = None
        self.born = self.loop.time()

    @property
    def is_silent(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.sockets:
            silent = [c for c in self.connections if isinstance(c, BoundedHttp) and c.is_silent and c is not self]
            oldest = min(silent, key=lambda connection: connection.born, default=self)
            self.connections.discard(oldest)  # it is lost a little later, and others may come before
            oldest.transport.abort()
        self._timer = self.loop.call_later(self.limits.send_seconds, self._look)

    def _look(self) -> None:
        if self.is_silent and self.cycle is self._seen:
            self.transport.abort()
            return
        self._seen = self.cycle
        self._timer = self.loop.call_later(self.limits.send_seconds, self._look)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: Request) -> None:
        self._unwatch()
        super().handle_websocket_upgrade(event)


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Counts frames that are no message of their own: pings, pongs, and parts of a message, which may be empty.

    A connection that goes on after its goodbye, or whose peer answers no ping, is dropped instead of closed.
    """

    limits: ClassVar[Limits]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = _abortable(self)
        self._rate = Rate(self.limits.messages_per_second, self.loop.time)

    def _count(self) -> None:
        if not self._rate.allows():
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MAX_UNREAD:
            self.transport.abort()

    def handle_cont(self, event: Frame) -> None:
        self._count()
        super().handle_cont(event)

    def handle_ping(self) -> None:
        self._count()
        super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        self._count()
        super().handle_pong(event)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(self.limits.send_seconds, self.transport.abort)

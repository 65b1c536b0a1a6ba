"""uvicorn's protocols with bounds that uvicorn lacks: on silent connections, on their number, on frames that carry no
message, on peers that read nothing, and on what peers that break a protocol write into the log."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from serving.faults import VisitorFaults
from serving.guard import App, Receive, Scope, Send
from serving.limits import Limits
from serving.protocol import Rate
from serving.wire import ABORT

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent
    from websockets.frames import Frame

MAX_UNREAD = 4 * 2**20  # bytes that a websocket has been sent and not yet read
NOT_UTF8 = 1007  # codes of RFC 6455, section 7.4.1
FAULTS = {
    1002: "a frame that is none of a websocket's",
    NOT_UTF8: "a text that is not UTF-8",
    1009: "a message of more than --message_bytes",
}


def protocols(limits: Limits, faults: VisitorFaults) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """For `http=` and `ws=` of uvicorn's Config, which gives them no place for our limits.

    faults: what visitors get wrong is counted there.
    """
    bounds = {"limits": limits, "faults": faults}
    return type("Http", (BoundedHttp,), bounds), type("Ws", (BoundedWebSocket,), bounds)


def _abortable(protocol: H11Protocol | WebSocketsSansIOProtocol) -> Any:
    """The protocol's application, with the end of its connection in its scope."""
    app = cast(App, protocol.app)

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        scope[ABORT] = protocol.transport.abort
        await app(scope, receive, send)

    return called


def _counting(logger: logging.Logger, faults: VisitorFaults) -> logging.Logger:
    """Writes where `logger` does, what `faults` lets through."""
    counting = logging.Logger(logger.name)
    counting.parent = logger
    counting.addFilter(faults)
    return counting


class BoundedHttp(H11Protocol):
    """Drops a connection that makes no request, or no further one, within `send_seconds`.

    When all connections are taken, the oldest silent one is dropped for a new one, so silent connections keep nobody
    out.
    """

    limits: ClassVar[Limits]
    faults: ClassVar[VisitorFaults]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _counting(self.logger, self.faults)
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

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._unwatch()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Ends the connection, and with it an answer to an earlier part of what turned out to be no request."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer was begun: another has no place behind it
            self.transport.close()


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Counts frames that are no message of their own: pings, pongs, and parts of a message, which may be empty.

    A connection that goes on after its goodbye, or whose peer answers no ping, is dropped instead of closed. What is
    sent to a peer that broke the protocol raises ClientDisconnected, as to one that is gone.
    """

    limits: ClassVar[Limits]
    faults: ClassVar[VisitorFaults]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = _abortable(self)
        self._rate = Rate(self.limits.messages_per_second, self.loop.time)

    def _count(self) -> None:
        if not self._rate.allows():
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn would wait for ever where it could not read the request
        if self.conn.handshake_exc is not None and not self.transport.is_closing():
            self.faults.count("a websocket's request that is none")
            self.transport.close()
        if self.transport.get_write_buffer_size() > MAX_UNREAD:
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent and not _is_utf8(b"".join(self.frames)):
            self.frames = []
            self.conn.fail(NOT_UTF8)
            self.handle_parser_exception()
        else:
            super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Ends a connection whose peer broke the protocol."""
        closing = self.conn.close_sent
        if closing is None:  # the fault came before the answer to the request: there is nobody to say goodbye to
            self.faults.count("a frame before the websocket was open")
            self.transport.abort()
            return
        self.faults.count(FAULTS.get(closing.code, FAULTS[1002]))
        super().handle_parser_exception()

    async def send(self, message: ASGISendEvent) -> None:
        await self.writable.wait()
        if self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)

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


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True

"""Visitors who break a protocol: a counted line a minute in the log, and the server's own faults with their tracebacks."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from serving.connection import Connection
from serving.faults import KINDS, OTHERS, VisitorFaults
from tests.serving.demo_server import DEFAULT, SECONDS, Client, StandIns, running, served

# ------------------------------------------------------------------------------------------------------- the counting


@dataclass
class Log:
    """Lines, and a clock that stands still until it is moved."""

    now: float = 0.0
    lines: list[str] = field(default_factory=list)

    @property
    def faults(self) -> VisitorFaults:
        return VisitorFaults(self.lines.append, lambda: self.now)


def test_a_kind_of_fault_is_one_line_a_minute_at_most() -> None:
    log = Log()
    faults = log.faults
    for second in range(150):
        log.now = float(second)
        for _ in range(2):
            faults.count("a")
    faults.count("b")
    faults.close()
    assert log.lines == [
        "demo: refused: a", "demo: refused 120 more in 60 s: a", "demo: refused 120 more in 60 s: a",
        "demo: refused: b", "demo: refused 59 more in 29 s: a",
    ]  # fmt: skip


def test_faults_are_told_when_another_kind_comes_and_at_the_end() -> None:
    log = Log()
    faults = log.faults
    for kind in "aab":
        faults.count(kind)
    log.now = 90.0
    faults.count("b")
    assert log.lines == [
        "demo: refused: a", "demo: refused: b", "demo: refused 1 more in 90 s: a", "demo: refused 1 more in 90 s: b"
    ]  # fmt: skip
    log.now = 91.0
    faults.count("a")
    faults.close()
    faults.close()
    assert log.lines[4:] == ["demo: refused 1 more in 1 s: a"]


def test_visitors_cannot_make_kinds_without_end() -> None:
    log = Log()
    faults = log.faults
    for number in range(1000):
        faults.count(str(number))
    assert len(log.lines) == KINDS + 1
    assert log.lines[-1] == f"demo: refused: {OTHERS}"


def test_warnings_are_counted_and_errors_pass() -> None:
    log, passed = Log(), []
    faults = log.faults
    for level in (logging.INFO, logging.WARNING, logging.WARNING, logging.ERROR):
        record = logging.LogRecord("uvicorn.error", level, "", 0, "what %s", ("was",), None)
        passed.append(faults.filter(record))
    assert passed == [True, False, False, True]
    assert log.lines == ["demo: refused: what was"]


# --------------------------------------------------------------------------------------------------------- the server


def frame(opcode: int, data: bytes, *, masked: bool = True, last: bool = True) -> bytes:
    mask = os.urandom(4) if masked else b""
    size = bytes([128 * masked | len(data)]) if len(data) < 126 else struct.pack("!BH", 128 * masked | 126, len(data))
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)) if masked else data
    return bytes([128 * last | opcode]) + size + mask + body


START = frame(1, b'{"type": "start", "prompt": "one"}')
FRAMES = {
    "a frame that is none of a websocket's": [
        frame(3, b"reserved"),
        frame(1, b"{}", masked=False),
        frame(0, b"of no message"),
        frame(9, b"a ping in parts", last=False),
        frame(8, b"x"),
    ],
    "a text that is not UTF-8": [
        frame(1, b"\xff"),
        frame(1, b"\xc3", last=False) + frame(0, b"("),
        frame(1, b"\xff") + frame(8, struct.pack("!H", 1000)),  # and is gone at once
    ],
    "a message of more than --message_bytes": [frame(1, b"x" * 50_000), frame(1, b"x" * 30_000, last=False) * 2],
}


def upgrade(address: str, more: str = "") -> bytes:
    lines = [
        "GET /stream HTTP/1.1", f"Host: {address}", f"Origin: http://{address}", "Connection: Upgrade",
        "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13",
    ]  # fmt: skip
    return ("\r\n".join(lines) + f"\r\n{more}\r\n").encode()


@contextmanager
def connected(address: str, first: bytes) -> Iterator[socket.socket]:
    """A connection on which `first` was sent, and something was answered or the connection ended."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as raw:
        raw.sendall(first)
        raw.recv(1)
        yield raw


def ends(raw: socket.socket, data: bytes = b"") -> None:
    """Sends, and reads until the server has closed the connection."""
    try:
        raw.sendall(data)
        while raw.recv(2**16):
            pass
    except ConnectionError:
        pass


async def sends_to_who_broke_off(scope: Any, receive: Any, send: Any) -> None:
    """An application that goes on sending when a connection is over, as one does that makes its frames meanwhile."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass
    await send({"type": "websocket.send", "bytes": b"a frame"})


def test_invalid_frames_are_a_line_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = Log()
    with served(sends_to_who_broke_off, DEFAULT, log.faults) as address:
        for wrong in FRAMES.values():
            for data in wrong:
                for _ in range(2):
                    with connected(address, upgrade(address)) as raw:
                        ends(raw, START + data)
                with connected(address, upgrade(address)) as raw:
                    raw.sendall(START + data[:-1])
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    assert log.lines == [f"demo: refused: {kind}" for kind in FRAMES]
    assert [record.getMessage() for record in caplog.records] == []


def test_the_demo_goes_on_after_invalid_frames(caplog: pytest.LogCaptureFixture) -> None:
    limits = replace(DEFAULT, ahead=600, max_frames=10**6)
    with running(StandIns(), limits) as address:
        for data in (FRAMES["a frame that is none of a websocket's"][0], frame(2, b"bytes"), frame(1, b"{")):
            for _ in range(3):
                with connected(address, upgrade(address)) as raw:
                    raw.sendall(START)
                    raw.recv(1000)
                    raw.sendall(data)
        with Client(address) as client:
            client.say("start", prompt="one")
            client.status("running", frames=20)
    assert [record for record in caplog.records if record.exc_info] == []


def test_requests_that_are_none_are_a_line_and_their_connections_end(caplog: pytest.LogCaptureFixture) -> None:
    log = Log()

    async def answers(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer", "more_body": scope["path"] == "/begins"})
        if scope["path"] == "/begins":
            await receive()
            await send({"type": "http.response.body", "body": b"end"})

    with served(answers, replace(DEFAULT, send_seconds=SECONDS), log.faults) as address:
        chunked = f"HTTP/1.1\r\nHost: {address}\r\nTransfer-Encoding: chunked\r\n\r\n"
        host, port = address.split(":")
        for data in (b"\x16\x03\x01\x02\r\n\r\n", f"POST / {chunked}zz\r\n".encode()):
            with socket.create_connection((host, int(port)), timeout=SECONDS) as raw:
                ends(raw, data)
        for path in ("/", "/begins"):
            with connected(address, f"POST {path} {chunked}".encode()) as raw:
                ends(raw, b"zz\r\n")
        with connected(address, upgrade(address, "X: " + "x" * 10_000 + "\r\n")) as raw:  # more than a websocket reads
            ends(raw)
    assert log.lines == [
        "demo: refused: Invalid HTTP request received.",
        "demo: refused: a websocket's request that is none",
    ]
    assert [record.getMessage() for record in caplog.records] == []


def test_a_fault_of_the_server_keeps_its_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(connection: Connection) -> None:
        raise RuntimeError("of the server")

    monkeypatch.setattr(Connection, "serve", breaks)
    with running(StandIns()) as address:
        for _ in range(2):
            with Client(address) as client, pytest.raises(ConnectionClosed):
                client.hear(lambda _: False)
    assert caplog.text.count("RuntimeError: of the server") == 2
    assert caplog.text.count("Traceback") >= 2

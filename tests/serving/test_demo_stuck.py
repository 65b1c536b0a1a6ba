"""Visitors of the demo who read nothing, say nothing, or keep what others wait for: only they lose what they hold."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from starlette.websockets import WebSocket
from torch import Tensor
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Origin

from serving.connection import Connection, Format
from serving.download import Downloads
from serving.frames import Kept, encode
from serving.limits import Limits
from serving.protocol import Switch
from serving.scheduler import Scheduler, State
from serving.wire import ABORT
from tests.serving.demo_server import DEFAULT, SECONDS, Client, StandIn, StandIns, code_of, fetch, running


class Noise(StandIn):
    """Of frames that no image format makes small."""

    def next_frames(self) -> Tensor:
        self.made += 2
        return torch.rand(2, 3, 512, 512)


@dataclass
class Deaf:
    """A websocket whose visitor reads nothing. said: the messages that the visitor sends."""

    said: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0

    def __post_init__(self) -> None:
        self.scope = {ABORT: self.abort}
        self.left = iter(self.said)

    def abort(self) -> None:
        self.aborted += 1

    async def receive(self) -> dict[str, Any]:
        if (message := next(self.left, None)) is None:
            await asyncio.Event().wait()
            raise AssertionError
        return message

    async def send_json(self, message: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    async def close(self, code: int, why: str) -> None:
        await asyncio.Event().wait()


def connection(deaf: Deaf, limits: Limits, scheduler: Scheduler | None = None) -> Connection:
    scheduler = scheduler or Scheduler(StandIns(), limits)
    return Connection(cast(WebSocket, deaf), scheduler, limits, Format(16, 1), {})


def test_who_does_not_read_the_answer_to_a_mistake_is_dropped() -> None:
    async def visit() -> None:
        deaf = Deaf([{"type": "websocket.receive", "text": "{"}])
        leave = await asyncio.wait_for(connection(deaf, Limits(send_seconds=1)).serve(), SECONDS)
        assert leave is None
        assert deaf.aborted == 1

    asyncio.run(visit())


def test_who_does_not_read_the_goodbye_is_dropped() -> None:
    async def visit() -> None:
        deaf = Deaf()
        visitor = connection(deaf, Limits(send_seconds=1, rest_seconds=1))
        leave = await asyncio.wait_for(visitor.serve(), SECONDS)
        assert leave is not None
        assert str(leave) == "nobody watched for 1 s: start again"
        assert deaf.aborted == 0
        await asyncio.wait_for(visitor.part(leave), SECONDS)
        assert deaf.aborted == 1

    asyncio.run(visit())


def test_who_reads_nothing_at_all_gives_the_place_to_the_next_in_line() -> None:
    """Over TCP, with every buffer between the two full."""
    limits = replace(DEFAULT, users=1, waiting=1, connections=2, ahead=600, send_seconds=1)
    with running(lambda prompt, seed: Noise(prompt, []), limits) as address, ExitStack() as stack:
        deaf = stack.enter_context(
            connect(
                f"ws://{address}/stream", origin=Origin(f"http://{address}"), proxy=None, max_queue=1, close_timeout=0
            )
        )
        deaf.send('{"type": "start", "prompt": "one"}')
        deaf.recv(timeout=SECONDS)  # it has the place
        client = stack.enter_context(Client(address, watches=False))
        client.say("start", prompt="two")
        client.status("waiting")
        client.status("running")
        client.say("stop")
        client.status("stopped")


def test_news_for_a_loop_that_was_closed_is_no_error() -> None:
    async def visit() -> Connection:
        return connection(Deaf(), Limits())

    asyncio.run(visit())._changed()


def test_a_scheduler_may_be_closed_twice_and_before_it_starts() -> None:
    scheduler = Scheduler(StandIns(), Limits())
    scheduler.close()
    scheduler.close()


# --------------------------------------------------------------------------------------------------------- the places


def test_a_place_is_passed_on_when_others_wait() -> None:
    scheduler = Scheduler(StandIns(), Limits(users=1, waiting=2, place_seconds=1))
    news = threading.Semaphore(0)
    first = scheduler.join("one", 0, news.release)  # and never shows a frame
    second = scheduler.join("two", 0, news.release)
    scheduler.start()
    while scheduler.view(second).state is State.waiting:
        assert news.acquire(timeout=SECONDS)
    view = scheduler.view(first)
    assert view.state is State.ended
    assert view.error == "others wait in line, and then a place is for 1 s at most"
    scheduler.close()


def test_messages_do_not_keep_a_place_and_shown_frames_do() -> None:
    async def visit() -> None:
        scheduler = Scheduler(StandIns(), Limits())
        visitor = connection(Deaf(), Limits(), scheduler)
        visitor._session = session = scheduler.join("one", 0, lambda: None)
        visitor._active = before = -1.0
        visitor._obey(Switch("two"))
        assert visitor._active == before
        assert not visitor._is_owed
        session.taken = 2
        assert visitor._is_owed
        scheduler.shown(session, 2)
        assert not visitor._is_owed

    asyncio.run(visit())


def test_nobody_is_thrown_out_before_the_first_block() -> None:
    begun, gate = threading.Event(), threading.Event()

    class Slow(StandIn):
        def next_frames(self) -> Tensor:
            begun.set()
            assert gate.wait(SECONDS)
            return super().next_frames()

    limits = replace(DEFAULT, idle_seconds=1, rest_seconds=2)
    with running(lambda prompt, seed: Slow(prompt, []), limits) as address, ExitStack() as stack:
        stack.callback(gate.set)
        client = stack.enter_context(Client(address))
        client.say("start", prompt="one")
        assert begun.wait(SECONDS)
        with Client(address) as resting:  # who has to go after twice as long
            assert code_of(resting) == (1000, "nobody watched for 2 s: start again")
        gate.set()
        client.status("running", frames=2)


# ------------------------------------------------------------------------------------------------------- the downloads


@pytest.fixture
def kept() -> Kept:
    kept = Kept(8, 8)
    kept.images += encode(torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8).numpy())
    return kept


Sent = list[dict[str, Any]]


async def fetched(downloads: Downloads, token: str, send: Callable[[Any], Any], aborted: list[int]) -> None:
    async def receive() -> Any:
        await asyncio.Event().wait()

    await downloads.of(token)({"type": "http", ABORT: lambda: aborted.append(1)}, receive, send)


def test_a_download_is_sent_as_it_is_read_and_others_are_refused_meanwhile(kept: Kept) -> None:
    async def visit() -> None:
        other = Kept(8, 1)
        other.images += kept.images
        downloads = Downloads({kept.token: kept, other.token: other}, Limits(downloads=1))
        sent: Sent = []
        refused: Sent = []
        reads, started = asyncio.Event(), asyncio.Event()

        async def slow(message: dict[str, Any]) -> None:
            sent.append(message)
            started.set()
            await reads.wait()

        async def quick(message: dict[str, Any]) -> None:
            refused.append(message)

        task = asyncio.create_task(fetched(downloads, kept.token, slow, []))
        await asyncio.wait_for(started.wait(), SECONDS)
        assert kept.busy
        assert len(sent) == 1
        for token in (kept.token, other.token):
            await fetched(downloads, token, quick, [])
        assert [message["status"] for message in refused[::2]] == [429, 429]
        assert b"made already" in refused[1]["body"]
        assert b"too many" in refused[3]["body"]
        reads.set()
        await asyncio.wait_for(task, SECONDS)
        body = b"".join(message["body"] for message in sent[1:])
        assert dict(sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
        assert len(sent) > 3
        assert not kept.busy
        assert downloads.open == 0
        await fetched(downloads, other.token, quick, [])
        assert refused[4]["status"] == 200

    asyncio.run(visit())


def test_a_download_that_nobody_reads_is_dropped(kept: Kept) -> None:
    async def visit() -> None:
        downloads = Downloads({kept.token: kept}, Limits(download_seconds=1))
        aborted: list[int] = []

        async def never(message: dict[str, Any]) -> None:
            await asyncio.Event().wait()

        await asyncio.wait_for(fetched(downloads, kept.token, never, aborted), SECONDS)
        assert aborted == [1]
        assert not kept.busy
        assert downloads.open == 0

    asyncio.run(visit())


# ----------------------------------------------------------------------------------------------------- the connections


def test_silent_connections_are_dropped_and_keep_nobody_out() -> None:
    limits = Limits(users=1, waiting=0, connections=1)
    with running(StandIns(), limits) as address, ExitStack() as stack:
        host, port = address.split(":")
        for _ in range(limits.sockets + 8):
            stack.enter_context(socket.create_connection((host, int(port)), SECONDS))
        assert fetch(address, "/")[0] == 200
    with running(StandIns(), replace(limits, send_seconds=1)) as address:
        host, port = address.split(":")
        for said in (b"", b"GET / HTTP/1.1\r\nHost: local", b"GET /icon.svg HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with socket.create_connection((host, int(port)), SECONDS) as silent:
                silent.sendall(said)
                try:
                    while silent.recv(2**16):
                        pass
                except ConnectionResetError:
                    pass


@pytest.mark.parametrize("flood", ["pings", "pongs", "empty parts"])
def test_frames_that_are_no_messages_are_counted(flood: str) -> None:
    with running(StandIns(), Limits(messages_per_second=5)) as address:
        with Client(address) as client, pytest.raises(ConnectionClosed):
            if flood == "empty parts":
                client.socket.send([""] * 1000)
            for _ in range(1000):
                (client.socket.ping if flood == "pings" else client.socket.pong)()
            client.socket.recv(timeout=SECONDS)
        with Client(address, watches=False) as client:  # and the server is as it was
            client.say("start", prompt="one")
            client.status("running", frames=2)

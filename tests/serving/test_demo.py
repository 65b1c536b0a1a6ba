"""The demo's server without a browser: turns, places, limits, what is refused, the download, the end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from serving.download import Downloads
from serving.frames import Kept, encode
from serving.guard import HEADERS
from serving.limits import Limits
from serving.scheduler import Full, Scheduler, Session, State
from tests.serving.demo_server import (
    DEFAULT,
    SECONDS,
    SIZE,
    Client,
    Overlapping,
    StandIn,
    StandIns,
    code_of,
    fetch,
    running,
)
from utils.logging import console
from utils.video import read_video

# ---------------------------------------------------------------------------------------------------------- the turns


class Visitor:
    """Of a scheduler without a server: takes blocks as they come, and shows them if it watches."""

    def __init__(self, scheduler: Scheduler, prompt: str, *, watches: bool = True) -> None:
        self.scheduler, self.watches, self.frames = scheduler, watches, 0
        self.news = threading.Semaphore(0)
        self.session: Session = scheduler.join(prompt, 0, self.news.release)

    @property
    def state(self) -> State:
        return self.scheduler.view(self.session).state

    def until(self, *states: State, frames: int = 0) -> None:
        while True:
            while (block := self.scheduler.take(self.session)) is not None:
                assert block.first == self.frames
                assert block.frames.shape[1:] == (*SIZE, 3)
                self.frames += len(block.frames)
                if self.watches:
                    self.scheduler.shown(self.session, self.frames)
            if self.state in states or (frames and self.frames >= frames):
                return
            assert self.news.acquire(timeout=SECONDS)


def test_each_visitor_gets_a_block_in_turn() -> None:
    opened = StandIns()
    scheduler = Scheduler(opened, Limits(users=3, max_frames=10, ahead=100))
    visitors = [Visitor(scheduler, name) for name in "abc"]
    scheduler.start()
    for visitor in visitors:
        visitor.until(State.ended)
        assert visitor.frames == 10
    scheduler.close()
    assert opened.turns == list("abc") * 5


def test_who_does_not_watch_gets_no_more_and_slows_nobody() -> None:
    opened = StandIns()
    scheduler = Scheduler(opened, Limits(users=2, max_frames=40, ahead=6))
    away, watching = Visitor(scheduler, "away", watches=False), Visitor(scheduler, "there")
    scheduler.start()
    watching.until(State.ended)
    assert watching.frames == 40
    assert opened.turns.count("away") == 3
    assert away.state is State.running
    with pytest.raises(ValueError, match="frames: 0 have been sent"):
        scheduler.shown(away.session, 6)  # they have been made, and nobody has read them
    away.until(State.ended, frames=6)
    away.watches = True
    with pytest.raises(ValueError, match="frames: 6 have been sent: more cannot have been shown"):
        scheduler.shown(away.session, 7)
    scheduler.shown(away.session, 6)
    away.until(State.ended)
    assert away.frames == 40
    scheduler.close()


def test_places_the_line_and_its_end() -> None:
    scheduler = Scheduler(StandIns(), Limits(users=1, waiting=2, max_frames=4))
    first, second, third = (Visitor(scheduler, name) for name in "abc")
    with pytest.raises(Full):
        scheduler.join("d", 0, lambda: None)
    assert [scheduler.view(v.session).place for v in (first, second, third)] == [0, 1, 2]
    scheduler.leave(second.session)
    assert second.state is State.stopped
    assert scheduler.view(third.session).place == 1
    scheduler.start()
    first.until(State.ended)
    third.until(State.ended)
    assert third.frames == 4
    scheduler.close()
    with pytest.raises(Full):  # the server ends
        scheduler.join("e", 0, lambda: None)


def test_a_video_that_fails_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler(StandIns(), Limits(users=2, max_frames=20))
    broken, unknown, fine = (Visitor(scheduler, prompt) for prompt in ("breaks later", "unknown", "fine"))
    scheduler.start()
    for visitor in (broken, unknown):
        visitor.until(State.failed)
    fine.until(State.ended)
    said = [scheduler.view(visitor.session).error for visitor in (broken, unknown)]
    assert said == [
        "the video failed (RuntimeError): the server's log says why", "prompt 'unknown': unknown word"
    ]  # fmt: skip
    assert fine.frames == 20
    scheduler.close()


def test_a_device_that_fails_ends_every_video_and_the_server() -> None:
    broke: list[str] = []
    scheduler = Scheduler(StandIns(), Limits(users=2, max_frames=600), on_break=lambda: broke.append(scheduler.broken))
    fine, broken = (Visitor(scheduler, prompt, watches=False) for prompt in ("fine", "breaks the device later"))
    scheduler.start()
    for visitor in (broken, fine):
        visitor.until(State.failed)
    assert "the device failed: the server has to be" in scheduler.view(fine.session).error
    with pytest.raises(Full):
        scheduler.join("more", 0, lambda: None)
    scheduler.close()
    assert broke == ["CUDA error: an illegal memory access was encountered"]


def test_visitors_read_no_paths_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler(StandIns(), Limits())
    visitor = Visitor(scheduler, "unknown in a cache")
    scheduler.start()
    visitor.until(State.failed)
    assert scheduler.view(visitor.session).error == "this prompt cannot be used here: the server's log says why"
    scheduler.close()
    assert "prompt '…' is not in the text cache /srv/a folder/text: add it" in caplog.text
    assert "unknown in a cache" not in caplog.text  # nor does the log tell what visitors typed


def test_nothing_is_made_for_who_left_when_the_turn_came() -> None:
    opened = StandIns()
    scheduler = Scheduler(opened, Limits())
    visitor = Visitor(scheduler, "one")
    job = scheduler._next()
    scheduler.leave(visitor.session)
    assert job is not None
    job()
    assert opened.seeds == []
    assert visitor.state is State.stopped


def test_ended_videos_are_closed_on_the_devices_thread_and_failed_ones_never() -> None:
    """This includes a video whose visitor leaves while its first block is made, and videos that run when the server ends."""
    begun, gate = threading.Event(), threading.Event()
    made: list[StandIn] = []

    class Slow(StandIn):
        def next_frames(self) -> Tensor:
            begun.set()
            assert gate.wait(SECONDS)
            return super().next_frames()

    def open_video(prompt: str, seed: int) -> StandIn:
        made.append((Slow if prompt == "slow" else StandIn)(prompt, []))
        return made[-1]

    scheduler = Scheduler(open_video, Limits(users=3, max_frames=8, ahead=2))
    slow = Visitor(scheduler, "slow")
    scheduler.start()
    assert begun.wait(SECONDS)
    others = [Visitor(scheduler, prompt) for prompt in ("whole", "breaks later")]
    scheduler.leave(slow.session)
    gate.set()
    for visitor, state in zip(others, (State.ended, State.failed), strict=True):
        visitor.until(state)
    last = Visitor(scheduler, "running", watches=False)
    last.until(State.ended, frames=2)
    assert last.state is State.running
    assert not made[-1].closed_on
    scheduler.close()
    assert {video.prompt: video.closed_on for video in made} == {
        "slow": ["device"], "whole": ["device"], "breaks later": [], "running": ["device"]
    }  # fmt: skip


def test_a_prompt_changes_with_the_next_block_and_a_wrong_one_changes_nothing() -> None:
    opened = StandIns()
    scheduler = Scheduler(opened, Limits(ahead=2))
    visitor = Visitor(scheduler, "one", watches=False)
    scheduler.start()
    for number, prompts in enumerate((["one"], ["not this", "two"], ["unknown"], ["three"]), start=1):
        for prompt in prompts:
            scheduler.switch(visitor.session, prompt)
        scheduler.shown(visitor.session, visitor.frames)  # until then the video waits
        visitor.until(frames=2 * number)
    scheduler.close()
    assert opened.turns == ["one", "two", "two", "three"]
    assert scheduler.notice(visitor.session) == "prompt 'unknown': unknown word"
    assert scheduler.notice(visitor.session) == ""


def test_a_block_that_was_begun_before_a_change_has_the_prompt_that_it_was_made_for() -> None:
    scheduler = Scheduler(lambda prompt, seed: Overlapping(prompt, []), Limits(ahead=2))
    news = threading.Semaphore(0)
    session = scheduler.join("one", 0, news.release)
    scheduler.start()
    told = []
    for prompt in ("one", "two", "unknown", "three"):
        scheduler.switch(session, prompt)
        scheduler.shown(session, 2 * len(told))  # until then the video waits
        while (block := scheduler.take(session)) is None:
            assert news.acquire(timeout=SECONDS)
        told.append(block.prompt)
    scheduler.close()
    assert told == ["one", "one", "two", "two"]


# --------------------------------------------------------------------------------------------------------- the server


def decoded(data: bytes, folder: Path) -> torch.Tensor:
    path = folder / "downloaded.mp4"
    path.write_bytes(data)
    return read_video(path)


def test_pages_have_their_headers_and_nothing_else_is_there() -> None:
    with running(StandIns()) as address:
        for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
            status, headers, body = fetch(address, path)
            assert status == 200
            assert headers["content-type"].startswith(kind)
            assert body
            assert {name: headers[name.lower()] for name in HEADERS} == HEADERS
            assert "server" not in headers
        assert json.loads(fetch(address, "/config")[2])["examples"] == ["one", "two"]
        for path in (
            "/index.html", "/docs", "/openapi.json", "/../demo.py", "/%2e%2e/demo.py", "/page/page.js", "/video/",
            "/video/..%2f..%2fdemo.py", "/video/x", "/serving/run.py",
        ):  # fmt: skip
            status, headers, _ = fetch(address, path)
            assert status == 404 and headers["content-security-policy"], path


def test_other_hosts_and_other_sites_are_refused() -> None:
    with running(StandIns()) as address:
        port = address.split(":")[1]
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "[::1", "demo.example:a@b"):
            assert fetch(address, "/", Host=host)[0] == 421, host
        for host in (f"localhost:{port}", f"[::1]:{port}", "demo.example", "10.1.2.3:80"):
            assert fetch(address, "/", Host=host)[0] == 200, host
        for origin in (
            "http://evil.example",
            "null",
            "http://127.0.0.1:1",
            f"file://{address}",
            f"http://{address}.evil",
        ):
            with pytest.raises(InvalidStatus) as refused, Client(address, origin=origin):
                pass
            assert refused.value.response.status_code == 403, origin
        with pytest.raises(InvalidStatus), connect(f"ws://{address}/stream", proxy=None):  # no Origin: no page of ours
            pass


def test_a_video_from_start_to_download(tmp_path: Path) -> None:
    opened = StandIns()
    limits = replace(DEFAULT, max_frames=30, ahead=10)
    with running(opened, limits) as address, Client(address, watches=False) as client:
        client.say("start", prompt="one", seed=7)
        client.status("running", frames=10)  # and no more, until they have been shown
        client.say("prompt", prompt="two")
        client.say("shown", frames=10)
        client.watches = True
        done = client.status("ended")
        assert done["frames"] == len(client.images) == 30
        assert done["seed"] == 7
        assert opened.seeds == [7]
        assert done["first"] == 0.25
        assert done["fps"] == 40.0
        prompts = [(m["prompt"], m["frame"]) for m in client.heard if m["type"] == "prompt"]
        assert prompts == [("one", 0), ("two", 10)]
        assert opened.turns == ["one"] * 5 + ["two"] * 10
        status, headers, data = fetch(address, f"/video/{done['token']}")
        assert (status, headers["content-disposition"]) == (200, 'attachment; filename="fewstep.mp4"')
        video = decoded(data, tmp_path)
        assert video.shape == (30, 3, 2 * SIZE[0], 2 * SIZE[1])
        assert (video.mean((1, 2, 3)) - torch.arange(30) / 50).abs().max() < 0.03  # its frames, in order
        # a new one on the same connection
        client.say("start", prompt="three")
        other = client.status("ended")
        assert other["video"] == 2
        assert other["token"] != done["token"]
        assert len(client.images) == 30


def test_stop_keeps_what_was_made_and_frees_the_place() -> None:
    with (
        running(StandIns(), replace(DEFAULT, users=1, waiting=0)) as address,
        Client(address) as first,
        Client(address) as second,
    ):
        first.say("start", prompt="one")
        first.status("running", frames=2)
        second.say("start", prompt="two")
        assert second.error() == "every place is taken, and the line for one too: try again in a minute"
        first.say("stop")
        stopped = first.status("stopped")
        assert fetch(address, f"/video/{stopped['token']}")[0] == 200
        first.say("prompt", prompt="two")
        assert first.error() == "prompt: no video is being made: press Start"
        second.say("start", prompt="two")
        second.status("running", frames=2)


def test_two_clients_at_once_and_a_third_that_follows_who_disconnects() -> None:
    limits = replace(DEFAULT, users=2, max_frames=10**6)  # a video that came to its end would free a place
    with running(StandIns(), limits) as address:  # noqa: SIM117 - one page within the other
        with Client(address) as first, Client(address) as second, Client(address) as third:
            for client, prompt in ((first, "one"), (second, "two")):
                client.say("start", prompt=prompt)
            for client in (first, second):
                client.status("running", frames=20)
            third.say("start", prompt="three")
            assert third.status("waiting")["place"] == 1
            first.socket.socket.shutdown(2)  # without a word
            third.status("running", frames=20)
            second.status("running", frames=40)


def test_a_video_is_gone_after_its_visitor() -> None:
    with running(StandIns(), replace(DEFAULT, grace_seconds=0)) as address:
        with Client(address) as client:
            client.say("start", prompt="one")
            token = client.status("running", frames=2)["token"]
            assert fetch(address, f"/video/{token}")[0] == 200
        with Client(address) as other:  # whose answer comes after the other's end
            other.say("stop", x=1)
            other.error()
            assert any(fetch(address, f"/video/{token}")[0] == 404 for _ in range(200))


def test_mistakes_are_answered_and_too_many_end_the_connection() -> None:
    with running(StandIns(), replace(DEFAULT, mistakes=3, max_frames=10**6)) as address, Client(address) as client:
        for text in ("{", '{"type": "stop", "x": 1}'):
            client.socket.send(text)
            assert client.error().startswith("message: ")
        client.say("start", prompt="unknown")  # a start: the count begins anew
        assert client.status("failed")["error"] == "prompt 'unknown': unknown word"
        client.say("start", prompt="one")
        client.status("running", frames=2)
        client.say("prompt", prompt="unknown words")
        assert client.error() == "prompt 'unknown words': unknown word"
        client.status("running", frames=len(client.images) + 2)  # the video goes on
        client.say("shown", frames=10**6)
        assert "have been sent: more cannot have been shown" in client.error()
        client.watches = False
        for text in ("{", "["):
            client.socket.send(text)
        with pytest.raises(ConnectionClosed) as closed:
            client.hear(lambda _: False)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert "closed after 3 wrong messages" in client.heard[-1]["message"]


@contextmanager
def admitted(address: str) -> Iterator[Client]:
    """A client with the one place for a page, once the server has cleaned up after the one before."""
    for _ in range(500):
        with Client(address) as client:
            client.say("stop", x=1)
            try:
                client.error()
            except ConnectionClosed:
                continue
            yield client
            return
    raise AssertionError("the place of the one before was never given back")


def test_abuse_ends_the_connection_with_the_code_for_it() -> None:
    limits = Limits(connections=1, users=1, waiting=0, messages_per_second=5, idle_seconds=1)
    with running(StandIns(), limits) as address:
        with admitted(address) as client:
            client.socket.send("x" * (limits.message_bytes + 1))
            assert code_of(client)[0] == 1009
        with admitted(address) as client:
            client.socket.send(b"\x00" * 10)
            assert code_of(client) == (1003, "message: bytes, where a JSON text belongs: reload the page")
        with admitted(address) as client:
            with suppress(ConnectionClosed):  # before all are sent
                for _ in range(40):
                    client.say("shown", frames=0)
            assert code_of(client) == (1008, "more than 5 messages a second: reload the page")
        with admitted(address) as client, Client(address) as one_more:
            assert code_of(one_more) == (1013, "too many visitors: try again in a minute")
            client.watches = False
            client.say("start", prompt="one")
            assert code_of(client) == (1000, "nobody watched for 1 s: start again")
        with admitted(address) as client:  # and the server is as it was
            client.say("start", prompt="one")
            client.watches = False
            client.status("running", frames=2)


def test_frames_are_lossless_when_small_and_jpeg_otherwise() -> None:
    small, large = (torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8).numpy() for side in (128, 130))
    assert encode(small)[0].startswith(b"\x89PNG")
    assert encode(large)[0].startswith(b"\xff\xd8")
    kept = Kept(8, 1)
    kept.images += encode(small)
    assert (next(kept._frames()) == small[0]).all()


def test_the_end_of_the_server_ends_its_sessions() -> None:
    with ExitStack() as stack:
        with running(StandIns()) as address:
            client = stack.enter_context(Client(address))
            client.say("start", prompt="one")
            client.status("running", frames=2)
            client.watches = False
        assert code_of(client)[0] == 1012


def test_a_download_that_no_disk_takes_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, sent, said = Kept(8, 1), list[Any](), list[str]()
    kept.images = [b"a frame"]

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is asked")

    monkeypatch.setattr(kept, "mp4", full)
    monkeypatch.setattr(console, "warning", lambda text, *args: said.append(text % args))
    downloads = Downloads({kept.token: kept}, DEFAULT)
    asyncio.run(downloads.of(kept.token)({"type": "http", "method": "GET"}, receive, send))
    assert sent[0]["status"] == 507
    assert (downloads.open, kept.busy) == (0, False)
    assert said == ["demo: a download could not be made on this disk: No space left on device"]

"""The demo's server on a thread of the test, over stand-in videos or a real toy student."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from torch import Tensor
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from generation.generator import Generator
from generation.live import Live, Pace
from generation.sampling import Sampling
from serving.connection import Format
from serving.faults import VisitorFaults
from serving.limits import Limits
from serving.run import listen, server_config
from serving.scheduler import Scheduler, Video
from serving.server import Site, make_app
from tests.small import BRIEF, save_networks, trainer, with_weights
from utils.errors import UserError

SECONDS = 60  # until something that has to happen counts as not happening
SIZE = (6, 10)
QUICK = 1_000_000  # messages a second: stand-ins' frames come at once, and each is acknowledged
DEFAULT = Limits(messages_per_second=QUICK)


@dataclass
class StandIn:
    """A video of grey frames, two a block, made at once. turns: prompts in order of the turns."""

    prompt: str
    turns: list[str]
    size: tuple[int, int] = SIZE
    made: int = 0
    closed_on: list[str] = field(default_factory=list)  # names of the threads that closed it

    def close(self) -> None:
        self.closed_on.append(threading.current_thread().name)

    def next_frames(self) -> Tensor:
        if self.prompt == "breaks later" and self.made:
            raise RuntimeError("of a device, with /a/path in it")
        if self.prompt == "breaks the device later" and self.made:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.turns.append(self.prompt)
        self.made += 2
        return torch.stack([self.frame(i) for i in (self.made - 2, self.made - 1)])

    def frame(self, number: int) -> Tensor:
        """Grey, and lighter from one to the next; then its left half counts how often it began anew at black."""
        frame = torch.full((3, *self.size), (number % 50) / 50)
        frame[..., : self.size[1] // 2] = (number % 50 + 5 * (number // 50)) / 50 % 1
        return frame

    def switch(self, prompt: str, *, recache: bool = False) -> None:
        if "unknown" in prompt:
            raise UserError(f"prompt {prompt!r}: unknown word")
        self.prompt = prompt

    @property
    def pace(self) -> Pace:
        return Pace(0.25, 40.0, self.made)


class Overlapping(StandIn):
    """One that begins the next block while it hands over this one, as `Live` does on a device."""

    begun = wanted = ""

    def next_frames(self) -> Tensor:
        self.wanted = self.wanted or self.prompt
        self.prompt, self.begun = self.begun or self.wanted, self.wanted
        return super().next_frames()

    def switch(self, prompt: str, *, recache: bool = False) -> None:
        if "unknown" in prompt:
            raise UserError(f"prompt {prompt!r}: unknown word")
        self.wanted = prompt


@dataclass
class StandIns:
    """Opens stand-ins; seeds: that they were opened with."""

    size: tuple[int, int] = SIZE
    turns: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __call__(self, prompt: str, seed: int) -> Video:
        if "unknown in a cache" in prompt:
            raise UserError(f"prompt {prompt!r} is not in the text cache /srv/a folder/text: add it")
        if "unknown" in prompt:
            raise UserError(f"prompt {prompt!r}:\n unknown word")
        self.seeds.append(seed)
        return StandIn(prompt, self.turns, self.size)


@contextmanager
def running(
    open_video: Callable[[str, int], Video],
    limits: Limits = DEFAULT,
    size: tuple[int, int] = SIZE,
    examples: tuple[str, ...] = ("one", "two"),
) -> Iterator[str]:
    """The address, as host:port, of a server that ends with the block."""
    site = Site("small", examples, size, 2, Format(fps=60, scale=2))
    app = make_app(Scheduler(open_video, limits), limits, site, ("demo.example",))
    with served(app, limits, VisitorFaults()) as address:
        yield address


@contextmanager
def served(app: Any, limits: Limits, faults: VisitorFaults) -> Iterator[str]:
    """The same of any application."""
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(server_config(app, limits, faults))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


def toy_student(folder: Path) -> Path:
    """A run of one iteration from random weights: its videos are noise that its prompt shapes, and cost next to nothing."""
    save_networks(folder / "weights")
    base = with_weights(BRIEF, folder / "weights")
    trainer(folder / "run", base, max_steps=1).train()
    return folder / "run"


def open_toy(run: Path) -> Callable[[str, int], Video]:
    generator = Generator.load(run, torch.device("cpu"))
    return lambda prompt, seed: Live(generator, prompt, Sampling(seed=seed))


class Client:
    """A visitor without a browser, who shows each frame at once unless told not to."""

    def __init__(self, address: str, *, watches: bool = True, origin: str | None = None) -> None:
        origin = f"http://{address}" if origin is None else origin
        # without a bound of its own: a client that stops to read keeps the server's goodbye from itself
        self._opened = connect(
            f"ws://{address}/stream", origin=Origin(origin), proxy=None, max_queue=None, open_timeout=SECONDS
        )
        self.watches = watches
        self.images: list[bytes] = []
        self.heard: list[dict[str, Any]] = []
        self.video = self.asked = 0  # number of the video that was heard of last, and of the one that was asked for

    def __enter__(self) -> Client:
        self.socket: ClientConnection = self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def say(self, kind: str, **values: object) -> None:
        self.asked = self.video + 1 if kind == "start" else self.asked
        self.socket.send(json.dumps({"type": kind, **values}))

    def hear(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next JSON message of which `wanted` is true; frames before it are looked at."""
        while True:
            message = self.socket.recv(timeout=SECONDS)
            if isinstance(message, str):
                self.heard.append(json.loads(message))
                self.video = max(self.video, self.heard[-1].get("video", 0))
                if wanted(self.heard[-1]):
                    return self.heard[-1]
            else:
                video, frame = (int.from_bytes(message[i : i + 4], "little") for i in (0, 4))
                self.images = self.images if frame else []
                assert frame == len(self.images)
                assert video > 0
                self.images.append(message[8:])
                if self.watches:
                    self.say("shown", frames=len(self.images))

    def error(self) -> str:
        return self.hear(lambda message: message["type"] == "error")["message"]

    def status(self, state: str, frames: int = 0) -> dict[str, Any]:
        """Of the video that was asked for last."""
        return self.hear(
            lambda m: (
                m["type"] == "status" and m["video"] == self.asked and m["state"] == state and m["frames"] >= frames
            )
        )


def code_of(client: Client) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as closed:
        client.hear(lambda _: False)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


def fetch(address: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=SECONDS) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()

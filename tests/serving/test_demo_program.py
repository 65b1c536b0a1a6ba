"""The demo as a program over a toy student: its videos, its end by signals, what it cannot serve."""

from __future__ import annotations

import errno
import os
import queue
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import uvicorn
from websockets.exceptions import ConnectionClosed

from generation.generator import Generator
from serving import run
from serving.command import demo_args
from serving.run import demo, listen
from tests.serving.demo_server import DEFAULT, SECONDS, Client, StandIn, code_of, open_toy, running, toy_student
from utils.errors import UserError


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_student(tmp_path_factory.mktemp("student"))


def test_a_toy_student_streams_and_a_seed_repeats_its_video(student: Path) -> None:
    with running(open_toy(student), replace(DEFAULT, max_frames=20), (16, 16)) as address, Client(address) as client:
        videos = []
        for prompt in ("the digit three moving up", "the digit three moving up", "the digit two moving up"):
            client.say("start", prompt=prompt, seed=3)
            assert client.status("ended")["fps"] > 0
            videos.append(client.images)
        assert videos[0] == videos[1] != videos[2]
        assert len(set(videos[0])) == 20
        client.say("start", prompt="a cat")
        assert client.status("failed")["error"].startswith("prompt 'a cat': unknown word 'a'; this encoder knows")


def told_ports(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int]:
    """Gets the port of each server that this process starts from here on."""
    ports: queue.Queue[int] = queue.Queue()

    def listen_and_tell(host: str, port: int) -> socket.socket:
        listening = listen(host, port)
        ports.put(listening.getsockname()[1])
        return listening

    monkeypatch.setattr(run, "listen", listen_and_tell)
    return ports


@pytest.mark.parametrize(("ending", "twice"), [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)])
def test_the_program_says_where_it_is_and_ends_on_a_signal(
    student: Path,
    ending: signal.Signals,
    twice: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, whose main thread is the server's: signals are nobody else's. twice: Ctrl+C while it ends."""
    import demo as program

    codes: list[int] = []
    ports = told_ports(monkeypatch)

    def visit() -> None:
        with Client(f"127.0.0.1:{ports.get(timeout=SECONDS)}", watches=False) as client:
            client.say("start", prompt="the digit three moving up")
            try:
                client.status("running", frames=2)
            finally:  # or the server would wait for it for ever
                os.kill(os.getpid(), ending)
            codes.append(code_of(client)[0])

    shutdown = uvicorn.Server.shutdown

    async def hurried(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        if twice:
            signal.raise_signal(signal.SIGINT)
            assert server.force_exit
        await shutdown(server, sockets)

    monkeypatch.setattr(uvicorn.Server, "shutdown", hurried)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--run", str(student), "--port", "0"])
    visitor = threading.Thread(target=visit)
    visitor.start()
    before = signal.getsignal(ending)
    assert program.main() == 0
    assert signal.getsignal(ending) == before
    visitor.join(SECONDS)
    assert "device" not in [thread.name for thread in threading.enumerate()]
    said = capsys.readouterr().out.splitlines()
    assert codes == [1012]
    assert said[-1] == "fewstep demo: ended"
    assert re.fullmatch(r"fewstep demo: http://127\.0\.0\.1:\d+/  \(Ctrl\+C ends it\)", said[-2])


def test_the_program_ends_with_one_line_when_its_device_fails(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = told_ports(monkeypatch)

    def visit() -> None:
        with Client(f"127.0.0.1:{ports.get(timeout=SECONDS)}") as client:
            client.say("start", prompt="breaks the device later")
            with pytest.raises(ConnectionClosed):
                client.hear(lambda _: False)

    monkeypatch.setattr(run, "Live", lambda generator, prompt, sampling: StandIn(prompt, []))
    visitor = threading.Thread(target=visit)
    visitor.start()
    with pytest.raises(UserError, match="the demo ended, for the device failed: CUDA error: an illegal memory access"):
        demo(lambda: Generator.load(student, torch.device("cpu")), demo_args(["--run", "x", "--port", "0"]))
    visitor.join(SECONDS)


def test_what_cannot_be_served_is_one_line(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator.load(student, torch.device("cpu"))
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(
            UserError, match=f"--host 127.0.0.1 --port {port}: .*: give an address of this machine and a"
        ):
            demo(lambda: generator, demo_args(["--run", "x", "--port", port]))
    with pytest.raises(UserError, match="--steps 9: this student has 2 steps"):
        demo(lambda: generator, demo_args(["--run", "x", "--port", "0", "--steps", "9"]))
    for name in ("fastapi", "uvicorn", "websockets"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=f"the demo needs {name}: pip install -r requirements.txt"):
                demo(lambda: generator, demo_args(["--run", "x"]))


def refusal(*options: str, loads: bool = False) -> str:
    """What the program says, whose run is loaded only where `loads` says so."""

    def load() -> Generator:
        assert loads
        raise UserError("loaded")

    with pytest.raises(UserError) as refused:
        demo(load, demo_args(["--run", "x", *options]))
    return str(refused.value)


def test_an_address_that_is_not_to_be_had_is_noticed_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "give an address of this machine and a free port, or --port 0 to get one"
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert refusal("--port", port) == f"--host 127.0.0.1 --port {port}: another program listens there: {remedy}"
    assert refusal("--host", "192.0.2.1", "--port", "0") == (  # an address of documentation
        f"--host 192.0.2.1 --port 0: this machine has no such address: {remedy}"
    )
    assert refusal("--host", "a..b").endswith(remedy)
    assert refusal("--port", "70000") == "--port 70000: give a number from 0 to 65535"
    assert refusal("--port", "0", loads=True) == "loaded"

    def refused(problem: OSError) -> Callable[..., NoReturn]:
        def fails(*args: object, **kwargs: object) -> NoReturn:
            raise problem

        return fails

    with monkeypatch.context() as patched:
        patched.setattr(socket, "create_server", refused(PermissionError(errno.EACCES, "denied")))
        assert refusal("--port", "80") == (
            f"--host 127.0.0.1 --port 80: ports below 1024 are not for every user: {remedy}"
        )
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", refused(socket.gaierror(socket.EAI_NONAME, "unknown")))
        assert refusal("--host", "nowhere") == f"--host nowhere --port 7860: no host has this name: {remedy}"

"""Runs the demo: one process, one port, until it is told to stop."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from generation.generator import Generator
from generation.live import Live
from serving.command import DemoArgs
from serving.connection import Format
from serving.faults import VisitorFaults
from serving.limits import Limits
from serving.scheduler import Scheduler
from serving.server import Site, make_app
from utils.errors import UserError
from utils.logging import console, setup_console

if TYPE_CHECKING:
    from uvicorn import Config

UNUSABLE = {
    errno.EADDRINUSE: "another program listens there",
    errno.EACCES: "ports below 1024 are not for every user",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    socket.EAI_NONAME: "no host has this name",
}
MIN_WIDTH = 256  # pixels to which a small video is enlarged for the download, unless --scale says otherwise


def demo(open_generator: Callable[[], Generator], args: DemoArgs) -> int:
    """Serves a run's videos until SIGINT or SIGTERM.

    open_generator: loads the run, once it is known that its videos can be served at the address that is asked for.

    Raises UserError for an address that it cannot listen on, a run that cannot be streamed, and a device that fails.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as problem:
        raise UserError(f"the demo needs {problem.name}: pip install -r requirements.txt") from None
    setup_console()
    with listen(args.host, args.port) as listening:
        return _serve(open_generator(), args, listening)


def _serve(generator: Generator, args: DemoArgs, listening: socket.socket) -> int:
    import uvicorn

    def open_video(prompt: str, seed: int) -> Live:
        return Live(generator, prompt, args.sampling(seed))

    examples = examples_of(generator)
    height, width = warm_up(generator, open_video(generator.task.negative_prompt, args.seed or 0))
    steps = len(generator.step_list(args.steps))
    format = Format(args.fps or generator.config.fps, args.scale or max(1, MIN_WIDTH // width), args.seed)
    site = Site(generator.config.name, examples, (height, width), steps, format)

    def on_break() -> None:
        server.should_exit = True

    faults = VisitorFaults()
    scheduler = Scheduler(open_video, args.limits, recache=args.recache, on_break=on_break, faults=faults)
    app = make_app(scheduler, args.limits, site, (args.host, *args.allow_host))
    server = uvicorn.Server(server_config(app, args.limits, faults))
    if not _is_local(listening):
        console.warning(
            "--host %s: anyone who reaches this address can use the device, and nothing is encrypted; "
            "ssh -L is the safe way", args.host,
        )  # fmt: skip
    print(f"fewstep demo: {_url(args.host, listening)}  (Ctrl+C ends it)", flush=True)
    with _signals_end_it():
        try:
            server.run([listening])
        finally:
            scheduler.close()  # a second Ctrl+C spares uvicorn the end of the application, which does it else
            faults.close()
    if scheduler.broken:
        raise UserError(f"the demo ended, for the device failed: {scheduler.broken}: start it again")
    print("fewstep demo: ended", flush=True)
    return 0


def examples_of(generator: Generator) -> tuple[str, ...]:
    """Prompts for the page: some of the run's validation prompts, if it has any."""
    try:
        return tuple(dict.fromkeys(generator.task.validation_prompts(4)))
    except UserError:
        return ()


def warm_up(generator: Generator, video: Live) -> tuple[int, int]:
    """Makes the first blocks of a video, so that no visitor waits for kernels to be chosen and passes to be recorded.

    Returns height and width in pixels. Raises UserError for a run that cannot be streamed.
    """
    generator.task.load_text_encoder()
    frames = video.next_frames()
    while generator.acceleration.records(generator.device) and not video.is_steady:
        video.next_frames()
    video.close()
    return frames.shape[2], frames.shape[3]


def server_config(app: Any, limits: Limits, faults: VisitorFaults) -> Config:
    """uvicorn with our limits, and without an access log: its lines would hold tokens of videos."""
    from uvicorn import Config

    from serving.bounded import protocols

    http, ws = protocols(limits, faults)
    return Config(
        app, http=http, ws=ws, ws_max_size=limits.message_bytes, ws_per_message_deflate=False, log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=5,
    )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A socket that browsers can connect to from here on; who comes early waits for the server. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as problem:  # a name may be none at all
        number = problem.errno if isinstance(problem, OSError) and problem.errno else 0
        raise UserError(
            f"--host {host} --port {port}: {UNUSABLE.get(number, str(problem))}: give an address of this machine and "
            "a free port, or --port 0 to get one"
        ) from None


def _is_local(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _url(host: str, listening: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Ignores the signal that ended uvicorn, which uvicorn raises again at its end."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(which, lambda *_: None) for which in signals]
    try:
        yield
    finally:
        for which, handler in zip(signals, before, strict=True):
            signal.signal(which, handler)

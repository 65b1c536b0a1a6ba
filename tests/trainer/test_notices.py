"""What a webhook receives, and that no server can stop a run, slow it, or see its URL written down."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_run
from configs.schema import RunConfig
from tests.small import BRIEF, config, merged
from trainer.base import RunOptions, Trainer
from trainer.command import train_args
from trainer.notices import VARIABLE, Notices, webhook_url
from trainer.run import train
from utils.config import to_yaml
from utils.errors import ConfigError, UserError
from utils.logging import console
from utils.webhook import Webhook, hidden

SECRET = "B0/xyzzy"


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(console, "propagate", True)
    caplog.set_level(logging.WARNING, "fewstep")
    return caplog


@contextmanager
def server(status: int = 200, location: str | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL, what it was sent)."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/{SECRET}"
            assert self.headers["Content-Type"] == "application/json"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))
            self.send_response(status)
            if location is not None:
                self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/{SECRET}", received
        finally:
            running.shutdown()
            thread.join()


@contextmanager
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/{SECRET}"


def run_config(url: str | None = None) -> RunConfig:
    return config(
        merged(BRIEF, {"name": "small/run"}),
        training={"max_steps": 2}, validation={"every": 2, "count": 1}, logging={"webhook": url},
    )  # fmt: skip


def test_a_run_tells_of_validation_and_of_its_end(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    with server() as (url, received):
        assert train(run_config(url), RunOptions(tmp_path / "logs", wandb=False)) == 0
        assert train(run_config(url), RunOptions(tmp_path / "logs", wandb=False)) == 0  # it was finished
    assert [event["event"] for event in received] == ["validation", "finished"]
    validation, end = received
    for event in received:
        assert event["run"] == "small/run"
        assert event["step"] == 2
        assert event["paths"]["folder"] == str(tmp_path / "logs")
        assert event["metrics"]["student/loss"] > 0 or event["metrics"]["critic/loss"] > 0
        assert abs(time.time() - event["time"]) < 600
    assert validation["exit_reason"] is None
    assert validation["paths"]["videos"] == [str(tmp_path / "logs/validation/step_000002_ema.mp4")]
    assert 0 <= validation["metrics"]["validation/ema_luma"] <= 1
    assert end["exit_reason"] == "finished"
    assert end["text"] == "small/run: finished at step 2"
    assert end["paths"]["checkpoint"] == str(tmp_path / "logs/checkpoints/step_00000002")
    assert not warned.records
    kept = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if SECRET.encode() in path.read_bytes()]


def test_a_signal_and_a_failure_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._ramp_sparsity

    def signalled(self: Trainer) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return step(self)

    def failing(self: Trainer) -> dict[str, float]:
        raise RuntimeError("out of\n memory")

    with server() as (url, received):
        monkeypatch.setenv(VARIABLE, url)
        monkeypatch.setattr(Trainer, "_ramp_sparsity", signalled)
        assert train(run_config(), RunOptions(tmp_path, wandb=False)) == 128 + signal.SIGUSR1
        monkeypatch.setattr(Trainer, "_ramp_sparsity", failing)
        with pytest.raises(RuntimeError):
            train(run_config(), RunOptions(tmp_path, wandb=False))
    told = [(event["event"], event["step"], event["exit_reason"]) for event in received]
    assert told == [("stopped", 1, "SIGUSR1"), ("failed", 1, "RuntimeError: out of memory")]
    assert received[0]["paths"]["checkpoint"].endswith("step_00000001")


def test_what_is_not_finite_is_still_json() -> None:
    with server() as (url, received):
        hook = Webhook(url)
        hook.send({"metrics": {"a": float("nan"), "b": 1.5}, "c": [float("inf")]})
        hook.close()
    assert received == [{"metrics": {"a": "nan", "b": 1.5}, "c": ["inf"]}]


def test_a_server_that_never_answers_costs_a_bounded_time_and_a_line(warned: pytest.LogCaptureFixture) -> None:
    with silent() as url:
        hook, began = Webhook(url, seconds=0.3), time.monotonic()
        for step in range(300):  # more than may wait
            hook.send({"step": step})
        assert time.monotonic() - began < 0.3
        hook.close()
        assert time.monotonic() - began < 2
    assert len(warned.records) == 1
    assert SECRET not in warned.text


def test_a_server_that_refuses_costs_a_line_and_the_end_is_still_sent(
    warned: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Notices("run", tmp_path, f"http://127.0.0.1:{port}/{SECRET}") as notices:
        notices.validated({}, [])
        notices.ended(None, None)
    with server(status=500) as (url, received):
        hook = Webhook(url)
        hook.send({"step": 1})
        hook.send({"step": 2})
        hook.close()
    assert received == [{"step": 1}, {"step": 2}]
    assert [record.getMessage() for record in warned.records] == [
        f"webhook http://127.0.0.1:{port}/***: an event was lost (Connection refused): the run goes on",
        f"webhook {hidden(url)}: an event was lost (status 500): the run goes on",
    ]


def test_a_redirect_is_not_followed(warned: pytest.LogCaptureFixture) -> None:
    with server() as (other, stolen), server(status=302, location=other) as (url, received):
        hook = Webhook(url)
        hook.send({})
        hook.close()
    assert (stolen, received) == ([], [{}])
    assert "status 302" in warned.text


def test_the_url_is_kept_nowhere_and_a_resumed_run_asks_for_it(
    warned: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    url = "https://me:xyzzy@hooks.example.org:444/xyzzy?key=xyzzy"
    run = run_config(url)
    assert run.logging.webhook == url
    assert "xyzzy" not in to_yaml(run) + repr(run)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(run))
    again = load_run(saved)
    assert again.logging.webhook == "https://hooks.example.org:444/***"
    assert Notices("run", tmp_path, again.logging.webhook).hook.url is None
    assert VARIABLE in warned.text


@pytest.mark.parametrize(
    "url", [f"ftp://a/{SECRET}", SECRET, f"https:///{SECRET}", f"https://a/{SECRET} b", f"http://a:x/{SECRET}"]
)
def test_what_is_no_url_is_refused_without_showing_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, url)
    for refused in (lambda: run_config(url), lambda: webhook_url(run_config().logging)):
        with pytest.raises(
            (ConfigError, UserError), match=f"(logging.webhook|{VARIABLE}) is no URL of http"
        ) as problem:
            refused()
        assert SECRET not in str(problem.value)


def test_a_command_line_is_no_place_for_it() -> None:
    with pytest.raises(UserError, match=VARIABLE):
        train_args(["--config_path", "a.yaml", "logging.webhook=https://a/b"])
    assert train_args(["--config_path", "a.yaml", "logging.webhook=null"]).overrides == ("logging.webhook=null",)

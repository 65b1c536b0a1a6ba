"""A real Chromium: the system's, or Debian's package installed once where that is allowed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

INSTALL_SECONDS = 120
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]  # no sandbox: it refuses to run as root, and the pages are our own


def chromium() -> str:
    """The program, installed if need be and possible. Skips the test with the reason otherwise."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("no chromium on this machine, and installing Debian's needs root and apt-get")
    install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with subprocess.Popen(
        ["bash", "-c", install], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as running:  # fmt: skip
        try:
            said = running.communicate(timeout=INSTALL_SECONDS)[1].strip().splitlines()
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # apt-get and what it started, of a session of their own
            said = [f"apt-get took more than {INSTALL_SECONDS} s"]
    if running.returncode != 0 or (path := shutil.which("chromium")) is None:
        pytest.skip(f"no chromium on this machine: {(said or ['apt-get failed'])[-1]}")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """With a profile of its own that vanishes."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    sync_api.expect.set_options(timeout=60_000)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=OPTIONS)
        yield started
        started.close()

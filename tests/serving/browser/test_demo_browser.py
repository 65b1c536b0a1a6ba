"""The demo's page in a real Chromium: a toy student streams, prompts change, visitors come and go, an MP4 is fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from serving.frames import encode
from serving.limits import Limits
from serving.protocol import frame_message
from serving.scheduler import Video
from tests.serving.demo_server import DEFAULT, StandIns, open_toy, running, toy_student
from utils.video import read_video

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SEVEN, THREE = "the digit seven moving left", "the digit three moving up"
PHONE, DESKTOP = (375, 812), (1280, 800)
ENDLESS = replace(DEFAULT, max_frames=100_000)  # no video ends before a slow machine has looked at it
MANY = re.compile(r"^([2-9]\d|\d{3,})$")  # frames: 20 or more


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Video]:
    return open_toy(toy_student(tmp_path_factory.mktemp("student")))


SOCKETS = """
    window.sockets = [];
    window.WebSocket = class extends WebSocket { constructor(url) { super(url); window.sockets.push(this); } };
"""  # those of a page, for what its own code never says


class Visitor:
    """A page in a profile of its own, and all that it asked for and complained of."""

    def __init__(self, browser: Browser, address: str, size: tuple[int, int] = DESKTOP) -> None:
        from playwright.sync_api import expect

        self.expect = expect
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        self.context.add_init_script(SOCKETS)
        self.page: Page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("websocket", lambda socket: self.asked.append(socket.url))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"http://{address}/")
        self.shows("#examples button:last-child", re.compile("."))

    def shows(self, selector: str, text: str | re.Pattern[str]) -> None:
        self.expect(self.page.locator(selector)).to_have_text(text)

    def says(self, text: str) -> None:
        self.expect(self.page.locator("#status")).to_contain_text(text)

    def start(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.click("#start")

    def pixels(self) -> str:
        found = self.page.evaluate("document.querySelector('canvas').toDataURL()")
        assert isinstance(found, str)
        return found

    def width(self) -> int:
        found = self.page.evaluate("document.documentElement.scrollWidth")
        assert isinstance(found, int)
        return found


@contextmanager
def site(
    browser: Browser, open_video: Callable[[str, int], Video], limits: Limits = ENDLESS
) -> Iterator[Callable[..., Visitor]]:
    """A server and its visitors, who have asked for nothing from elsewhere and have had no errors by the end."""
    visitors: list[Visitor] = []
    with running(open_video, limits, (16, 16), (SEVEN, THREE)) as address:

        def visit(size: tuple[int, int] = DESKTOP) -> Visitor:
            visitors.append(Visitor(browser, address, size))
            return visitors[-1]

        yield visit
        for visitor in visitors:
            visitor.context.close()
            allowed = re.compile(rf"(http|ws)://{re.escape(address)}/|blob:http://{re.escape(address)}/")
            assert [url for url in visitor.asked if not allowed.match(url)] == []
            assert visitor.complaints == []
            assert visitor.asked


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_page_fits_and_reads_well_without_a_mouse(browser: Browser, size: tuple[int, int]) -> None:
    with site(browser, StandIns()) as visit:
        visitor = visit(size)
        page = visitor.page
        assert visitor.width() == size[0]
        assert page.title() == "fewstep live"
        assert page.get_by_label("Prompt", exact=True).input_value() == SEVEN
        page.get_by_role("button", name=THREE).click()
        assert page.get_by_label("Prompt", exact=True).input_value() == THREE
        for name in ("Change prompt", "Stop", "Download MP4"):
            visitor.expect(page.get_by_role("button", name=name)).to_be_disabled()
        page.keyboard.press("Enter")  # the prompt has the focus
        visitor.says("Streaming.")
        visitor.shows("#caption", f"“{THREE}”")
        page.keyboard.press("Control+a")
        page.keyboard.insert_text("w" * 100 + " wide")
        page.keyboard.press("Enter")
        visitor.expect(page.locator("#caption")).to_contain_text("wide")
        assert visitor.width() == size[0]
        for control in page.locator("main button, main textarea, main input").all():
            box = control.bounding_box()
            assert box is not None
            assert box["height"] >= 34


def test_a_video_from_prompt_to_mp4(
    browser: Browser, toy: Callable[[str, int], Video], tmp_path: Path
) -> None:  # fmt: skip
    with site(browser, toy) as visit:
        visitor = visit()
        page, nothing = visitor.page, visitor.pixels()
        visitor.start(SEVEN)
        visitor.shows("#caption", f"“{SEVEN}”")
        early = visitor.pixels()
        visitor.shows("#frames", MANY)
        assert len({nothing, early, visitor.pixels()}) == 3
        visitor.shows("#first", re.compile(r"^\d+ ms$|^\d+\.\d s$"))
        visitor.shows("#made-fps", re.compile(r"^\d+(\.\d)? fps$"))
        visitor.shows("#shown-fps", re.compile(r"^\d+(\.\d)? fps$"))
        page.fill("#prompt", "a cat")
        page.click("#change")
        visitor.expect(page.get_by_role("alert")).to_contain_text("unknown word 'a'")
        page.fill("#prompt", THREE)
        page.click("#change")
        visitor.shows("#caption", f"“{THREE}”")
        visitor.shows("#error", "")
        page.click("#stop")
        visitor.says("Stopped after")
        frames = int(re.findall(r"\d+", page.locator("#status").inner_text())[0])
        with page.expect_download() as download:
            page.get_by_role("button", name="Download MP4").click()
        assert download.value.suggested_filename == "fewstep.mp4"
        download.value.save_as(tmp_path / "fewstep.mp4")
        video = read_video(tmp_path / "fewstep.mp4")
        assert video.shape == (frames, 3, 32, 32)
        assert frames >= 20
        assert (video[0] - video[-1]).abs().mean() > 0.02


def test_two_at_once_one_in_line_and_one_who_goes(browser: Browser, toy: Callable[[str, int], Video]) -> None:
    with site(browser, toy, replace(ENDLESS, users=2, waiting=1)) as visit:
        first, second, third = (visit(size) for size in (DESKTOP, PHONE, DESKTOP))
        for visitor in (first, second):
            visitor.start(SEVEN)
        for visitor in (first, second):
            visitor.shows("#frames", MANY)
        third.start(THREE)
        third.says("You are number 1 in line.")
        before = second.pixels()
        first.page.close()  # in the middle of a video
        third.shows("#frames", MANY)
        third.shows("#caption", f"“{THREE}”")
        second.says("Streaming.")
        assert second.pixels() != before


def test_two_submits_at_once_make_one_connection(browser: Browser) -> None:
    with site(browser, StandIns()) as visit:
        visitor = visit()
        visitor.page.fill("#prompt", "one")
        visitor.page.evaluate("for (let i = 0; i < 3; i++) document.getElementById('form').requestSubmit()")
        visitor.shows("#frames", MANY)
        assert visitor.page.evaluate("sockets.length") == 1


def test_nothing_is_drawn_after_a_stop(browser: Browser) -> None:
    frame = list(frame_message(1, 0, encode(np.zeros((1, 16, 16, 3), np.uint8))[0]))
    with site(browser, StandIns()) as visit:
        visitor = visit()
        left = visitor.page.evaluate(
            """async (bytes) => {
                const { Player } = await import("/player.js");
                const player = new Player(document.createElement("canvas"), 60, 10, () => {});
                const add = () => { player.add(new Uint8Array(bytes).buffer); return player.decoding; };
                player.reset(1);
                const decoding = add();
                player.stop();
                const late = add(); // was in flight
                player.reset(1); // of another connection
                await Promise.all([decoding, late]);
                const old = player.queue.length + player.pending + player.shown;
                await add();
                return [old, player.queue.length + player.shown];
            }""",
            frame,
        )
        assert left == [0, 1]
        visitor.start("one")
        visitor.shows("#frames", MANY)
        first = visitor.page.locator("#first").inner_text()
        visitor.page.click("#stop")
        visitor.says("Stopped after")
        visitor.shows("#first", first)


def test_what_the_page_never_says_is_refused(browser: Browser) -> None:
    with site(browser, StandIns()) as visit:
        visitor = visit()
        alert = visitor.page.get_by_role("alert")
        visitor.start("one")
        visitor.shows("#frames", MANY)
        for text in ("{", '{"type": "start"', "\\u0000", '{"type": "stop", "type": "stop"}'):
            visitor.page.evaluate("text => sockets[0].send(text)", text)
            visitor.expect(alert).to_have_text("message: not a JSON object: reload the page")
            visitor.page.evaluate("document.getElementById('error').textContent = ''")
        visitor.says("Streaming.")
        visitor.page.evaluate("sockets[0].send('x'.repeat(50000))")
        visitor.expect(alert).to_contain_text("Disconnected:")
        visitor.start("two")
        visitor.shows("#caption", "“two”")
        visitor.page.evaluate("sockets[1].send(new Uint8Array(9))")
        visitor.expect(alert).to_contain_text("Disconnected: message: bytes, where a JSON text belongs")


def test_markup_in_a_prompt_is_text(browser: Browser) -> None:
    nasty = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"
    with site(browser, StandIns()) as visit:
        visitor = visit(PHONE)
        visitor.start(nasty)
        visitor.shows("#caption", f"“{nasty}”")
        assert visitor.page.locator("#caption *").count() == 0
        assert visitor.page.title() == "fewstep live"
        assert visitor.width() == PHONE[0]


def test_a_video_has_an_end_and_another_begins_after_a_refusal(
    browser: Browser, toy: Callable[[str, int], Video]
) -> None:
    with site(browser, toy, replace(DEFAULT, max_frames=10)) as visit:
        visitor = visit()
        visitor.start(SEVEN)
        visitor.says("Done: 10 frames, the most that a video may have here.")
        visitor.shows("#frames", "10")
        first, seed = visitor.pixels(), visitor.page.locator("#seed-note").inner_text().split()[-1]
        alert = visitor.page.get_by_role("alert")
        for prompt, said in ((" ", "prompt: type a text"), ("breaks", "unknown word 'breaks'")):
            visitor.start(prompt)
            visitor.expect(alert).to_contain_text(said)
        visitor.page.fill("#seed", seed)
        visitor.start(SEVEN)
        visitor.shows("#frames", "10")
        visitor.says("Done: 10 frames")
        visitor.shows("#error", "")
        assert visitor.pixels() == first  # the same seed, the same video


def test_a_restart_in_mid_stream_and_the_end_of_the_server(browser: Browser) -> None:
    large = (144, 256)  # sent as JPEG
    with running(StandIns(large), ENDLESS, large, (SEVEN,)) as address:
        visitor = Visitor(browser, address)
        visitor.start("one")
        visitor.shows("#frames", MANY)
        visitor.start("two")
        visitor.shows("#caption", "“two”")
        visitor.shows("#frames", MANY)
        before = visitor.pixels()
        visitor.shows("#frames", re.compile(r"^\d{3}$"))
        assert visitor.pixels() != before
        assert visitor.page.evaluate("document.querySelector('canvas').width") == 256
        visitor.says("Streaming.")
    visitor.expect(visitor.page.get_by_role("alert")).to_have_text(
        "Disconnected: the server has ended. Start connects again."
    )
    visitor.shows("#start", "Start")
    assert visitor.complaints == []
    visitor.context.close()

"""What a visitor may say, and nothing else: one JSON object a message, every key known, every value checked.

{"type": "start", "prompt": "...", "seed": 7}   a new video; seed may be left out
{"type": "prompt", "prompt": "..."}             another prompt from the next block on that is not begun
{"type": "shown", "frames": 12}                 so many frames of this video have been shown: more may be made
{"type": "stop"}
"""

from __future__ import annotations

import json
import struct
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from serving.limits import Limits

MAX_SEED = 2**31 - 1
_HEADER = struct.Struct("<II")  # number of the video on this connection, number of the frame in it


@dataclass(frozen=True)
class Start:
    prompt: str
    seed: int | None


@dataclass(frozen=True)
class Switch:
    prompt: str


@dataclass(frozen=True)
class Shown:
    frames: int


@dataclass(frozen=True)
class Stop:
    pass


Message = Start | Switch | Shown | Stop
KEYS = {"start": {"prompt", "seed"}, "prompt": {"prompt"}, "shown": {"frames"}, "stop": set()}


def parse(text: str, limits: Limits) -> Message:
    """A visitor's message. Raises ValueError with one line that can be shown to the visitor."""
    try:
        raw = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # broken, nested without end, a number of thousands of digits
        raise ValueError("message: not a JSON object: reload the page") from None
    if not isinstance(raw, dict):
        raise ValueError("message: not a JSON object: reload the page")
    kind = raw.pop("type", None)
    if not isinstance(kind, str) or kind not in KEYS:
        raise ValueError(f"message: its type has to be one of {', '.join(KEYS)}")
    if raw.keys() - KEYS[kind]:
        raise ValueError(f"message: {kind} takes {' and '.join(sorted(KEYS[kind])) or 'nothing'}, and no other key")
    match kind:
        case "start":
            return Start(_prompt(raw.get("prompt"), limits), _whole(raw.get("seed"), "seed", MAX_SEED, optional=True))
        case "prompt":
            return Switch(_prompt(raw.get("prompt"), limits))
        case "shown":
            frames = _whole(raw.get("frames"), "frames", limits.max_frames)
            assert frames is not None
            return Shown(frames)
        case _:
            return Stop()


def frame_message(video: int, frame: int, image: bytes) -> bytes:
    """A frame on the wire: numbers of the video and of the frame, 32 bits each, low byte first; then PNG or JPEG."""
    return _HEADER.pack(video, frame) + image


def one_line(problem: Exception) -> str:
    """What an error says, in at most 300 characters of one line."""
    text = " ".join(str(problem).split())
    return text if len(text) <= 300 else text[:299] + "…"


def without_prompt(problem: Exception, prompt: str) -> str:
    """What an error says, in one line, without the prompt that it quotes."""
    text = " ".join(str(problem).split())
    for quoted in (repr(prompt), repr(prompt[:60])):
        text = text.replace(quoted, "'…'")
    return text


def without_paths(problem: Exception, prompt: str) -> str | None:
    """What an error of a prompt says, in one line; None if the visitor may not read it.

    A visitor may read no path. The prompt's words may look like one, for the visitor knows them.
    """
    told = without_prompt(problem, prompt)
    return None if isinstance(problem, OSError) or "/" in told or "\\" in told else one_line(problem)


class Rate:
    """Messages of one visitor: so many a second on average, and twice as many at once."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._left, self._at = 2.0 * per_second, clock()

    def allows(self) -> bool:
        """Counts one more message."""
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._per_second, 2.0 * self._per_second) - 1
        self._at = now
        return self._left >= 0


def _prompt(value: object, limits: Limits) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("prompt: type a text")
    if len(value) > limits.prompt_chars:
        raise ValueError(f"prompt: {len(value)} characters: {limits.prompt_chars} are the most: shorten it")
    prompt = " ".join(value.split())
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
        raise ValueError("prompt: it has control characters: type plain text")
    return prompt


def _whole(value: object, name: str, most: int, *, optional: bool = False) -> int | None:
    if value is None and optional:
        return None
    if type(value) is not int or not 0 <= value <= most:  # bool is an int, and no number here
        raise ValueError(f"{name}: give a whole number from 0 to {most}")
    return value


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(keys := dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return keys


def _no_constant(name: str) -> object:
    raise ValueError(name)

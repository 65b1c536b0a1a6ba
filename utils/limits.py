"""Sizes that no real run reaches, and no real file: what is above them is a slip of the hand or a damaged file, and
would end in a failed allocation. They are looked at before anything is allocated.

What files may ask for can be raised: `FEWSTEP_LIMITS="pixels=400000000,text=2000000000" python ...`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError

# Latent frames of one sample: 4.6 hours at 24 frames a second and 4 frames a latent one. The longest training videos
# are minutes, and the keys and values of one latent frame of Wan 1.3B at 480p take 0.3 GB.
FRAMES = 100_000
# Latent height or width: 32,768 pixels at 8 a latent one, twice the width of 16K video.
SIDE = 4096
# Latent elements (frames x height x width) of one sample: attention kernels count tokens in 32-bit integers.
VOLUME = 2**31 - 1
# Samples of one update: at the 32,760 tokens of a Wan clip 3e10 tokens, hundreds of times a language model's largest.
BATCH = 1_000_000
# Denoising steps: schedules have 1000 levels.
STEPS = 10_000
# Seconds of any limit of time: 30 years.
SECONDS = 1e9
# Threads of one process.
THREADS = 4096
# Frames a second: MP4 counts time in 1/90,000 s.
FPS = 1000
# Shift of noise levels. Above it all levels are noise, to four digits.
SHIFT = 10_000
# Rank of an adapter: no matrix that it is added to is larger.
RANK = 1_000_000
VARIABLE = "FEWSTEP_LIMITS"


@dataclass(frozen=True)
class Limits:
    """What a file may ask for.

    text: bytes of a text file that is read whole: prompts, captions, JSON. A million prompts have 0.3 GB.
    line: bytes of one prompt or caption.
    recipe: bytes of a YAML. The longest recipe here has 4,000.
    nodes: values in a YAML, each as often as an alias repeats it.
    pixels: of a picture or a frame. Those of 16K have 133 million.
    media: bytes of a video or an image in a tar.
    row: bytes that a row group of a table, or a video that is read whole, becomes in memory.
    ratio: how many bytes one compressed byte may become in a row group of more than 64 MiB.
    pickle: bytes of the part of a torch file that is no tensor.
    rows: samples of a data set.
    """

    text: int = 1 << 29
    line: int = 1 << 20
    recipe: int = 1 << 18
    nodes: int = 100_000
    pixels: int = 1 << 27
    media: int = 1 << 32
    row: int = 1 << 34
    ratio: int = 1000
    pickle: int = 1 << 28
    rows: int = 100_000_000


def limits() -> Limits:
    """Those of this process. Raises UserError for an environment variable that is no list of them."""
    return _limits(os.environ.get(VARIABLE, ""))


@functools.lru_cache(maxsize=8)
def _limits(text: str) -> Limits:
    known, raised = [field.name for field in dataclasses.fields(Limits)], {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = part.partition("=")
        if name not in known or not value.isdecimal() or not 0 < len(value) < 20:
            raise UserError(f"{VARIABLE}={text}: {part!r} is no limit: write NAME=NUMBER, NAME of {', '.join(known)}")
        raised[name] = int(value)
    return Limits(**raised)


def check_size(
    name: str, asked: int, where: object, *, error: type[ValueError] = UserError, unit: str = "bytes"
) -> None:
    """Raises `error`, one line, where a file asks for more than the limit of this name."""
    limit = getattr(limits(), name)
    if not asked <= limit:
        raise error(
            f"{where} asks for {asked} {unit} and the limit is {limit}: give another file, or raise the limit "
            f"({VARIABLE}={name}={asked})"
        )


def check_counts(section: Any, limits: dict[str, int], why: str = "no real video is larger") -> None:
    """Raises ValueError unless each named field of a section is from 1 to its limit, or None where it may be."""
    for name, limit in limits.items():
        value = getattr(section, name)
        if value is None:
            continue
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value > limit:
            raise ValueError(f"{name} must be at most {limit} ({why}), got {value}: lower it")


_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def check_within(section: Any, **intervals: str) -> None:
    """Raises ValueError unless each named field of a section lies in its interval, or is None where it may be.

    intervals: as mathematics writes them, such as "[0, 1)" or "(0, inf)". NaN lies in none.
    """
    for name, interval in intervals.items():
        value, found = getattr(section, name), _INTERVAL.fullmatch(interval)
        assert found is not None, interval
        if value is None:
            continue
        least, most = float(found[2]), float(found[3])
        above = value >= least if found[1] == "[" else value > least
        if not (above and (value <= most if found[4] == "]" else value < most)):
            raise ValueError(f"{name} must be in {interval}, got {value}")


def check_video(section: Any) -> None:
    """Raises ValueError for `frames`, `height` and `width` of a latent video that no run can have."""
    check_counts(section, {"frames": FRAMES, "height": SIDE, "width": SIDE})
    volume = section.frames * section.height * section.width
    if volume > VOLUME:
        raise ValueError(
            f"frames x height x width is {volume}, and attention counts at most {VOLUME} tokens: lower one of them"
        )

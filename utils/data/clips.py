"""Clips of videos, and images, as samples of pixels: probed, cut to buckets, decoded by PyAV."""

# T frames of a clip  C channels  H W pixels

from __future__ import annotations

import functools
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.data.buckets import Info, Pace, Size, choose, cover
from utils.data.media import Media
from utils.data.order import BucketOrder
from utils.data.stream import REMEDY_BEFORE, CorruptSample, Faults, Sample
from utils.errors import UserError
from utils.fields import show
from utils.limits import check_size, limits
from utils.logging import warn
from utils.random import keyed_seed
from utils.reading import read_json, reading
from utils.video import deep_pixels, is_deep, open_image
from utils.writing import write_text

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF: the tag, and its values where height and width are swapped


class Start(StrEnum):
    """Where in a video its clip begins: anew for each position (training), or always the same (preprocessing)."""

    random = "random"
    first = "first"
    middle = "middle"


@dataclass(frozen=True)
class Plan:
    """The bucket of each item that has one; why the others have none (too short, too slow); corrupt ones by number."""

    bucket_of: dict[int, int]
    left_out: dict[int, str]
    infos: dict[int, Info]


class VideoClips:
    """A source of clips: `pixels` [T, 3, H, W] in [0, 1] of the bucket that `plan_clips` chose, and the caption."""

    def __init__(
        self,
        shards: Sequence[Sequence[Media]],
        plan: Plan,
        sizes: Sequence[Size],
        pace: Pace,
        start: Start = Start.random,
        seed: int = 0,
    ) -> None:
        self.media = [media for shard in shards for media in shard]
        self.shard_sizes = [len(shard) for shard in shards]
        self.plan, self.sizes, self.pace, self.start, self.seed = plan, list(sizes), pace, start, seed

    media_type = "video"

    def video_frames(self, item: int) -> int:
        """Frames of the video that a model makes of this item, or sees: here the clip's."""
        return self.sizes[self.plan.bucket_of[item]].frames

    def buckets(self) -> list[list[list[int]]]:
        """Items by bucket and shard, as `BucketOrder` takes them."""
        out: list[list[list[int]]] = [[[] for _ in self.shard_sizes] for _ in self.sizes]
        ends = np.cumsum(self.shard_sizes)
        for item, bucket in sorted(self.plan.bucket_of.items()):
            out[bucket][int(np.searchsorted(ends, item, side="right"))].append(item)
        return out

    def order(self, batch: int, seed: int, pool: int | None = None) -> BucketOrder:
        """Batches of one bucket each. Raises ValueError where no video suits any."""
        return BucketOrder(self.buckets(), batch, seed, pool)

    def read(self, item: int, position: int) -> Sample:
        """The clip of this item. Raises CorruptSample."""
        media, info = self.media[item], self.plan.infos[item]
        size = self.sizes[self.plan.bucket_of[item]]
        caption = media.text()  # first: it costs nothing beside the decoding
        begin = self._begin(info, size, position)
        return Sample(media.name, caption, pixels=decode_clip(media, size, self.pace, info.fps, begin))

    def _begin(self, info: Info, size: Size, position: int) -> float:
        """Seconds from the video's start."""
        spare = max(info.frames - self.pace.span(size.frames, info.fps), 0.0)
        share = {Start.first: 0.0, Start.middle: 0.5}.get(self.start)
        if share is None:
            share = keyed_seed(self.seed, "clip start", position) / 2.0**63
        return int(share * (int(spare) + 1) if self.start is Start.random else share * spare) / info.fps


class Images:
    """A source of images: `pixels` [1, 3, H, W] in [0, 1], scaled to cover `size` and cropped, and the caption."""

    def __init__(self, shards: Sequence[Sequence[Media]], size: Size) -> None:
        self.media = [media for shard in shards for media in shard]
        self.shard_sizes = [len(shard) for shard in shards]
        self.size = size

    def read(self, item: int, position: int) -> Sample:
        """The image `item`. Raises CorruptSample."""
        del position  # nothing is drawn
        media = self.media[item]
        return Sample(media.name, media.text(), pixels=decode_image(media, self.size))


class ImageClips(VideoClips):
    """Images as clips of one frame, in buckets by aspect. sizes: of the videos that begin with them, frames included;
    plan: of `plan_clips` with `header=probe_image`, for sizes of one frame."""

    media_type = "image"

    def __init__(self, shards: Sequence[Sequence[Media]], plan: Plan, sizes: Sequence[Size]) -> None:
        super().__init__(shards, plan, [replace(size, frames=1) for size in sizes], Pace(), Start.first)
        self.lengths = [size.frames for size in sizes]

    def read(self, item: int, position: int) -> Sample:
        """The image `item`: pixels [1, 3, H, W]. Raises CorruptSample."""
        del position  # nothing is drawn
        media = self.media[item]
        pixels = decode_image(media, self.sizes[self.plan.bucket_of[item]])
        return Sample(media.name, media.text(), pixels=pixels)

    def video_frames(self, item: int) -> int:
        return self.lengths[self.plan.bucket_of[item]]


def plan_clips(
    shards: Sequence[Sequence[Media]],
    sizes: Sequence[Size],
    pace: Pace,
    *,
    cache: Path | None = None,
    max_corrupt: float = 0.01,
    threads: int = 8,
    header: Callable[[Media], Info] | None = None,
) -> Plan:
    """Reads every video's header and chooses its bucket. What suits none is left out, in one line of warning.

    shards: the videos or images.
    sizes: of the buckets.
    pace: at which frames are taken.
    cache: a JSON file of the headers. It is read where it exists, so that only new files are opened, and written whole.
    max_corrupt: share of files that may be corrupt.
    threads: that read headers.
    header: reads the header of a file, None: `probe`, of videos.

    Raises TooManyCorrupt, or ValueError where no video suits a bucket.
    """
    media = [file for shard in shards for file in shard]
    faults = Faults(len(media), max_corrupt, REMEDY_BEFORE)
    plan = Plan({}, {}, {})
    for item, found in enumerate(_headers(media, cache, threads, header or probe)):
        if isinstance(found, CorruptSample):
            faults.add(item, found)
            continue
        bucket, why = choose(found, sizes, pace)
        plan.infos[item] = found
        if bucket is None:
            plan.left_out[item] = f"{media[item].name} {why}"
        else:
            plan.bucket_of[item] = bucket
    if plan.left_out:
        first, count = next(iter(plan.left_out.values())), len(plan.left_out)
        warn(f"{count} of {len(media)} videos suit no bucket and are left out; the first: {first}")
    if not plan.bucket_of:
        why = next(iter([*plan.left_out.values(), *faults.reasons.values()]))
        raise ValueError(f"data: none of {len(media)} videos suits a bucket of {', '.join(map(str, sizes))}: {why}")
    return plan


def probe(media: Media) -> Info:
    """A video's header. Raises CorruptSample."""
    import av

    with _decoding(media), media.part.open() as file, av.open(file, "r") as container:
        stream = _video_of(container, media)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise CorruptSample(f"{media.name} does not say its frames a second")
        fps = float(rate)
        seconds = _seconds(stream.duration, stream.time_base, container.duration)
        frames = stream.frames or round(seconds * fps)
        if (first := next(container.decode(stream), None)) is None:
            raise CorruptSample(f"{media.name} cannot be decoded: no frame in it")
        turned, height, width = _rotation(first) % 2, stream.height, stream.width
        if not (fps > 0 and min(frames, height, width) > 0):
            raise CorruptSample(f"{media.name} says that it has {frames} frames of {height}x{width}, {fps:g} a second")
    return Info(frames, fps, *((width, height) if turned else (height, width)))


def probe_image(media: Media) -> Info:
    """An image's header, as a video of one frame. Raises CorruptSample."""
    with _decoding(media), media.part.open() as file, open_image(file, media.name) as image:
        turned = image.getexif().get(ORIENTATION, 1) in SIDEWAYS
        width, height = image.size
    return Info(1, 1.0, *((width, height) if turned else (height, width)))


def decode_clip(media: Media, size: Size, pace: Pace, source_fps: float, begin: float = 0.0) -> Tensor:
    """Frames [T, 3, H, W] in [0, 1], scaled to cover the size, the middle cropped.

    Each is the last frame shown at its time, so a variable frame rate is met too.

    media: the video.
    size: of the clip.
    pace: at which frames are taken.
    source_fps: frames a second of the video.
    begin: where the clip begins, in seconds.

    Raises CorruptSample where the video cannot be decoded or ends too early.
    """
    import av

    times = [begin + i * pace.step(source_fps) for i in range(size.frames)]
    with _decoding(media), media.part.open() as file, av.open(file, "r") as container:
        stream = _video_of(container, media)
        stream.thread_type = "AUTO"
        pictures = list(_pictures(container, stream, times, 0.5 / source_fps, size))
    if len(pictures) < size.frames:
        raise CorruptSample(f"{media.name} ends after {len(pictures)} of the {size.frames} frames of its clip")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def decode_end(media: Media, size: Size, *, last: bool) -> Tensor:
    """The first or the last frames [T, 3, H, W] in [0, 1] of a video, each as it is stored whatever its time, scaled
    to cover the size, the middle cropped. Raises CorruptSample where the video cannot be decoded or has too few."""
    import av

    with _decoding(media), media.part.open() as file, av.open(file, "r") as container:
        stream = _video_of(container, media)
        stream.thread_type = "AUTO"
        decoded = container.decode(stream)
        kept = deque(decoded if last else islice(decoded, size.frames), maxlen=size.frames)
        pictures = [_picture(frame, size) for frame in kept]
    if len(pictures) < size.frames:
        raise CorruptSample(
            f"{media.name} has {len(pictures)} frames, {size.frames} are needed: give a longer video, or ask for fewer "
            "frames"
        )
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def decode_image(media: Media, size: Size) -> Tensor:
    """An image as [1, 3, H, W] in [0, 1], scaled to cover the size, the middle cropped. Raises CorruptSample."""
    from PIL import Image, ImageOps

    with _decoding(media), media.part.open() as file, open_image(file, media.name) as image:
        if is_deep(image):
            return _deep_image(image, size, media.name)
        upright = ImageOps.exif_transpose(image).convert("RGB")
        height, width = _covered(upright, size, media.name)
        pixels = np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(_middle(pixels, size).copy()).permute(2, 0, 1)[None].float() / 255


def _deep_image(image: Any, size: Size, name: str) -> Tensor:
    """`decode_image` of 16 bits, whose channels Pillow scales as floats."""
    from PIL import Image, ImageOps

    channels = []
    for channel in np.moveaxis(deep_pixels(image), -1, 0):
        picture = Image.fromarray(np.ascontiguousarray(channel))
        picture.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
        upright = ImageOps.exif_transpose(picture)
        height, width = _covered(upright, size, name)
        scaled = np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC))
        channels.append(torch.from_numpy(_middle(scaled, size).copy()))
    return torch.stack(channels)[None].clamp(0, 1)  # bicubic weights overshoot


def _decoding(media: Media) -> AbstractContextManager[None]:
    return reading("", media.name, "", says="cannot be decoded", error=CorruptSample)


def _video_of(container: Any, media: Media) -> Any:
    """The video's stream, which then decodes no picture that is too large. Raises CorruptSample."""
    stream = container.streams.video[0]
    check_size("pixels", stream.width * stream.height, media.name, error=CorruptSample, unit="pixels")
    stream.codec_context.options = {"max_pixels": str(limits().pixels)}  # a later header may say another size
    return stream


def _covered(picture: Any, size: Size, name: str) -> tuple[int, int]:
    """`cover` of a picture: a very narrow one would become a very large one. Raises CorruptSample."""
    height, width = cover(picture.height, picture.width, size)
    check_size("pixels", height * width, f"{name} scaled to {height}x{width}", error=CorruptSample, unit="pixels")
    return height, width


def _pictures(
    container: Any, stream: Any, times: Sequence[float], slack: float, size: Size
) -> Iterator[NDArray[np.uint8]]:
    """The frame shown at each time; fewer where the video ends before.

    container: the opened file.
    stream: its video.
    times: in seconds, rising.
    slack: half of a frame, in seconds.
    size: of the frames.
    """
    zero = float((stream.start_time or 0) * stream.time_base)
    if times[0] > 0:
        container.seek(int((times[0] + zero) / stream.time_base), stream=stream)  # to the key frame before it
    wanted, last, last_time = iter(times), None, 0.0
    due = next(wanted, None)
    for number, frame in enumerate(container.decode(stream)):
        moment = frame.time - zero if frame.time is not None else number * 2 * slack
        while due is not None and last is not None and moment > due + slack:
            yield _picture(last, size)
            due = next(wanted, None)
        if due is None:
            return
        last, last_time = frame, moment
    while due is not None and last is not None and due <= last_time + slack:
        yield _picture(last, size)
        due = next(wanted, None)


def _picture(frame: Any, size: Size) -> NDArray[np.uint8]:
    """A frame as uint8 [H, W, 3] of the size, upright."""
    turns = _rotation(frame)
    shown = Size(size.frames, size.width, size.height) if turns % 2 else size
    height, width = _covered(frame, shown, "a frame")
    picture = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    return np.rot90(_middle(picture, shown), turns)


def _middle(picture: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    top, left = (picture.shape[0] - size.height) // 2, (picture.shape[1] - size.width) // 2
    return picture[top : top + size.height, left : left + size.width]


def _rotation(frame: Any) -> int:
    """Quarter turns, against the clock, that bring a frame upright: telephones store how they were held."""
    return round(float(frame.rotation) / 90) % 4


def _seconds(duration: int | None, time_base: Any, container_duration: int | None) -> float:
    if duration and time_base:
        return float(duration * time_base)
    return (container_duration or 0) / 1e6  # AV_TIME_BASE: microseconds


def _headers(
    media: Sequence[Media], cache: Path | None, threads: int, header: Callable[[Media], Info]
) -> Iterator[Info | CorruptSample]:
    """The header of each video in order, from the cache where the file has not changed since."""
    known = {} if cache is None or not cache.is_file() else _known_headers(cache)
    keys = [_identity(file) for file in media]
    with ThreadPoolExecutor(threads) as pool:
        new = {key: file for key, file in zip(keys, media, strict=True) if key not in known}
        for key, found in zip(new, pool.map(functools.partial(_probed, header), new.values()), strict=True):
            known[key] = {"corrupt": str(found)} if isinstance(found, CorruptSample) else asdict(found)
    if cache is not None and new:
        write_text(cache, json.dumps({key: known[key] for key in keys}), "headers of videos")
    for key in keys:
        yield CorruptSample(known[key]["corrupt"]) if "corrupt" in known[key] else Info(**known[key])


def _known_headers(cache: Path) -> dict[str, dict[str, Any]]:
    """What the cache holds, by the files' keys; empty, with a warning, for a damaged one."""
    kinds = {"frames": int, "fps": float, "height": int, "width": int}
    try:
        found = read_json("headers of videos", cache, "they are read again")
        for key, header in found.items():
            types = {name: type(value) for name, value in header.items()} if isinstance(header, dict) else {}
            if types not in (kinds, {"corrupt": str}):
                raise UserError(f"headers of videos: {cache} holds {show(header)} of {show(key)}: they are read again")
    except UserError as problem:
        warn(str(problem))
        return {}
    return found


def _probed(header: Callable[[Media], Info], media: Media) -> Info | CorruptSample:
    try:
        return header(media)
    except CorruptSample as problem:
        return problem


def _identity(media: Media) -> str:
    """A key that changes when the file does. An absent file has a key too: reading it raises the error."""
    path = media.part.path
    stat = path.stat() if path.is_file() else None
    facts = [media.name, media.part.offset, media.part.size, stat and stat.st_size, stat and stat.st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

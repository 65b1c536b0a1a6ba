"""Videos and images on disk: MP4 (H.264), GIF, PNG strip. Pixels are floats in [0, 1], [T, C, H, W] with C = 1 or 3."""

# B batch  T frames  C channels  H W pixels

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.errors import UserError
from utils.limits import check_size, limits
from utils.reading import reading
from utils.writing import whole_file

Frame = NDArray[np.uint8]  # [H, W, 3]
Frames = NDArray[np.uint8]  # [T, H, W, 3]
Writer = Callable[[Path, Iterable[Frame], float], None]


def write_video(path: str | Path, pixels_TCHW: Tensor | Iterable[Tensor], fps: float, scale: int = 1) -> Path:
    """Writes .mp4 (H.264, yuv420p), .gif, or .png (all frames side by side), by suffix; returns the path.

    The video may come in parts, each [T, C, H, W] and asked for when the one before is written: of a long MP4 no more
    than a part is ever held.
    `scale` repeats each pixel that many times a side. Odd MP4 sizes are padded by their last row or column, which
    yuv420p needs. A GIF counts time in 1/100 s and merges equal neighbouring frames. The file appears whole or not at
    all; missing folders are made. Raises ValueError on an unknown suffix, a wrong shape, fps <= 0 or scale < 1, and
    Unwritten where it cannot be written.
    """
    path = Path(path)
    writers: dict[str, Writer] = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
    if path.suffix not in writers:
        raise ValueError(f"video: cannot write {path.name!r}; the suffix must be one of {', '.join(writers)}")
    if fps <= 0 or scale < 1:
        raise ValueError(f"video: fps must be positive and scale at least 1, got fps {fps} and scale {scale}")
    parts = [pixels_TCHW] if isinstance(pixels_TCHW, Tensor) else pixels_TCHW
    frames = (frame for part in parts for frame in to_uint8(part, scale))
    with whole_file(path, "video:") as temporary:
        writers[path.suffix](temporary, frames, fps)
    return path


def write_mp4(path: Path, frames: Iterable[Frame], fps: float) -> None:
    """An MP4 (H.264, yuv420p) of frames that come one at a time, all of one size, so that a long video is never held
    uncompressed. Raises ValueError for no frames or fps <= 0."""
    if fps <= 0:
        raise ValueError(f"video: fps must be positive, got {fps}")
    _write_mp4(path, frames, fps)


def read_video(path: str | Path) -> Tensor:
    """All frames of an MP4 or GIF (or anything else PyAV decodes): [T, 3, H, W] in [0, 1].

    Raises ValueError if there is no such file or no video in it, or one that is too large (`Limits`).
    """
    import av

    path = _existing(path)
    with reading("video: cannot decode", path, says="is no video"):
        if path.suffix == ".gif":
            return _to_float(_held(_gif_frames(path), path))
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.options = {"max_pixels": str(limits().pixels)}
            decoded: Any = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
            return _to_float(_held(decoded, path))


def read_image(path: str | Path) -> Tensor:
    """An image file as RGB [3, H, W] in [0, 1]. Raises ValueError if there is no such file or it is no image."""
    path = _existing(path)
    with reading("image: cannot decode", path, says="is no image"), open_image(path, f"image: {path}") as image:
        if is_deep(image):
            return torch.from_numpy(deep_pixels(image)).permute(2, 0, 1)
        return _to_float(np.asarray(image.convert("RGB"))[None])[0]


def open_image(file: Path | BinaryIO, name: str) -> Any:
    """The image of Pillow's in a file, nothing decoded. Raises UserError for one of more pixels than `Limits.pixels`,
    and what Pillow raises."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # of Pillow, a fixed limit; ours is looked at here, from the header too
    image = Image.open(file)
    try:
        check_size("pixels", image.width * image.height, name, unit="pixels")
    except UserError:
        image.close()
        raise
    return image


def is_deep(image: Any) -> bool:
    """Whether an opened image of Pillow's has 16 bits a channel, of which `convert` would keep 8 or clip them.

    Raises UserError for numbers of 32 bits, whose white is not known.
    """
    if image.mode in ("I", "F"):
        raise UserError("its pixels are numbers of 32 bits, whose white is not known: save it with 8 or 16 bits")
    return image.mode.startswith("I;16") or any(";16" in mode for mode in _raw_modes(image))


def deep_pixels(image: Any) -> NDArray[np.float32]:
    """RGB [H, W, 3] in [0, 1] of an image that `is_deep`; transparency is left out. Raises what the decoders raise."""
    if image.mode.startswith("I;16"):
        return _of_levels(np.asarray(image)[..., None].repeat(3, axis=-1))
    import av

    here = image.fp.tell()
    image.fp.seek(0)
    with av.open(image.fp, "r") as container:
        container.streams.video[0].codec_context.options = {"max_pixels": str(limits().pixels)}
        frame = next(container.decode(video=0))
    image.fp.seek(here)  # Pillow goes on reading, for EXIF behind the pixels
    packed = re.fullmatch(r"(ya16|rgb48|rgba64)(le|be)", frame.format.name)
    if packed is None:
        raise UserError(f"its pixels are {frame.format.name}: save it with 8 or 16 bits of RGB")
    # as they lie there: swscale's way from ya16 to gray16 errs now and then
    plane, width = frame.planes[0], {"ya16": 2, "rgb48": 3, "rgba64": 4}[packed[1]]
    rows = np.frombuffer(plane, np.uint8)[: frame.height * plane.line_size].reshape(frame.height, plane.line_size)
    stored = rows[:, : frame.width * width * 2].copy().view("<u2" if packed[2] == "le" else ">u2")
    levels = stored.reshape(frame.height, frame.width, width)
    return _of_levels(levels[..., :3] if width > 2 else levels[..., :1].repeat(3, axis=-1))


def _of_levels(levels: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers of 16 bits as shares of white."""
    return np.asarray(levels, np.float32) / np.float32(65535)


def _raw_modes(image: Any) -> list[str]:
    """How Pillow names the stored pixels of each tile, such as "RGB;16B"."""
    args = [tile[3] for tile in getattr(image, "tile", [])]
    return [str(part) for each in args for part in (each if isinstance(each, tuple) else (each,))]


def grid(videos_BTCHW: Tensor, columns: int | None = None, padding: int = 1, value: float = 0.5) -> Tensor:
    """One video [T, C, H', W'] of a batch laid out in rows of `columns` (near-square if None), `padding` pixels of
    grey `value` around each. Missing places of the last row are filled with `value`."""
    batch, frames, channels, height, width = videos_BTCHW.shape
    if batch < 1 or (columns is not None and columns < 1) or padding < 0:
        raise ValueError(f"grid: needs videos, columns >= 1, padding >= 0; got {batch}, {columns}, {padding}")
    columns = min(columns or math.ceil(math.sqrt(batch)), batch)
    rows = math.ceil(batch / columns)
    pitch_h, pitch_w = height + padding, width + padding
    canvas = videos_BTCHW.new_full((frames, channels, rows * pitch_h + padding, columns * pitch_w + padding), value)
    for i, video in enumerate(videos_BTCHW):
        top, left = (i // columns) * pitch_h + padding, (i % columns) * pitch_w + padding
        canvas[..., top : top + height, left : left + width] = video
    return canvas


def to_uint8(pixels_TCHW: Tensor, scale: int = 1) -> Frames:
    """Pixels [T, 1 or 3, H, W] in [0, 1], or of 8 bits already, as 8-bit RGB, each repeated `scale` times a side.
    Raises ValueError for another shape, NaN or infinity."""
    if pixels_TCHW.ndim != 4 or pixels_TCHW.shape[1] not in (1, 3) or 0 in pixels_TCHW.shape:
        raise ValueError(f"video: pixels must be [T, 1 or 3, H, W] and not empty, got {list(pixels_TCHW.shape)}")
    height, width = pixels_TCHW.shape[-2:]
    check_size("pixels", height * width * scale**2, f"video: scale {scale}", unit="pixels")
    levels = eight_bits(pixels_TCHW).cpu().expand(-1, 3, -1, -1)
    enlarged = levels.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    return np.ascontiguousarray(enlarged.permute(0, 2, 3, 1).numpy())


def eight_bits(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], of any shape, as 0 to 255; of 8 bits they stay as they are. Raises ValueError for NaN or
    infinity."""
    if pixels.dtype is torch.uint8:
        return pixels
    pixels = pixels.detach().float()
    if not torch.isfinite(pixels).all():
        raise UserError("video: pixels hold NaN or infinity: the network or the decoder gave no numbers")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _to_float(frames: Frames) -> Tensor:
    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 255


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"video: no such file: {path}")
    return path


def _write_mp4(path: Path, frames: Iterable[Frame], fps: float) -> None:
    import av

    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise ValueError("video: no frames to write")
    height, width = first.shape[:2]
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14"}
        for frame in chain([first], rest):
            padded = np.pad(frame, padding, mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: Iterable[Frame], fps: float) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame).quantize(256) for frame in frames]
    duration = max(round(1000 / fps), 20)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=duration, loop=0, disposal=1)


def _gif_frames(path: Path) -> Iterator[Frame]:
    from PIL import ImageSequence

    with open_image(path, f"video: {path}") as image:
        yield from (np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image))


def _held(frames: Iterable[Frame], path: Path) -> Frames:
    """All frames of a video. Raises UserError for none, and for more bytes than `Limits.row`."""
    kept, size = [], 0
    for frame in frames:
        size += 5 * frame.nbytes  # as they come, and as fp32
        check_size("row", size, f"video: {path}")
        kept.append(frame)
    if not kept:
        raise UserError(f"video: {path} holds no frame: give another")
    return np.stack(kept)


def _write_png(path: Path, frames: Iterable[Frame], fps: float) -> None:
    from PIL import Image

    del fps  # a strip has no time
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(path, "PNG")

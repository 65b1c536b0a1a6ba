"""Images of 16 bits a channel keep their values, as PNG and TIFF, grey and colour, turned and scaled."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from utils.data.buckets import Size
from utils.data.clips import decode_image
from utils.data.media import IMAGES, Media, Part, find_media
from utils.data.stream import CorruptSample
from utils.video import read_image

Deep = NDArray[np.uint16]  # [H, W] or [H, W, C]
LAYOUTS = {(): 0, (2,): 4, (3,): 2, (4,): 6}  # channels -> the colour type of PNG
HEIGHT, WIDTH = 6, 8
SIZE = Size(1, HEIGHT, WIDTH)


def levels(*channels: int) -> Deep:
    """All of them differ, many only in their lower byte."""
    values = torch.randperm(65536, generator=torch.Generator().manual_seed(1))[
        : HEIGHT * WIDTH * int(np.prod(channels))
    ]
    return values.numpy().astype(np.uint16).reshape(HEIGHT, WIDTH, *channels)


def png(image: Deep, orientation: int = 1) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, LAYOUTS[image.shape[2:]], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        parts.insert(2, chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(image: Deep, compression: str = "raw") -> bytes:
    """Grey by Pillow, colour by FFmpeg."""
    file = io.BytesIO()
    if image.ndim == 2:
        Image.fromarray(image).save(file, "TIFF")
        return file.getvalue()
    codec = av.CodecContext.create("tiff", "w")
    codec.width, codec.height, codec.pix_fmt = WIDTH, HEIGHT, "rgb48le"
    codec.time_base, codec.options = Fraction(1), {"compression_algo": compression}
    packets = [*codec.encode(av.VideoFrame.from_ndarray(image, format="rgb48le")), *codec.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def expected(image: Deep) -> torch.Tensor:
    colour = {1: [0, 0, 0], 2: [0, 0, 0], 3: [0, 1, 2], 4: [0, 1, 2]}
    wide = image.reshape(HEIGHT, WIDTH, -1)
    return torch.from_numpy(wide[..., colour[wide.shape[-1]]].astype(np.float32) / 65535).permute(2, 0, 1)


FILES = {
    "grey.png": (png(levels()), levels()),
    "grey_alpha.png": (png(levels(2)), levels(2)),
    "rgb.png": (png(levels(3)), levels(3)),
    "rgb_alpha.png": (png(levels(4)), levels(4)),
    "grey.tiff": (tiff(levels()), levels()),
    "rgb.tif": (tiff(levels(3)), levels(3)),
    "rgb_deflate.tif": (tiff(levels(3), "deflate"), levels(3)),
}


@pytest.mark.parametrize("name", FILES)
def test_values_are_kept(tmp_path: Path, name: str) -> None:
    data, image = FILES[name]
    (tmp_path / name).write_bytes(b"before" + data)
    inside = Media(name, Part(tmp_path / name, 6, len(data)), "")  # as in a tar
    assert torch.equal(decode_image(inside, SIZE)[0], expected(image))
    (tmp_path / name).write_bytes(data)
    assert torch.equal(read_image(tmp_path / name), expected(image))
    ((media,),) = find_media(tmp_path, IMAGES)
    assert torch.equal(decode_image(media, SIZE)[0], expected(image))


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_turned_and_scaled_as_those_of_8_bits(tmp_path: Path, channels: tuple[int, ...], orientation: int) -> None:
    """Of levels that 8 bits hold, the same picture comes out, but that one of 8 bits is rounded in each direction."""
    small = (96 + levels(*channels) // 1024).astype(np.uint8)  # bicubic weights overshoot neither black nor white
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(small).save(tmp_path / "8.png", exif=exif)
    (tmp_path / "16.png").write_bytes(png(small.astype(np.uint16) * 257, orientation))
    for size in (Size(1, WIDTH, HEIGHT), Size(1, 4, 4), Size(1, 12, 10)):
        shallow, deep = (decode_image(Media(n, Part(tmp_path / n), ""), size) for n in ("8.png", "16.png"))
        assert shallow.shape == deep.shape == (1, 3, size.height, size.width)
        assert (shallow - deep).abs().max() <= 1.5 / 255


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_of_32_bits_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((HEIGHT, WIDTH), kind)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"numbers of 32 bits, whose white is not known"):
        read_image(tmp_path / "a.tiff")
    with pytest.raises(CorruptSample, match=r"numbers of 32 bits, whose white is not known"):
        decode_image(Media("a.tiff", Part(tmp_path / "a.tiff"), ""), SIZE)

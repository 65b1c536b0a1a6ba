"""Videos are read back: what was written is what decodes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils import video as video_module
from utils.video import eight_bits, grid, read_image, read_video, write_video


def _ramp(frames: int, height: int, width: int) -> Tensor:
    """A smooth coloured video in which every frame is different."""
    t = torch.linspace(0, 0.4, frames).view(-1, 1, 1, 1)
    x = torch.linspace(0, 0.5, width).expand(height, width)
    y = torch.linspace(0, 0.5, height)[:, None].expand(height, width)
    return torch.stack([x, y, (x + y) / 2]) + t


def test_mp4_decodes_to_what_was_written(tmp_path: Path) -> None:
    import av

    pixels = _ramp(9, 16, 24)
    path = write_video(tmp_path / "new" / "a.mp4", pixels, fps=7.5, scale=4)
    decoded = read_video(path)
    assert decoded.shape == (9, 3, 64, 96)
    expected = pixels.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert (decoded - expected).abs().mean() < 0.01
    assert (decoded - expected).abs().max() < 0.08
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(15, 2)


def test_odd_mp4_sizes_are_padded_by_their_edge(tmp_path: Path) -> None:
    decoded = read_video(write_video(tmp_path / "a.mp4", torch.full((3, 1, 15, 17), 0.6), fps=8))
    assert decoded.shape == (3, 3, 16, 18)
    assert (decoded - 0.6).abs().max() < 0.02


def test_gif_of_grey_pixels_is_exact(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (5, 1, 8, 8)) / 255
    decoded = read_video(write_video(tmp_path / "a.gif", pixels, fps=10, scale=2))
    assert torch.equal(decoded, pixels.expand(-1, 3, -1, -1).repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_png_strip_holds_the_frames_side_by_side(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (4, 3, 6, 5)) / 255
    strip = read_image(write_video(tmp_path / "a.png", pixels, fps=8))
    assert strip.shape == (3, 6, 20)
    assert torch.equal(torch.stack(strip.split(5, dim=-1)), pixels)


def test_values_are_clamped_and_rounded(tmp_path: Path) -> None:
    pixels = torch.tensor([-1.0, 2.0, 0.4999 / 255, 0.5001 / 255]).view(1, 1, 2, 2)
    image = read_image(write_video(tmp_path / "a.png", pixels, fps=8))
    assert (image[0] * 255).round().flatten().tolist() == [0, 255, 0, 1]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_a_video_in_parts_is_the_whole_and_an_mp4_holds_one_at_a_time(tmp_path: Path, suffix: str) -> None:
    whole, alive = torch.rand(6, 3, 8, 8), []

    def parts() -> Iterator[Tensor]:
        for part in whole.split(2):
            chunk = part.clone()
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk
            if suffix == "mp4":
                assert all(seen() is None for seen in alive[:-1])

    write_video(tmp_path / f"parts.{suffix}", parts(), 8, 2)
    write_video(tmp_path / f"bits.{suffix}", eight_bits(whole), 8, 2)
    write_video(tmp_path / f"whole.{suffix}", whole, 8, 2)
    read = read_image if suffix == "png" else read_video
    for name in ("parts", "bits"):
        # the encoder varies in its last bits from call to call
        found, expected = read(tmp_path / f"{name}.{suffix}"), read(tmp_path / f"whole.{suffix}")
        assert found.shape == expected.shape
        assert (found - expected).abs().mean() < (0.02 if suffix == "mp4" else 1e-6)
    assert len(alive) == 3


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.png", torch.zeros(1, 1, 4, 4), fps=8)
    old = path.read_bytes()

    def broken(temporary: Path, frames: object, fps: float) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(video_module, "_write_png", broken)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, torch.ones(1, 1, 4, 4), fps=8)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    frames = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"'a.avi'; the suffix must be one of .mp4, .gif, .png"):
        write_video(tmp_path / "a.avi", frames, fps=8)
    with pytest.raises(ValueError, match=r"got \[2, 2, 4, 4\]"):
        write_video(tmp_path / "a.mp4", frames[:, :2], fps=8)
    with pytest.raises(ValueError, match="NaN"):
        write_video(tmp_path / "a.mp4", frames / 0, fps=8)
    with pytest.raises(ValueError, match="fps must be positive"):
        write_video(tmp_path / "a.mp4", frames, fps=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no such file"):
        read_video(tmp_path / "a.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="cannot decode"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="cannot decode"):
        read_image(tmp_path / "text.png")


def test_grid_places_every_video() -> None:
    videos = torch.rand(5, 2, 3, 4, 6)
    sheet = grid(videos, columns=3, padding=2, value=0.25)
    assert sheet.shape == (2, 3, 2 * 6 + 2, 3 * 8 + 2)
    for i, video in enumerate(videos):
        top, left = (i // 3) * 6 + 2, (i % 3) * 8 + 2
        assert torch.equal(sheet[..., top : top + 4, left : left + 6], video)
    assert (sheet == 0.25).sum() == sheet.numel() - videos.numel()
    assert grid(videos[:1]).shape == (2, 3, 6, 8)
    assert grid(videos, padding=0).shape == (2, 3, 8, 18)

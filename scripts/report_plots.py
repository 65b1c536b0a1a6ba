"""The report's pictures: loss curves as inline SVG, and all methods beside each other as one video, GIF and PNG strip.

M methods  P prompts  T frames  C channels  H W pixels
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.video import write_video

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#c026d3")  # legible on white and on black
_INK = "#010203"  # stands for the page's text colour, which is not known here
_POINTS = 160  # of a curve: a run's steps are averaged down to these
ARROWS = {"left": "←", "right": "→", "up": "↑", "down": "↓"}


@dataclass(frozen=True)
class Panel:
    """One plot. lines: (legend, key in a run's metrics, that run's entries)."""

    title: str
    lines: tuple[tuple[str, str, Sequence[dict[str, Any]]], ...]
    log: bool = False
    level: tuple[str, float] | None = None


def curves(panels: Sequence[Panel]) -> list[str]:
    """An SVG for each panel that has numbers; it takes its text colour from the page."""
    return [svg for number, panel in enumerate(panels) if (svg := _curve(panel, number))]


def _curve(panel: Panel, number: int) -> str:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": f"panel {number}", "font.size": 9, "axes.spines.top": False,
        "axes.spines.right": False, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.titlesize": 10,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(4.2, 2.5), layout="constrained")
        drawn = 0
        for colour, (legend, key, entries) in zip(COLOURS, panel.lines, strict=False):
            steps, values = thinned([(e["step"], e[key]) for e in entries if key in e])
            if steps:
                axes.plot(steps, values, color=colour, linewidth=1.4, label=legend)
                drawn += 1
        if panel.level is not None:
            axes.axhline(panel.level[1], color=_INK, linewidth=0.8, linestyle="--", label=panel.level[0])
        axes.set_title(panel.title, loc="left")
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.2)
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        if drawn > 1 or panel.level is not None:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        pyplot.close(figure)
    return _inline(buffer.getvalue()) if drawn else ""


def thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over equal stretches to at most _POINTS of them."""
    size = -(-len(points) // _POINTS) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    steps, values = ([sum(p[axis] for p in chunk) / len(chunk) for chunk in chunks] for axis in (0, 1))
    return steps, values


def _inline(svg: str) -> str:
    """matplotlib's file as an element of an HTML page: no prologue, no metadata, nothing that names an address."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
    return svg.replace(_INK, "currentColor")


# ------------------------------------------------------------------------------------------------------ moving pictures


def short(prompt: str) -> str:
    """ "the digit seven moving left" -> "seven ←", "a red circle moving up" -> "red circle ↑", "a handwritten seven" ->
    "seven"; another prompt as it is."""
    words = prompt.split()
    if words[:2] == ["a", "handwritten"]:
        return words[-1]
    if len(words) != 5 or words[3] != "moving" or words[4] not in ARROWS:
        return prompt
    named = words[2:3] if words[1] == "digit" else words[1:3]
    return " ".join([*named, ARROWS[words[4]]])


def held(pixels: Tensor, frames: int = 4) -> Tensor:
    """Frames [..., T, C, H, W] whose last one stays for a while, so that a loop's seam is seen as such."""
    return torch.cat([pixels, pixels[..., -1:, :, :, :].expand(*pixels.shape[:-4], frames, *pixels.shape[-3:])], dim=-4)


def side_by_side(videos: Tensor, padding: int = 1, value: float = 0.25) -> Tensor:
    """Videos [P, T, C, H, W] in one row: [T, C, H, P (W + padding) - padding]."""
    gap = videos.new_full((*videos.shape[1:4], padding), value)
    return torch.cat([piece for video in videos for piece in (video, gap)][:-1], dim=-1)


def write_comparison(root: Path, labels: Sequence[str], prompts: Sequence[str], videos: Tensor, fps: int) -> None:
    """Writes comparison.mp4 and .gif (a row for each method, a column for each prompt) and comparison.png (the same
    for the first two prompts, frame by frame).

    root: folder of the files.
    labels: of M methods.
    prompts: P of them.
    videos: [M, P, T, C, H, W] in [0, 1].
    fps: frames a second.
    """
    heads = [short(prompt) for prompt in prompts]
    for name, scale, columns, levels in (("comparison.mp4", 4, len(heads), 255), ("comparison.gif", 3, 6, 15)):
        # few levels keep the GIF small: noise that nobody sees is most of its bytes
        rows = [side_by_side((held(video[:columns]) * levels).round() / levels) for video in videos]
        write_video(root / name, _sheet(rows, labels, heads[:columns], scale), fps)
    write_strips(root / "comparison.png", labels, prompts[:2], videos[:, :2])


def write_strips(path: Path, labels: Sequence[str], prompts: Sequence[str], videos: Tensor) -> None:
    """A PNG: a row for each method, its videos of the prompts beside each other, frame by frame.

    videos: [M, P, T, C, H, W] in [0, 1]."""
    zoom = max(16 // videos.shape[-1], 1)  # of small images, for their headings
    videos = videos.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
    strips = [side_by_side(video.flatten(0, 1)[:, None]) for video in videos]
    titles = [short(prompt) if frame == 0 else "" for prompt in prompts for frame in range(videos.shape[2])]
    write_video(path, _sheet(strips, labels, titles, 3), 1)


def _sheet(rows: Sequence[Tensor], labels: Sequence[str], heads: Sequence[str], scale: int) -> Tensor:
    """Rows of frames [T, 1 or 3, h, w] under each other, enlarged, labels on their left, heads above: [T, 3, H, W]."""
    pad = scale
    enlarged = [row.repeat_interleave(scale, -2).repeat_interleave(scale, -1) for row in rows]
    frames, _, height, width = enlarged[0].shape
    font = _font(3 * scale + 3)
    left = int(max(font.getlength(label) for label in labels)) + 2 * pad + 4
    top = 6 * scale + 4
    rows_y = [top + number * (height + pad) for number in range(len(rows))]
    size = (left + width + pad, rows_y[-1] + height + pad)
    texts = [(float(pad + 2), y + height / 2, label, "lm") for y, label in zip(rows_y, labels, strict=True)]
    pitch, anchor = (width + pad) / len(heads), "lm" if "" in heads else "mm"
    start = 0 if "" in heads else pitch / 2
    texts += [(left + start + number * pitch, top / 2, head, anchor) for number, head in enumerate(heads)]
    sheet = _written(size, texts, font).expand(frames, -1, -1, -1).clone()
    for y, row in zip(rows_y, enlarged, strict=True):
        sheet[:, :, y : y + height, left : left + width] = row
    return sheet


def _written(
    size: tuple[int, int], texts: Sequence[tuple[float, float, str, str]], font: FreeTypeFont | ImageFont
) -> Tensor:
    """The still part: texts (x, y, what, PIL's anchor) on a dark ground, [1, 3, H, W]."""
    import numpy as np
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", size, (24, 26, 32))
    draw = ImageDraw.Draw(picture)
    for x, y, text, anchor in texts:
        draw.text((x, y), text, font=font, fill=(220, 222, 228), anchor=anchor)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255


def _font(size: int) -> FreeTypeFont | ImageFont:
    """matplotlib's own DejaVu: it has the arrows, and is there wherever the curves can be drawn."""
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)

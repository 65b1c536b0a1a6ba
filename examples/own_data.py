"""Shows how to train on data of one's own: a folder of short clips, each with its file's name as its caption.

python -m examples.own_data --clips my_clips --logdir logs/examples/own_data
python -m examples.own_data --clips my_clips training.max_steps=500 data.side=32

my_clips has files such as "a red ball rolling left.mp4" (or .gif). They are cut to the middle square, made grey and
small, and all are held in memory: enough to try an idea on a toy network. Real videos for Wan go through
`preprocess.py video` instead. A kind of data that stays becomes a file in tasks/kinds/, without `@register`: see
docs/extending.md. There is one split, so nothing here can be evaluated on clips that were held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

import fewstep
from model.types import LatentSize
from tasks.data import register
from tasks.task import TaskContext
from tasks.world import WorldData, WorldTask
from utils.errors import ConfigError
from utils.video import read_video
from worlds.glyphs import Split
from worlds.toy import ToyBatch


class ClipsWorld:
    """The clips of a folder. Space-to-depth by 2 stands in for a VAE: pixels [B, F, C, h, w] <-> latents
    [B, F, 4, h/2, w/2]. Raises ValueError for a folder without clips that are long enough."""

    def __init__(self, folder: Path, frames: int, side: int) -> None:
        files = sorted(path for path in folder.glob("*") if path.suffix in (".mp4", ".gif"))
        if not files:
            raise ValueError(f"{folder} has no .mp4 or .gif: give a folder of clips")
        self.side = side
        self.latent_shape: tuple[int, ...] = (frames, 4, side // 2, side // 2)
        self.captions = [path.stem.lower() for path in files]
        self.clips = torch.cat([self.encode(self._read(path, frames, side)) for path in files])

    def _read(self, path: Path, frames: int, side: int) -> Tensor:
        """Pixels [1, F, 1, side, side] in [0, 1]."""
        pixels = read_video(path)[:frames].float()
        if len(pixels) < frames:
            raise ValueError(f"{path} has {len(pixels)} frames: give clips of at least {frames}, or set data.length")
        height, width = pixels.shape[-2:]
        cut = min(height, width)
        top, left = (height - cut) // 2, (width - cut) // 2
        square = pixels[..., top : top + cut, left : left + cut].mean(1, keepdim=True)
        return interpolate(square, size=(side, side), mode="area")[None]

    def parse(self, caption: str) -> int:
        if caption not in self.captions:
            raise ValueError(f"no clip is called {caption!r}: choose one of {', '.join(self.captions)}")
        return self.captions.index(caption)

    def batch(self, indices: Sequence[int], split: Split) -> ToyBatch:
        """The samples with these indices: a pure function of them, so a resume repeats none."""
        rows = [index % len(self.captions) for index in indices]
        return ToyBatch(self.clips[rows], [self.captions[row] for row in rows])

    def real_videos_for(self, captions: Sequence[str], seed: int, split: Split = "test") -> Tensor:
        return self.clips[[self.parse(caption) for caption in captions]]

    def encode(self, pixels_BFCHW: Tensor) -> Tensor:
        return pixel_unshuffle(pixels_BFCHW.float().mean(2, keepdim=True) * 2 - 1, 2)

    def decode(self, latents_BFCHW: Tensor, *, clamp: bool = True) -> Tensor:
        pixels = (pixel_shuffle(latents_BFCHW.float(), 2) + 1) / 2
        return (pixels.clamp(0, 1) if clamp else pixels).expand(-1, -1, 3, -1, -1)

    def resized(self, frames: int, height: int) -> ClipsWorld:
        if (frames, height) != (self.latent_shape[0], self.side // 2):
            raise ValueError(f"clips are {self.latent_shape[0]} frames of {self.side} x {self.side} pixels")
        return self


@register
@dataclass
class ClipsData(WorldData):
    """folder: of clips. length: frames from the start of each. side: pixels of a frame's side, a multiple of 4."""

    kind: str = "clips"
    folder: str = "my_clips"
    length: int = 6
    side: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1 or self.side < 4 or self.side % 4:
            raise ValueError(f"side must be a multiple of 4 and length at least 1, got {self.side} and {self.length}")

    @property
    def size(self) -> LatentSize:
        return self.length, self.side // 2, self.side // 2

    def task(self, context: TaskContext) -> WorldTask:
        try:
            return WorldTask(ClipsWorld(Path(self.folder), self.length, self.side), self, context)
        except ValueError as problem:
            raise ConfigError(f"data.folder: {problem}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a toy teacher on a folder of clips.")
    parser.add_argument("--clips", default="my_clips", help="the folder")
    parser.add_argument("--config_path", default="configs/toy/teacher.yaml")
    parser.add_argument("--logdir", default="logs/examples/own_data")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    chosen = ["data.kind=clips", f"data.folder={Path(args.clips).resolve()}", *args.overrides]
    folder = fewstep.train(args.config_path, *chosen, logdir=args.logdir)
    print(f"{folder}: see validation/, where each video should look like the clip of its caption")


if __name__ == "__main__":
    main()

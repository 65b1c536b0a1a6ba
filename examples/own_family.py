"""Shows how to train a network of one's own: a small 3D convolutional one, by flow matching, on a world of this code.

python -m examples.own_family --logdir logs/examples/own_family
python -m examples.own_family student.overrides.dim=64 training.max_steps=500

It has none of the traits (cache, features, adapters ...), so runs that need one are refused by name. A family that
stays becomes a folder of model/, without `register`: docs/families.md walks through one and lists the traits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import fewstep
from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.sparse import SparseConfig
from model.codec import Codecs, PixelCodecs
from model.family import FirstFrame, Network, PlainFamily, register, replaced
from model.path import Flow
from model.types import Prompt


@dataclass(frozen=True)
class ConvConfig:
    """dim: width. num_layers: blocks. in_dim, out_dim: latent channels. words: room for words in the captions."""

    dim: int = 48
    num_layers: int = 3
    in_dim: int = 4
    out_dim: int = 4
    words: int = 32
    num_heads: int = 1
    patch_size: tuple[int, int, int] = (1, 1, 1)
    image_dim: int | None = None
    first_frame: FirstFrame = FirstFrame.none
    model_type: str = "text-to-video"

    def tokens_per_frame(self, height: int, width: int) -> int:
        return height * width


class Block(nn.Module):
    """x + conv(silu(conv(x) + what time and words say))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv3d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        """x [B, d, F, H, W], said [B, d, F or 1, 1, 1]."""
        return x + self.second(silu(self.first(silu(x)) + said))


class ConvNetwork(Network):
    """(x [B, F, C, H, W], time [B] or [B, F] in [0, 1], words [B, W]) to a velocity like x."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv3d(config.in_dim, config.dim, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))
        self.words = nn.Linear(config.words, config.dim, bias=False)
        self.blocks = nn.ModuleList(Block(config.dim) for _ in range(config.num_layers))
        self.conv_out = nn.Conv3d(config.dim, config.out_dim, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def fsdp_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        levels = time[:, None] if time.ndim == 1 else time  # [B, 1] or [B, F]
        said = self.time(levels[..., None].float()) + self.words(words.float())[:, None]  # [B, F or 1, d]
        said, y = said.transpose(1, 2)[..., None, None], self.conv_in(x.transpose(1, 2))
        for block in self.blocks:
            y = block(y, said)
        return self.conv_out(silu(y)).transpose(1, 2)  # type: ignore[no-any-return]


class ConvFamily(PlainFamily):
    """What of this file the rest of the code asks: see `Family` in model/family.py."""

    presets: Mapping[str, ConvConfig] = {"conv-toy": ConvConfig()}
    telling: tuple[str, ...] = ("conv_in.bias", "conv_out.bias")
    head = "conv_out.weight"
    shared: tuple[str, ...] = ("in_dim", "out_dim", "words")
    codecs: Codecs = PixelCodecs(mean=(0.5, 0.5, 0.5), scale=(2.0, 2.0, 2.0))

    def geometry(self, preset: str, overrides: Mapping[str, Any]) -> ConvConfig:
        return replaced(self.presets[preset], overrides)

    def path(self, geometry: Any) -> Flow:
        return Flow()

    def network(
        self, geometry: Any, backend: Backend, checkpointing: Checkpointing, sparse: SparseConfig | None
    ) -> ConvNetwork:
        return ConvNetwork(geometry)

    def prompt_shapes(self, geometry: Any) -> dict[str, tuple[int, ...]]:
        return {"words": (geometry.words,)}

    def toy_prompts(
        self, captions: Sequence[str], geometry: Any, seed: int, device: torch.device
    ) -> Callable[[Sequence[str]], Prompt]:
        """Which words a prompt has; the empty prompt has none."""
        known = sorted({word for caption in captions for word in caption.lower().split()})
        if len(known) > geometry.words:
            raise ValueError(f"captions have {len(known)} words: set student.overrides.words to that")
        places = {word: place for place, word in enumerate(known)}

        def encode(prompts: Sequence[str]) -> Prompt:
            rows = torch.zeros(len(prompts), geometry.words)
            for row, prompt in zip(rows, prompts, strict=True):
                for word in prompt.lower().split():
                    if word not in places:
                        raise ValueError(f"prompt {prompt!r}: {word!r} is no word of {', '.join(known)}")
                    row[places[word]] = 1
            return {"words": rows.to(device)}

        return encode


register("conv", ConvFamily())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains this file's network.")
    parser.add_argument("--config_path", default="configs/toy/teacher.yaml")
    parser.add_argument("--logdir", default="logs/examples/own_family")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    chosen = [
        "student.preset=conv-toy", "student.attention=sdpa",
        "generator_training.optimizer.kind=adamw", "generator_training.optimizer.lr=1e-3",
    ]  # fmt: skip
    folder = fewstep.train(args.config_path, *chosen, *args.overrides, logdir=args.logdir)
    pixels = fewstep.load(folder).video("the digit three moving left", fewstep.Sampling(steps=8))
    print(f"{folder}: trained, and sampled {list(pixels.shape)}")


if __name__ == "__main__":
    main()

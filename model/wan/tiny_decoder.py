"""TAEHV's tiny decoder for Wan's latents (github.com/madebyollin/taehv: taew2_1.pth, taew2_2.pth): previews, fast.

Four stages of 2-D convolutions; time comes in by memory blocks, which also see their input of one frame before, and
by 1x1 convolutions that make two frames of one. It reads normalised latents and gives pixels in [0, 1].
"""

# B batch  F latent frames  C channels  H W latent size  T pixel frames  h w pixel size

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from model.wan.sources import check_archive, check_tensor
from model.weights import real_numbers
from utils.reading import reading

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)  # frames that each stage makes of one
TRIMMED = 3  # of the first latent frame's four frames, all but the last: Wan's clips begin with one frame alone
RGB = 3


class Squash(nn.Module):
    """Latents far out are drawn in, to within -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Memory(nn.Module):
    """A residual block over a frame and the frame before, [N, C, H, W] both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return functional.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class Grow(nn.Module):
    """`factor` frames of one: [1, C, H, W] -> [factor, C, H, W], for a batch [B, ...] -> [B * factor, ...]."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


def _conv(inner: int, outer: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, bias=bias)


class TinyDecoder(nn.Module):
    """channels: the latents' channels, 16 for Wan 2.1's and 48 for 2.2's.
    patch: side of the pixel square that is one place.
    widths: the widths of its stages. The parameters have the names and shapes of the files (`decoder.*` of them).
    """

    def __init__(self, channels: int = 16, patch: int = 1, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        layers: list[nn.Module] = [Squash(), _conv(channels, widths[0]), nn.ReLU()]
        for width, narrower, factor in zip(widths, widths[1:], GROWTH, strict=False):
            layers += [Memory(width), Memory(width), Memory(width), nn.Upsample(scale_factor=2)]
            layers += [Grow(width, factor), _conv(width, narrower, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], RGB * patch * patch))

    def stream(self) -> TinyStream:
        return TinyStream(self)


class TinyStream:
    """A decode in progress: blocks of latents [B, f, C, H, W] in, their pixels [B, t, 3, h, w] in [0, 1] out.

    Frame by frame, so any split into blocks gives the same bits; the first latent frame gives one frame, others four.
    """

    def __init__(self, net: TinyDecoder) -> None:
        self.net = net
        self._past: dict[int, Tensor] = {}
        self._begun = False

    def __call__(self, latents: Tensor) -> Tensor:
        dtype = next(self.net.parameters()).dtype
        out = []
        for latent_BCHW in latents.to(dtype).unbind(1):
            pixels_BTChw = self._frame(latent_BCHW)
            out.append(pixels_BTChw if self._begun else pixels_BTChw[:, TRIMMED:])
            self._begun = True
        return torch.cat(out, dim=1)

    def _frame(self, latent_BCHW: Tensor) -> Tensor:
        batch, x = latent_BCHW.shape[0], latent_BCHW  # from here on [B * frames, C, H, W]
        for index, layer in enumerate(self.net.decoder):
            if isinstance(layer, Memory):
                now = x.unflatten(0, (batch, -1))
                before = self._past.get(index, torch.zeros_like(now[:, 0]))
                past = torch.cat([before[:, None], now[:, :-1]], dim=1)
                self._past[index] = now[:, -1]
                x = layer(x, past.flatten(0, 1))
            else:
                x = layer(x)
        pixels = functional.pixel_shuffle(x, self.net.patch).float().clamp(0, 1)
        return pixels.unflatten(0, (batch, -1))


def load_tiny_decoder(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> TinyDecoder:
    """From a .safetensors or .pth file; the sizes are read off the weights. Raises ValueError, one line."""
    state = {key: value for key, value in _read(Path(path)).items() if key.startswith("decoder.")}
    try:
        channels = state["decoder.1.weight"].shape[1]
        patch = round((state["decoder.22.weight"].shape[0] / RGB) ** 0.5)
        widths = [state[f"decoder.{layer}.weight"].shape[0] for layer in (1, 8, 14, 20)]
    except KeyError as missing:
        raise ValueError(
            f"tiny decoder: {path} has no {missing}: give taehv's file for Wan, such as taew2_1.pth"
        ) from None
    with torch.device("meta"):
        net = TinyDecoder(channels, patch, widths)
    for name, parameter in net.named_parameters():
        found = state.get(name)
        if found is not None and _is_grow(net, name) and found.shape[0] > parameter.shape[0]:
            # trained to make more frames: the last ones are the clip's
            found = state[name] = found[-parameter.shape[0] :]
        if found is None or found.shape != parameter.shape:
            has = "lacks" if found is None else f"has {list(found.shape)} as"
            raise ValueError(f"tiny decoder: {path} {has} {name} {list(parameter.shape)}: give taehv's file for Wan")
    if unknown := sorted(set(state) - {name for name, _ in net.named_parameters()}):
        raise ValueError(f"tiny decoder: {path} holds {unknown[0]}, which a decoder for Wan has not: give another file")
    net.load_state_dict(state, assign=True)
    return net.to(dtype).eval().requires_grad_(False)


def _is_grow(net: TinyDecoder, name: str) -> bool:
    return isinstance(net.decoder[int(name.split(".")[1])], Grow)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".pth", ".pt") or not path.is_file():
        raise ValueError(f"tiny decoder: {path} is no .safetensors or .pth file: give taehv's, such as taew2_1.pth")
    with reading("tiny decoder", path, "give taehv's file, such as taew2_1.pth"):
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            check_archive(path)
            state = torch.load(path, "cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"tiny decoder: {path} is no table of tensors: give taehv's file, such as taew2_1.pth")
    for name, value in state.items():
        where = f"tiny decoder: {path}: {name}"
        check_tensor(value, where)
        real_numbers(value, where)
    return state

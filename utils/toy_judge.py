"""The toy world's judge: measures videos by means that never saw a generator.

A small CNN trained on real frames tells the digit and gives appearance features; the ink's centroid, tracked on the
torus, gives direction, speed and jitter. Appearance, motion and intensity are reported apart: one distance over all of
them rewards dim, blurry videos.
"""

# B batch  F frames  C channels  H W pixels  D features  K classes

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from utils.data.toy_world import DIRECTIONS, Split, ToyWorld
from utils.metrics import binomial_error, clipped_share, frechet_distance

# name -> (label, better): what a metric table needs to know. "real" = the nearer to real videos' value the better.
METRICS: Final = {
    "prompt_right": ("prompt right", "high"),
    "digit_right": ("digit right", "high"),
    "direction_right": ("direction right", "high"),
    "appearance_fd": ("appearance FD, %", "low"),
    "motion_error": ("speed error, px/frame", "low"),
    "jitter": ("jitter, px", "low"),
    "flicker": ("flicker", "low"),
    "intensity": ("intensity", "real"),
    "diversity": ("diversity", "real"),
}
_RECIPE: Final = 1  # part of the cache's name: raise it when the network or its training changes
_SEED: Final = 201117
_TRAINING_VIDEOS: Final = 4000
_STEPS: Final = 1200
_BATCH: Final = 64
_LR: Final = 5e-3
_ACCURACY_VIDEOS: Final = 2000
_REFERENCE_VIDEOS: Final = 2000  # at least: real videos behind the Frechet distance and the diversity
_FLOOR_DRAWS: Final = 5
_CHUNK: Final = 256  # videos a forward


class _DigitNet(nn.Module):
    """Centred frames [B, 1, H, W] -> features [B, 64]; `head` makes logits [B, 10] of them."""

    def __init__(self, canvas: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.project = nn.Linear(32 * (canvas // 4) ** 2, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(frames_BCHW))))
        return functional.relu(self.project(x.flatten(1)))


@dataclass(frozen=True)
class _Reference:
    """Real training videos of the evaluated captions, each repeated equally often, and the distance's floor."""

    features: Tensor  # [R, D]
    ink: Tensor  # [R, F]
    floor: float
    floor_sd: float


class ToyJudge:
    """Judges latents against captions. Trains its CNN on first use (CPU seconds, fixed seed, global random state
    untouched) and keeps it in `cache_dir`, so that every row of a table comes from the same judge.

    `accuracy`: share of held-out real videos whose digit it tells.
    """

    def __init__(self, world: ToyWorld, cache_dir: str | Path) -> None:
        if world.config.frames < 2:
            raise ValueError(f"toy judge: motion needs at least 2 frames, the world has {world.config.frames}")
        self.world = world
        key = json.dumps([_RECIPE, asdict(world.config)], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=6).hexdigest()
        self.path = Path(cache_dir) / f"toy_judge_{digest}.safetensors"
        self._net, self.accuracy = _load(self.path, world) if self.path.exists() else _train_and_save(world, self.path)
        self._references: dict[tuple[str, ...], _Reference] = {}

    def evaluate(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Every measure of these videos, by name. n >= 400 makes the Frechet distance worth reading.

        prompt_right, digit_right, direction_right: shares, each with its binomial standard error `*_se`. A direction is
            right if the mean displacement points more along the caption's than any other and is at least a third of the
            true speed.
        appearance_fd: Frechet distance of the videos' mean CNN features to those of real training videos of the same
            captions, in percent of the real features' total variance; appearance_fd_floor: the same for as many real
            held-out videos, what a perfect generator would score (mean of several draws, and their deviation *_sd).
            Far below the floor hints at copies of the training digits.
        motion_error: mean |speed - true speed| in px/frame. jitter: standard deviation, in px, of the frame-to-frame
            displacement about its mean over the video. Both of the ink's centroid, with standard errors *_se.
        flicker: mean frame-to-frame |change of total ink|, as a share of real ink, beyond that of real videos.
        intensity: mean pixel, with *_se; intensity_real: that of real videos. clipped: share of values outside [0, 1].
        diversity: mean feature distance between videos of one caption, relative to real; nan if no caption is repeated.

        Raises ValueError if sizes disagree, fewer than 2 videos are given, or latents are not finite.
        """
        self._check(latents_BFCHW, captions)
        latents_BFCHW = latents_BFCHW.detach().cpu()
        pixels = self.world.decode(latents_BFCHW)[:, :, :1]
        told_digits, told_directions = zip(*(self.world.parse(caption) for caption in captions), strict=True)
        features_BD, digits = self._appearance(pixels)
        digit_ok = digits == torch.tensor(told_digits)
        direction_ok, speed_error, jitter = self._motion(pixels, told_directions)
        reference = self._reference(captions)
        real_ink = reference.ink.mean()
        count = len(captions)
        shares = {
            "prompt_right": (digit_ok & direction_ok).double().mean().item(),
            "digit_right": digit_ok.double().mean().item(),
            "direction_right": direction_ok.double().mean().item(),
        }
        return {
            **shares,
            **{f"{name}_se": binomial_error(share, count) for name, share in shares.items()},
            "appearance_fd": _relative_distance(features_BD, reference.features),
            "appearance_fd_floor": reference.floor,
            "appearance_fd_floor_sd": reference.floor_sd,
            **_mean_and_error("motion_error", speed_error),
            **_mean_and_error("jitter", jitter),
            **_mean_and_error("intensity", pixels.mean(dim=(1, 2, 3, 4))),
            "intensity_real": real_ink.item() / self.world.config.canvas**2,
            "flicker": max(_flicker(_ink(pixels), real_ink) - _flicker(reference.ink, real_ink), 0.0),
            "clipped": clipped_share(self.world.decode(latents_BFCHW, clamp=False)).mean().item(),
            "diversity": _diversity(features_BD, captions, reference.features),
            "videos": float(count),
        }

    @torch.no_grad()
    def adherence(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> Tensor:
        """[B] in [0, 1]: the caption's digit's probability, by the mean of the frames' log-likelihoods, and 0 for
        another direction: a reward, not a measure to report. NaN for a sample that holds NaN."""
        pixels = self.world.decode(latents_BFCHW.detach().float().cpu())[:, :, :1]
        digits, directions = zip(*(self.world.parse(caption) for caption in captions), strict=True)
        features_BFD = self._net(centred(pixels).flatten(0, 1)).unflatten(0, pixels.shape[:2])
        likelihood = self._net.head(features_BFD).log_softmax(-1).mean(dim=1).softmax(-1)
        right = likelihood[torch.arange(len(digits)), torch.tensor(digits)]
        return right * self._motion(pixels, directions)[0]

    def _check(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> None:
        frame = self.world.latent_shape[1:]
        if latents_BFCHW.ndim != 5 or latents_BFCHW.shape[2:] != frame or latents_BFCHW.shape[1] < 2:
            raise ValueError(
                f"toy judge: latents must be [B, F >= 2, {', '.join(map(str, frame))}], got {list(latents_BFCHW.shape)}"
            )
        if len(captions) != len(latents_BFCHW) or len(captions) < 2:
            raise ValueError(
                f"toy judge: needs at least 2 videos, one caption each; got {len(latents_BFCHW)} and {len(captions)}"
            )
        if not torch.isfinite(latents_BFCHW).all():
            raise ValueError("toy judge: latents hold NaN or infinity; the generator has diverged")

    def _motion(self, pixels: Tensor, directions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(direction right, speed error in px/frame, jitter in px), each [B]."""
        step_BFxy = displacement(pixels)
        velocity_Bxy = step_BFxy.mean(dim=1)
        along_BV = velocity_Bxy @ torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64).T
        wanted = torch.tensor([list(DIRECTIONS).index(direction) for direction in directions])
        moving = along_BV.amax(dim=1) >= self.world.config.speed / 3
        direction_ok = (along_BV.argmax(dim=1) == wanted) & moving
        speed_error = (velocity_Bxy.norm(dim=1) - self.world.config.speed).abs()
        jitter = (step_BFxy - velocity_Bxy[:, None]).square().sum(dim=2).mean(dim=1).sqrt()
        return direction_ok, speed_error, jitter

    def _appearance(self, pixels_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(CNN features averaged over frames [B, D], digit by the frames' joint likelihood [B])."""
        features, digits = [], []
        with torch.no_grad():
            for chunk in pixels_BFCHW.split(_CHUNK):
                features_BFD = self._net(centred(chunk).flatten(0, 1)).unflatten(0, chunk.shape[:2])
                features.append(features_BFD.mean(dim=1))
                digits.append(self._net.head(features_BFD).log_softmax(-1).mean(dim=1).argmax(-1))
        return torch.cat(features), torch.cat(digits)

    def _reference(self, captions: Sequence[str]) -> _Reference:
        key = tuple(captions)
        if key not in self._references:
            repeats = math.ceil(_REFERENCE_VIDEOS / len(captions))
            pixels, features = self._real(list(captions) * repeats, _SEED, "train")
            held_out = [self._real(captions, _SEED + draw, "test")[1] for draw in range(_FLOOR_DRAWS)]
            floors = torch.tensor([_relative_distance(draw, features) for draw in held_out])
            self._references[key] = _Reference(features, _ink(pixels), floors.mean().item(), floors.std().item())
        return self._references[key]

    def _real(self, captions: Sequence[str], seed: int, split: Split) -> tuple[Tensor, Tensor]:
        """Real videos' (pixels, features)."""
        pixels = self.world.decode(self.world.real_videos_for(captions, seed, split))[:, :, :1]
        return pixels, self._appearance(pixels)[0]


def centroid_phase(pixels_BFCHW: Tensor) -> Tensor:
    """The ink's centroid on the torus as unit complex numbers [B, F, (x, y)]: angle 2 pi x / W.

    The circular mean ignores a uniform background and, unlike the plain centroid, has no edge to be drawn from.
    """
    ink_BFHW = pixels_BFCHW.double().sum(dim=2)
    phases = []
    for other, size in ((-2, ink_BFHW.shape[-1]), (-1, ink_BFHW.shape[-2])):
        angle = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
        moment = (ink_BFHW.sum(dim=other) * torch.polar(torch.ones_like(angle), angle)).sum(dim=-1)
        phases.append(torch.polar(torch.ones_like(moment.real), moment.angle()))
    return torch.stack(phases, dim=-1)


def displacement(pixels_BFCHW: Tensor) -> Tensor:
    """Frame-to-frame motion of the ink's centroid, [B, F - 1, (x, y)] in pixels, the short way round the torus."""
    phase = centroid_phase(pixels_BFCHW)
    size_xy = torch.tensor([pixels_BFCHW.shape[-1], pixels_BFCHW.shape[-2]], dtype=torch.float64)
    return (phase[:, 1:] * phase[:, :-1].conj()).angle() * size_xy / (2 * math.pi)


def centred(pixels_BFCHW: Tensor) -> Tensor:
    """Every frame rolled by whole pixels so that its centroid is in the middle: place is no part of appearance. One
    with NaN, which has no place, stays where it is."""
    phase = centroid_phase(pixels_BFCHW)
    for dim, axis in ((-1, 0), (-2, 1)):
        size = pixels_BFCHW.shape[dim]
        shift = (phase[..., axis].angle() * (size / (2 * math.pi))).round().nan_to_num(size // 2).long()
        index = (torch.arange(size) + shift[..., None] - size // 2) % size
        index = index[:, :, None, None, :] if dim == -1 else index[:, :, None, :, None]
        pixels_BFCHW = pixels_BFCHW.gather(dim, index.expand(pixels_BFCHW.shape))
    return pixels_BFCHW


def _ink(pixels_BFCHW: Tensor) -> Tensor:
    """Total of each frame's pixels, [B, F]."""
    return pixels_BFCHW.sum(dim=(2, 3, 4))


def _mean_and_error(name: str, values_B: Tensor) -> dict[str, float]:
    return {name: values_B.mean().item(), f"{name}_se": values_B.std().item() / math.sqrt(len(values_B))}


def _flicker(ink_BF: Tensor, real_ink: Tensor) -> float:
    return (ink_BF.diff(dim=1).abs().mean() / real_ink).item()


def _relative_distance(features_ND: Tensor, reference_RD: Tensor) -> float:
    """Frechet distance in percent of the reference's total variance, so that the features' scale does not matter."""
    return 100 * frechet_distance(features_ND, reference_RD) / reference_RD.var(dim=0).sum().item()


def _pairwise_within(features_ND: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mean distance between the features of two different videos of one caption, per caption that is repeated."""
    rows: dict[str, list[int]] = defaultdict(list)
    for i, caption in enumerate(captions):
        rows[caption].append(i)
    return {c: functional.pdist(features_ND[index]).mean().item() for c, index in rows.items() if len(index) > 1}


def _diversity(features_BD: Tensor, captions: Sequence[str], reference_RD: Tensor) -> float:
    generated = _pairwise_within(features_BD, captions)
    real = _pairwise_within(reference_RD, list(captions) * (len(reference_RD) // len(captions)))
    return sum(generated.values()) / sum(real[c] for c in generated) if generated else math.nan


def _train_and_save(world: ToyWorld, path: Path) -> tuple[_DigitNet, float]:
    net = _train(world)
    accuracy = _held_out_accuracy(world, net)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(net.state_dict(), temporary, metadata={"held_out_accuracy": repr(accuracy)})
    os.replace(temporary, path)
    return net, accuracy


def _load(path: Path, world: ToyWorld) -> tuple[_DigitNet, float]:
    with safe_open(path, framework="pt") as file:
        accuracy = float(file.metadata()["held_out_accuracy"])
        net = _DigitNet(world.config.canvas)
        net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    return net.eval().requires_grad_(False), accuracy


def _frames(world: ToyWorld, count: int, split: Split) -> tuple[Tensor, Tensor]:
    """The first `count` videos of a split, centred [count, F, 1, H, W], and their digits [count]."""
    batch = world.batch(range(count), split)
    digits = torch.tensor([world.parse(caption)[0] for caption in batch.captions])
    return centred(world.decode(batch.latents_BFCHW)[:, :, :1]), digits


def _train(world: ToyWorld) -> _DigitNet:
    frames_BFCHW, digits_B = _frames(world, _TRAINING_VIDEOS, "train")
    frames, labels = frames_BFCHW.flatten(0, 1), digits_B.repeat_interleave(world.config.frames)
    # the CPU generator alone: torch.manual_seed would reseed the accelerators as well
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(_SEED)
        net = _DigitNet(world.config.canvas)
        optimizer = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS)
        for _ in range(_STEPS):
            chosen = torch.randint(len(frames), (_BATCH,))
            features = functional.dropout(net(frames[chosen]), 0.5)
            loss = functional.cross_entropy(net.head(features), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return net.eval().requires_grad_(False)


def _held_out_accuracy(world: ToyWorld, net: _DigitNet) -> float:
    """Share of held-out videos whose digit the frames' joint likelihood tells."""
    frames_BFCHW, digits_B = _frames(world, _ACCURACY_VIDEOS, "test")
    with torch.no_grad():
        logits = net.head(net(frames_BFCHW.flatten(0, 1))).log_softmax(-1)
    told = logits.unflatten(0, frames_BFCHW.shape[:2]).mean(dim=1).argmax(-1)
    return (told == digits_B).double().mean().item()

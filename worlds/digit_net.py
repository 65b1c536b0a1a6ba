"""What the judges of digits share: the classifier that tells them, kept on disk, and measures of its features.

Every row of a table comes from the same network: it is trained on real handwriting once, by a fixed recipe and seed.
"""

# B batch  C channels  H W pixels  N R samples  D features

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from utils.metrics import diversity, frechet_distance
from utils.tensor_files import save_file
from utils.writing import check_writable, whole_file, writing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_RECIPE: Final = 1  # part of the file's name: raise it when the network or its training changes
_SEED: Final = 201117
_STEPS: Final = 1200
_BATCH: Final = 64
_LR: Final = 5e-3


class DigitNet(nn.Module):
    """Square images [B, 1, H, H] -> features [B, 64]; `head` makes logits [B, 10] of them. side: H, a multiple of 4."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.project = nn.Linear(32 * (side // 4) ** 2, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(images_BCHW))))
        return functional.relu(self.project(x.flatten(1)))

    @classmethod
    def trained(cls, images_NCHW: Tensor, labels_N: Tensor) -> DigitNet:
        """A network trained to tell these images' labels, in CPU seconds; the global random state is untouched."""
        # the CPU generator alone: torch.manual_seed would reseed the accelerators as well
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(_SEED)
            net = cls(images_NCHW.shape[-1])
            optimizer = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=0.05)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS)
            for _ in range(_STEPS):
                chosen = torch.randint(len(images_NCHW), (_BATCH,))
                features = functional.dropout(net(images_NCHW[chosen]), 0.5)
                loss = functional.cross_entropy(net.head(features), labels_N[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
        return net.eval().requires_grad_(False)


def stored_at(folder: str | Path, name: str, world: DataclassInstance) -> Path:
    """Where the network of a judge of this world is kept."""
    key = json.dumps([_RECIPE, asdict(world)], sort_keys=True)
    return Path(folder) / f"{name}_{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}.safetensors"


def kept(path: Path, side: int, make: Callable[[], tuple[DigitNet, float]]) -> tuple[DigitNet, float]:
    """The network at `path` and its accuracy on held-out handwriting; made and written there if it is absent."""
    with writing("judge", path):
        is_there = path.exists()
    if is_there:
        with safe_open(path, framework="pt") as file:
            accuracy = float(file.metadata()["held_out_accuracy"])
            net = DigitNet(side)
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
        return net.eval().requires_grad_(False), accuracy
    check_writable(path, "judge")
    net, accuracy = make()
    with whole_file(path, "judge") as temporary:
        save_file(net.state_dict(), temporary, metadata={"held_out_accuracy": repr(accuracy)})
    return net, accuracy


def relative_distance(features_ND: Tensor, reference_RD: Tensor) -> float:
    """Frechet distance in percent of the reference's total variance, so that the features' scale does not matter."""
    return 100 * frechet_distance(features_ND, reference_RD) / reference_RD.var(dim=0).sum().item()


def check_samples(judge: str, latents: Tensor, captions: Sequence[str]) -> None:
    """Raises ValueError unless there are at least 2 samples, with a caption each, all of them finite."""
    if len(captions) != len(latents) or len(captions) < 2:
        raise ValueError(f"{judge}: needs at least 2 samples, one caption each; got {len(latents)} and {len(captions)}")
    if not torch.isfinite(latents).all():
        raise ValueError(f"{judge}: latents hold NaN or infinity; the generator has diverged")


def relative_diversity(features_BD: Tensor, captions: Sequence[str], reference_RD: Tensor) -> float:
    """Mean distance between features of one caption's samples, relative to real ones'; nan if no caption is repeated.

    reference_RD: real samples of the same captions, the whole list of them some times over.
    """
    generated = _pairwise_within(features_BD, captions)
    real = _pairwise_within(reference_RD, list(captions) * (len(reference_RD) // len(captions)))
    return sum(generated.values()) / sum(real[c] for c in generated) if generated else math.nan


def _pairwise_within(features_ND: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mean distance between the features of two different samples of one caption, per caption that is repeated."""
    rows: dict[str, list[int]] = defaultdict(list)
    for i, caption in enumerate(captions):
        rows[caption].append(i)
    return {c: diversity(features_ND[index]) for c, index in rows.items() if len(index) > 1}

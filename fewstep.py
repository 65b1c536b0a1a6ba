"""fewstep from Python, for notebooks and scripts: what the commands do, and no more.

    import fewstep

    fewstep.train("configs/toy/teacher.yaml", "training.max_steps=100", logdir="logs/teacher")
    student = fewstep.load("logs/quickstart/self_forcing_dmd")
    for pixels in student.stream("the digit three moving left"):
        ...  # [T, 3, h, w] in [0, 1], block by block

T pixel frames  h w pixel size
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from configs.load import load_run, run_from_plain
from configs.schema import RunConfig
from generation.generator import Generator
from generation.pretrained import Model, load_model
from generation.sampling import Sampling, StudentChoice
from trainer.base import RunOptions
from trainer.command import default_logdir
from trainer.run import train as _train
from utils import distributed
from utils.config import to_plain
from utils.errors import ConfigError, UserError

__all__ = ["ConfigError", "Sampling", "Student", "UserError", "load", "train"]


class Student:
    """A network that makes videos of prompts. generator: does the work, for those who need more."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    @torch.no_grad()
    def stream(self, prompt: str, sampling: Sampling = Sampling(), *, number: int = 0) -> Iterator[Tensor]:
        """Yields pixels [T, 3, h, w] in [0, 1], on the CPU, as they are made: a block at a time from a causal student,
        all at once from other networks.

        sampling: steps, frames, seed and so on; by default as the run was trained.
        number: with `sampling.seed`, selects this video's noise, as a prompt's number in a file does.

        Raises UserError for what the network cannot do, and for a prompt that cannot be encoded.
        """
        decode = self.generator.task.decoding()
        for latents in self.generator.stream([prompt], sampling, [number]):
            yield decode(latents)[0].cpu()

    def video(self, prompt: str, sampling: Sampling = Sampling(), *, number: int = 0) -> Tensor:
        """The whole video, pixels [T, 3, h, w]: all that `stream` yields."""
        return torch.cat(list(self.stream(prompt, sampling, number=number)))


def load(source: str | Path, *, weights: str = "ema", device: str | torch.device | None = None) -> Student:
    """The student of a run, or a released model.

    source: a run's folder or one of its checkpoints, or a released model: a folder in Diffusers' layout, or a file.
    weights: of a run, "ema" (their average) or "raw".
    device: where to load it; None takes the GPU if there is one.

    Raises UserError.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"load: weights {weights!r} are unknown: choose ema or raw")
    try:
        place = distributed.device() if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # the latter is of a torch without CUDA
        raise UserError(f"load: there is no device {device} here: choose cpu, or None for what there is") from None
    if (Path(source) / "model_index.json").is_file() or Path(source).is_file():
        if weights != "ema":
            raise UserError(f"load: weights {weights!r} are a run's, and {source} is a released model: leave them out")
        return Student(load_model(Model(str(source)), Sampling(), place))
    return Student(Generator.load(Path(source), place, student=StudentChoice(weights)))


def train(config: str | Path | RunConfig, *overrides: str, logdir: str | Path | None = None) -> Path:
    """Trains a run to its end, or goes on with what is in its folder, and returns the folder.

    config: a YAML's path, or a config.
    overrides: `key=value`, or another YAML's path (an overlay), laid over the YAML.
    logdir: the run's folder; None is as train.py chooses it for a YAML's path.

    Raises UserError, and ConfigError for a config that cannot work. A signal saves the run; UserError then says so.
    """
    if isinstance(config, RunConfig):
        if overrides or logdir is None:
            raise UserError("train: overrides are for a YAML's path, and a config needs a logdir")
        run, folder = run_from_plain(to_plain(config)), Path(logdir)  # as strict as a YAML's values
    else:
        run, folder = load_run(config, overrides), Path(logdir or default_logdir(Path(config)))
    if code := _train(run, RunOptions(folder)):
        raise UserError(f"train: signal {code - 128} came, and the run is saved in {folder}: call again to go on")
    return folder

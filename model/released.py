"""What model authors gave out: many-step models and few-step students, and where they lie on the Hub.

A family says all of its own (`Family.released`, `Family.students`, `Family.sources`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.reading import read_json as read_object

INDEX = "model_index.json"
CLUES = (INDEX, "*config.json")  # files of a few bytes that say what a model is


@dataclass(frozen=True)
class Released:
    """A many-step model as its authors sample it: what its files say, and else what they publish.

    steps: evaluations of the solver.
    guidance: scale of classifier-free guidance; of two experts the high-noise one's.
    low_guidance: the low-noise expert's scale, None for one network.
    boundary: the noise level that parts two experts, None for one network.
    solver: name of the solver, as `--solver` has it.
    shift: shift of the noise levels, None where no file says it.
    height, width: pixels of a video.
    frames: latent frames of a video.
    parts: files and folders of the pipeline that sampling needs.
    few_steps: whether its files say that it is a few-step student, whose steps they do not name.
    """

    steps: int
    guidance: float
    low_guidance: float | None
    boundary: float | None
    solver: str
    shift: float | None
    height: int
    width: int
    frames: int
    parts: tuple[str, ...]
    few_steps: bool = False


@dataclass(frozen=True)
class Student:
    """A few-step student as its authors sample it: without guidance, with fresh noise between steps.

    title: its name in words.
    source: the repository and file that publish these settings.
    steps: timesteps 0..1000 of its steps, falling.
    warp: whether shift is applied to them.
    shift: of the noise levels.
    block: latent frames of a block, None for a bidirectional network.
    height, width: pixels of a video.
    frames: latent frames of a video.
    window: latent frames that a block sees, its own and the sinks included; None for all.
    sinks: first latent frames that stay in the window.
    longest: latent frames of the longest video that it was trained on, None for `frames`.
    first_steps: steps of the first block, where they are others than those of later ones.
    weights: "ema" or "raw", which of a file with both is published with these settings.
    sparsity: of its sparse attention, None for dense.
    trigflow: whether it is sampled in TrigFlow (arXiv 2410.11081): noise has variance 1 at the first level, which may
        be below 1, and fewer steps are the first ones of the list.
    """

    title: str
    source: str
    steps: tuple[float, ...]
    warp: bool
    shift: float
    block: int | None
    height: int
    width: int
    frames: int
    window: int | None = None
    sinks: int = 0
    longest: int | None = None
    first_steps: tuple[float, ...] = ()
    weights: str = "ema"
    sparsity: float | None = None
    trigflow: bool = False


@dataclass(frozen=True)
class Source:
    """A repository of the Hub that holds the weights of a preset, and all that a run of it needs besides.

    repo: `owner/name`.
    parts: bytes of the weights in each of its folders, as stored there. Files of less than 50 MB are left out.
    licence: SPDX name.
    """

    repo: str
    parts: Mapping[str, int]
    licence: str

    @property
    def size(self) -> int:
        """Bytes of all its parts."""
        return sum(self.parts.values())

    def download_command(self, *parts: str) -> str:
        """The command of a shell that fetches these folders, or everything."""
        return f"hf download {self.repo}" + "".join(f" --include '{part}/*'" for part in parts)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none. Raises ValueError for a file that is not JSON."""
    return read_object("config", file, "fetch it again") if file.is_file() else {}


def classes_of(folder: Path) -> list[str]:
    """The class of a pipeline by its model_index.json; in a folder without one, the classes of its parts."""
    files = [folder / INDEX] if (folder / INDEX).is_file() else sorted(folder.glob("*/config.json"))
    return [str(name) for file in files if (name := read_json(file).get("_class_name")) is not None]

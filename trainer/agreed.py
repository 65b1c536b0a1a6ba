"""What all ranks of a run must have alike before they begin: the command, the config, the code and the data."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence

import torch

from configs.schema import RunConfig
from trainer.options import RunOptions
from trainer.provenance import sources
from utils import distributed
from utils.agreement import ONE_COMMAND, require_agreement
from utils.compared import leaves


def require_same_command(config: RunConfig, options: RunOptions) -> None:
    """Raises AgreedError, which names each option, key or file that is not the same on all ranks."""
    command = {
        "--logdir": str(options.logdir),
        "--resume": options.resume,
        "--max_steps": str(options.max_steps),
        "--no_save": str(not options.save),
        "--no_visualize": str(not options.visualize),
        "--disable-wandb": str(not options.wandb),
    }
    versions = {"Python": platform.python_version(), "torch": str(torch.__version__)}
    code = {path: f"a file\0{digest}" for path, digest in sources().items()}
    require_agreement({**command, **leaves(config), **versions, **code}, ONE_COMMAND)


def require_same_data(contents: Callable[[], Mapping[str, Sequence[str]]]) -> None:
    """Raises AgreedError, which names the first prompt or sample that is not the same on all ranks.

    contents: gives what is in files, by the option that names them; see `Task.contents`. Not asked of a single rank.
    """
    if distributed.world_size() > 1:
        require_agreement(contents(), "give all nodes the same files, or a folder that they share")

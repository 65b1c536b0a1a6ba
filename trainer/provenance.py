"""What a checkpoint was made with: its config, and the versions of the code and of what it stands on."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from configs.earlier import completed
from configs.load import run_from_state
from configs.schema import RunConfig
from utils.compared import differences
from utils.config import to_plain
from utils.errors import ConfigError

ROOT = Path(__file__).parents[1]
KEY = "made_with"  # of a checkpoint's state; those of earlier versions have none


@functools.cache
def sources() -> Mapping[str, str]:
    """`source_digests` of the project, as it was when this process first asked: what is edited later is not loaded."""
    return source_digests(ROOT)


def source_digests(root: Path) -> dict[str, str]:
    """A hash of each `*.py` of ``root`` and of the packages in it, by its path below ``root``: edits that are not
    committed count, a run's logs do not."""
    files = [*root.glob("*.py"), *(file for mark in root.glob("*/__init__.py") for file in mark.parent.rglob("*.py"))]
    by_path = {file.relative_to(root).as_posix(): file for file in sorted(files)}
    return {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in by_path.items()}


def code(root: Path, digests: Mapping[str, str]) -> str:
    """``<git revision>+<digest of the sources>``; the digest alone where there is no git."""
    digest = hashlib.sha256("".join(f"{path}\0{of_file}\n" for path, of_file in digests.items()).encode()).hexdigest()
    command = ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"]
    try:
        revision = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git here, or none that answers: the digest says enough
        revision = ""
    return "+".join(filter(None, [revision, digest[:12]]))


@functools.cache
def this_code() -> str:
    """`code` of the project, as `sources` has it."""
    return code(ROOT, sources())


def versions(device: torch.device) -> dict[str, str | None]:
    """Versions by name, for a checkpoint's state. cuda is None for a run on the CPU."""
    return {
        "fewstep": f"{_version(ROOT / 'pyproject.toml')} ({this_code()})",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _version(project: Path) -> str:
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("fewstep")  # installed, and not run from its folder


def config_changes(state: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Which keys of a run are not those of the checkpoint that it goes on from, in words."""
    try:
        saved = to_plain(run_from_state(state["config"]))
    except ConfigError:  # of a version with other keys
        saved = completed(state["config"])
    return differences(saved, to_plain(config))


def changed_since(state: Mapping[str, Any], changes: Sequence[str], mine: Mapping[str, str | None]) -> str:
    """In one line, how a run differs from the checkpoint that it goes on from; empty if it does not.

    state: of the checkpoint.
    changes: `config_changes` of the run.
    mine: `versions` of the run.
    """
    theirs = state.get(KEY, {})
    known = theirs.keys() & mine.keys()
    found = {
        "the config is not that of the checkpoint": changes,
        "the checkpoint was made with other versions": differences(
            {name: theirs[name] for name in known}, {name: mine[name] for name in known}
        ),
    }
    return "; ".join(f"{what}: {'; '.join(keys)}" for what, keys in found.items() if keys)

"""Parts of a model in Diffusers' layout: a pipeline's folder has one folder for each part, on disk or on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.hub import snapshot
from model.weights import real_numbers
from utils.reading import read_json, reading

WHOLE, PIECES, PIECE = 1 << 20, 64, 1 << 14  # bytes of a small file; how many pieces of a large one, their bytes


def pipeline_folder(path: str | Path, parts: Sequence[str]) -> Path:
    """The local folder of `path`: itself, or a Hub name's (`owner/name`), of which only `parts` are fetched: folders,
    or files by their names.

    Raises ValueError, one line, for what is neither there nor fetched (HF_HUB_OFFLINE is respected).
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise ValueError(f"{path} is no folder: give one in Diffusers' layout, or a Hub name (owner/name)")
    return snapshot(str(path), None, [part if "." in part else f"{part}/*" for part in parts])


def part_folder(path: str | Path, part: str) -> Path:
    """The folder of one part: `path` itself if it has a config.json, else its subfolder `part`. Raises ValueError."""
    folder = pipeline_folder(path, [part])
    if (folder / "config.json").is_file():
        return folder
    if not (folder / part / "config.json").is_file():
        raise ValueError(f"{folder} has no {part}/config.json, nor one of its own: give a folder in Diffusers' layout")
    return folder / part


def read_config(folder: Path, *wanted: str) -> dict[str, Any]:
    """Its config.json, which must be of a class in `wanted`. Raises ValueError."""
    config = read_json("config", folder / "config.json")
    named = config.get("_class_name") or config.get("architectures") or "nothing that says its class"
    found = named if isinstance(named, str) else ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    if found not in wanted:
        raise ValueError(f"{folder} holds {found}: give the folder of {' or '.join(wanted)}")
    return config


@contextmanager
def loading(what: str, path: str | Path) -> Iterator[None]:
    """What diffusers or transformers raise inside for files that do not load is a ValueError, one line."""
    with reading(what, path, "fetch it again", says="does not load"):
        yield


def load_whole(model: Any, folder: Path, what: str, *, unused: str | None = None, **options: Any) -> Any:
    """`model`, a class of diffusers or transformers, from a local folder with each of its weights, by `from_pretrained`
    with these options. unused: how names of weights begin that may lie there or not.

    Raises ValueError, one line, for files that do not load, and for missing, unexpected or wrongly shaped weights.
    """
    with loading(what, folder):
        loaded, report = model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, report.get(f"{kind}_keys") or ()))
        if keys := [key for key in keys if unused is None or not key.startswith(unused)]:
            raise ValueError(f"{what}: {folder} has {len(keys)} {kind} weights ({', '.join(keys[:4])}): fetch it again")
    for name, parameter in loaded.named_parameters():
        real_numbers(parameter.detach(), f"{what}: {folder}: {name}")
    return loaded


def fingerprint(folder: str | Path) -> str:
    """A hash of the files of a folder: names, sizes, small files whole, large ones by their head and evenly spread
    pieces. Other weights change all of their bytes, so gigabytes need not be read."""
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(WHOLE))
            if size > WHOLE:
                for i in range(PIECES):
                    opened.seek(i * (size - PIECE) // (PIECES - 1))
                    digest.update(opened.read(PIECE))
    return digest.hexdigest()

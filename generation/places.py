"""Where inference.py writes: a name for each prompt, and what the videos of a folder were made with."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from generation.command import InferenceArgs
from utils import distributed
from utils.errors import UserError
from utils.reading import read_json
from utils.writing import write_text, writing

_SETTINGS = "settings.json"
_MOST_BYTES = 96  # of a prompt in a file name; file systems allow 255 for the name, some 143
_DIGITS = 12  # of the hash of a prompt


def slug(prompt: str, most: int = 48) -> str:
    """A file name made of a prompt: its first letters and digits, of any script, and no more than `_MOST_BYTES`."""
    kept: list[str] = []
    for char in unicodedata.normalize("NFC", prompt.lower()):
        kind = unicodedata.category(char)[0]
        if kind in "LN" or (kind == "M" and kept and kept[-1] != "-"):  # a mark belongs to the letter before it
            kept.append(char)
        elif kept and kept[-1] != "-":
            kept.append("-")
    return "".join(kept)[:most].encode()[:_MOST_BYTES].decode(errors="ignore").rstrip("-") or "empty"


def places(args: InferenceArgs) -> tuple[list[Path], bool]:
    """Where each prompt's video goes, and whether existing ones are kept. Raises UserError.

    A file of prompts numbers its videos. The name of a single prompt has a hash of it where its words alone could be
    another prompt's.
    """
    if not args.from_file and args.out.suffix:
        return [args.out], False
    with writing("--out", args.out):
        is_file = args.out.exists() and not args.out.is_dir()
    if is_file:
        raise UserError(f"--out {args.out} is a file: give a folder")
    if args.from_file:
        return [args.out / f"{i:04d}_{slug(prompt)}.{args.suffix}" for i, prompt in enumerate(args.prompts)], True
    path = args.out / f"0000_{_alone(args.prompts[0])}.{args.suffix}"
    with writing("--out", args.out):
        is_numbered = path.is_file() and (args.out / _SETTINGS).is_file()
    if is_numbered:
        raise UserError(f"--out {args.out}: {path.name} is there already, of a file of prompts: give another folder")
    return [path], False


def _alone(prompt: str) -> str:
    """A name that no other prompt has."""
    name = slug(prompt)
    if name.replace("-", " ") == prompt:
        return name
    return f"{name}_{hashlib.sha256(prompt.encode(errors='backslashreplace')).hexdigest()[:_DIGITS]}"


def same_settings(args: InferenceArgs, paths: Sequence[Path], checkpoints: Sequence[str], fps: int, batch: int) -> None:
    """Keeps what the folder's videos were made with beside them, and refuses to go on with anything else. Prompts may
    be added behind those that were there.

    args: what was asked.
    paths: of all videos.
    checkpoints: of the networks.
    fps: frames a second.
    batch: videos made at once.
    """
    settings = _settings(args, checkpoints, fps, batch)
    file = args.out / _SETTINGS
    if file.is_file():
        stored = read_json("settings", file, "give another --out, or delete it with its videos")
        stored["image"] = None if stored.get("image") == "None" else stored.get("image")  # as version 0.1 wrote it
        if (before := _begun(args.prompts, stored.get("prompts"))) is not None:
            stored["prompts"] = settings["prompts"]
        changed = sorted(key for key in settings if key != "batch" and stored.get(key) != settings[key])
        if changed:
            raise UserError(
                f"the videos in {args.out} were made with other settings ({', '.join(changed)}): give another --out"
                + (f", or their --checkpoint (in {file})" if "source" in changed else "")
            )
        if before is not None and distributed.is_main():
            print(f"{args.out} is of the first {before} of {len(args.prompts)} prompts: the others are added")
    elif other := next((path for path in paths if path.is_file()), None):
        raise UserError(f"--out {args.out}: {other.name} was made from no file of prompts: give another folder")
    if distributed.is_main():
        write_text(file, json.dumps(settings, indent=1), "--out")


def _settings(args: InferenceArgs, checkpoints: Sequence[str], fps: int, batch: int) -> dict[str, object]:
    (*_, prompts) = _digests(args.prompts)
    settings = {
        "source": checkpoints or str(args.source),  # a run may have another one by now
        "weights": args.weights,
        "image": None if args.footage.image is None else str(args.footage.image),
        "video": None if args.footage.video is None else str(args.footage.video),
        "extend": args.footage.extend,
        "image_encoder": args.image_encoder,
        "size": args.size,
        "loras": [asdict(lora) for lora in args.loras],
        "low_loras": [asdict(lora) for lora in args.low_loras],
        "lora_scale": args.lora_scale,
        "fp8": args.acceleration.fp8,
        "tiny_decoder": args.tiny_decoder,
        "scale": args.scale,
        "fps": fps,
        "batch": batch,
        "prompts": prompts,
        **asdict(args.sampling),
    }
    out: dict[str, object] = json.loads(json.dumps(settings))  # as they come back
    return out


def _begun(prompts: Sequence[str], digest: object) -> int | None:
    """How many prompts the folder has, where more follow those now; else None."""
    return next((i for i, found in enumerate(_digests(prompts[:-1]), start=1) if found == digest), None)


def _digests(prompts: Iterable[str]) -> Iterator[str]:
    """A hash of the first prompt, of the first two, ..., of all."""
    digest = hashlib.sha256()
    for i, prompt in enumerate(prompts):
        digest.update(f"{chr(10) if i else ''}{prompt}".encode())
        yield digest.hexdigest()

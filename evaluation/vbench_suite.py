"""VBench of a run: `python evaluate.py --suite vbench`. Videos by its protocol, resumable; then its scores.

Under torchrun each rank makes its share of the videos; scoring is a start without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from evaluation.vbench_protocol import (
    DIMENSIONS,
    FLICKER,
    Prompt,
    Wanted,
    normalised,
    read_scores,
    read_suite,
    totals,
    wanted_videos,
)
from evaluation.videos import generated_videos
from generation.generator import Generator
from generation.sampling import Sampling
from utils import distributed
from utils.data.prompts import load_prompts
from utils.errors import UserError
from utils.reading import UTF8, read_json
from utils.video import write_video
from utils.writing import write_text, writing

FULL_INFO = "VBench_full_info.json"
_WORKER = Path(__file__).with_name("vbench_worker.py")
_FIND = (
    "import importlib.util as u; s = u.find_spec('vbench'); print(s.submodule_search_locations[0] if s else '')\n"
    "print('detectron2' if u.find_spec('detectron2') else '')"
)
_NEED_DETECTRON = ("object_class", "multiple_objects", "color", "spatial_relationship")


@dataclass(frozen=True)
class VBenchArgs:
    """What `--suite vbench` was asked.

    videos: their folder; scores go beside it, to `NAME_scores`.
    python: an interpreter with vbench.
    prompts: a VBench_full_info.json; None takes the package's.
    augmented: texts to make videos from, a line for each line of `originals`, or .json by prompt.
    originals: VBench's own prompts in the order of `augmented`.
    dimensions: to score.
    download: whether VBench may fetch the models that it lacks.
    only_videos: whether videos are made and nothing is scored.
    batch: videos made at once.
    fps: frames a second of the videos.
    encoding: of `augmented` and `originals`.
    """

    videos: Path
    python: str
    prompts: Path | None
    augmented: Path | None
    originals: Path | None
    dimensions: tuple[str, ...]
    download: bool
    only_videos: bool
    batch: int
    fps: int
    encoding: str = UTF8


def parse_dimensions(text: str | None) -> tuple[str, ...]:
    """The dimensions of a comma-separated list; all of VBench's for None. Raises UserError."""
    names = tuple(DIMENSIONS) if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in DIMENSIONS]:
        raise UserError(f"--dimensions: VBench has no {unknown[0]!r}: choose of {', '.join(DIMENSIONS)}")
    return names


def cache_folder() -> Path:
    """Where VBench keeps its models."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def find_package(python: str) -> tuple[Path | None, bool]:
    """(The folder of the vbench package of this interpreter, or None; whether it has detectron2.) Raises UserError."""
    try:
        done = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        raise UserError(f"--vbench_python {python} does not run ({problem}): give an interpreter with vbench") from None
    folder, detectron = [*done.stdout.splitlines(), "", ""][:2]
    return (Path(folder) if folder else None), bool(detectron)


def check_scoring(args: VBenchArgs, package: Path | None, detectron: bool) -> None:
    """Raises UserError, one line, for what scoring lacks. Called before hours of sampling."""
    if package is None:
        raise UserError(
            f"--suite vbench: {args.python} has no vbench: `pip install vbench` in an environment of its own (it pins "
            "old packages), give its --vbench_python, or --only_videos with --prompts to make the videos now"
        )
    if not detectron and (need := [name for name in args.dimensions if name in _NEED_DETECTRON]):
        raise UserError(
            f"--suite vbench: {', '.join(need)} need detectron2, which {args.python} lacks: install it there, or leave "
            "them out by --dimensions"
        )
    cache = cache_folder()
    missing = {file: name for name in args.dimensions for file in DIMENSIONS[name].files if not (cache / file).exists()}
    if missing and not args.download:
        file, name = next(iter(missing.items()))
        raise UserError(
            f"--suite vbench: VBench's cache {cache} lacks {len(missing)} models ({file} of {name}): copy them there, "
            "name another by VBENCH_CACHE_DIR, or let VBench fetch them at first use by --download"
        )


def load_suite(args: VBenchArgs, package: Path | None) -> list[Prompt]:
    """VBench's prompts. Raises UserError."""
    path = args.prompts or (package / FULL_INFO if package else None)
    if path is None:
        raise UserError(
            f"--suite vbench: {args.python} has no vbench, whose data the prompts are: `pip install vbench`, or give "
            f"its {FULL_INFO} by --prompts"
        )
    try:
        return read_suite(path)
    except ValueError as problem:
        raise UserError(f"--prompts: {problem}") from None


def load_augmented(args: VBenchArgs) -> dict[str, str] | None:
    """Texts to make videos from, by VBench's prompt. Raises UserError."""
    if args.augmented is None:
        return None
    try:
        if args.augmented.suffix == ".json":
            found = read_json("augmented prompts", args.augmented)
            if not all(isinstance(text, str) for text in found.values()):
                raise ValueError(f"{args.augmented} must be an object of texts by VBench's prompt")
            return found
        if args.originals is None:
            raise ValueError("a text file needs --originals: VBench's prompts (all_dimension.txt) in the same order")
        texts, originals = (load_prompts(path, args.encoding) for path in (args.augmented, args.originals))
        if len(texts) != len(originals):
            raise ValueError(f"{args.augmented} has {len(texts)} prompts, --originals {len(originals)}: one for each")
        return dict(zip(originals, texts, strict=True))
    except (ValueError, OSError) as problem:
        raise UserError(f"--augmented: {problem}") from None


def evaluate_vbench(generator: Generator, args: VBenchArgs, sampling: Sampling, source: str) -> dict[str, float] | None:
    """Makes the missing videos and scores all of them: raw scores by dimension. Raises UserError.

    Nothing is scored, and None returned, if only videos were asked for or if there are several processes. source: the
    name of the weights.
    """
    several = distributed.world_size() > 1
    package, detectron = find_package(args.python)
    if not (args.only_videos or several):
        check_scoring(args, package, detectron)
    prompts, augmented = load_suite(args, package), load_augmented(args)
    try:
        wanted = wanted_videos(prompts, args.dimensions, augmented)
    except ValueError as problem:
        raise UserError(f"--suite vbench: {problem}") from None
    _same_settings(args, augmented, sampling, source)
    make_videos(generator, wanted, args, sampling)
    if args.only_videos or several:
        print(f"videos in {args.videos}: start again without --only_videos and torchrun to score them")
        return None
    assert package is not None
    return score(args, package, str(generator.device))


def make_videos(generator: Generator, wanted: Sequence[Wanted], args: VBenchArgs, sampling: Sampling) -> None:
    """Writes this rank's share of the videos, without those that exist."""
    share = wanted[distributed.rank() :: distributed.world_size()]
    todo = [video for video in share if not (args.videos / video.name).is_file()]
    if len(todo) < len(share):
        print(f"{len(share) - len(todo)} of {len(share)} videos are there already")
    batches = generated_videos(
        generator, [video.text for video in todo], sampling, [video.seed for video in todo], args.batch
    )
    names = iter(todo)
    for pixels in tqdm(batches, desc="videos", total=-(-len(todo) // args.batch), disable=None):
        for video, frames in zip([next(names) for _ in pixels], pixels, strict=True):
            write_video(args.videos / video.name, frames, args.fps)


def score(args: VBenchArgs, package: Path, device: str) -> dict[str, float]:
    """Raw scores by dimension; stored ones are not made again. Raises UserError if VBench fails."""
    out = args.videos.with_name(f"{args.videos.name}_scores")  # beside: VBench takes each file in a folder for a video
    try:
        stored = read_scores(out)
    except ValueError as problem:
        raise UserError(f"--videos: {problem}") from None
    # flicker last: its static filter may find too few still videos, and the others' scores are kept
    if todo := sorted((name for name in args.dimensions if name not in stored), key=lambda name: name == FLICKER):
        full_info = str((args.prompts or package / FULL_INFO).resolve())
        asked = {
            "videos": str(args.videos.resolve()), "out": str(out.resolve()), "full_info": full_info,
            "dimensions": todo, "device": device, "flicker": FLICKER,
        }  # fmt: skip
        code = subprocess.run([args.python, str(_WORKER), json.dumps(asked)]).returncode
        if code:
            raise UserError(f"--suite vbench: VBench ended with code {code}: what it said is above, {out} has the rest")
    scores = read_scores(out)
    if lost := [name for name in args.dimensions if name not in scores]:
        raise UserError(f"--suite vbench: VBench wrote no score of {', '.join(lost)} to {out}")
    return {name: scores[name] for name in args.dimensions}


def report(scores: dict[str, float]) -> str:
    """The scores as text: raw and normalised, in percent, then the totals."""
    values, width = normalised(scores), max(map(len, DIMENSIONS))
    lines = [f"{'':{width}}  {'raw':>7}  {'normalised':>10}"]
    lines += [f"{name:{width}}  {100 * raw:7.2f}  {100 * values[name]:10.2f}" for name, raw in scores.items()]
    lines += [f"{name:{width}}  {'':7}  {100 * value:10.2f}" for name, value in totals(scores).items()]
    if len(scores) < len(DIMENSIONS):
        lines.append(f"no total: {len(DIMENSIONS) - len(scores)} of {len(DIMENSIONS)} dimensions were left out")
    return "\n".join(lines)


def _same_settings(args: VBenchArgs, augmented: dict[str, str] | None, sampling: Sampling, source: str) -> None:
    """Keeps what the videos are made with beside them, and refuses to go on with anything else. Raises UserError."""
    texts = json.dumps(augmented, sort_keys=True)
    settings = {
        "source": source,
        "fps": args.fps,
        **asdict(sampling),
        "texts": hashlib.sha256(texts.encode()).hexdigest(),
    }
    settings = json.loads(json.dumps(settings))  # as they are read back
    file = args.videos.with_name(f"{args.videos.name}_settings.json")
    with writing("--videos", args.videos):
        stored = read_json("settings", file, "give another --videos, or delete it") if file.is_file() else None
        if stored is None:
            write_text(file, json.dumps(settings, indent=1), "--videos")
        args.videos.mkdir(parents=True, exist_ok=True)
    if stored is not None and (changed := sorted(key for key in settings if stored.get(key) != settings[key])):
        raise UserError(
            f"the videos in {args.videos} were made with other settings ({', '.join(changed)}): give another --videos"
        )

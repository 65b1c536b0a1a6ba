"""Where a file of a recipe comes from that is not there: one line with a command, and how large it is."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from configs.schema import RunConfig
from model.family import FirstFrame, families
from model.released import Source
from planning.disk import stored_bytes
from planning.launch import Recipe
from tasks.kinds.encoded import EncodedData
from trainer.command import default_logdir
from utils.data.prompts import load_prompts
from utils.space import size_text

ROOT = Path(__file__).parents[1]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = (".safetensors", ".pt", ".pth", ".bin")


def weights_remedy(path: str, parts: Sequence[str], preset: str, key: str, comments: Sequence[str]) -> str:
    """How to get weights that are absent.

    path: where a recipe looks for them.
    parts: folders of a pipeline in Diffusers' layout that it needs.
    preset: of the network that they are for, or that the other parts go with.
    key: of the config, which a user may set to another path.
    comments: of the recipe's head, which may say where a file is published.
    """
    if (recipe := _recipe_of(Path(path))) is not None:
        return f"train it first: torchrun train.py --config_path {recipe}"
    if "logs" in Path(path).parts:
        return f"train the run of this folder first (train.py --logdir {path}), or set {key} to another"
    if Path(path).suffix in FILES:
        return _published(path, comments) or f"set {key} to a file that is there"
    if (source := _source(path, preset)) is not None:
        found = [part for part in parts if part in source.parts or part in ("tokenizer", "image_processor")]
        size = sum(source.parts.get(part, 0) for part in found)
        where = "" if path == source.repo else f" --local-dir {shlex.quote(path)}"
        return f"{source.download_command(*found)}{where}   ({size_text(size)}, {source.licence})"
    if HUB_NAME.fullmatch(path):
        return f"hf download {path}, if it is a name on the Hub; else set {key} to a folder that is there"
    return f"set {key} to a folder that is there"


def expert_part(path: str, preset: str, expert: str | None) -> str:
    """The folder of a pipeline that holds a network. expert: which of two, None for a model of one."""
    source = _source(path, preset)
    has_two = source is not None and "transformer_2" in source.parts
    return "transformer_2" if has_two and expert == "low" else "transformer"


def _source(path: str, preset: str) -> Source | None:
    """The repository of the Hub that a folder's name says, else that of the preset."""
    known = [source for family in families().values() for source in family.sources.values()]
    named = [source for source in known if Path(path).name == source.repo.partition("/")[2]]
    if named:
        return named[0]
    by_preset = next((f.sources[preset] for f in families().values() if preset in f.sources), None)
    # a name of the Hub that is not the source's is another model
    is_other = HUB_NAME.fullmatch(path) is not None and not path.startswith(("weights/", "models/"))
    return None if is_other else by_preset


def _recipe_of(path: Path) -> str | None:
    """The recipe here whose run has this folder."""
    for file in sorted((ROOT / "configs").glob("*/*.yaml")):
        recipe = file.relative_to(ROOT)
        folder = default_logdir(recipe)
        if path in (folder, folder / "checkpoints") or folder / "checkpoints" in path.parents:
            return recipe.as_posix()
    return None


def _published(path: str, comments: Sequence[str]) -> str | None:
    """The command that fetches a file of which a recipe's head says `owner/name on the Hub, folder/file`."""
    name = re.escape(Path(path).name)
    for line in comments:
        if found := re.search(rf"([\w.-]+/[\w.-]+) on the Hub, ((?:[\w.-]+/)*{name})", line):
            repo, inside = found.groups()
            folder = Path(path).parent
            move = "" if folder / inside == Path(path) else f" && mv {shlex.quote(str(folder / inside))} {path}"
            return f"hf download {repo} {inside} --local-dir {shlex.quote(str(folder))}{move}"
    return None


def cache_remedy(recipe: Recipe, config: RunConfig, cache: str) -> str:
    """How to make a cache of text embeddings."""
    prompts = config.data.prompts
    command = (
        f"python preprocess.py text {recipe.arguments(with_logdir=False)} --prompts {prompts or 'FILE'} --out {cache}"
    )
    if prompts is None or not Path(prompts).exists():
        return command
    most = len(set(load_prompts(prompts))) * 2 * sum(map(math.prod, config.student.prompt_shapes.values()))
    return f"{command}   (at most {size_text(most)})"


def stored_remedy(config: RunConfig, data: EncodedData, kind: str, path: str, comments: Sequence[str]) -> str:
    """How to make a folder of latents. kind: "video" or "images"."""
    takes = config.student.geometry()
    shown = ["--i2v"] if takes.first_frame is FirstFrame.channels else []
    if shown and takes.image_dim is not None and data.image_encoder is not None:
        shown.append(f"--image_encoder {shlex.quote(data.image_encoder)}")
    folder = "--videos VIDEOS" if kind == "video" else "--images IMAGES"
    vae = shlex.quote(data.vae.path or "VAE")
    words = [f"python preprocess.py {kind} {folder} --vae {vae} --bucket {_bucket(config, data, comments)}", *shown]
    return " ".join([*words, f"--out {shlex.quote(path)}"])


def _bucket(config: RunConfig, data: EncodedData, comments: Sequence[str]) -> str:
    """The pixels of the run's videos; of a VAE that is not there yet, as the recipe's head says."""
    frames, height, width = data.size
    codecs = config.student.codecs
    if data.vae.path is not None and Path(data.vae.path).is_dir():
        try:
            side = codecs.spatial(data.vae.path)
            return f"{codecs.time_stride * (frames - 1) + 1}x{height * side}x{width * side}"
        except (ValueError, OSError):
            pass  # its own finding says what is wrong with it
    said = next((m[1] for line in comments if (m := re.search(r"--bucket (\d+x\d+x\d+)", line))), None)
    return said or "TxHxW"


def trajectories_remedy(recipe: Recipe, config: RunConfig, path: str) -> str:
    """How to make a teacher's trajectories."""
    parallel = config.parallel
    ranks = parallel.replicate * (parallel.shard or 1) * parallel.sequence
    program = "python" if ranks == 1 else f"torchrun --nproc_per_node {ranks}"
    command = f"{program} preprocess.py ode {recipe.arguments(with_logdir=False)} --out {shlex.quote(path)}"
    several = "" if ranks > 1 else "; on N GPUs: torchrun --nproc_per_node N in the place of python"
    return f"{command}   ({size_text(stored_bytes(config))}{several})"

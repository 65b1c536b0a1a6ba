"""What a recipe reads: whether it is there, whether it fits, and how to get what is not.

Only names, headers and small files are read. Nothing is fetched, where HF_HUB_OFFLINE is set as doctor.py sets it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from configs.earlier import going_on
from configs.schema import RunConfig
from configs.sections import TrainerKind
from model.folders import part_folder
from model.network import NetworkConfig
from model.ode_regression import lacking_levels
from model.schedule import uniform_sigmas
from model.text_encoder import PromptEncoder
from planning.disk import META, networks_of_run
from planning.finding import Finding, first_line
from planning.launch import Recipe
from planning.sources import (
    HUB_NAME,
    cache_remedy,
    expert_part,
    stored_remedy,
    trajectories_remedy,
    weights_remedy,
)
from tasks.build import build_task
from tasks.kinds.encoded import EncodedData
from tasks.stored import StoredImages, StoredLatents, StoredPairs
from tasks.text import prompt_encoder
from tasks.text_cache import TextCache
from trainer.build import check_first_frames
from trainer.caption_dropout import check_dropped_text
from trainer.run_networks import sharing
from trainer.weight_sources import open_init
from utils import checkpoint
from utils.data.prompts import load_prompts
from utils.data.tensors import Statistics
from utils.reading import reading
from utils.space import size_text


@dataclass(frozen=True)
class Use:
    """A path that a recipe names.

    key: of the config.
    path: a file or folder, or a name on the Hub.
    check: reads its headers, and raises where it does not fit.
    remedy: how to get it, asked only where it is absent.
    parts: of a pipeline's folder, what is needed of it; empty for anything else.
    """

    key: str
    path: str
    check: Callable[[], None]
    remedy: Callable[[], str]
    parts: tuple[str, ...] = ()


def check_files(recipe: Recipe, config: RunConfig) -> Iterator[Finding]:
    """A finding for each path that is absent, each use of one that does not fit, and each path that is right."""
    comments = recipe.comments()
    if (begun := checkpoint.latest_sound(recipe.folder / "checkpoints")) is not None:
        config = going_on(config, checkpoint.load_state(begun)["config"])
    found = uses(recipe, config, comments)
    blocked = False
    for path in dict.fromkeys(use.path for use in found):
        here = [use for use in found if use.path == path]
        for finding in _findings(path, here, config, comments):
            blocked |= finding.blocks
            yield finding
    if not blocked and (problem := _problem(lambda: _build(config))) is not None:
        yield Finding("data", False, problem, "see docs/data.md")


def uses(recipe: Recipe, config: RunConfig, comments: list[str]) -> list[Use]:
    """All paths of a recipe, in the order in which a run comes to them."""
    return [*_networks(config, comments), *_prompts(config), *_data(recipe, config, comments)]


def is_here(path: str) -> bool:
    """Whether a path is on this machine; of a name on the Hub, whether something of it lies in the Hub's cache."""
    if os.path.exists(path):  # False also for a name that no file can have
        return True
    if HUB_NAME.fullmatch(path) is None:
        return False
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE, f"models--{path.replace('/', '--')}", "snapshots")
    return constants.HF_HUB_OFFLINE and cached.is_dir()


def _findings(path: str, here: list[Use], config: RunConfig, comments: list[str]) -> Iterator[Finding]:
    keys = ", ".join(use.key for use in here)
    if not is_here(path):
        parts = tuple(dict.fromkeys(part for use in here for part in use.parts))
        preset = config.student.preset
        roles = [use.key.split(".")[0] for use in here if use.key.endswith(".init")]
        if roles:
            preset = getattr(config, roles[0]).preset
        weights = bool(parts)
        remedy = weights_remedy(path, parts, preset, here[0].key, comments) if weights else here[0].remedy()
        yield Finding(path, False, f"absent; {keys}", remedy)
        return
    wrong = {use.key: problem for use in here if (problem := _problem(use.check)) is not None}
    for problem in dict.fromkeys(wrong.values()):
        yield Finding(
            path, False, problem, f"put right what {', '.join(k for k, p in wrong.items() if p == problem)} names"
        )
    if right := [use.key for use in here if use.key not in wrong]:
        yield Finding(path, True, f"{', '.join(right)}{_size(Path(path))}")


def _size(path: Path) -> str:
    """Of a file or a folder in words, nothing for a name on the Hub."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"; {size_text(sum(file.stat().st_size for file in files))}" if files else ""


def _problem(check: Callable[[], object]) -> str | None:
    """Why a check fails, None where it does not."""
    try:
        check()
    except Exception as problem:  # also of libraries that read files: each is the finding of its path
        return first_line(problem)
    return None


# ------------------------------------------------------------------------------------------------------------ networks


def _networks(config: RunConfig, comments: list[str]) -> Iterator[Use]:
    """Weights of each network, and its LoRA files. An adapter on the teacher's copy has none of its own."""
    shared = sharing(config)
    checked: list[tuple[NetworkConfig, str]] = []
    for name, network in networks_of_run(config).items():
        if network.init is None or name in shared:
            continue
        same = next((role for other, role in checked if other.other_weights(network) is None), None)
        checked.append((network, name))
        part = expert_part(network.init, network.preset, network.expert)
        check = _nothing if same is not None else _network_check(name, network)
        yield Use(f"{name}.init", network.init, check, str, (part,))
        for number, lora in enumerate(network.loras):
            key = f"{name}.loras[{number}].path"
            yield Use(key, lora.path, _nothing, lambda key=key: f"set {key} to a file that is there")  # type: ignore[misc]


def _network_check(name: str, network: NetworkConfig) -> Callable[[], None]:
    def check() -> None:
        family, dense = network.family, network.attention
        with META:
            net = family.network(network.geometry(), dense, network.checkpointing, network.sparse)
        open_init(net, network, name)

    return check


def _nothing() -> None:
    """Of a path whose check is another one's."""


# ----------------------------------------------------------------------------------------------------------------- data


def _prompts(config: RunConfig) -> Iterator[Use]:
    files = {"data.prompts": config.data.prompts, "validation.prompts": config.validation.prompts}
    for key, path in files.items():
        if path is not None:
            yield Use(
                key, path, _loads(path), lambda: "write it: one prompt a line in a .txt; docs/data.md has more forms"
            )


def _loads(path: str) -> Callable[[], None]:
    def check() -> None:
        load_prompts(path)

    return check


def _data(recipe: Recipe, config: RunConfig, comments: list[str]) -> Iterator[Use]:
    data = config.data
    if isinstance(data, EncodedData):
        yield from _text(recipe, config, data)
        yield from _pixels(config, data)
        shape = _shape(config)
        if data.latents is not None and data.real:
            latents = data.latents

            def check_latents() -> None:
                StoredLatents("data.latents", Path(latents), shape, config.seed, statistics=_any_statistics(shape))

            yield Use(
                "data.latents", latents, check_latents,
                lambda: stored_remedy(config, data, "video", latents, comments),
            )  # fmt: skip
        if data.images is not None:
            images = data.images

            def check_images() -> None:
                StoredImages("data.images", Path(images), shape, config.seed, statistics=_any_statistics(shape))

            yield Use(
                "data.images", images, check_images, lambda: stored_remedy(config, data, "images", images, comments)
            )
    if config.trainer is TrainerKind.ode and (path := config.ode.path) is not None:
        yield Use(
            "ode.path", path, lambda: _check_pairs(config, path), lambda: trajectories_remedy(recipe, config, path)
        )


def _text(recipe: Recipe, config: RunConfig, data: EncodedData) -> Iterator[Use]:
    """The encoder, if something has to be encoded still, and the cache."""
    cache, encoder = data.text.cache, data.text.encoder
    if encoder is not None and (cache is None or _lacks_prompts(config, data, cache)):
        asked = prompt_encoder(data.text, config.student, torch.device("cpu"))
        yield Use("data.text.encoder", encoder, lambda: _check_encoder(asked), str, asked.parts)
    if cache is not None:

        def check() -> None:
            TextCache(Path(cache), config.student.prompt_shapes)

        yield Use("data.text.cache", cache, check, lambda: cache_remedy(recipe, config, cache))


def _lacks_prompts(config: RunConfig, data: EncodedData, cache: str) -> bool:
    """Whether the encoder has to run: for a cache that is not there or does not fit, or for a prompt that it lacks."""
    shapes = config.student.prompt_shapes
    if not Path(cache).is_dir() or _problem(lambda: TextCache(Path(cache), shapes)):
        return True
    dropped = [] if config.dropped_text is None else [config.dropped_text]
    files = [path for path in (data.prompts, config.validation.prompts) if path is not None and Path(path).exists()]
    wanted = [data.negative_prompt, *dropped, *(prompt for path in files for prompt in load_prompts(path))]
    return bool(TextCache(Path(cache), shapes).missing(wanted))


def _pixels(config: RunConfig, data: EncodedData) -> Iterator[Use]:
    """The VAE and the image encoder."""
    codecs, geometry = config.student.codecs, config.student.geometry()
    if (vae := data.vae.path) is not None:

        def check_vae() -> None:
            if (found := codecs.channels(data.vae)) != geometry.out_dim:
                raise ValueError(
                    f"data.vae.path: {vae} has {found} channels, the networks {geometry.out_dim}: give theirs"
                )
            _check_headers(part_folder(vae, "vae"))

        yield Use("data.vae.path", vae, check_vae, str, ("vae",))
    if (tiny := data.vae.tiny_decoder) is not None:
        remedy = "fetch taehv's file for this Wan, or set data.vae.tiny_decoder=null"
        yield Use("data.vae.tiny_decoder", tiny, _nothing, lambda: remedy)
    if (encoder := data.image_encoder) is not None:

        def check_image_encoder() -> None:
            codecs.check_image_encoder(encoder)
            _check_headers(part_folder(encoder, "image_encoder"))

        yield Use("data.image_encoder", encoder, check_image_encoder, str, ("image_encoder", "image_processor"))


def _check_encoder(encoder: PromptEncoder) -> None:
    for folder in encoder.weight_folders():
        _check_headers(folder)


def _check_headers(folder: Path) -> None:
    """Raises ValueError for a folder without weights, and for a file that is cut short."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors: fetch it again")
    for file in files:
        with reading("", file, "fetch it again"), safe_open(file, "pt") as opened:
            opened.keys()


def _shape(config: RunConfig) -> tuple[int, int, int, int]:
    """(F, C, H, W) of a video."""
    frames, height, width = config.data.size
    return frames, config.student.geometry().out_dim, height, width


def _any_statistics(shape: tuple[int, int, int, int]) -> Statistics:
    """For folders of raw latents, of which shapes alone are read."""
    return Statistics((0.0,) * shape[1], (1.0,) * shape[1])


def _check_pairs(config: RunConfig, path: str) -> None:
    stored = StoredPairs(Path(path), _shape(config), config.seed, config.ode.sigmas).sigmas_S.tolist()
    grid = uniform_sigmas(config.ode.steps, config.ode.shift, config.student.path.start)
    if lacking := lacking_levels(stored, config.schedule.sigmas(), grid):
        raise ValueError(
            f"ode.path: {path} stores other noise levels than schedule.denoising_step_list asks for "
            f"({', '.join(f'{level:.4g}' for level in lacking)}): make trajectories with this config"
        )


def _build(config: RunConfig) -> None:
    """What a run builds of its data before it trains, and what it refuses then."""
    check_first_frames(config)
    check_dropped_text(config, build_task(config, torch.device("cpu")))

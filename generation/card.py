"""The page of an exported folder, README.md as the Hub reads it: what it is, how to sample it, how it was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.experts import expert_of
from configs.schema import RunConfig
from configs.sizes import schedule_at, sizes_of
from generation.adapters import comfyui_file
from generation.base import Base, base_of
from generation.comfyui import in_comfyui
from generation.extracted import section
from generation.find import Found
from model.export import ADAPTER_FILE, Dtype, LoraNames, Pipeline
from model.extraction import Extraction
from model.released import Source
from model.schedule import TIMESTEPS, unshift_sigma
from model.types import LatentSize

CARD = "README.md"
PROMPT = "a red fox runs through fresh snow"
PRECISION = 'torch_dtype={"vae": torch.float32, "default": torch.bfloat16}'
_SOURCE = re.compile(r'^source = "[^"\n]*"', re.M)


@dataclass(frozen=True)
class Exported:
    """What a folder holds.

    found: the network, of two experts the high-noise one; its config has the steps of both.
    format: "diffusers", "native" or "lora".
    dtype: in which its weights are stored.
    bases: what it began as, for each network in it.
    boundary: the noise level that parts two experts, None for one network.
    licence: under which it is given, None where nothing says it.
    name: of the folder.
    names: whose names an adapter has.
    extraction: what an adapter holds of a difference, None for one that was trained and for other formats.
    """

    found: Found
    format: str
    dtype: Dtype
    bases: tuple[Base, ...]
    boundary: float | None
    licence: str | None
    name: str
    names: LoraNames = LoraNames.diffusers
    extraction: Extraction | None = None

    @property
    def is_for_comfyui(self) -> bool:
        return self.format == "lora" and self.names is LoraNames.comfyui

    @property
    def config(self) -> RunConfig:
        return self.found.config

    @property
    def pipeline(self) -> Pipeline:
        return self.found.exporter.pipeline(self.found.geometry, self.boundary)

    @property
    def released(self) -> Source | None:
        """The released model whose networks have this one's geometry, and so its files."""
        network, family = self.found.network, self.found.network.family
        names = [network.preset, *family.sources]
        alike = (n for n in names if n in family.sources and family.geometry(n, {}) == self.found.geometry)
        return next((family.sources[name] for name in alike), None)


def card(exported: Exported) -> str:
    """README.md of an exported folder, of every format."""
    config = exported.config
    said = list(dict.fromkeys(base.told() for base in exported.bases))
    if exported.extraction is not None:
        said = [f"It is the difference from {exported.bases[0].itself}, extracted by SVD, and lies on these weights."]
    lines = [
        *_metadata(exported),
        f"# {config.name}",
        "",
        f"Exported by fewstep: {exported.found.label}, {_what(exported)}.",
        "",
        *said,
        "",
        "## Sampling",
        "",
        *_sampling(exported),
        "",
        *(section(exported.extraction, exported.names) if exported.extraction else ()),
        "## Training",
        "",
        *_table(_training(exported)),
    ]
    return "\n".join(lines) + "\n"


def licence_of(text: str) -> str | None:
    """The licence in a card's metadata."""
    head = re.match(r"---\n(.*?)^---$", text, re.M | re.S)
    found = re.search(r"^license: (\S+)$", head[1], re.M) if head else None
    return found[1] if found else None


def addressed(text: str, name: str) -> str:
    """A card whose code loads `name`, of a folder or on the Hub."""
    return _SOURCE.sub(f"source = {json.dumps(name)}", text)


# ------------------------------------------------------------------------------------------------------------ sections


def _metadata(exported: Exported) -> list[str]:
    relation = "adapter" if exported.format == "lora" else "finetune"
    library = exported.format != "native" and not exported.is_for_comfyui
    return metadata(exported.bases, exported.licence, relation, exported.pipeline, of_diffusers=library)


def metadata(
    bases: Sequence[Base], licence: str | None, relation: str, pipeline: Pipeline, *, of_diffusers: bool
) -> list[str]:
    """As https://huggingface.co/docs/hub/model-cards reads it. relation: to the bases."""
    repos = list(dict.fromkeys(base.repo for base in bases if base.repo is not None))
    lines = ["---"]
    if licence is not None:
        lines.append(f"license: {licence.lower()}")
    if repos:
        lines += ["base_model:", *(f"- {repo}" for repo in repos), f"base_model_relation: {relation}"]
    if of_diffusers:
        lines.append("library_name: diffusers")
    task = "image-to-video" if pipeline.takes_image else "text-to-video"
    return [*lines, f"pipeline_tag: {task}", "tags:", "- fewstep", "---"]


def _what(exported: Exported) -> str:
    adapter = "for ComfyUI" if exported.is_for_comfyui else "for Diffusers, and in the folder peft for PEFT"
    what = {
        "diffusers": "a pipeline of Diffusers without text encoder and VAE",
        "native": "weights under the names of the model's authors",
        "lora": f"an adapter (LoRA) {adapter}",
    }[exported.format]
    stored = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8 (float8_e4m3fn)"}[exported.dtype.value]
    return f"{what}, in {stored}" + ("" if exported.boundary is None else ", both experts")


def _sampling(exported: Exported) -> list[str]:
    if exported.found.is_critic:
        return ["This is the critic of a distillation. It knows the student's videos, and is not meant to make any."]
    lines = _table(_settings(exported))
    config = exported.config
    if exported.is_for_comfyui:
        return [*lines, "", *in_comfyui(config, exported.bases[0], exported.pipeline, comfyui_file(exported.name))]
    if exported.boundary is None and (side := expert_of(config)) is not None:
        return [*lines, "", f"This is the {side}-noise expert of two: videos need the other one too."]
    code = _code(exported)
    if isinstance(code, str):
        lines += ["", code]
    else:
        lines += ["", "```python", *code, "```", ""]
        lines += ["With imageio installed, `diffusers.utils.export_to_video` writes a file of it."]
    if exported.pipeline.note:
        lines += ["", exported.pipeline.note]
    if config.is_causal:
        lines += ["", "It was trained to generate block by block; this pipeline denoises all frames at once."]
    return lines


def _settings(exported: Exported) -> dict[str, str]:
    """How the run samples it."""
    config, out = exported.config, {}
    schedule = schedule_at(config, config.data.size)
    if config.few_steps:
        sigmas = schedule.sigmas()
        out["steps"] = str(len(sigmas))
        out["noise levels (sigmas)"] = ", ".join(f"{sigma:.6g}" for sigma in sigmas)
        out["timesteps"] = ", ".join(f"{sigma * TIMESTEPS:.6g}" for sigma in sigmas)
    else:
        out["steps"] = str(config.validation.steps)
    out["shift"] = f"{schedule.timestep_shift:g}"
    out["scheduler"] = _call(scheduler_config(config))
    out["guidance"] = "1 (none: one pass a step)" if config.few_steps else f"{config.validation.guidance:g}"
    if exported.boundary is not None:
        out["experts"] = f"high noise from sigma {exported.boundary:g} up, low noise below"
    frames, height, width = _size(exported)
    out["video"] = f"{frames} frames of {height}x{width} pixels, {config.fps} a second"
    return out | _other_sizes(exported)


def _other_sizes(exported: Exported) -> dict[str, str]:
    """The schedule at each other size of video that the run was trained on, where it is another one."""
    config, out = exported.config, {}
    own = schedule_at(config, config.data.size)
    for size in sizes_of(config):
        schedule = schedule_at(config, size)
        if schedule == own:
            continue
        frames, height, width = _pixels(exported, size)
        said = f"shift {schedule.timestep_shift:.6g}"
        if config.few_steps:
            said += f", noise levels {', '.join(f'{sigma:.6g}' for sigma in schedule.sigmas())}"
        out[f"for {frames} frames of {height}x{width} pixels"] = said
    return out


def _training(exported: Exported) -> dict[str, str]:
    """The essentials of the run's config."""
    config, network = exported.config, exported.found.network
    out = {"trainer": config.trainer.value}
    if config.trainer.value == "score_distillation":
        out |= {"objective": config.objective.kind, "rollout": config.rollout.kind}
    if config.teacher is not None:
        out["teacher"] = _teacher(config)
    frames, height, width = config.data.size
    out["data"] = f"{config.data.kind}, latents of {frames} frames, {height}x{width}"
    part = config.critic_training if exported.found.is_critic else config.generator_training
    out["optimizer"] = f"{part.optimizer.kind}, learning rate {part.optimizer.lr:g}"
    out["updates"] = f"batch of {config.training.global_batch_size}, {config.training.max_steps} iterations planned"
    out["precision"] = config.training.precision.value
    if network.lora is not None:
        lora = network.lora
        out["adapter"] = f"rank {lora.rank}, alpha {lora.scale * lora.rank:g}, beside {', '.join(lora.layers)}"
    return out | {"seed": str(config.seed)}


def _teacher(config: RunConfig) -> str:
    assert config.teacher is not None
    base = base_of(config.teacher)
    name = base.repo or (base.named and f"local weights named {base.named}") or "random weights"
    by_run = f", by way of {', '.join(base.runs)}" if base.runs else ""
    guidance = getattr(config.objective, "real_guidance_scale", None)
    return f"{name}{by_run}" + ("" if guidance is None else f", guidance {guidance:g}")


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


# ---------------------------------------------------------------------------------------------------------------- code


def scheduler_config(config: RunConfig) -> dict[str, Any]:
    """Diffusers' scheduler of the run, for videos of the data's size: its shift is one number."""
    shift = schedule_at(config, config.data.size).timestep_shift
    return config.student.family.exporter.scheduler(shift, few_steps=config.few_steps)


def scheduler_sigmas(config: RunConfig) -> list[float]:
    """The student's steps as that scheduler's `set_timesteps(sigmas=...)` takes them: it applies its shift to them."""
    schedule = schedule_at(config, config.data.size)
    return [unshift_sigma(sigma, schedule.timestep_shift) for sigma in schedule.sigmas()]


def _call(scheduler: dict[str, Any]) -> str:
    """A scheduler's config as the call that makes it."""
    values = ", ".join(f"{name}={value!r}" for name, value in scheduler.items() if name != "_class_name")
    return f"{scheduler['_class_name']}({values})"


def _size(exported: Exported) -> tuple[int, int, int]:
    """Frames, height and width of a video in pixels."""
    return _pixels(exported, exported.config.data.size)


def _pixels(exported: Exported, size: LatentSize) -> tuple[int, int, int]:
    frames, height, width = size
    side = exported.pipeline.pixels
    return 1 + (frames - 1) * exported.config.student.codecs.time_stride, height * side, width * side


def _code(exported: Exported) -> list[str] | str:
    """Lines that load the folder and sample it as the run does, or a sentence that says why there are none."""
    made, scheduler = exported.pipeline, scheduler_config(exported.config)
    classes = {made.name}
    source = f'source = "{exported.name}"  # this folder, or its name on the Hub'
    if exported.format == "diffusers":
        base = exported.released.repo if exported.released else made.base
        load = [f'base = "{base}"  # for its text encoder and VAE', source, *_load_pipeline(exported)]
    elif exported.format == "lora":
        classes.add(scheduler["_class_name"])
        load = [_adapted(exported), source, *_load_adapter(exported)]
    elif exported.dtype is Dtype.fp8:
        return "The scale of each fp8 matrix lies beside it, as ComfyUI reads it. Diffusers does not know such scales."
    elif exported.released is None:
        return "No released model has this geometry, so Diffusers needs the same weights from `--format diffusers`."
    else:
        classes |= {scheduler["_class_name"], made.index[exported.found.exporter.networks[0]][1]}
        base = f'base = "{exported.released.repo}"  # for all but the weights'
        load = [base, source, *_load_native(exported)]
    others = ["from functools import partial"] if exported.config.few_steps else []
    if exported.format == "native":
        others.append("from pathlib import Path")
    third = [f"from diffusers import {', '.join(sorted(classes))}"]
    third += ["from diffusers.utils import load_image"] if made.takes_image else []
    if exported.format == "native":
        third += ["from huggingface_hub import snapshot_download", "from safetensors.torch import load_file"]
    place = 'pipe.to("cuda" if torch.cuda.is_available() else "cpu")'
    return [*others, *([""] if others else []), "import torch", *third, "", *load, place, "", *_sample(exported)]


def _load_pipeline(exported: Exported) -> list[str]:
    made = exported.pipeline
    without = ", ".join(f"{name}=None" for name in exported.found.exporter.networks)
    others = ", ".join(f"{name}=parts.{name}" for name in made.parts)
    return [
        f"parts = {made.name}.from_pretrained(base, {without}, {PRECISION})",
        f"pipe = {made.name}.from_pretrained(source, {others}, {PRECISION})",
    ]


def _adapted(exported: Exported) -> str:
    """The line that says what an adapter lies on: only a pipeline that holds just that may be named."""
    (base,) = exported.bases
    if base.is_whole_start:
        return f'base = "{base.repo}"  # the model that the adapter lies on'
    return 'base = "BASE"  # put a folder in Diffusers\' layout here, with the weights that the adapter lies on'


def _load_adapter(exported: Exported) -> list[str]:
    return [
        f"pipe = {exported.pipeline.name}.from_pretrained(base, {PRECISION})",
        f'pipe.load_lora_weights(source, weight_name="{ADAPTER_FILE}")',
        f"pipe.scheduler = {_call(scheduler_config(exported.config))}",
    ]


def _load_native(exported: Exported) -> list[str]:
    made, exporter = exported.pipeline, exported.found.exporter
    names = exporter.networks if exported.boundary is not None else exporter.networks[:1]
    folders = exporter.experts if exported.boundary is not None else (".",)
    networks = ", ".join(f'{name}=network("{part}")' for name, part in zip(names, folders, strict=True))
    boundary = "" if exported.boundary is None else f"boundary_ratio={exported.boundary}, "
    cls = made.index[exporter.networks[0]][1]
    return [
        "folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source))",
        "",
        "def network(part):",
        "    weights = {}",
        '    for file in sorted((folder / part).glob("*.safetensors")):',
        "        weights |= load_file(file)",
        f'    return {cls}.from_single_file(weights, config=base, subfolder="transformer", torch_dtype=torch.bfloat16)',
        "",
        f"pipe = {made.name}.from_pretrained(base, {networks}, {boundary}{PRECISION})",
        f"pipe.scheduler = {_call(scheduler_config(exported.config))}",
    ]


def _sample(exported: Exported) -> Sequence[str]:
    config = exported.config
    frames, height, width = _size(exported)
    image = ['image = load_image("first_frame.png")'] if exported.pipeline.takes_image else []
    shown = "image=image, " if image else ""
    if config.few_steps:
        sigmas = [round(sigma, 9) for sigma in scheduler_sigmas(config)]
        partial = "pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=steps)"
        steps = [f"steps = {sigmas}", partial]
        number, guidance = len(sigmas), 1.0
    else:
        steps, number, guidance = [], config.validation.steps, config.validation.guidance
    return [
        *image,
        *steps,
        "video = pipe(",
        f'    {shown}prompt="{PROMPT}", height={height}, width={width}, num_frames={frames},',
        f"    num_inference_steps={number}, guidance_scale={guidance},",
        f").frames[0]  # [{frames}, {height}, {width}, 3] in 0..1",
    ]

"""How an exported adapter is loaded and sampled in ComfyUI, by the names of its nodes: lines of a card."""

from __future__ import annotations

from configs.experts import expert_of
from configs.schema import RunConfig
from configs.sizes import schedule_at
from generation.base import Base
from model.export import Pipeline
from model.network import Expert


def in_comfyui(config: RunConfig, base: Base, pipeline: Pipeline, file: str) -> list[str]:
    """base: what the adapter lies on. file: its name in the folder."""
    side = expert_of(config)
    model = "the weights that the adapter lies on"
    if base.is_whole_start:
        model = f"the weights of {base.repo} as a single file, from the folder models/diffusion_models,"
    which = "it" if side is None else f"the {side}-noise model of the two"
    lines = [
        f"1. Copy {file} into ComfyUI's folder models/loras.",
        f"2. Load {model} with the node UNETLoader.",
        f"3. Put the node LoraLoaderModelOnly behind {which}, with strength_model 1.",
        f"4. {_sampler(config, side)}",
    ]
    if side is not None:
        lines += ["", f"This is the {side}-noise expert of two: videos need both, each with its own adapter."]
    if pipeline.takes_image:
        lines += ["", "The network starts from an image: the node WanImageToVideo gives it."]
    if config.is_causal:
        lines += ["", "It was trained to generate block by block; these nodes denoise all frames at once."]
    return lines


def _sampler(config: RunConfig, side: Expert | None) -> str:
    """ComfyUI's lcm predicts x0 and noises it anew at each step, as a few-step student's sampler does here."""
    if not config.few_steps:
        return "Sample with KSampler: uni_pc, scheduler simple. ModelSamplingSD3 gets the shift of the table."
    sigmas = ", ".join(f"{sigma:.6g}" for sigma in schedule_at(config, config.data.size).sigmas())
    levels = f"`{sigmas}` and the low-noise expert's first level" if side is Expert.high else f"`{sigmas}, 0`"
    return (
        f"Sample with SamplerCustomAdvanced: ManualSigmas has {levels}, KSamplerSelect has lcm, and CFGGuider has cfg "
        "1. These noise levels are shifted already."
    )

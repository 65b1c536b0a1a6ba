"""The data section of a translated recipe, and what of it other projects' files do not say."""

from __future__ import annotations

from importers.networks import NETWORKS
from importers.recipe import Recipe

# latent frames, height and width of a recipe that says nothing: 81 frames of 480x832, and 5B's 121 of 704x1280
USUAL = {"frames": 21, "height": 60, "width": 104}
USUAL_5B = {"frames": 31, "height": 44, "width": 80}
STRIDE_T = 4  # frames of video to a latent frame, after the first
SIZES = ("data.wan.frames", "data.wan.height", "data.wan.width")


def finish_data(recipe: Recipe) -> None:
    """Kind wan, in the recipe's sizes, with the base model's encoder and VAE.

    What rules staged for it: `size`, of latents; `pixels`, of videos; `base`, the model that all networks came from.
    """
    is_5b = recipe.get("student.preset") == "5b"
    _sizes(recipe, USUAL_5B if is_5b else USUAL, 16 if is_5b else 8)
    if recipe.get("validation.fps") is None:
        recipe.set("validation.fps", 24 if is_5b else 16)
    _parts(recipe)
    missing = recipe.missing
    if recipe.get("data.prompts") is None and recipe.get("data.latents") is None:
        missing["data.prompts"] = "a file of prompts (.txt, .csv, .jsonl, .parquet)"
    missing["data.text.cache"] = "a folder of `python preprocess.py text`; without it the encoder stays in memory"
    if not recipe.get("data.negative_prompt"):
        missing["data.negative_prompt"] = "what guidance leads away from, which is nothing yet: usually Wan's own"
    _tasks(recipe)


def put_sizes(recipe: Recipe, name: str, **sides: int) -> None:
    """Stages sides of latents (`size`) or of videos (`pixels`)."""
    recipe.staged.setdefault(name, {}).update(sides)


def _sizes(recipe: Recipe, usual: dict[str, int], ratio: int) -> None:
    pixels, size = recipe.staged.get("pixels", {}), dict(recipe.staged.get("size", {}))
    if "frames" in pixels:
        size.setdefault("frames", (pixels["frames"] - 1) // STRIDE_T + 1)
    for side in ("height", "width"):
        if side in pixels:
            size.setdefault(side, pixels[side] // ratio)
    for side in usual:
        if side not in size:
            recipe.missing[f"data.wan.{side}"] = "not in the recipe: this is the model's usual one"
    whole = {**usual, **size}
    if recipe.get("rollout.kind") == "self_forcing":
        whole["frames"] = _blocks(recipe, whole["frames"])
    recipe.set("data.wan", whole)


def _blocks(recipe: Recipe, frames: int) -> int:
    """The frames of as many whole blocks as there are, at least one."""
    block = recipe.get("causal.num_frame_per_block") or 3
    first = int(bool(recipe.get("causal.independent_first_frame")))
    fitting = first + max((frames - first) // block, 1) * block
    if fitting != frames:
        recipe.notes["data.wan.frames"] = f"{fitting}, as {frames} latent frames are not whole blocks of {block}"
    return fitting


def _parts(recipe: Recipe) -> None:
    """Encoder and VAE from the base model, which is read in Diffusers' layout: a folder or a repository of it."""
    inits = [recipe.staged.get("base_weights"), *(recipe.get(f"{name}.init") for name in reversed(NETWORKS))]
    known = next((init for init in inits if init and init.lower().endswith("diffusers")), None)
    for path in ("data.text.encoder", "data.vae.path"):
        if recipe.get(path) is None and known is not None:
            recipe.set(path, known)
        elif recipe.get(path) is None:
            recipe.missing[path] = "a pipeline's folder in Diffusers' layout, or its Hub name"
    if recipe.get("data.vae.path") is None:
        recipe.set("validation.every", None)  # nothing could be decoded


def _tasks(recipe: Recipe) -> None:
    """Lists what else image-to-video models and models of two experts need."""
    preset, missing = recipe.get("student.preset"), recipe.missing
    if preset in ("i2v-14b", "i2v-a14b"):
        missing["data.images"] = "a folder of `python preprocess.py images`, with data.prompts null"
    if preset == "i2v-14b":
        missing["data.image_encoder"] = "the pipeline's folder, for CLIP"
    if preset in ("a14b", "i2v-a14b"):
        for name in NETWORKS:
            missing[f"{name}.expert"] = (
                "high or low: one expert is trained at a time, within the bounds of the noise levels that "
                "configs/wan2.2_a14b/ has"
            )

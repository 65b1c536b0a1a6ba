"""The data section of a translated recipe, and what of it other projects' files do not say."""

from __future__ import annotations

import re

from importers.recipe import Recipe

# by what a model's name holds, the first that fits: (parts of the name, geometry)
PRESETS = (
    (("i2v", "a14b"), "i2v-a14b"), (("i2v", "14b"), "i2v-14b"), (("a14b",), "a14b"), (("14b",), "14b"),
    (("1.3b",), "1.3b"), (("5b",), "5b"),
)  # fmt: skip
# latent frames, height and width of a recipe that says nothing: 81 frames of 480x832, and 5B's 121 of 704x1280
USUAL = {"frames": 21, "height": 60, "width": 104}
USUAL_5B = {"frames": 31, "height": 44, "width": 80}
STRIDE_T = 4  # frames of video to a latent frame, after the first


def preset_of(name: str) -> str | None:
    """The geometry that a model's name or path tells; None if it tells none."""
    return next((preset for parts, preset in PRESETS if all(part in name.lower() for part in parts)), None)


def finish_data(recipe: Recipe) -> None:
    """Kind wan, in the recipe's sizes, with the base model's encoder and VAE.

    What rules left for it: `size`, of latents; `pixels`, of videos; `base`, the model that all networks came from.
    """
    is_5b = recipe.get("student.preset") == "5b"
    _sizes(recipe, USUAL_5B if is_5b else USUAL, 16 if is_5b else 8)
    if recipe.get("validation.fps") is None:
        recipe.set("validation.fps", 24 if is_5b else 16)
    _parts(recipe)
    if recipe.get("data.prompts") is None:
        recipe.fill("data.prompts", "a file of prompts (.txt, .csv, .jsonl, .parquet)")
    recipe.fill("data.text.cache", "a folder of `python preprocess.py text`; without it the encoder stays in memory")
    if not recipe.get("data.negative_prompt"):
        recipe.fill("data.negative_prompt", "what guidance leads away from, which is nothing yet: usually Wan's own")
    _tasks(recipe)


def _sizes(recipe: Recipe, usual: dict[str, int], ratio: int) -> None:
    pixels, size = recipe.values.pop("pixels", {}), dict(recipe.values.pop("size", {}))
    if "frames" in pixels:
        size.setdefault("frames", (pixels["frames"] - 1) // STRIDE_T + 1)
    for side in ("height", "width"):
        if side in pixels:
            size.setdefault(side, pixels[side] // ratio)
    if unsaid := [name for name in usual if name not in size]:
        recipe.fill(f"data.wan: {', '.join(unsaid)}", "not in the recipe: these are the usual ones of the model")
    whole = {**usual, **size}
    if recipe.get("rollout.kind") == "self_forcing":
        whole["frames"] = _blocks(recipe, whole["frames"])
    recipe.set("data.wan", dict(whole))


def _blocks(recipe: Recipe, frames: int) -> int:
    """The frames of as many whole blocks as there are, at least one."""
    block, first = (
        recipe.get("causal.num_frame_per_block") or 3,
        int(bool(recipe.get("causal.independent_first_frame"))),
    )
    fitting = first + max((frames - first) // block, 1) * block
    if fitting != frames:
        recipe.notes.append(f"data.wan.frames: {fitting}, as {frames} latent frames are not whole blocks of {block}")
    return fitting


def _parts(recipe: Recipe) -> None:
    """Encoder and VAE from the base model, which is read in Diffusers' layout."""
    inits = (recipe.get(f"{name}.init") for name in ("critic", "teacher", "student"))
    base = next((path for path in (recipe.values.pop("base", None), *inits) if path), None)
    if base is not None and re.match(r"Wan2\.\d", base.rpartition("/")[2]) and not base.lower().endswith("diffusers"):
        base = f"{base}-Diffusers"
        recipe.fill("data.text.encoder, data.vae.path", f"{base} was guessed: they are read in Diffusers' layout")
    for path in ("data.text.encoder", "data.vae.path"):
        if recipe.get(path) is None and base is not None:
            recipe.set(path, base)
        elif recipe.get(path) is None:
            recipe.fill(path, "a pipeline's folder in Diffusers' layout, or its Hub name")
    if recipe.get("data.vae.path") is None:
        recipe.set("validation.every", None)  # nothing could be decoded


def _tasks(recipe: Recipe) -> None:
    """Lists what else image-to-video models and models of two experts need."""
    preset = recipe.get("student.preset")
    if preset in ("i2v-14b", "i2v-a14b"):
        recipe.fill("data.images", "a folder of `python preprocess.py images`, with data.prompts null")
    if preset == "i2v-14b":
        recipe.fill("data.image_encoder", "the pipeline's folder, for CLIP")
    if preset in ("a14b", "i2v-a14b"):
        recipe.fill(
            "student.expert, teacher.expert, critic.expert", "high or low: one expert is trained at a time, within the "
            "bounds of the noise levels that configs/wan2.2_a14b/ has",
        )  # fmt: skip

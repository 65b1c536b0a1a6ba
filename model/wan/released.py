"""Wan2.1 and Wan2.2 as they were released: how Wan samples them, and their repositories on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from model.experts import I2V_BOUNDARY, T2V_BOUNDARY
from model.released import INDEX, Released, Source, classes_of, read_json
from model.wan.geometry import read_config

# of a pipeline's model_index.json, and of the transformer's config.json where there is none
STUDENT_CLASS = "WanDMDPipeline"  # FastWan, see model/wan/students.py
CLASSES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", STUDENT_CLASS, "WanTransformer3DModel")
PARTS = (INDEX, "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
SCHEDULER = "scheduler/scheduler_config.json"
SOLVERS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}
# Wan's own (arXiv 2503.20314 and wan/configs of Wan2.2), where the files say nothing; of two experts high and low noise
STEPS, GUIDANCE = 50, 5.0
EXPERTS_STEPS, EXPERTS_GUIDANCE = 40, {"t2v": (4.0, 3.0), "i2v": (3.5, 3.5)}
SIZES = {"ti2v": (704, 1280, 31)}  # height, width, latent frames: 121 frames of video
SIZE = (480, 832, 21)  # 81 frames of video


def released(folder: Path) -> Released:
    """A folder in Diffusers' layout, by its JSON files alone. Raises ValueError in one line."""
    fields = read_config(file) if (file := folder / "transformer" / "config.json").is_file() else None
    if fields is None:
        raise ValueError(f"{file} is not there, or not of a Wan DiT: fetch it again")
    task, boundary = str(fields["model_type"]), _boundary(folder)
    height, width, frames = SIZES.get(task, SIZE)
    steps, guidance, low = STEPS, GUIDANCE, None
    if boundary is not None:
        steps, (guidance, low) = EXPERTS_STEPS, EXPERTS_GUIDANCE.get(task, (GUIDANCE, GUIDANCE))
    sees_image = fields.get("image_dim") is not None
    few_steps = bool(read_json(folder / SCHEDULER).get("stochastic_sampling")) or STUDENT_CLASS in classes_of(folder)
    return Released(
        steps=steps,
        guidance=guidance,
        low_guidance=low,
        boundary=boundary,
        solver="euler" if few_steps else _solver(folder),
        shift=_shift(folder),
        height=height,
        width=width,
        frames=frames,
        parts=(
            *PARTS,
            *(("transformer_2",) if boundary is not None else ()),
            *(("image_encoder", "image_processor") if sees_image else ()),
        ),
        few_steps=few_steps,
    )


def _boundary(folder: Path) -> float | None:
    """The noise level that parts the two experts, None for one network. Raises ValueError where no file names it."""
    if not (folder / "transformer_2").is_dir():
        return None
    boundary = read_json(folder / INDEX).get("boundary_ratio")
    if boundary is None:
        raise ValueError(
            f"it has a transformer_2, but its {INDEX} no boundary_ratio: add it (Wan2.2: {T2V_BOUNDARY} for text, "
            f"{I2V_BOUNDARY} for images)"
        )
    return float(boundary)


def _solver(folder: Path) -> str:
    """The solver that the scheduler's file names, Euler where there is no file. Raises ValueError for another."""
    values = read_json(folder / SCHEDULER)
    found, prediction = values.get("_class_name"), values.get("prediction_type", "flow_prediction")
    if found is None:
        return "euler"
    if found not in SOLVERS or prediction != "flow_prediction":
        raise ValueError(
            f"its scheduler is {found} for {prediction}: put {SCHEDULER} of {' or '.join(SOLVERS)} for flow_prediction "
            "in its place"
        )
    return SOLVERS[found]


def _shift(folder: Path) -> float | None:
    values = read_json(folder / SCHEDULER)
    return next((float(values[key]) for key in ("flow_shift", "shift") if values.get(key)), None)


# Bytes of the weights: the parameters of a preset's geometry, or of a part's published config.json, times the bytes of
# the precision that they are stored in. tests/model/wan/test_released.py counts the parameters. DiTs and VAEs are fp32,
# UMT5-XXL is fp32 in Wan2.1's repositories and bf16 in Wan2.2's, CLIP ViT-H/14 is fp16. The products for 1.3B, T2V-A14B
# and both text encoders are the total_size of the repositories' index.json. For the other parts the precision follows
# from the number of shards, or from the size of a whole repository with them.
UMT5_FP32, UMT5_BF16 = 22_723_641_344, 11_361_820_672
VAE_21, VAE_22 = 507_570_124, 2_818_754_672
CLIP = 1_261_532_160
DIT_14B, DIT_I2V_A14B = 57_153_966_336, 57_155_604_736


def _source(name: str, dit: int, text_encoder: int, vae: int = VAE_21, **more: int) -> Source:
    """One of Wan's repositories, all of which are Apache-2.0."""
    parts = {"transformer": dit, "text_encoder": text_encoder, "vae": vae, **more}
    return Source(f"Wan-AI/{name}-Diffusers", parts, "Apache-2.0")


SOURCES: Mapping[str, Source] = {
    "1.3b": _source("Wan2.1-T2V-1.3B", 5_675_987_200, UMT5_FP32),
    "14b": _source("Wan2.1-T2V-14B", DIT_14B, UMT5_FP32),
    "i2v-14b": _source("Wan2.1-I2V-14B-480P", 65_579_515_136, UMT5_FP32, image_encoder=CLIP),
    "5b": _source("Wan2.2-TI2V-5B", 19_999_150_848, UMT5_BF16, VAE_22),
    "a14b": _source("Wan2.2-T2V-A14B", DIT_14B, UMT5_BF16, transformer_2=DIT_14B),
    "i2v-a14b": _source("Wan2.2-I2V-A14B", DIT_I2V_A14B, UMT5_BF16, transformer_2=DIT_I2V_A14B),
}

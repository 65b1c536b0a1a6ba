"""Published few-step students of Wan: how their authors sample them, and by what their files are known.

Every number is from the file that `source` names; other files are named beside the row. No checkpoint was run to choose
one. What publishes no settings, or is not told apart, is refused: a user may name a layout (`--layout`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.released import Student, classes_of
from model.wan.config import PRESETS
from model.wan.formats import GATE
from model.wan.released import STUDENT_CLASS
from model.wan.sources import groups_of, located
from model.wan.weights import LazyWeights

VIDEO = {"height": 480, "width": 832, "frames": 21}  # image_or_video_shape 1, 21, 16, 60, 104 of their configs
FOUR = (1000.0, 750.0, 500.0, 250.0)
THREE = (1000.0, 757.0, 522.0)

# rCM's sigma_max and mid_t: angles t of TrigFlow, x = cos t x0 + sin t e. The rectified flow's level of such an x is
# s = sin t / (cos t + sin t). RectifiedFlow_TrigFlowWrapper (rcm/utils/denoiser_scaling.py) tells the network 1000 s,
# which its inference script rounds to bf16 (988, 784, 608, 406); here the network is told the level itself.
RCM_ANGLES = (math.atan(80.0), 1.3, 1.0, 0.6)


def _level(angle: float) -> float:
    return math.sin(angle) / (math.cos(angle) + math.sin(angle))


def _warped(title: str, source: str, **settings: Any) -> Student:
    """Self-Forcing's step list and shift: denoising_step_list, warp_denoising_step, timestep_shift."""
    return Student(title, source, **{"steps": FOUR, "warp": True, "shift": 5.0, "block": 3, **VIDEO, **settings})


def _unwarped(title: str, source: str, **settings: Any) -> Student:
    """CausVid's step list, whose entries are noise levels themselves."""
    return Student(title, source, **{"steps": THREE, "warp": False, "shift": 8.0, "block": None, **VIDEO, **settings})


# context_noise is 0 and independent_first_frame false in all of the causal ones (default_config.yaml of configs)
STUDENTS: Mapping[str, Student] = {
    # generator_ema: --use_ema of README
    "self-forcing": _warped("Self-Forcing", "guandeh17/Self-Forcing, self_forcing_dmd.yaml"),
    # use_ema false; local_attn_size 12 holds the sinks, sink_size 3; 240 is streaming_max_length of
    # longlive_train_long.yaml, and positions are absolute up to there
    "longlive": _warped(
        "LongLive", "NVlabs/LongLive v1.0, longlive_inference.yaml",
        window=12, sinks=3, longest=240, frames=120, weights="raw",
    ),  # minimal_inference/autoregressive_inference.py reads the group generator
    "causvid": _unwarped("CausVid", "tianweiy/CausVid, wan_causal_dmd.yaml", block=3, weights="raw"),
    "causvid-bidirectional": _unwarped(
        "CausVid's bidirectional student", "tianweiy/CausVid, wan_bidirectional_dmd_from_scratch.yaml",
        weights="raw",
    ),
    # README samples the first without --use_ema, and the others with it
    "causal-forcing": _warped(
        "Causal-Forcing", "thu-ml/Causal-Forcing, causal_forcing_dmd_chunkwise.yaml", weights="raw"
    ),
    "causal-forcing-framewise": _warped(
        "Causal-Forcing, framewise", "thu-ml/Causal-Forcing, causal_forcing_dmd_framewise.yaml", block=1
    ),
    # first_steps: denoising_step_list_first_chunk
    "causal-forcing-2step": _warped(
        "Causal-Forcing++, 2 steps", "thu-ml/Causal-Forcing, causal_forcing_dmd_framewise_2step.yaml",
        block=1, steps=(1000.0, 500.0), first_steps=FOUR,
    ),
    "causal-forcing-1step": _warped(
        "Causal-Forcing++, 1 step", "thu-ml/Causal-Forcing, causal_forcing_dmd_framewise_1step.yaml",
        block=1, steps=(1000.0,), first_steps=FOUR,
    ),
    # 77 frames of video
    "rcm": _unwarped(
        "rCM", "NVlabs/rcm, rcm/inference/wan2pt1_t2v_rcm_infer.py",
        steps=tuple(1000 * _level(angle) for angle in RCM_ANGLES), shift=1.0, frames=20, trigflow=True,
    ),
    # flow_shift and dmd_denoising_steps, which are the scheduler's own timesteps (stages/dmd.py); sizes of
    # fastvideo/pipelines/basic/wan/presets.py; sparsity of examples/inference/basic/basic_dmd.py
    "fastwan": _unwarped(
        "FastWan 1.3B", "hao-ai-lab/FastVideo, fastvideo/configs/pipelines/wan.py", height=448, frames=16, sparsity=0.8
    ),
    # vsa_sparsity of examples/distill/Wan2.1-T2V/Wan-Syn-Data-480P/distill_dmd_VSA_t2v_14B.yaml
    "fastwan-14b": _unwarped(
        "FastWan 14B", "hao-ai-lab/FastVideo, fastvideo/configs/pipelines/wan.py", height=448, frames=16, sparsity=0.9
    ),
    # dense: the FullAttn variant
    "fastwan-5b": _unwarped(
        "FastWan 5B", "hao-ai-lab/FastVideo, fastvideo/configs/pipelines/wan.py",
        shift=5.0, height=704, width=1280, frames=31,
    ),
}  # fmt: skip

# of a path in small letters: names of the published files, with the folder where the file's own says too little
NAMES = {
    "self-forcing": r"self_forcing_(dmd|sid)\.\w+",  # self_forcing_sid.yaml samples as _dmd.yaml does
    "longlive": r"longlive_base\.\w+",
    "causvid": r"autoregressive_checkpoint(/model\.pt)?",
    "causvid-bidirectional": r"bidirectional_checkpoint[12](/model\.pt)?",
    "causal-forcing": r"chunkwise/causal_forcing\.\w+",
    "causal-forcing-framewise": r"framewise/causal_forcing\.\w+",
    "causal-forcing-2step": r"framewise-2step\.\w+",
    "causal-forcing-1step": r"framewise-1step\.\w+",
    "rcm": r"rcm_wan2\.1_t2v_[^/]*",
}


def student_of(path: str, layout: str | None) -> Student | None:
    """See `Family.student_of`."""
    if layout is not None and layout not in STUDENTS:
        raise ValueError(f"--layout {layout} is unknown: choose among {', '.join(STUDENTS)}")
    weights = LazyWeights(path)
    name = layout or _by_folder(Path(path), weights) or _by_name(path)
    if name is None and weights.linear_patch:
        raise ValueError(
            "it has the layout of NVlabs/rcm, in which students, their teachers and causal students look alike: give "
            "--layout rcm if it is an rCM student (files named rCM_Wan2.1_T2V_... are)"
        )
    if name is None:
        return None
    student = STUDENTS[name]
    if student.sparsity is not None and not any(GATE.match(key) for key in weights.shapes):
        student = replace(student, sparsity=None)  # FastWan without gates was distilled with dense attention
    return _with_group(student, groups_of(located(path)))


def _by_folder(folder: Path, weights: LazyWeights) -> str | None:
    """By the class in a pipeline's model_index.json."""
    if not folder.is_dir() or STUDENT_CLASS not in classes_of(folder):
        return None
    geometry = weights.geometry()
    if geometry.model_type == "ti2v":
        return "fastwan-5b"
    return "fastwan-14b" if geometry.dim == PRESETS["14b"].dim else "fastwan"


def _by_name(path: str) -> str | None:
    text = (Path(path).absolute() if Path(path).exists() else Path(path)).as_posix().lower()
    return next((name for name, pattern in NAMES.items() if re.search(rf"(^|/){pattern}$", text)), None)


def _with_group(student: Student, groups: frozenset[str]) -> Student:
    """With the weights that the file has, where it lacks those that the settings were published with."""
    held = groups & {"generator", "generator_ema"}
    return replace(student, weights="ema" if "generator_ema" in held else "raw") if len(held) == 1 else student

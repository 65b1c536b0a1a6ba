"""VBench's protocol: its dimensions, which videos it wants, and how its scores become one (arXiv 2311.17982).

The prompts are the vbench package's data (`VBench_full_info.json`) and are read from there. Bounds and weights are
those of its leaderboard (Vchitect/VBench, `scripts/constant.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from utils.reading import read_text, reading

SAMPLES: Final = 5  # videos of a prompt
FLICKER: Final = "temporal_flickering"
FLICKER_SAMPLES: Final = 25  # of which VBench's static filter keeps five still ones
SEED_STRIDE: Final = 100_000  # 100000 i + j keys video j of prompt i: the VBench team's seeds of Wan
QUALITY_WEIGHT: Final = 4
SEMANTIC_WEIGHT: Final = 1
_GRIT: Final = ("grit_model/grit_b_densecap_objectdet.pth",)
_CLIP: Final = ("clip_model/ViT-B-32.pt",)
_VICLIP: Final = ("ViCLIP/ViClip-InternVid-10M-FLT.pth",)


@dataclass(frozen=True)
class Dimension:
    """A dimension of VBench.

    low, high: raw scores that become 0 and 1.
    files: in VBench's cache, where it finds the models of this dimension (0.1.5).
    weight: in the mean over a group of dimensions.
    """

    low: float
    high: float
    files: tuple[str, ...]
    weight: float = 1.0


QUALITY: Final = {
    "subject_consistency": Dimension(0.1462, 1, ("dino_model/dino_vitbase16_pretrain.pth",)),
    "background_consistency": Dimension(0.2615, 1, _CLIP),
    FLICKER: Dimension(0.6293, 1, ("raft_model/models/raft-things.pth",)),  # of the static filter
    "motion_smoothness": Dimension(0.706, 0.9975, ("amt_model/amt-s.pth",)),
    "aesthetic_quality": Dimension(0, 1, ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader")),
    "imaging_quality": Dimension(0, 1, ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)),
    "dynamic_degree": Dimension(0, 1, ("raft_model/models/raft-things.pth",), weight=0.5),
}
SEMANTIC: Final = {
    "object_class": Dimension(0, 1, _GRIT),
    "multiple_objects": Dimension(0, 1, _GRIT),
    "human_action": Dimension(0, 1, ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",)),
    "color": Dimension(0, 1, _GRIT),
    "spatial_relationship": Dimension(0, 1, _GRIT),
    "scene": Dimension(0, 0.8222, ("caption_model/tag2text_swin_14m.pth",)),
    "appearance_style": Dimension(0.0009, 0.2855, _CLIP),
    "temporal_style": Dimension(0, 0.364, _VICLIP),
    "overall_consistency": Dimension(0, 0.364, _VICLIP),
}
DIMENSIONS: Final = QUALITY | SEMANTIC


@dataclass(frozen=True)
class Wanted:
    """A video that VBench judges.

    name: its file's, as VBench looks for it.
    text: what it is made from.
    seed: keys its noise.
    """

    name: str
    text: str
    seed: int


@dataclass(frozen=True)
class Prompt:
    """A prompt of VBench.

    text: VBench's own, which files are named by.
    dimensions: that judge its videos.
    """

    text: str
    dimensions: tuple[str, ...]


def read_suite(path: str | Path) -> list[Prompt]:
    """The prompts of a `VBench_full_info.json`, each once (two of its 946 rows repeat a prompt), in its order.

    Raises ValueError for a file that cannot be read or is another, and for a dimension that is unknown.
    """
    with reading("vbench", path, says="cannot be read as VBench's full info"):
        rows = json.loads(read_text("vbench", Path(path)))
        read = [(str(row["prompt_en"]), tuple(map(str, row["dimension"]))) for row in rows]
    merged: dict[str, tuple[str, ...]] = {}
    for text, dimensions in read:
        if unknown := sorted(set(dimensions) - DIMENSIONS.keys()):
            raise ValueError(f"vbench: {path} names a dimension {unknown[0]!r}; known are {', '.join(DIMENSIONS)}")
        merged[text] = tuple(dict.fromkeys((*merged.get(text, ()), *dimensions)))
    if not merged:
        raise ValueError(f"vbench: {path} holds no prompt")
    return [Prompt(text, dimensions) for text, dimensions in merged.items()]


def wanted_videos(
    prompts: Sequence[Prompt], dimensions: Sequence[str], augmented: Mapping[str, str] | None = None
) -> list[Wanted]:
    """The videos that these dimensions judge: 5 of a prompt, 25 where flicker is judged.

    augmented: longer texts to make them from, by VBench's prompt; files keep the names of VBench's. A prompt's seeds
    depend on its place in the whole suite only. Raises ValueError for a prompt without an augmented one, or with "/".
    """
    out = []
    for number, prompt in enumerate(prompts):
        judged = set(prompt.dimensions) & set(dimensions)
        if not judged:
            continue
        if "/" in prompt.text:
            raise ValueError(f"vbench: prompt {prompt.text!r} cannot name a file: take the / out")
        if augmented is not None and prompt.text not in augmented:
            raise ValueError(f"vbench: no augmented prompt for {prompt.text!r}: the file must have all of them")
        text = prompt.text if augmented is None else augmented[prompt.text]
        for sample in range(FLICKER_SAMPLES if FLICKER in judged else SAMPLES):
            out.append(Wanted(f"{prompt.text}-{sample}.mp4", text, SEED_STRIDE * number + sample))
    return out


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """Raw scores by dimension, mapped so that its bounds become 0 and 1 (not clamped, as on the leaderboard)."""
    return {name: (raw - DIMENSIONS[name].low) / (DIMENSIONS[name].high - DIMENSIONS[name].low)
            for name, raw in scores.items()}  # fmt: skip


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """quality, semantic and total of raw scores, as on the leaderboard, without those that lack a dimension's score.

    Quality and semantic are means of the normalised scores (dynamic degree counts half), the total is
    (4 quality + semantic) / 5. Raises ValueError for an unknown dimension.
    """
    if unknown := sorted(scores.keys() - DIMENSIONS.keys()):
        raise ValueError(f"vbench: unknown dimension {unknown[0]!r}; known are {', '.join(DIMENSIONS)}")
    values, out = normalised(scores), {}
    for group, members in (("quality", QUALITY), ("semantic", SEMANTIC)):
        if members.keys() <= values.keys():
            weights = sum(dimension.weight for dimension in members.values())
            out[group] = sum(members[name].weight * values[name] for name in members) / weights
    if len(out) == 2:
        both = QUALITY_WEIGHT * out["quality"] + SEMANTIC_WEIGHT * out["semantic"]
        out["total"] = both / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return out


def read_scores(folder: str | Path) -> dict[str, float]:
    """Raw scores by dimension of all `*_eval_results.json` in a folder, as VBench writes them.

    Of several files with one dimension the last by name counts. Raises ValueError for a file of another kind.
    """
    scores: dict[str, float] = {}
    for file in sorted(Path(folder).glob("*_eval_results.json")):
        with reading("vbench", file, says="cannot be read as VBench's results"):
            found = json.loads(read_text("vbench", file))
            scores |= {str(name).replace(" ", "_"): float(value[0]) for name, value in found.items()}
    return scores

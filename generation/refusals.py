"""What a network cannot do is refused before anything is made, and what it was not trained for is said."""

from __future__ import annotations

import functools

from torch import Tensor

from configs.schema import RunConfig
from generation.sampling import Sampling
from model.family import FirstFrame
from pipeline.causal import CausalConfig
from utils import distributed
from utils.errors import UserError
from utils.logging import console


def refuse_unused(sampling: Sampling, config: RunConfig, *, causal: bool, few_steps: bool, has_experts: bool) -> None:
    """Refuses options that the network would silently ignore.

    sampling: the options.
    config: the config of the network's run.
    causal: whether the network makes videos block by block.
    few_steps: whether it is sampled by its own step list.
    has_experts: whether it is a high-noise and a low-noise expert.

    Raises UserError.
    """
    unused: dict[str, object]
    if not causal:
        kind, unused = "a bidirectional network", {"window": sampling.window, "sinks": sampling.sinks}
        unused |= {"block_steps": sampling.block_steps or None, "noisy_context": sampling.noisy_context or None}
        instead = "use a causal student"
    else:
        kind, unused, instead = "a causal student", {"guidance": sampling.guidance}, "leave it out"
    for name, value in unused.items():
        if value is not None:
            raise UserError(f"--{name}: {kind} takes none: {instead}")
    most = len(config.schedule.denoising_step_list)
    if too_many := [steps for steps in sampling.block_steps if steps > most]:
        raise UserError(f"--block_steps: {too_many[0]}: this student has {most} steps: choose 1 to {most}")
    if sampling.block_steps and (sampling.steps is not None or sampling.strength is not None):
        raise UserError("--block_steps names the steps of every block: leave out --steps and --strength")
    if few_steps:
        for name in ("guidance", "guidance_2", "solver"):
            if getattr(sampling, name) is not None:
                raise UserError(f"--{name}: a distilled student takes none: leave it out")
    if sampling.guidance_2 is not None and not has_experts:
        raise UserError("--guidance_2 is for models of two experts: this is one network: leave it out")
    if sampling.sinks is not None and sampling.window is None and config.causal.window_frames is None:
        raise UserError(f"--sinks {sampling.sinks}: without a window nothing is ever dropped: give --window too")


def refuse_inputs(
    sampling: Sampling, first_frames: Tensor | None, clip: Tensor | None, *, causal: bool, takes: FirstFrame
) -> None:
    """Refuses an image or a clip that the network cannot take, and a lack of one that it needs.

    sampling: has the strength that goes with a clip.
    first_frames: the videos' first frames.
    clip: the clip that the videos start from.
    causal: whether the network makes videos block by block.
    takes: how the network is given first frames.

    Raises UserError.
    """
    strength = sampling.strength
    if (clip is None) != (strength is None) or (strength is not None and not 0 < strength <= 1):
        raise UserError(f"--strength {strength}: give a clip and a share of the steps in (0, 1], or neither")
    if clip is not None and first_frames is not None:
        raise UserError("--strength makes a clip anew, from its own first frame: leave the image out")
    if first_frames is not None and not causal and takes is FirstFrame.none:
        raise UserError(
            "--image, --extend: a bidirectional network takes none unless it was made for it (model_type ti2v or "
            "i2v): use such a network, or a causal student"
        )
    if first_frames is None and clip is None and takes is FirstFrame.channels:
        raise UserError("this network makes videos from an image (model_type i2v): give --image")


def beyond_training(made: int | None, causal: CausalConfig | None, trained: int) -> str:
    """In one line, that a network is to see more frames at once than it was trained on; empty where it is not.

    made: latent frames of the video, None for one without end.
    causal: how blocks look back, None for a network that makes all frames at once.
    trained: latent frames of the longest video that the network was trained on.
    """
    window = None if causal is None else causal.window_frames
    seen = min((length for length in (made, window) if length is not None), default=0)
    if seen <= trained:
        return ""
    what = f"a video of {seen}" if seen != window else f"a window of {seen}"
    remedy = f"--frames {trained}" if causal is None else f"--window {trained}"
    return (
        f"{what} latent frames: this network was trained on {trained} at the most, and what it makes of more at once "
        f"may fall apart: give {remedy}"
    )


@functools.cache
def warn_once(text: str) -> None:
    """Says what was not said before, on one rank."""
    if text and distributed.is_main():
        console.warning("%s", text)

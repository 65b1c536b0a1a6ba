"""Runs whose videos begin with a given frame: what must fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import RunConfig
from model.family import FirstFrame


def check_first_frames(config: RunConfig, *, real: bool) -> None:
    """Raises ValueError, one line, if the run gives its networks a first frame that they cannot take, or none to i2v.

    An i2v network takes the first frame as channels beside the latents, a ti2v or causal one as its clean first frame.

    real: whether the run trains on real videos, whose first frames are then given.
    """
    data, takes = config.data, config.student.geometry().first_frame
    if takes is FirstFrame.channels and data.first_frame is False:
        raise ValueError("data.first_frame is false, but an i2v network always needs an image: set it null")
    if not data.has_first_frame(takes, real=real):
        return
    if takes is FirstFrame.channels:
        longest = config.rollout.longest(data.frames)
        if longest != data.frames:
            raise ValueError(
                f"rollout.num_training_frames {longest}: the channels of an i2v network "
                f"describe {data.frames} frames: set it null"
            )
        return
    made = config.trainer.value == "ode" and config.ode.path is None
    teacher = None if config.teacher is None else config.teacher.geometry().first_frame
    if (takes is FirstFrame.none and not config.is_causal) or (made and teacher is FirstFrame.none):
        raise ValueError(
            f"{'teacher' if made else 'student'}: a bidirectional network of model_type 't2v' cannot be given the "
            "first frame of data.images or data.first_frame: choose a preset of ti2v or i2v, or set them null"
        )
    if config.is_causal and 1 not in config.causal.blocks(data.frames)[:1]:
        raise ValueError(
            f"causal.num_frame_per_block {config.causal.num_frame_per_block}: a given first frame is a block of its "
            "own: set causal.independent_first_frame to true"
        )

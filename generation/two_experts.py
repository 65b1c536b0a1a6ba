"""Two distilled experts as one student (Wan2.2 A14B): first the high-noise one's steps, then the low one's."""

from __future__ import annotations

from dataclasses import replace

from configs.experts import expert_of
from configs.schema import RunConfig
from configs.sizes import scales_shift
from model.network import Expert
from model.objective import ObjectiveConfig, objectives
from model.schedule import TIMESTEPS
from utils.errors import UserError


def joined(high: RunConfig, low: RunConfig) -> tuple[RunConfig, float]:
    """(the high run with the steps of both, the noise level that parts them). Raises UserError for runs that are no
    pair: of other geometries or rollouts, or with steps on the wrong side."""
    for name, config in (("--run", high), ("--low_run", low)):
        if config.is_causal or config.trainer.value != "score_distillation":
            raise UserError(f"{name}: two experts share no cache: both must be bidirectional few-step students")
    if high.student.geometry() != low.student.geometry() or high.data.frames != low.data.frames:
        raise UserError("--low_run is of another geometry or length than --run: give the two experts of one model")
    if scales_shift(high) != scales_shift(low) or (scales_shift(high) and high.data.size != low.data.size):
        raise UserError(
            "--run and --low_run scale their shifts by the size of a video differently: train both with one "
            "training.scale_shift, and training.sizes beside data of one size, or with null"
        )
    boundary = low.schedule.max_score_timestep / TIMESTEPS
    if boundary >= 1:
        raise UserError("--low_run was trained at all noise levels: its schedule.max_score_timestep is 1000")
    ours, theirs = high.schedule, low.schedule
    same = (ours.warp_denoising_step, ours.timestep_shift) == (theirs.warp_denoising_step, theirs.timestep_shift)
    if not same or not ours.sigmas()[-1] >= boundary > theirs.sigmas()[0]:
        raise UserError(
            f"the steps of --run ({_shown(high)}) and of --low_run ({_shown(low)}) are not those above and below "
            f"{boundary:g} of one list: train both with one shift and with steps on their own side"
        )
    steps = [*ours.denoising_step_list, *theirs.denoising_step_list]
    # bounds of the whole: what is sampled goes through all noise levels
    whole = replace(ours, denoising_step_list=steps, min_score_timestep=theirs.min_score_timestep)
    objective = high.objective
    if objectives()[objective.kind].in_interval:  # the joined run has no interval, and is only sampled
        objective = ObjectiveConfig.variants()["dmd"]()
    return replace(high, schedule=whole, objective=objective), boundary


def refuse_half(config: RunConfig) -> None:
    """Raises UserError for one of two experts that is to make videos alone from noise. A low-noise one may make a clip
    anew, so the sampler looks at that."""
    side = expert_of(config)
    if side is None or (side is Expert.low and config.few_steps):
        return
    if not config.few_steps:
        raise UserError(
            f"--run: it is the {side}-noise expert of two, a many-step network, and makes no video alone: export it "
            "with --format native, and put it into its model's folder for --model"
        )
    raise UserError(
        "--run: it is the high-noise expert of two, and makes no video alone: give the low-noise one's run beside it, "
        "as --low_run (of inference.py, evaluate.py and export.py)"
    )


def _shown(config: RunConfig) -> str:
    return ", ".join(f"{sigma:.3g}" for sigma in config.schedule.sigmas())

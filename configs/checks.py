"""Combinations of sections that cannot work together. Every error is one line: key, value, remedy.

Most are rows of configs/rules.py. Here is what has to be computed: steps, blocks, sizes, shared weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from configs import rules
from configs.images import check_first_frames
from configs.rollout import SelfForcingConfig
from configs.schema import RunConfig
from configs.sections import TrainerKind
from configs.sizes import check_sizes
from pipeline.self_forcing_training import rollout_lengths
from utils.variants import check_kinds


def check_run(run: RunConfig) -> None:
    """Raises ValueError, one line, for a run that cannot work: key, value, remedy."""
    check_kinds(run)
    _check_traits(run)
    _check_steps(run)
    if run.trainer is TrainerKind.score_distillation:
        _check_rules(run, rules.DISTILLATION)
        _check_lengths(run)
    _check_rules(run, rules.OTHER_TRAINERS)
    needs = run.needs_data()
    run.data.check_use(needs, validates=run.validation.every is not None)
    _check_blocks(run)
    _check_networks(run)
    check_first_frames(run, real=needs is not None)
    check_sizes(run)
    _check_shared_weights(run)
    for section in ("generator_training", "critic_training"):
        trained = getattr(run, section)
        for rule in rules.OPTIMIZERS:
            if rule.wrong(run, trained):
                raise ValueError(rule.says.format(run=run, section=section, trained=trained))


def _check_rules(run: RunConfig, table: Sequence[rules.Rule]) -> None:
    for rule in table:
        if rule.wrong(run):
            raise ValueError(rule.says.format(run=run))


def _check_traits(run: RunConfig) -> None:
    """What a run asks of its networks, their family must have."""
    for trait, (what, is_asked) in rules.TRAITS.items():
        if is_asked(run) and trait not in run.student.family.traits:
            raise ValueError(
                f"student.preset {run.student.preset}: its family has no {trait.value}, which {what} needs: leave it "
                "out, or choose a preset of another family"
            )


def _check_steps(run: RunConfig) -> None:
    if not run.few_steps:  # a many-step network has no use for the list, which has a default
        return
    try:
        run.student.path.check_steps(run.schedule.sigmas())
    except ValueError as problem:
        raise ValueError(f"schedule.denoising_step_list: {problem}") from None


def _check_lengths(run: RunConfig) -> None:
    """Rollouts that are longer than the data's videos have whole blocks."""
    if isinstance(run.rollout, SelfForcingConfig) and run.rollout.num_training_frames is not None:
        try:
            rollout_lengths(run.data.frames, run.rollout.num_training_frames, run.causal.num_frame_per_block)
        except ValueError as problem:
            raise ValueError(f"rollout.{problem}: change it, or set it to null") from None


def _check_blocks(run: RunConfig) -> None:
    if not run.is_causal:
        return
    try:
        run.causal.blocks(run.data.frames)
    except ValueError as problem:
        video = ""
        if run.data.through_codec:
            video = f" (these are {run.student.codecs.time_stride * (run.data.frames - 1) + 1} frames of video)"
        raise ValueError(f"{run.data.frames_key} and causal.num_frame_per_block disagree: {problem}{video}") from None


def _check_networks(run: RunConfig) -> None:
    found = rules.networks(run)
    for rule in rules.NETWORKS:
        for name, net in found.items():
            if rule.wrong(run, name, net):
                raise ValueError(rule.says.format(run=run, name=name, net=net))
    student, geometries = run.student.geometry(), {name: net.geometry() for name, net in found.items()}
    for name, geometry in geometries.items():
        for field in run.student.family.shared:
            ours, theirs = getattr(student, field), getattr(geometry, field)
            if ours != theirs:
                raise ValueError(
                    f"{name} has {field} {theirs} and student {ours}: they must see the same latents, text and image"
                )
    heads = [geometry.num_heads for geometry in geometries.values()]
    common = math.gcd(*heads)
    if common % run.parallel.sequence:
        legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"parallel.sequence {run.parallel.sequence} does not divide the heads of every network "
            f"({', '.join(map(str, heads))}): choose {legal}"
        )


def _check_shared_weights(run: RunConfig) -> None:
    """Adapters that share the teacher's weights begin from them, and pass through them in one way."""
    if run.teacher is None or run.trainer is TrainerKind.diffusion or run.ode.path is not None:
        return
    trained = {name: net for name, net in rules.networks(run).items() if name != "teacher"}
    sharing = {name: net for name, net in trained.items() if net.lora and net.lora.share}
    for name, net in sharing.items():
        if key := net.other_weights(run.teacher):
            trained_value, frozen_value = (
                network.preset if key == "geometry" else getattr(network, key) for network in (net, run.teacher)
            )
            raise ValueError(
                f"{name}.lora.share puts the adapter on the teacher's weights, but {name} has {key} {trained_value} "
                f"and the teacher {frozen_value}: give both the same, or set {name}.lora.share to false"
            )
    if len({(net.attention, net.checkpointing) for net in sharing.values()}) > 1:
        raise ValueError("student and critic share one copy of the weights: give them one attention, checkpointing")

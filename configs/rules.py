"""Tables of what a run must not be: each row is a condition and the line that a user then reads.

A line begins with the key at fault and ends with the remedy. What stands in braces are values of the run.
docs/configuration.md lists these lines; configs/checks.py goes through the tables, and checks what has to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.rollout import SelfForcingConfig
from configs.schema import RunConfig
from configs.sections import TrainerKind, UpdateSchedule
from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.family import Trait
from model.gan_config import Features, Heads
from model.network import NetworkConfig
from model.objective import Role, objectives
from model.schedule import TIMESTEPS
from utils.optim import TrainedConfig
from utils.parallel.mesh import EngineKind


@dataclass(frozen=True)
class Rule:
    """A run that cannot work. says: the line, with values of `run` in braces. wrong: whether a run is like that."""

    says: str
    wrong: Callable[[RunConfig], object]


@dataclass(frozen=True)
class NetworkRule:
    """The same for one of a run's networks. says: the line may also name it ({name}) and its values ({net})."""

    says: str
    wrong: Callable[[RunConfig, str, NetworkConfig], object]


@dataclass(frozen=True)
class OptimizerRule:
    """The same for the section of a trained network, with {section} and its values {trained}."""

    says: str
    wrong: Callable[[RunConfig, TrainedConfig], object]


def networks(run: RunConfig) -> dict[str, NetworkConfig]:
    """The networks that a run names, by role."""
    found = {"student": run.student, "teacher": run.teacher, "critic": run.critic}
    return {name: network for name, network in found.items() if network is not None}


def _any(run: RunConfig, is_so: Callable[[NetworkConfig], object]) -> bool:
    return any(is_so(network) for network in networks(run).values())


def _distils(run: RunConfig) -> bool:
    return run.trainer is TrainerKind.score_distillation


def _on_deepspeed(run: RunConfig) -> bool:
    return run.parallel.engine is EngineKind.deepspeed


# Score objectives compare teacher and critic. A discriminator alone needs only the network whose features it sees.
def _sees_critic(run: RunConfig) -> bool:
    return run.objective.gan is not None and run.objective.gan.features is Features.critic


def _sees_teacher(run: RunConfig) -> bool:
    return run.objective.gan is not None and run.objective.gan.features is Features.teacher


def _needs_teacher(run: RunConfig) -> bool:
    return Role.teacher in objectives()[run.objective.kind].roles or _sees_teacher(run)


def _needs_critic(run: RunConfig) -> bool:
    return Role.critic in objectives()[run.objective.kind].roles or _sees_critic(run)


def _by_exit(run: RunConfig) -> bool:
    return run.schedule.ts_schedule or run.schedule.ts_schedule_max


def _exits_differ(run: RunConfig) -> bool:
    rollout = run.rollout
    if not isinstance(rollout, SelfForcingConfig):
        return False
    return not rollout.same_step_across_blocks and not rollout.last_step_only


# what a run asks of its networks' family: (in words, whether it does)
TRAITS: dict[Trait, tuple[str, Callable[[RunConfig], object]]] = {
    Trait.cache: ("a causal run", lambda run: run.is_causal),
    Trait.features: ("objective.gan", lambda run: run.objective.gan is not None),
    Trait.lora: ("lora", lambda run: _any(run, lambda net: net.lora is not None or net.loras)),
    Trait.sparse: ("sparse", lambda run: _any(run, lambda net: net.sparse is not None)),
    Trait.sequence: ("parallel.sequence", lambda run: run.parallel.sequence > 1),
    Trait.replay: (
        "checkpointing",
        lambda run: _any(run, lambda net: net.checkpointing is not Checkpointing.none),
    ),
}

_NEEDS = "is null, but objective.kind {run.objective.kind} needs it: give it a preset and an init"
_UNUSED = "is not used by objective.kind {run.objective.kind} on these features: set it to null"
DISTILLATION: Sequence[Rule] = (
    Rule(f"teacher {_NEEDS}", lambda run: run.teacher is None and _needs_teacher(run)),
    Rule(f"teacher {_UNUSED}", lambda run: run.teacher is not None and not _needs_teacher(run)),
    Rule(f"critic {_NEEDS}", lambda run: run.critic is None and _needs_critic(run)),
    Rule(f"critic {_UNUSED}", lambda run: run.critic is not None and not _needs_critic(run)),
    Rule(
        "objective.reward judges samples of prompts alone: choose another rollout.kind, or none",
        lambda run: run.objective.reward is not None and (run.rollout.from_data or run.data.images is not None),
    ),
    Rule(
        "rollout.caption_dropout {run.rollout.caption_dropout} leaves samples without a prompt, which "
        "objective.reward judges them by: set it to 0",
        lambda run: run.objective.reward is not None and run.rollout.caption_dropout,
    ),
    Rule(
        "objective.kind {run.objective.kind} needs schedule.min_score_timestep, where its interval starts",
        lambda run: objectives()[run.objective.kind].in_interval and run.schedule.min_score_timestep <= 0,
    ),
    Rule(
        "objective.gan.heads image judges single images, not videos of {run.data.frames} latent frames: choose video "
        "or register",
        lambda run: run.objective.gan and run.objective.gan.heads is Heads.image and run.data.frames != 1,
    ),
    Rule(
        "objective.gan and critic_keep are not for engine deepspeed: choose fsdp2",
        lambda run: _on_deepspeed(run) and (run.objective.gan or run.objective.critic_keep is not None),
    ),
    Rule(
        "schedule.ts_schedule needs one exit step for all blocks: set rollout.same_step_across_blocks to true",
        lambda run: _by_exit(run) and _exits_differ(run),
    ),
    Rule(
        "rollout.kind {run.rollout.kind} has no exit step: set schedule.ts_schedule and ts_schedule_max to false",
        lambda run: _by_exit(run) and run.rollout.by_block,
    ),
    Rule(
        "schedule.min_score_timestep {run.schedule.min_score_timestep} is above the last step's level, which "
        "schedule.ts_schedule_max takes as the upper bound: lower it",
        lambda run: (
            run.schedule.ts_schedule_max and run.schedule.min_score_timestep / TIMESTEPS >= min(run.schedule.sigmas())
        ),
    ),
    Rule(
        "rollout.reuse_rollout needs iterations that train both networks: set training.update_schedule to joint",
        lambda run: run.rollout.reuse_rollout and run.training.update_schedule is UpdateSchedule.alternating,
    ),
    Rule(
        "training.max_steps {run.training.max_steps} ends within critic_warmup_steps "
        "{run.training.critic_warmup_steps}: the student would never train",
        lambda run: run.training.max_steps <= run.training.critic_warmup_steps,
    ),
)

OTHER_TRAINERS: Sequence[Rule] = (
    Rule(
        "rollout.caption_dropout {run.rollout.caption_dropout} is for trainer score_distillation, not "
        "{run.trainer.value}: set it to 0 (diffusion and consistency have a caption_dropout of their own)",
        lambda run: run.rollout.caption_dropout and not _distils(run),
    ),
    Rule(
        "teacher is null: the ode trainer makes trajectories with one: set it, or ode.path",
        lambda run: run.trainer is TrainerKind.ode and run.teacher is None and run.ode.path is None,
    ),
    Rule(
        "trainer consistency needs a causal teacher, and an average: set teacher and ema.decay",
        lambda run: run.trainer is TrainerKind.consistency and (run.teacher is None or run.ema.decay is None),
    ),
)

NETWORKS: Sequence[NetworkRule] = (
    NetworkRule(
        "{name}.preset {net.preset} and student.preset {run.student.preset} are of two families: choose presets of one",
        lambda run, name, net: net.family is not run.student.family,
    ),
    NetworkRule(
        "{name}.attention {net.attention.value}: this network has none: leave it out",
        lambda run, name, net: net.attention is not Backend.SDPA and Trait.backends not in net.family.traits,
    ),
    NetworkRule(
        "parallel.compile is not for {name}.attention plain: choose sdpa, flex or flash",
        lambda run, name, net: run.parallel.compile and net.attention is Backend.PLAIN,
    ),
    NetworkRule(
        "teacher.sparse.ramp_step: a teacher does not change during a run: set it null",
        lambda run, name, net: name == "teacher" and net.sparse and net.sparse.ramp_step is not None,
    ),
    NetworkRule(
        "teacher.lora: a teacher is never trained: set it null (LoRA files: teacher.loras)",
        lambda run, name, net: name == "teacher" and net.lora is not None,
    ),
    NetworkRule(
        "critic.lora: trainer {run.trainer.value} has no critic: set it null",
        lambda run, name, net: name == "critic" and net.lora is not None and not _distils(run),
    ),
    NetworkRule(
        "{name}.lora is not for engine deepspeed: choose fsdp2",
        lambda run, name, net: net.lora is not None and _on_deepspeed(run),
    ),
)

# DeepSpeed's optimizers see flat parts of many matrices
OPTIMIZERS: Sequence[OptimizerRule] = (
    OptimizerRule(
        "{section}.optimizer: kind {trained.optimizer.kind} is not for engine deepspeed: choose adamw, or fsdp2",
        lambda run, trained: _on_deepspeed(run) and not trained.optimizer.on_deepspeed,
    ),
    OptimizerRule(
        "{section}.optimizer: clip_value is not for engine deepspeed: set clip_norm, or choose fsdp2",
        lambda run, trained: _on_deepspeed(run) and trained.optimizer.clip_value is not None,
    ),
)

"""What FastVideo's launchers and its modular trainer share: batches, phases, curves, sparsity, adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from importers.lora import FASTVIDEO_DEFAULT, fastvideo_targets, put_adapter
from importers.networks import NETWORKS
from importers.recipe import Recipe, Untranslated
from importers.rules import CRITIC, STUDENT, integer, real

# flow_shift of its pipeline configs (fastvideo/configs/pipelines/wan.py), by what a model's name holds
SHIFTS = (
    ("fastwan", 8.0), ("sfwan2.2", 12.0), ("sfwan", 5.0), ("a14b", 12.0), ("5b", 5.0), ("720p", 5.0), ("480p", 3.0),
    ("t2v-14b", 5.0), ("1.3b", 3.0),
)  # fmt: skip


def ratio(value: Any) -> float:
    """A noise level of 0..1, of which its code takes the whole timestep below."""
    return int(real(value) * 1000) / 1000


def shift_of(recipe: Recipe) -> None:
    """One shift of the scores' levels and of the table that warps steps; by the model where no option says it."""
    shift = recipe.staged.get("shift")
    if shift is None:
        name = str(recipe.staged.get("base") or recipe.get("student.init")).lower()
        shift = next((known for part, known in SHIFTS if part in name), None)
        if shift is None:
            recipe.refused.append("flow_shift: it is not in the file, and the model's name does not tell its default")
            return
        recipe.notes["schedule.score_timestep_shift"] = f"not in the file: {shift} is what its code has for this model"
    recipe.set("schedule.score_timestep_shift", shift)
    recipe.set("schedule.timestep_shift", recipe.staged.get("step_shift", shift))


def batch(recipe: Recipe) -> None:
    """Samples an update: those of a group of ranks that share one, times the groups, times accumulation. The ranks are
    replicate x shard, in which its shard counts ranks that share a sample."""
    staged, sequence = recipe.staged, recipe.get("parallel.sequence") or 1
    replicate, shard = staged.get("replicate", 1), staged.get("shard")
    micro, accumulation = recipe.get("training.micro_batch_size") or 1, staged.get("accumulation", 1)
    if shard is None or shard < 1:
        recipe.missing["training.global_batch_size"] = (
            f"the number of GPUs over {sequence}, times {micro * accumulation}: the file does not say how many"
        )
        return
    recipe.set("parallel.replicate", replicate)
    recipe.set("parallel.shard", shard // sequence if shard % sequence == 0 else None)
    if replicate * shard % sequence:
        recipe.refused.append(f"sp_size: {sequence} does not divide the {replicate * shard} ranks of the file")
    recipe.set("training.global_batch_size", micro * accumulation * max(replicate * shard // sequence, 1))
    recipe.notes["training.global_batch_size"] = f"of {replicate * shard} GPUs, as hsdp_replicate_dim x hsdp_shard_dim"


def phase(recipe: Recipe) -> None:
    """Its students are trained in iterations N, 2N, ..., counted from 1: the first N - 1 train the critic alone."""
    interval = recipe.get("training.generator_update_interval") or 1
    recipe.set("training.critic_warmup_steps", interval - 1)
    recipe.notes["training.critic_warmup_steps"] = f"its student is first trained in iteration {interval}"
    if start := recipe.get("ema.start"):
        recipe.set("ema.start", start // interval)
        recipe.notes["ema.start"] = f"iteration {start}, counted in updates of the student"


@dataclass(frozen=True)
class Counted:
    """How a network's rate is counted.

    updates: of the network in the run.
    horizon: steps of the schedule in which it would end.
    pace: steps of the schedule an update.
    """

    updates: int
    horizon: int
    pace: int = 1


def curves(recipe: Recipe, *, counts_iterations: bool) -> None:
    """Both networks' rates. Each schedule ends with max_train_steps of its own steps.

    counts_iterations: whether the student's schedule goes on in every iteration, and not with its updates alone.
    """
    total, interval = recipe.get("training.max_steps") or 0, recipe.get("training.generator_update_interval") or 1
    student = Counted(total // interval, total, interval if counts_iterations else 1)
    for option, name, section, counted in (
        ("lr_scheduler", "curve", STUDENT, student),
        ("fake_score_lr_scheduler", "critic_curve", CRITIC, Counted(total, total)),
    ):
        curve = recipe.staged.get(name, "constant")
        if problem := _curve(recipe, section, curve, recipe.staged.get("warmup", 0), counted):
            recipe.refuse(option, problem)


def _curve(recipe: Recipe, section: str, kind: str, warmup: int, counted: Counted) -> str | None:
    """Sets `lr_schedule` of a network. Returns why it has no counterpart, None if it has one."""
    path = f"{section}.lr_schedule"
    if kind == "constant":  # whatever the warm-up says
        recipe.set(path, {"kind": "constant", "warmup_steps": 0})
        return None
    if kind not in ("constant_with_warmup", "linear", "cosine"):
        return "only constant, constant_with_warmup, linear and cosine have a counterpart"
    decays = kind != "constant_with_warmup"
    first, last = math.ceil(warmup / counted.pace), counted.horizon // counted.pace
    if kind == "cosine" and counted.updates != last:
        return f"its code ends the cosine at {last} updates of this network, which are {counted.updates} in the run"
    floor = 1 - (counted.updates - first) / (last - first) if first < counted.updates < last else 0.0
    recipe.set(path, {"kind": kind if decays else "constant", "warmup_steps": first, "floor": floor if decays else 0.0})
    if first:
        recipe.notes[f"{path}.warmup_steps"] = "its first update has a rate of 0, ours 1 / this"
    if decays and floor:
        recipe.notes[f"{path}.floor"] = f"theirs would reach 0 at update {last}, and the run has {counted.updates}"
    return None


def single(value: Any) -> int:
    """A micro-batch, for all samples of which its code draws one noise level and one exit step."""
    if (integer(value) or 1) != 1:
        raise Untranslated("its code draws one noise level for a whole micro-batch: choose 1, and accumulate more")
    return 1


def check_models(recipe: Recipe) -> None:
    """Models of two experts, and of images, are trained otherwise."""
    for network in NETWORKS:
        preset = recipe.get(f"{network}.preset") or ""
        if "a14b" in preset:
            recipe.refused.append(f"{network}: its code trains both experts of this model in one run, ours one of them")
        elif preset.startswith("i2v"):
            recipe.refused.append(f"{network}: image-to-video recipes of it are not carried over")


def sparse(recipe: Recipe) -> None:
    """Sparsity r * min(step // I, floor(S / r)) of iterations counted from 1, where I > 1; else S from the first on."""
    staged = recipe.staged
    sparsity, step, every = staged.get("sparsity", 0.0), staged.get("ramp", 0.01), staged.get("ramp_every", 1)
    if not sparsity:
        return
    if not staged.get("vsa"):
        recipe.notes["student.sparse"] = "none: VSA_sparsity counts with FASTVIDEO_ATTENTION_BACKEND=VIDEO_SPARSE_ATTN"
        return
    section: dict[str, Any] = {"sparsity": sparsity, "cube": [4, 4, 4]}
    if every > 1 and step <= 0:
        recipe.refuse("VSA_decay_rate", "a ramp needs a step above 0")
    elif every > 1:
        top = round(int(sparsity / step) * step, 6)
        section |= {"sparsity": top, "ramp_step": step, "ramp_every": every}
        recipe.notes["student.sparse.sparsity"] = f"its ramp of {step} ends at {top}"
        recipe.notes["student.sparse.ramp_every"] = "it climbs in the last of these iterations, ours in the next one"
    if staged.get("lora"):
        recipe.refuse("lora_training", "its adapters train the gates of sparse attention, and ours do not")
        return
    recipe.set("student.sparse", section)
    recipe.set("critic.sparse", {"sparsity": 0.0, "cube": [4, 4, 4]})
    recipe.notes["critic.sparse"] = "its code runs the critic through the same kernel, with all tiles and a gate"


def adapters(recipe: Recipe) -> None:
    """Student and critic are both adapters; a target is any part of a layer's name."""
    staged = recipe.staged
    given = {"lora_rank", "lora_alpha", "lora_names"} & staged.keys()
    if not staged.get("lora"):
        if given:
            recipe.notes["student.lora"] = "none: lora_rank and its like count with lora_training"
        return
    if "lora_rank" not in staged:
        recipe.refuse("lora_training", "it needs a lora_rank")
        return
    has_image = recipe.get("student.preset") == "i2v-14b"
    try:
        targets = fastvideo_targets(staged.get("lora_names", FASTVIDEO_DEFAULT), has_image=has_image)
    except Untranslated as problem:
        recipe.refuse("lora_target_modules", str(problem))
        return
    alpha = staged.get("lora_alpha")
    for network in NETWORKS[0], NETWORKS[2]:
        put_adapter(recipe, network, staged["lora_rank"], None if alpha is None else float(alpha), targets)

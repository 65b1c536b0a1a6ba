"""What a run says before its first iteration and after its last: what it is, where its results lie, what to do next."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from configs.experts import expert_of
from configs.schema import RunConfig
from model.family import FirstFrame
from model.network import Expert
from model.score import ScoreNet
from trainer.networks import Trained
from trainer.run_networks import left_uncompiled
from utils import distributed
from utils.fields import show
from utils.parallel.mesh import Mesh


@dataclass(frozen=True)
class Extent:
    """A run and how far it goes.

    config: of the run.
    folder: of the run.
    total: iterations in all.
    begins: iterations that were done before this process.
    saves: whether checkpoints are written.
    """

    config: RunConfig
    folder: Path
    total: int
    begins: int
    saves: bool = True

    @property
    def resume(self) -> str:
        """The command that goes on with the run."""
        folder = shlex.quote(str(self.folder))
        config = shlex.quote(str(self.folder / "config.yaml"))
        return f"train.py --config_path {config} --logdir {folder}"


@dataclass(frozen=True)
class Setting:
    """What a run consists of.

    trained: what it trains, by name.
    teacher: its frozen network.
    mesh: its processes.
    device: where this one computes.
    counts: of its data, by name.
    """

    trained: Mapping[str, Trained]
    teacher: ScoreNet | None
    mesh: Mesh
    device: torch.device
    counts: Mapping[str, int]


def opening(extent: Extent, setting: Setting) -> list[str]:
    """The lines before the first iteration."""
    config, mesh = extent.config, setting.mesh
    training, size = config.training, config.training.micro_batch_size
    device = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else setting.device.type
    each = training.global_batch_size // (mesh.dp_size * size)
    return [
        f"run        {config.name} ({config.trainer.value}) in {extent.folder}",
        *(f"network    {name}: {text}" for name, text in _networks(config, setting).items()),
        f"device     {device}, {_counted(mesh.world, 'rank')} on {_counted(distributed.nodes(), 'node')} (replicate "
        f"{mesh.replicate} x shard {mesh.shard} x sequence {mesh.sequence}), precision {training.precision.value}",
        *_idle_gpus(mesh.world),
        f"data       {config.data.kind}: " + ", ".join(_counted(n, name) for name, n in setting.counts.items()),
        *compiled(config, setting),
        *dropped_captions(config),
        f"batch      {training.global_batch_size} = {mesh.dp_size} at once x {each} in turn x micro-batches of {size}",
        f"saved      {_cadence(extent)}",
        f"steps      {extent.total - extent.begins} to go: {extent.begins} of {extent.total} are done; the first is "
        "slower than the others, for it allocates and compiles",
    ]


def _idle_gpus(ranks: int) -> list[str]:
    gpus = torch.cuda.device_count()
    if ranks > 1 or gpus < 2:
        return []
    return [
        f"device     1 of this machine's {gpus} GPUs is used: torchrun --nproc_per_node {gpus} train.py ... takes all"
    ]


def compiled(config: RunConfig, setting: Setting) -> list[str]:
    """The lines of what parallel.compile compiles and what it leaves as it is; none for a run without."""
    if not config.parallel.compile:
        return []
    sections = {"student": config.student, "critic": config.critic, "teacher": config.teacher}
    here = [*setting.trained, *(["teacher"] if setting.teacher is not None else [])]
    left = {name: why for name, why in left_uncompiled(config).items() if name in here}
    blocks = [name for name in here if name in sections and name not in left]
    reasons = [f"{name} ({why})" for name, why in left.items()]
    reasons += [f"{name} (a head)" for name in here if name not in sections]
    if sparse := [name for name in blocks if (section := sections[name]) is not None and section.sparse is not None]:
        reasons.append(f"the sparse attention of {', '.join(sparse)} (its maps would be made anew at each call)")
    return [
        f"compiled   the blocks of {', '.join(blocks) or 'no network'}, at their first passes",
        f"left       uncompiled: {'; '.join([*reasons, 'what lies outside the blocks, text encoders and codecs'])}",
    ]


def dropped_captions(config: RunConfig) -> list[str]:
    """The line of a teacher that is to know what no caption is; none for other runs."""
    if config.dropped_text is None:
        return []
    text = f"the negative prompt ({show(config.dropped_text)})" if config.dropped_text else "the empty text"
    return [f"captions   {config.diffusion.caption_dropout:.3g} of them are dropped: the sample is trained with {text}"]


def _networks(config: RunConfig, setting: Setting) -> dict[str, str]:
    sections = {"student": config.student, "critic": config.critic, "teacher": config.teacher}
    out: dict[str, str] = {}
    for name, trained in setting.trained.items():
        section, learns = sections.get(name), sum(map(_size, trained.optimizer.parameters))
        text = f"{short(learns)} parameters, trained"
        if section is not None and section.lora is not None:
            text = f"an adapter of rank {section.lora.rank}, {text}, on {short(_weights(trained.net))} in all"
        out[name] = text if section is None else f"{section.preset}, {text}"
    if setting.teacher is not None and config.teacher is not None:
        out["teacher"] = f"{config.teacher.preset}, {short(_weights(setting.teacher.net))} parameters, frozen"
    return out


def _weights(net: nn.Module) -> int:
    return sum(map(_size, net.parameters()))


def _size(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, which ZeRO-3 keeps empty between its uses."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def short(number: float) -> str:
    """1.42B, 85.3M, 12.1k: three digits of a number."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.0f}"


def _counted(number: int, name: str) -> str:
    return f"{number} {name if number == 1 else name + 's'}"


def _cadence(extent: Extent) -> str:
    if not extent.saves:
        return "nothing: --no_save"
    checkpoint, validation = extent.config.checkpoint, extent.config.validation
    kept = f"the last {checkpoint.keep_last} kept"
    kept += f" and each {checkpoint.keep_every}th" if checkpoint.keep_every else ""
    videos = "no validation videos"
    if validation.every:
        videos = f"validation videos every {validation.every} and after the last"
    return f"a checkpoint every {checkpoint.every} steps ({kept}), {videos}"


def finished_before(extent: Extent, *, changed: bool) -> str:
    """The line of a run that was finished when this process began. changed: whether its config was another one."""
    planned = extent.config.training.max_steps
    key = f"training.max_steps {planned}" if extent.total == planned else f"--max_steps {extent.total}"
    other = "; nothing was trained with the config that differs: give another --logdir for it" if changed else ""
    return (
        f"this run is finished: {extent.begins} steps are done, and {key} asks for no more: raise it to go on, or give "
        f"--resume never to start anew{other}"
    )


def stopped(extent: Extent, number: int, step: int, world: int) -> str:
    """The line of a run that signal `number` ended after `step` steps."""
    name = signal.Signals(number).name
    if not extent.saves:
        return f"{name}: stopped after step {step} of {extent.total}; --no_save: nothing is saved"
    launcher = "python" if world == 1 else "with as many ranks,"
    return (
        f"{name}: step {step} of {extent.total} is saved in {extent.folder}: to go on, start the same command again, "
        f"or: {launcher} {extent.resume}"
    )


def closing(extent: Extent, checkpoint: Path | None, updates: int, prompt: str) -> list[str]:
    """The lines after the last iteration.

    checkpoint: the newest one, None where nothing was saved.
    updates: of the student.
    prompt: one that it knows.
    """
    done = f"finished   {max(extent.total, extent.begins)} steps"
    if checkpoint is None:
        return [f"{done}; no checkpoint was written (--no_save)"]
    raw = extent.config.ema.lag(updates) is not None  # the average is almost the student as it began
    why = ["weights    the average lags behind the student, so these commands take the raw weights"] if raw else []
    return [
        f"{done}: {checkpoint}",
        *why,
        *(f"next       {command}" for command in next_commands(extent, prompt, "raw" if raw else None)),
    ]


def next_commands(extent: Extent, prompt: str, weights: str | None) -> list[str]:
    """What to type to see, to judge and to export the student. weights: 'ema' or 'raw', None for the default."""
    config, folder = extent.config, shlex.quote(str(extent.folder))
    run = f"--run {folder}"
    if (side := expert_of(config)) is not None:  # alone it makes no video
        high, low = (folder, "LOW_NOISE_RUN") if side is Expert.high else ("HIGH_NOISE_RUN", folder)
        run = f"--run {high} --low_run {low}"
    run += "" if weights is None else f" --weights {weights}"
    geometry = config.student.geometry()
    image = " --image FILE" if geometry.first_frame is FirstFrame.channels else ""
    videos, exported = (shlex.quote(str(extent.folder / name)) for name in ("videos", "export"))
    out = [f"python inference.py {run}{image} --prompt {shlex.quote(prompt)} --out {videos}"]
    if config.data.suite == "toy":  # evaluate.py's default
        out += [f"python evaluate.py {run}"]
    elif side is None and config.is_causal and not image:
        out += [f"python demo.py {run}"]
    elif config.data.suite is not None:
        out += [f"python evaluate.py {run} --suite {config.data.suite}"]
    if config.student.family.exporter.formats:
        layout = "lora" if side is None and config.student.lora is not None else "diffusers"
        out += [f"python export.py {run} --format {layout} --out {exported}"]
    return out

"""A run's network as files that others load: `python export.py --run logs/x --format diffusers --out DIR`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.load import run_from_state
from configs.schema import RunConfig
from generation.two_experts import joined
from model.export import ADAPTER_CONFIG, SHARD_BYTES, Dtype, Exporter, Format, Pipeline
from model.family import Geometry
from model.network import NetworkConfig
from model.schedule import unshift_sigma
from model.weights import Weights
from trainer.validation import starts_from_noise
from trainer.weight_sources import lag_of, open_group
from utils import checkpoint
from utils.checkpoint_folder import read_manifest
from utils.cli import Parser, refuse_several_ranks
from utils.errors import UserError
from utils.logging import console
from utils.shards import write_file

LIBRARY = "diffusers"


@dataclass(frozen=True)
class ExportArgs:
    """What was asked for. weights: 'ema', 'raw', or None for the average where there is one."""

    run: Path
    format: str
    out: Path
    dtype: Dtype
    weights: str | None
    network: str
    shard_bytes: int | None
    low: Path | None = None  # run of the low-noise expert


@dataclass(frozen=True)
class Found:
    """One network of a checkpoint."""

    folder: Path
    group: str  # of the checkpoint
    network: NetworkConfig
    config: RunConfig
    label: str  # e.g. "student, averaged, step 600"

    @property
    def geometry(self) -> Geometry:
        return self.network.geometry()

    @property
    def exporter(self) -> Exporter:
        return self.network.family.exporter

    def weights(self) -> Weights:
        """All of them: those of an adapter with what it was trained on. Raises UserError."""
        try:
            return open_group(self.folder, self.group)
        except ValueError as problem:
            raise UserError(str(problem)) from None


def export_args(argv: Sequence[str] | None = None) -> ExportArgs:
    """Parses the command line. Raises UserError."""
    parser = Parser(prog="export.py", description="Write a run's network for others to load.")
    parser.add_argument("--run", type=Path, required=True, help="run folder, or one checkpoint")
    parser.add_argument("--low_run", type=Path, help="run of the low-noise expert, for a pipeline of both")
    parser.add_argument("--format", choices=("diffusers", "native", "lora"), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--dtype", choices=[kind.value for kind in Dtype], default="fp32", help="default: fp32")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: the average, where there is one")
    parser.add_argument("--network", default="student", help="student (default) or critic")
    parser.add_argument(
        "--shard_gb", "--shard-gb", type=float, default=SHARD_BYTES / 1e9, metavar="GB",
        help="largest file (default 5); 0 for one file whatever its size, as ComfyUI wants it",
    )  # fmt: skip
    a = parser.parse_args(argv)
    if not 0 <= a.shard_gb < float("inf"):
        raise UserError(f"--shard_gb {a.shard_gb}: give a size in GB, or 0 for one file")
    shard = int(a.shard_gb * 1e9) or None
    if a.low_run is not None and a.format != "diffusers":
        raise UserError(f"--low_run is for --format diffusers: export each run alone as {a.format}")
    return ExportArgs(
        run=a.run,
        format=a.format,
        out=a.out,
        dtype=Dtype(a.dtype),
        weights=a.weights,
        network=a.network,
        shard_bytes=shard,
        low=a.low_run,
    )


def find(run: Path, network: str, weights: str | None) -> Found:
    """A network of a run's latest checkpoint, or of one checkpoint. Raises UserError."""
    folder = None if str(run) in ("auto", "never") else checkpoint.resolve_resume(str(run), run)
    if folder is None:
        raise UserError(f"--run {run}: no run there: give a run's folder, or a checkpoint's")
    state = checkpoint.load_state(folder)
    config = run_from_state(state["config"])
    groups = checkpoint.tensor_names(folder)
    names = [name for name in ("student", "critic") if name in groups]
    if network not in names:
        raise UserError(f"--network {network}: {folder} has none of that name: choose {' or '.join(names)}")
    averaged = f"{network}_ema" in groups if weights is None else weights == "ema"
    if averaged and f"{network}_ema" not in groups:
        raise UserError(f"--weights ema: {folder} has no average of the {network}: use --weights raw")
    section: NetworkConfig | None = config.student if network == "student" else config.critic
    assert section is not None
    label = f"{network}, {'averaged' if averaged else 'raw'} weights, step {read_manifest(folder)['step']}"
    if averaged and network == "student" and (lag := lag_of(folder, "ema")):
        console.warning("--run %s: %s: choose the raw weights (--weights raw)", folder, lag)
    group = f"{network}_ema" if averaged else network
    return Found(folder, group, section, config, label)


def export(args: ExportArgs) -> Path:
    """Writes what was asked for, whole or not at all, and returns the folder. Raises UserError."""
    found = find(args.run, args.network, args.weights)
    exporter = found.exporter
    if args.format not in exporter.formats:
        known = f"only {' and '.join(exporter.formats)}" if exporter.formats else "nothing yet"
        raise UserError(f"--format {args.format}: for networks of preset {found.network.preset} there is {known}")
    if args.format == "lora":
        if args.dtype is Dtype.fp8:
            raise UserError("--dtype fp8 is for whole weights: give an adapter fp32 or bf16")
        state, alpha = lora_of(found)
        if args.dtype is Dtype.bf16:
            state = {name: value.bfloat16() for name, value in state.items()}
        return written(args.out, lambda folder: save_lora(folder, exporter, state, alpha))
    names, parts = Format(args.format), {exporter.networks[0]: found}
    config, boundary = found.config, None
    if args.low is not None:
        parts[exporter.networks[1]] = low = find(args.low, args.network, args.weights)
        config, boundary = joined(config, low.config)
    elif names is Format.DIFFUSERS and config.few_steps and not starts_from_noise(config):
        raise UserError(
            f"--run {args.run}: a low-noise expert makes no pipeline alone: give it as --low_run beside the high one's "
            "--run, or use --format native"
        )
    weights = {name: part.weights() for name, part in parts.items()}

    def write(folder: Path) -> None:
        if names is Format.NATIVE:
            exporter.save(folder, weights[exporter.networks[0]], found.geometry, names, args.dtype, args.shard_bytes)
            return
        for name, values in weights.items():
            exporter.save(folder / name, values, found.geometry, names, args.dtype, args.shard_bytes)
        (folder / "scheduler").mkdir()
        _json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config))
        _json(folder / "model_index.json", model_index(config, exporter.pipeline(found.geometry, boundary)))
        (folder / "README.md").write_text(card(replace(found, config=config)))

    return written(args.out, write)


def written(out: Path, write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a temporary folder beside `out`, then gives it that name. Raises UserError for an `out` that is
    not new or empty, or cannot be written; then nothing is left behind."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: it is there already: give a new folder, or delete it")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        write(temporary)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's are the owner's alone
        os.rename(temporary, out)
    except OSError as problem:
        raise UserError(
            f"--out {out}: {problem.strerror or problem}: free some space, or give another folder"
        ) from None
    except ValueError as problem:
        raise UserError(str(problem)) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed
    return out


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------- Diffusers


def scheduler_config(config: RunConfig) -> dict[str, Any]:
    """Diffusers' scheduler of the run."""
    return config.student.family.exporter.scheduler(config.schedule.timestep_shift, few_steps=config.few_steps)


def scheduler_sigmas(config: RunConfig) -> list[float]:
    """The student's steps as that scheduler's `set_timesteps(sigmas=...)` takes them: it applies its shift to them."""
    shift = config.schedule.timestep_shift
    return [unshift_sigma(sigma, shift) for sigma in config.schedule.sigmas()]


def model_index(config: RunConfig, pipeline: Pipeline) -> dict[str, Any]:
    """The pipeline's parts: those that are not exported are passed to `from_pretrained`."""
    scheduler = scheduler_config(config)["_class_name"]
    return {"_class_name": pipeline.name, "scheduler": [LIBRARY, scheduler], **pipeline.index}


def card(found: Found) -> str:
    """README.md of an exported folder: what it is, and the lines that load and sample it as the run does."""
    config, made = found.config, found.exporter.pipeline(found.geometry, None)
    pipeline, image = made.name, "image=IMAGE, " if made.takes_image else ""
    without = ", ".join(f"{name}=None" for name in found.exporter.networks)
    lines = [
        f"# {config.name}",
        "",
        f"Exported by fewstep: {found.label}.",
        "",
        "```python",
        f"from diffusers import {pipeline}",
        f'base = "{made.base}"  # whichever has the text encoder and VAE of this model',
        f"parts = {pipeline}.from_pretrained(base, {without})",
        f"others = dict({', '.join(f'{name}=parts.{name}' for name in made.parts)})",
        f"pipe = {pipeline}.from_pretrained(DIR, **others)",
    ]
    if config.few_steps:
        sigmas = scheduler_sigmas(config)
        lines += [
            "from functools import partial",
            f"steps = {[round(sigma, 9) for sigma in sigmas]}",
            "pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=steps)",
            f"pipe({image}prompt=PROMPT, num_inference_steps={len(sigmas)}, guidance_scale=1.0)",
        ]
    else:
        lines += [f"pipe({image}prompt=PROMPT, guidance_scale={config.validation.guidance})"]
    lines += ["```"]
    if made.note:
        lines += ["", made.note]
    if config.is_causal:
        lines += ["", "It was trained to generate block by block; this pipeline denoises all frames at once."]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------- LoRA


def lora_of(found: Found) -> tuple[dict[str, Tensor], float]:
    """(adapter under native names, `blocks.0.self_attn.q.lora_A.weight`; alpha) of a network that is one. Raises
    UserError for any other."""
    lora = found.network.lora
    if lora is None:
        raise UserError(
            f"--format lora: {found.folder} trained all weights, and has no adapter: use --format diffusers or native"
        )
    stored = checkpoint.StoredGroup(found.folder, found.group)
    return dict(stored.read(stored.shapes)), lora.scale * lora.rank


def save_lora(folder: Path, exporter: Exporter, state: Mapping[str, Tensor], alpha: float) -> None:
    """An adapter alone: `pytorch_lora_weights.safetensors` for Diffusers, and `peft/` for PEFT. Raises ValueError."""
    weights = {name: value.contiguous() for name, value in exporter.lora_to_diffusers(state, alpha).items()}
    write_file(folder / "pytorch_lora_weights.safetensors", weights)
    (folder / "peft").mkdir()
    adapter, config = exporter.lora_to_peft(state, alpha)
    write_file(folder / "peft" / "adapter_model.safetensors", {k: v.contiguous() for k, v in adapter.items()})
    _json(folder / "peft" / ADAPTER_CONFIG, config)


def main() -> int:
    args = export_args()
    refuse_several_ranks("export.py")
    out = export(args)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{args.format} in {args.dtype.value}, {size / 1e9:.2f} GB -> {out}")
    return 0

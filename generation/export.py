"""A run's network as files that others load: `python export.py --run logs/x --format diffusers --out DIR`."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.experts import expert_of
from configs.schema import RunConfig
from generation.adapters import comfyui_file, save_lora, trained_adapter
from generation.base import Base, base_of, sources_of
from generation.card import CARD, Exported, card, metadata, scheduler_config
from generation.extracted import (
    EXTRACTED_RANK,
    adapter_of,
    base_network,
    card_of_files,
    extracted,
    network_of_files,
    say,
)
from generation.find import Found, find
from generation.push import Push, check_push, push
from generation.two_experts import joined
from model.export import SHARD_BYTES, Dtype, Format, LoraNames, Pipeline
from model.extraction import Extraction
from model.network import Expert, NetworkConfig
from utils.cli import Parser, refuse_several_ranks
from utils.errors import UserError
from utils.limits import RANK
from utils.writing import whole_folder, writing

LIBRARY = "diffusers"
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a repository
Writer = Callable[[Path], Extraction | None]  # fills a folder, and tells what it holds of a difference
_OF_A_RUN = ("low_run", "format", "base", "licence", "names", "rank")  # options
LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class ExportArgs:
    """What was asked for.

    run: the run, None for `model`, or to push `out` as it is.
    format: "diffusers", "native" or "lora"; empty without a run.
    out: the folder.
    dtype: in which weights are stored.
    weights: "ema", "raw", or None for the average where there is one.
    network: "student" or "critic".
    shard_bytes: the most that a file holds, None for one file.
    low: run of the low-noise expert.
    base: repository of the base model, where the run does not say it; for an adapter of a run that trained all weights
        what is subtracted: a file, a folder, a run or a repository.
    licence: of what is exported, None for the base model's.
    push: where to upload it, None for nowhere.
    names: whose names an adapter gets.
    rank: of an adapter that is extracted, None for `EXTRACTED_RANK`.
    model: weights of no run, from which `base` is subtracted.
    """

    run: Path | None
    format: str
    out: Path
    dtype: Dtype
    weights: str | None
    network: str
    shard_bytes: int | None
    low: Path | None = None
    base: str | None = None
    licence: str | None = None
    push: Push | None = None
    names: LoraNames = LoraNames.diffusers
    rank: int | None = None
    model: str | None = None


def export_args(argv: Sequence[str] | None = None) -> ExportArgs:
    """Parses the command line. Raises UserError."""
    parser = Parser(prog="export.py", description="Write a run's network for others to load, and upload it.")
    parser.add_argument(
        "--run",
        type=Path,
        help="run folder, or one checkpoint: required (no default), but for --push of an --out",
    )
    parser.add_argument(
        "--model", metavar="B", help="weights of no run, for --format lora --base A: a file, a folder or owner/name"
    )
    parser.add_argument("--low_run", type=Path, help="run of the low-noise expert, for both in one export")
    parser.add_argument("--format", choices=("diffusers", "native", "lora"), help="required with --run, no default")
    names = [kind.value for kind in LoraNames]
    parser.add_argument("--names", choices=names, help="whose names --format lora writes (default: diffusers)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--dtype", choices=[kind.value for kind in Dtype], default="fp32", help="default: fp32")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: the average, where there is one")
    parser.add_argument("--network", default="student", help="student (default) or critic")
    parser.add_argument(
        "--shard_gb", "--shard-gb", type=float, default=SHARD_BYTES / 1e9, metavar="GB",
        help="largest file (default 5); 0 for one file whatever its size, as ComfyUI wants it",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="A", help="base model on the Hub, owner/name (default: what the run began from); for "
        "--format lora of a run that trained all weights what is subtracted: a file, a folder, a run or owner/name",
    )  # fmt: skip
    rank_help = f"of the adapter that --format lora --base A extracts (default: {EXTRACTED_RANK})"
    parser.add_argument("--rank", type=int, help=rank_help)
    parser.add_argument("--licence", metavar="NAME", help="of what is exported (default: the base model's)")
    parser.add_argument("--push", metavar="owner/name", help="upload DIR to this repository of the Hub, made private")
    parser.add_argument("--public", action="store_true", help="make the repository of --push public")
    a = parser.parse_args(argv)
    if not 0 <= a.shard_gb < float("inf"):
        raise UserError(f"--shard_gb {a.shard_gb}: give a size in GB, or 0 for one file")
    if a.public and a.push is None:
        raise UserError("--public is for --push: say where to")
    if a.model is not None:
        _check_model(a)
    _check_names(None if a.format == "lora" else a.base, a.licence, a.push)
    if a.run is None and a.model is None and a.push is None:
        raise UserError("--run is missing: give a run's folder")
    if a.run is not None and a.format is None:
        raise UserError("--format is missing: choose diffusers, native or lora")
    if a.run is None and a.model is None and (unused := [n for n in _OF_A_RUN if getattr(a, n) is not None]):
        raise UserError(f"--{unused[0]} is for an export of --run: without one, --push uploads --out as it is")
    _check_adapter(a)
    return ExportArgs(
        run=a.run,
        format=a.format or "",
        out=a.out,
        dtype=Dtype(a.dtype),
        weights=a.weights,
        network=a.network,
        shard_bytes=int(a.shard_gb * 1e9) or None,
        low=a.low_run,
        base=a.base,
        licence=a.licence,
        push=None if a.push is None else Push(a.push, a.public),
        names=LoraNames(a.names or "diffusers"),
        rank=a.rank,
        model=a.model,
    )


def _check_model(a: Namespace) -> None:
    if a.run is not None:
        raise UserError("--model and --run are two networks: give one of them")
    if a.format != "lora" or a.base is None:
        raise UserError("--model is what --format lora subtracts --base A from: give both")
    if a.network != "student":
        raise UserError("--network is of a --run: --model is a network by itself")


def _check_adapter(a: Namespace) -> None:
    """What goes with --format lora and with no other."""
    if a.low_run is not None and a.format == "lora":
        raise UserError("--low_run is for --format diffusers or native: export each adapter alone")
    if a.names is not None and a.format != "lora":
        raise UserError("--names is for --format lora: the other formats have names of their own")
    if a.rank is not None and (a.format != "lora" or a.base is None):
        raise UserError("--rank is of an adapter that is extracted: give --format lora and --base A with it")
    if a.rank is not None and not 1 <= a.rank <= RANK:
        raise UserError(f"--rank {a.rank}: give a whole number from 1 to {RANK}")


def _check_names(base: str | None, licence: str | None, repo: str | None) -> None:
    for option, name in (("--base", base), ("--push", repo)):
        if name is not None and not NAME.fullmatch(name):
            raise UserError(f"{option} {name}: give a repository of the Hub as owner/name")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(f"--licence {licence}: give one name, as the Hub lists them: apache-2.0, mit, other")


def export(args: ExportArgs) -> Path:
    """Writes what was asked for, whole or not at all, and returns the folder. Raises UserError."""
    assert args.run is not None
    found = find(args.run, args.network, args.weights)
    exporter = found.exporter
    if args.format not in exporter.formats:
        known = f"only {' and '.join(exporter.formats)}" if exporter.formats else "nothing yet"
        raise UserError(f"--format {args.format}: for networks of preset {found.network.preset} there is {known}")
    parts, boundary = {exporter.networks[0]: found}, None
    if args.low is not None:
        parts[exporter.networks[1]] = low = find(args.low, args.network, args.weights)
        config, boundary = joined(found.config, low.config)
        found = replace(found, config=config)
    elif args.format == "diffusers" and (side := expert_of(found.config)) is not None:
        pair = "give it as --low_run beside the high one's --run"
        pair = pair if side is Expert.low else "give the low one's run as --low_run"
        raise UserError(
            f"--run {args.run}: a {side}-noise expert makes no pipeline alone: {pair}, or use --format native"
        )
    if args.format == "lora":
        _check_lora(args, found)
    exported = described(args, found, tuple(parts.values()), boundary)
    write = adapter_writer(args, exported) if args.format == "lora" else weights_writer(args, exported, parts)

    def whole(folder: Path) -> None:
        extraction = write(folder)
        (folder / CARD).write_text(card(replace(exported, extraction=extraction)))

    return written(args.out, whole)


def _check_lora(args: ExportArgs, found: Found) -> None:
    """Raises UserError for what does not go with a network's adapter."""
    if args.dtype is Dtype.fp8:
        raise UserError("--dtype fp8 is for whole weights: give an adapter fp32 or bf16")
    if (lora := found.network.lora) is None:
        return
    _check_names(args.base, None, None)
    if args.rank is not None:
        raise UserError(f"--rank {args.rank}: {found.folder} trained an adapter of rank {lora.rank}: leave it out")


def export_difference(args: ExportArgs) -> Path:
    """The difference of stored weights from others as an adapter, whole or not at all. Raises UserError."""
    assert args.model is not None
    assert args.base is not None
    if args.dtype is Dtype.fp8:
        raise UserError("--dtype fp8 is for whole weights: give an adapter fp32 or bf16")
    base, name = args.base, args.out.resolve().name
    network, weights = network_of_files(args.model, args.weights)
    exporter = network.family.exporter
    if "lora" not in exporter.formats:
        raise UserError(f"--format lora: for networks of preset {network.preset} there is no adapter")
    (before,), known = _base_of_difference(network, base)
    licence = args.licence or (known.pop() if len(known) == 1 else None)
    if licence is None and args.push is not None:
        raise UserError(f"--push: the licence is unknown ({before.told().rstrip('.')}): give --licence NAME")
    for_comfyui = args.names is LoraNames.comfyui
    pipeline = exporter.pipeline(network.geometry(), None)

    def whole(folder: Path) -> None:
        extraction = extracted(weights, network, base, args.rank or EXTRACTED_RANK, args.dtype)
        say(extraction, args.names)
        save_lora(folder, exporter, adapter_of(extraction), args.dtype, comfyui_file(name) if for_comfyui else None)
        head = metadata((before,), licence, "adapter", pipeline, of_diffusers=not for_comfyui)
        page = card_of_files(name, base_of(network), before, pipeline, extraction, args.names, head)
        (folder / CARD).write_text(page)

    return written(args.out, whole)


def described(args: ExportArgs, found: Found, parts: Sequence[Found], boundary: float | None) -> Exported:
    """What the card says. Raises UserError where it is to be pushed, and no licence is known."""
    bases = tuple(base_of(part.network, args.base) for part in parts)
    known = {base.licence for base in bases}
    if subtracted := _subtracted(args, found):
        bases, known = _base_of_difference(found.network, subtracted)
    licence = args.licence or (known.pop() if len(known) == 1 else None)
    if licence is None and args.push is not None:
        remedy = bases[0].remedy(sources_of(found.network))
        raise UserError(f"--push: the licence is unknown ({bases[0].told().rstrip('.')}): {remedy}")
    return Exported(found, args.format, args.dtype, bases, boundary, licence, args.out.resolve().name, args.names)


def _base_of_difference(network: NetworkConfig, base: str) -> tuple[tuple[Base], set[str | None]]:
    """(what an extracted adapter lies on, the licences of that and of what it was subtracted from)."""
    stated = base if NAME.fullmatch(base) and not Path(base).exists() else None
    before = base_of(base_network(network, base))
    return (before,), {before.licence, base_of(network, stated).licence}


def _subtracted(args: ExportArgs, found: Found) -> str | None:
    """The base whose difference is to be written as an adapter, None for any other export."""
    return args.base if args.format == "lora" and found.network.lora is None else None


def adapter_writer(args: ExportArgs, exported: Exported) -> Writer:
    """What writes the adapter into a folder, and gives what it holds of a difference. Raises UserError."""
    found = exported.found
    file = comfyui_file(exported.name) if args.names is LoraNames.comfyui else None
    base = _subtracted(args, found)
    trained = None if base is not None else trained_adapter(found)

    def write(folder: Path) -> Extraction | None:
        if trained is not None:
            save_lora(folder, found.exporter, trained, args.dtype, file)
            return None
        assert base is not None
        extraction = extracted(found.weights(), found.network, base, args.rank or EXTRACTED_RANK, args.dtype)
        say(extraction, args.names)
        save_lora(folder, found.exporter, adapter_of(extraction), args.dtype, file)
        return extraction

    return write


def weights_writer(args: ExportArgs, exported: Exported, parts: Mapping[str, Found]) -> Writer:
    """What writes the weights into a folder. parts: the networks by their folders in a pipeline. Raises UserError."""
    found, exporter, names = exported.found, exported.found.exporter, Format(args.format)
    weights = {name: part.weights() for name, part in parts.items()}
    if names is Format.NATIVE:
        folders = dict(zip(weights, exporter.experts if len(weights) > 1 else (".",), strict=True))
    else:
        folders = {name: name for name in weights}

    def write(folder: Path) -> None:
        for name, values in weights.items():
            exporter.save(folder / folders[name], values, found.geometry, names, args.dtype, args.shard_bytes)
        if names is Format.DIFFUSERS:
            (folder / "scheduler").mkdir()
            _json(folder / "scheduler" / "scheduler_config.json", scheduler_config(found.config))
            _json(folder / "model_index.json", model_index(found.config, exported.pipeline))

    return write


def written(out: Path, write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a temporary folder beside `out`, then gives it that name. Raises UserError for an `out` that is
    not new or empty, or cannot be written; then nothing is left behind."""
    with writing("--out", out):
        is_taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_taken:
        raise UserError(f"--out {out}: it is there already: give a new folder, or delete it")
    try:
        with whole_folder(out, "--out") as temporary:
            write(temporary)
    except UserError:
        raise
    except ValueError as problem:
        raise UserError(str(problem)) from None
    return out


def _json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def model_index(config: RunConfig, pipeline: Pipeline) -> dict[str, Any]:
    """The pipeline's parts: those that are not exported are passed to `from_pretrained`."""
    scheduler = scheduler_config(config)["_class_name"]
    return {"_class_name": pipeline.name, "scheduler": [LIBRARY, scheduler], **pipeline.index}


def main() -> int:
    args = export_args()
    refuse_several_ranks("export.py")
    if args.push is not None:
        check_push(args.push)
    out = args.out
    if args.run is not None or args.model is not None:
        out = export(args) if args.run is not None else export_difference(args)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        print(f"{args.format} in {args.dtype.value}, {size / 1e9:.2f} GB -> {out}")
    if args.push is not None:
        print(f"{out} -> {push(out, args.push)}")
    return 0

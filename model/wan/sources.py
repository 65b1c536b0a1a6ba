"""Where weights lie: a file, a folder, a pipeline's folder with one or two experts, or a repository of the Hub.

Nothing is read here but names, headers and config.json: tensors are mapped, and read when they are asked for.
"""

from __future__ import annotations

import functools
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.hub import hub_name, snapshot
from model.weights import Stored, real_numbers
from utils.absent import absent
from utils.errors import UserError
from utils.limits import check_size
from utils.reading import read_json, reading
from utils.shards import named_dtype

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
LAYERS = "_quantization_metadata"  # of a safetensors header: ComfyUI's word on each layer that it stores in fewer bits
# folders of the experts of Wan2.2 A14B, which split the noise levels: Diffusers' names, Wan's own
EXPERTS = {"high": ("transformer", "high_noise_model"), "low": ("transformer_2", "low_noise_model")}
# what else lies beside Wan's own DiT as a torch file
OTHER_MODELS = re.compile(r"models_t5|models_clip|VAE|vae")

# groups of a Self-Forcing, CausVid or LongLive checkpoint by `which`, the first that is there
LORA_GROUP, CRITIC_LORA = "generator_lora", "critic_lora"  # adapters, each of which may be alone
GROUPS = {"ema": ("generator_ema", "generator"), "raw": ("generator",), "critic": ("critic",), "lora": (LORA_GROUP,)}
KNOWN_GROUPS = {name for names in GROUPS.values() for name in names} | {CRITIC_LORA}
NESTED = ("state_dict", "model", "module", "model_state_dict")


# --------------------------------------------------------------------------------------------------------------- where


def located(path: str | Path, expert: str | None = None) -> Path:
    """The file or folder that holds the weights themselves, fetched from the Hub if it has to be.

    path: a file, a folder of weights, a pipeline's folder, or `owner/name[@revision][/path inside]` on the Hub.
    expert: 'high' or 'low' of a model with two. Raises ValueError in one line.
    """
    if expert is not None and expert not in EXPERTS:
        raise ValueError(f"expert '{expert}' is unknown: choose high or low (noise)")
    if (hub := hub_name(path)) is None:
        return within(Path(path), expert)
    return _fetched(hub["repo"], hub["revision"], hub["inside"], expert)


def within(folder: Path, expert: str | None) -> Path:
    """The part of a pipeline's folder that is the DiT; any other path as it is. Raises ValueError."""
    if not folder.is_dir():
        return folder
    found = {
        which: next((folder / name for name in names if (folder / name).is_dir()), None)
        for which, names in EXPERTS.items()
    }
    high, low = found["high"], found["low"]
    if expert is not None and (high or low):
        chosen = found[expert]
        if chosen is None:
            raise ValueError(f"'{folder}' has one network, no {' or '.join(EXPERTS[expert])}: leave the expert out")
        return chosen
    if high and low:
        raise ValueError(
            f"'{folder}' has two experts: give {folder}/{high.name} (high noise) or {folder}/{low.name} (low noise)"
        )
    return high or low or folder


def _fetched(repo: str, revision: str | None, inside: str | None, expert: str | None) -> Path:
    if inside is not None:
        beside = str(Path(inside).parent / "config.json")
        root = snapshot(repo, revision, [inside, f"{inside}/*", beside])
        return within(root / inside, expert)
    # the layout first, from files of a few bytes: a pipeline also holds a text encoder of 20 GB
    root = snapshot(repo, revision, ["*config.json", "model_index.json"])
    part = within(root, expert).relative_to(root)
    patterns = ["config.json", "diffusion_pytorch_model*"] if part == Path() else [f"{part}/*"]
    return snapshot(repo, revision, patterns) / part


def config_file(path: Path) -> Path | None:
    """The config.json of located weights, if there is one."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return file if file.is_file() else None


def weight_files(path: str | Path) -> list[Path]:
    """One file, or of a folder its shards as an index.json lists them, else its only file.

    Raises ValueError when there is nothing to read, a shard is missing, or shards of two models lie there.
    """
    path = Path(path)
    if path.is_file() and path.suffix in (".safetensors", *TORCH_SUFFIXES):
        return [path]
    if not path.exists():
        raise ValueError(f"no weights at '{path}': it {absent(path)}: doctor.py says how to get what a recipe names")
    if path.suffix == ".gguf":
        refuse_stand_in(path)
    if not path.is_dir():
        raise ValueError(
            f"no weights at '{path}': give a .safetensors, .pt or .pth file, a folder of them, or a run's folder"
        )
    kinds = {
        "safetensors": (path.glob("*.safetensors"), path.glob("*.safetensors.index.json")),
        "torch": (
            (file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES and not OTHER_MODELS.search(file.name)),
            (file for suffix in TORCH_SUFFIXES for file in path.glob(f"*{suffix}.index.json")),
        ),
    }
    found = {kind: (sorted(files), sorted(indices)) for kind, (files, indices) in kinds.items()}
    files, indices = found["safetensors" if any(found["safetensors"]) or not any(found["torch"]) else "torch"]
    if len(indices) == 1:
        return _shards(indices[0], files)
    if len(files) != 1 or indices:
        name = TORCH_SUFFIXES[0] if files and files[0].suffix in TORCH_SUFFIXES else ".safetensors"
        raise ValueError(f"'{path}' has {len(files)} {name} files and {len(indices)} index files: name one file")
    return files


def _shards(index: Path, found: list[Path]) -> list[Path]:
    listed = sorted(set(weight_map(index).values()))
    files = [index.parent / name for name in listed]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.name} in '{index.parent}' names {missing[0]}, which is not there: fetch all shards")
    of_shards = re.compile(r"-\d+-of-\d+\.")
    if strangers := [file.name for file in found if of_shards.search(file.name) and file not in files]:
        raise ValueError(
            f"'{index.parent}' also holds {strangers[0]}, which {index.name} does not name: shards of two models are "
            "mixed; fetch one of them into a new folder"
        )
    return files


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) < 256 and Path(name).name == name


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file of an index.json. Raises ValueError."""
    found = read_json("index of shards", index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(map(_is_file_name, found.values())):
        raise ValueError(f"'{index}' is no index of shards: fetch it again")
    return found


# ---------------------------------------------------------------------------------------------------------------- open


def open_tensors(path: str | Path, which: str = "ema") -> dict[str, Stored]:
    """Every tensor of located weights under its stored name. which: group of a file that has several (see GROUPS).

    Raises ValueError.
    """
    out: dict[str, Stored] = {}
    files = weight_files(path)
    for file in files:
        part = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file, which)
        if len(files) > 1:
            _check_shard(file, part, out)
        out |= part
    return out


def _check_shard(file: Path, part: Mapping[str, Stored], others: Mapping[str, Stored]) -> None:
    index = next(file.parent.glob("*.index.json"))
    listed = {key for key, name in weight_map(index).items() if name == file.name}
    if differing := sorted(listed ^ part.keys()) or sorted(part.keys() & others.keys()):
        raise ValueError(
            f"{file.name} does not hold what {index.name} says ({len(differing)} names differ, first "
            f"{differing[0]}): shards of two models are mixed; fetch them again"
        )


def _open_safetensors(file: Path) -> dict[str, Stored]:
    refuse_stand_in(file)
    with reading("weights", file):
        opened = safe_open(file, framework="pt")
        views = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        kinds = {key: (tuple(view.get_shape()), named_dtype(view.get_dtype())) for key, view in views.items()}

    def raw(key: str) -> Tensor:
        with reading("weights", file):
            return opened.get_tensor(key)  # type: ignore[no-any-return]

    def read(key: str) -> Tensor:
        return real_numbers(raw(key), f"{file}: {key}")

    return {
        key: Stored(shape, functools.partial(read, key), dtype, functools.partial(raw, key))
        for key, (shape, dtype) in kinds.items()
    }


def layer_formats(path: str | Path) -> dict[str, str]:
    """How layers are stored in eight bits or fewer, as ComfyUI says it in the header: JSON by the layer's stored name.
    Raises ValueError."""
    out: dict[str, str] = {}
    for file in weight_files(path):
        if file.suffix != ".safetensors":
            continue
        with reading("weights", file), safe_open(file, framework="pt") as opened:
            layers = json.loads((opened.metadata() or {}).get(LAYERS, "{}")).get("layers", {})
            out |= {name: json.dumps(layer) for name, layer in layers.items()}
    return out


def refuse_stand_in(file: Path) -> None:
    """Raises ValueError for a file that stands where weights should be."""
    with reading("weights", file), file.open("rb") as opened:
        begins = opened.read(64)
    if begins.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{file} is a pointer of git-lfs and not the file: run git lfs pull there, or fetch it with hf download"
        )
    if begins.startswith(b"GGUF"):
        raise ValueError(f"{file} is a GGUF file, whose packed blocks are not read: take the bf16 or fp8 file")


def groups_of(path: str | Path) -> frozenset[str]:
    """The groups (see GROUPS) that located weights have; none for a file of one network. Raises ValueError, OSError."""
    files = weight_files(path)
    if len(files) != 1 or files[0].suffix == ".safetensors":
        return frozenset()
    state = read_torch(files[0])
    return frozenset(KNOWN_GROUPS & state.keys()) if isinstance(state, dict) else frozenset()


def read_torch(file: Path) -> Any:
    """What a torch file holds, its tensors mapped. Raises ValueError for anything but tensors and plain values."""
    remedy = "fetch it again; one of a torch before 1.6 load and save anew"
    refuse_stand_in(file)
    with reading("weights", file, remedy, says="cannot be mapped"):
        check_archive(file)
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"{file} is damaged, or holds objects besides tensors, which could run code: save its state_dict alone"
            ) from None


def check_archive(file: Path) -> None:
    """Raises UserError for a torch file whose members are packed, or whose part that is no tensor is too large; other
    errors for one that is no archive. torch packs no members, and unpacks what it finds without a limit."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(
                    f"{file}: its member {member.filename} is packed and asks for {member.file_size} bytes: torch "
                    "packs nothing: fetch it again"
                )
            if member.filename.endswith(".pkl"):
                check_size("pickle", member.file_size, f"{file}: {member.filename}")


def check_tensor(value: Tensor, where: str) -> None:
    """Raises UserError for a tensor that is no plain array of numbers."""
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "quantised" if value.is_quantized else "without numbers (meta)" if value.is_meta else "sparse"
        raise UserError(f"{where} is {kind}: save it as a plain tensor")


def _open_torch(file: Path, which: str) -> dict[str, Stored]:
    state = _group(read_torch(file), which)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file.name} holds no state_dict of tensors: give a file saved from one")
    out: dict[str, Stored] = {}
    for key, value in state.items():
        where = f"{file}: {key}"
        check_tensor(value, where)
        out[str(key)] = Stored(
            tuple(value.shape),
            functools.partial(real_numbers, value, where),
            value.dtype,
            functools.partial(torch.Tensor.detach, value),
        )
    return out


def _group(state: Any, which: str) -> Any:
    """The network that is asked for, of a checkpoint that may hold several."""
    if not isinstance(state, dict):
        return state
    if groups := KNOWN_GROUPS & state.keys():
        found = next((name for name in GROUPS[which] if name in state), None)
        if LORA_GROUP in groups <= {LORA_GROUP, CRITIC_LORA}:  # whoever wanted a network says that this is none
            found = LORA_GROUP
        if found is None:
            raise ValueError(f"the file has no {GROUPS[which][0]}: it has {', '.join(map(str, state))}")
        return _group(state[found], which)
    if inner := next((name for name in NESTED if isinstance(state.get(name), dict)), None):
        return _group(state[inner], which)
    return state

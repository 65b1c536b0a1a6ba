"""LoRA files (arXiv 2106.09685): read under any of the usual names and added to base weights; named for others.

W' = W + scale * alpha / rank * up @ down, with down [r, in] and up [out, r]; those of the patch embedding are 5-D.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.export import ADAPTER_CONFIG
from model.merged import Change
from model.wan.formats import to_diffusers_key, to_native_key, unwrapped
from model.wan.sources import CRITIC_LORA, LORA_GROUP, groups_of, located, open_tensors, weight_files
from model.weights import Shapes, State, Stored
from utils.logging import warn
from utils.reading import read_json, reading

# trainers' names of the same two matrices, an adapter's name perhaps between them and the leaf
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.\w+)?\.(?P<leaf>weight|bias)"
)
_OTHER = re.compile(r"(?P<module>.+)\.(?P<part>alpha|diff|diff_b|diff_m)")
_DOWN = ("lora_A", "lora_down", "lora.down")
_JOINED = ("lora_unet_", "lora_transformer_")  # before names whose dots may be underscores
_PATCH = "patch_embedding"
_PEFT = "base_model.model."
_COMFYUI = "diffusion_model."
_EXPERTS = {"transformer.": "high", "transformer_2.": "low"}
# other kinds of adapters, by the names of their factors
_KINDS = {"DoRA": ("dora_scale", "lora_magnitude_vector"), "LoKr": ("lokr_w",), "LoHa": ("hada_w",)}
# what only networks with CLIP tokens have: adapters made on one are laid over others, too
_OF_IMAGES = re.compile(r"blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)|img_emb\.proj\.\d+|img_emb")


class LoraFile:
    """The changes of one LoRA by the native name of the module, e.g. `blocks.0.self_attn.q`.

    What only networks have that see an image is left out over weights of one that does not, with one warning.

    path: a file, a PEFT folder, or `owner/name/file` on the Hub.
    shapes: of the base, by native names.
    expert: 'high' or 'low' where the file has changes for both.

    Raises ValueError in one line for what is no LoRA, or of a kind that is not supported.
    """

    def __init__(self, path: str | Path, shapes: Shapes, expert: str | None = None) -> None:
        self.path = path
        try:
            place = located(path)
            stored = _of_expert(open_tensors(_adapter(place), "lora"), expert)
            if groups_of(_adapter(place)) >= {LORA_GROUP, CRITIC_LORA}:
                warn(f"{path} holds two adapters: the generator's is taken, and {CRITIC_LORA} is left out")
            self.alphas = _stated_alphas(place)
            found = _changes(stored, {name.rpartition(".")[0] for name in shapes})
            left_out = [name for name, change in found.items() if _is_for_images(name, change, shapes)]
            self.changes = {name: change for name, change in found.items() if name not in left_out}
            if left_out:
                warn(
                    f"{path}: {len(left_out)} of {len(found)} changes are left out: they are of a network that sees an "
                    f"image, and these weights are not ({', '.join(left_out[:3])})"
                )
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None

    def factor(self, module: str, change: Change) -> float:
        """alpha / rank of a module (alpha / sqrt(rank) where the file says rslora); 1 where the file says nothing."""
        assert change.down is not None
        rank = change.down.shape[0]
        if change.alpha is not None:
            with reading("LoRA", self.path):
                return float(change.alpha.read()) / rank
        if self.alphas is None:
            return 1.0
        alpha = next(
            (value for name, value in self.alphas["pattern"].items() if name.search(to_diffusers_key(module))),
            self.alphas["alpha"],
        )
        return float(alpha) / (math.sqrt(rank) if self.alphas["rslora"] else rank)


# ---------------------------------------------------------------------------------------------------------------- read


def _adapter(place: Path) -> Path:
    """The weights in a PEFT folder, or a folder as Diffusers saves them."""
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if place.is_dir() and (place / name).is_file():
            return place / name
    return place


def _of_expert(stored: dict[str, Stored], expert: str | None) -> dict[str, Stored]:
    present = {prefix for prefix in _EXPERTS if any(key.startswith(prefix) for key in stored)}
    if present == {"transformer_2."} and expert == "high":
        raise ValueError("the LoRA is the low-noise expert's: give it to that one (inference.py: --low_lora)")
    if len(present) < 2:
        return stored
    if expert is None:
        raise ValueError("the LoRA has changes for two experts: say which, high or low")
    return {
        key: value
        for key, value in stored.items()
        if not key.startswith(tuple(present)) or _EXPERTS[key.split(".")[0] + "."] == expert
    }


def _changes(stored: Mapping[str, Stored], modules: Iterable[str]) -> dict[str, Change]:
    joined = {f(name).replace(".", "_"): name for name in modules for f in (str, to_diffusers_key)}
    out: dict[str, Change] = {}
    unknown = []
    for key, value in stored.items():
        match = _FACTOR.fullmatch(key) or _OTHER.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        part = match["part"]
        module = _module(match["module"], joined)
        # diff_m: LightX2V's name for the difference of a block's, or the head's, modulation
        module, part = (f"{module}.modulation", "diff") if part == "diff_m" else (module, part)
        change = out.setdefault(module, Change())
        if part == "diff_b" or match.groupdict().get("leaf") == "bias":
            change.bias.append(value)
        else:
            setattr(change, "down" if part in _DOWN else part if part in ("alpha", "diff") else "up", value)
    for kind, parts in _KINDS.items():
        if of_kind := [key for key in stored if any(f".{part}" in key for part in parts)]:
            raise ValueError(f"it is a {kind} ({of_kind[0]}), which is not read: merge it where it was trained")
    if unknown or not out:
        raise ValueError(
            f"{len(unknown)} names are not a LoRA's ({', '.join(unknown[:3])}): give a file of LoRA alone"
            if out
            else f"no LoRA: it has no names like {unknown[:2]} with lora_A or lora_down"
        )
    for module, change in out.items():
        try:
            change.shape()
        except ValueError as problem:
            raise ValueError(f"{module} {problem}: the file is not whole") from None
    return out


def _module(name: str, joined: Mapping[str, str]) -> str:
    """A module's native name."""
    if prefix := next((prefix for prefix in _JOINED if name.startswith(prefix)), None):
        return joined.get(name.removeprefix(prefix).lstrip("_").replace(".", "_"), name)
    name = name.removeprefix(_PEFT)
    for prefix in _EXPERTS:
        name = name.removeprefix(prefix)
    return to_native_key(unwrapped(name))


def _is_for_images(module: str, change: Change, shapes: Shapes) -> bool:
    """Whether a change is of what only networks have that see an image, and these weights are of one that does not."""
    if _OF_IMAGES.fullmatch(module):
        return f"{module}.weight" not in shapes
    base = shapes.get(f"{_PATCH}.weight", ())
    theirs = change.diff.shape if change.diff is not None else ()
    return module == _PATCH and len(base) == len(theirs) == 5 and theirs[1] > base[1] and theirs[0] == base[0]


def _stated_alphas(place: Path) -> dict[str, Any] | None:
    """What PEFT's adapter_config.json, or the metadata that Diffusers writes, says of alpha; None where neither is."""
    folder = place if place.is_dir() else place.parent
    if (folder / ADAPTER_CONFIG).is_file():
        place = folder / ADAPTER_CONFIG
        values = read_json("LoRA", place)
    else:
        file = weight_files(_adapter(place))[0]
        if file.suffix != ".safetensors":
            return None
        with reading("LoRA", file), safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
            values = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    if "lora_alpha" not in values:
        return None
    if values.get("use_dora"):
        raise ValueError("DoRA is not supported: merge it where it was trained")
    with reading("LoRA", place, "its lora_alpha and alpha_pattern must be numbers, its names regular expressions"):
        patterns = dict(values.get("alpha_pattern") or {})
        return {
            "alpha": _alpha(values["lora_alpha"]),
            "pattern": {re.compile(rf"(^|\.){name}$"): _alpha(value) for name, value in patterns.items()},
            "rslora": bool(values.get("use_rslora")),
        }


def _alpha(value: Any) -> float:
    """Raises ValueError unless it is a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"alpha {value!r} is no finite number")
    return float(value)


# --------------------------------------------------------------------------------------------------------------- write


def lora_to_diffusers(state: Mapping[str, Tensor], alpha: float) -> State:
    """A LoRA for `pipeline.load_lora_weights`. state: `blocks.0.self_attn.q.lora_A.weight` and so on, native names.

    alpha / rank goes into the up matrices, so the file means the same whatever reads it. Raises ValueError.
    """
    out: State = {}
    for module, (down, up) in _pairs(state).items():
        name = f"transformer.{to_diffusers_key(module)}"
        factor = alpha / down.shape[0]
        out |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": (up.float() * factor).to(up.dtype)}
    return out


def lora_to_peft(state: Mapping[str, Tensor], alpha: float) -> tuple[State, dict[str, Any]]:
    """(adapter_model.safetensors, adapter_config.json) for PEFT over Diffusers' transformer. state: as above."""
    pairs = _pairs(state)
    out = {
        f"{_PEFT}{to_diffusers_key(module)}.lora_{letter}.weight": value
        for module, pair in pairs.items()
        for letter, value in zip("AB", pair, strict=True)
    }
    ranks = {down.shape[0] for down, _ in pairs.values()}
    if len(ranks) != 1:
        raise ValueError(f"the LoRA has several ranks ({', '.join(map(str, sorted(ranks)))}): export it to Diffusers")
    config = {
        "peft_type": "LORA", "r": ranks.pop(), "lora_alpha": alpha,
        "target_modules": sorted(map(to_diffusers_key, pairs)),
        "bias": "none", "lora_dropout": 0.0, "inference_mode": True,
    }  # fmt: skip
    return out, config


def lora_to_comfyui(
    state: Mapping[str, Tensor], alpha: float, differences: Mapping[str, Tensor] | None = None
) -> State:
    """A LoRA as ComfyUI and most other programs read it: native names, with an alpha beside each pair.

    state: as above.
    alpha: of all pairs; stored in fp32, whatever the factors are.
    differences: what is added to whole parameters, by their native names, which may be those of biases.
    Raises ValueError.
    """
    out: State = {}
    for module, (down, up) in _pairs(state).items():
        name = f"{_COMFYUI}{module}"
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    for parameter, value in (differences or {}).items():
        module, _, leaf = parameter.rpartition(".")
        ending = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(leaf, f"{parameter}.diff")
        out[f"{_COMFYUI}{ending}"] = value
    return out


def _pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    names = {key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for key in state}
    unpaired = [n for n in sorted(names) if f"{n}.lora_A.weight" not in state or f"{n}.lora_B.weight" not in state]
    if unpaired or not names:
        raise ValueError(f"no LoRA: {unpaired[0] if unpaired else 'it is empty'} lacks lora_A.weight or lora_B.weight")
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in sorted(names)}

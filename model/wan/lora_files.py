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

from safetensors import safe_open
from torch import Tensor

from model.export import ADAPTER_CONFIG
from model.merged import Change
from model.wan.formats import to_diffusers_key, to_native_key, unwrapped
from model.wan.sources import located, open_tensors, weight_files
from model.weights import State, Stored
from utils.reading import read_json, reading

# trainers' names of the same two matrices, an adapter's name perhaps between them and the leaf
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.\w+)?\.(?P<leaf>weight|bias)"
)
_OTHER = re.compile(r"(?P<module>.+)\.(?P<part>alpha|diff|diff_b)")
_DOWN = ("lora_A", "lora_down", "lora.down")
_KOHYA = "lora_unet_"
_PEFT = "base_model.model."
_EXPERTS = {"transformer.": "high", "transformer_2.": "low"}


class LoraFile:
    """The changes of one LoRA by the native name of the module, e.g. `blocks.0.self_attn.q`.

    path: a file, a PEFT folder, or `owner/name/file` on the Hub; modules: native names of the base's modules, which
    names joined by underscores (kohya) need. expert: 'high' or 'low' where the file has changes for both.
    Raises ValueError in one line for what is no LoRA, or of a kind that is not supported.
    """

    def __init__(self, path: str | Path, modules: Iterable[str], expert: str | None = None) -> None:
        self.path = path
        try:
            place = located(path)
            stored = _of_expert(open_tensors(_adapter(place), "lora"), expert)
            self.alphas = _stated_alphas(place)
            self.changes = _changes(stored, modules)
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
        change = out.setdefault(_module(match["module"], joined), Change())
        part = match["part"]
        if part == "diff_b" or match.groupdict().get("leaf") == "bias":
            change.bias.append(value)
        else:
            setattr(change, "down" if part in _DOWN else part if part in ("alpha", "diff") else "up", value)
    if unknown or not out:
        raise ValueError(
            f"{len(unknown)} names are not a LoRA's ({', '.join(unknown[:3])}): DoRA, LoKr and LoHa are not supported"
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
    if name.startswith(_KOHYA):
        return joined.get(name.removeprefix(_KOHYA), name)
    name = name.removeprefix(_PEFT)
    for prefix in _EXPERTS:
        name = name.removeprefix(prefix)
    return to_native_key(unwrapped(name))


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


def _pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    names = {key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for key in state}
    unpaired = [n for n in sorted(names) if f"{n}.lora_A.weight" not in state or f"{n}.lora_B.weight" not in state]
    if unpaired or not names:
        raise ValueError(f"no LoRA: {unpaired[0] if unpaired else 'it is empty'} lacks lora_A.weight or lora_B.weight")
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in sorted(names)}

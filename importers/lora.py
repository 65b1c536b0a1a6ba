"""Adapters of other projects' recipes: the layers that they name, and whose weights an adapter lies on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from importers.recipe import Recipe, Untranslated

ATTENTION = ["q", "k", "v", "o"]
# FastVideo's names of a Wan block's layers, and ours
FASTVIDEO_LAYERS = {
    "blocks.0.to_q": "self_attn.q", "blocks.0.to_k": "self_attn.k", "blocks.0.to_v": "self_attn.v",
    "blocks.0.to_out": "self_attn.o", "blocks.0.attn2.to_q": "cross_attn.q", "blocks.0.attn2.to_k": "cross_attn.k",
    "blocks.0.attn2.to_v": "cross_attn.v", "blocks.0.attn2.to_out": "cross_attn.o",
    "blocks.0.ffn.fc_in": "ffn.0", "blocks.0.ffn.fc_out": "ffn.2",
    "blocks.0.attn2.add_k_proj": "cross_attn.k_img", "blocks.0.attn2.add_v_proj": "cross_attn.v_img",
}  # fmt: skip
# its default, in which to_qkv and to_gate_compress are of no dense Wan block, and q_proj and its like of no Wan block
FASTVIDEO_DEFAULT = [
    "q_proj", "k_proj", "v_proj", "o_proj", "to_q", "to_k", "to_v", "to_out", "to_qkv", "to_gate_compress",
]  # fmt: skip


def adapter_keys(*networks: str) -> tuple[str, ...]:
    """The section `lora` of these networks, whose keys several options decide together."""
    return tuple(f"{name}.lora" for name in networks)


def names_of(value: Any) -> list[str]:
    """`to_q,to_k`, `to_q` or a list of them."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else map(str, value)) if name.strip()]


def fastvideo_targets(names: Sequence[str], *, has_image: bool) -> list[str]:
    """Our layers that hold one of these texts in FastVideo's name of them. Raises Untranslated for a name that no layer
    holds, but for those of its default list."""
    known = {other: ours for other, ours in FASTVIDEO_LAYERS.items() if has_image or not ours.endswith("_img")}
    held = {name: [ours for other, ours in known.items() if name in other] for name in names}
    if unknown := [name for name, found in held.items() if not found and name not in FASTVIDEO_DEFAULT]:
        raise Untranslated(f"{', '.join(unknown)} is in the name of no linear layer of a block")
    found = [ours for other, ours in known.items() if any(name in other for name in names)]
    if not found:
        raise Untranslated("no linear layer of a block has such a name")
    return short(found)


def short(layers: Iterable[str]) -> list[str]:
    """`q` for a layer that both attentions have, the whole name for one of a single one."""
    layers = list(layers)
    ends = [layer.rpartition(".")[2] for layer in layers]
    return list(dict.fromkeys(e if ends.count(e) == 2 else layer for e, layer in zip(ends, layers, strict=True)))


def put_adapter(recipe: Recipe, network: str, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    """Sets `lora` of a network. An adapter shares the teacher's weights if its network starts from them."""
    teacher = (recipe.get("teacher.preset"), recipe.get("teacher.init"))
    share = (recipe.get(f"{network}.preset"), recipe.get(f"{network}.init")) == teacher
    recipe.set(f"{network}.lora", {"rank": rank, "alpha": alpha, "targets": list(targets), "share": share})
    recipe.notes[f"{network}.lora.share"] = (
        "the adapter lies on the teacher's own copy of the weights"
        if share
        else f"{network} does not start from the teacher's weights, so its adapter has a frozen copy of its own"
    )

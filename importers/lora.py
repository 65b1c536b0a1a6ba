"""Adapters of other projects' recipes: their options, the layers that they name, and what differs here."""

from __future__ import annotations

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
FASTVIDEO_DEFAULT = ["to_q", "to_k", "to_v", "to_out", "k_proj", "v_proj"]


def rank(recipe: Recipe, value: Any) -> None:
    recipe.set("adapter.rank", int(value))


def alpha(recipe: Recipe, value: Any) -> None:
    if value is not None:  # without a value it is the rank, as here
        recipe.set("adapter.alpha", float(value))


def names_of(value: Any) -> list[str]:
    """`to_q,to_k`, `to_q` or a list of them."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else map(str, value)) if name.strip()]


def fastvideo_targets(recipe: Recipe, value: Any) -> None:
    recipe.set("adapter.names", names_of(value))


def simpletuner_kind(recipe: Recipe, value: Any) -> None:
    if value not in ("lora", "full"):
        raise Untranslated("lora or full")
    recipe.set("adapter.on", value == "lora")


def simpletuner_type(recipe: Recipe, value: Any) -> None:
    if value != "standard":
        raise Untranslated("there is none of this here: a plain LoRA of its rank was taken")


def no_dropout(recipe: Recipe, value: Any) -> None:
    recipe.set("adapter.dropout", float(value))


def put_adapter(recipe: Recipe, names: tuple[str, ...], adapter: dict[str, Any], targets: list[str]) -> None:
    """Sets `lora` of these networks. An adapter shares the teacher's weights if its network starts from them."""
    teacher = (recipe.get("teacher.preset"), recipe.get("teacher.init"))
    for name in names:
        share = (recipe.get(f"{name}.preset"), recipe.get(f"{name}.init")) == teacher
        said = {"rank": adapter["rank"], "alpha": adapter.get("alpha"), "targets": list(targets), "share": share}
        recipe.set(f"{name}.lora", said)
        if share:
            recipe.notes.append(f"{name}.lora.share: the adapter lies on the teacher's own copy of the weights")
        else:
            recipe.notes.append(
                f"{name}.lora.share: false, as {name} does not start from the teacher's weights: a frozen copy more"
            )


def finish_fastvideo(recipe: Recipe) -> None:
    """In FastVideo student and critic are both adapters; a target is any part of a layer's name."""
    adapter = recipe.values.pop("adapter", {})
    if not adapter.get("on"):
        if adapter:
            recipe.left.append("lora_rank and its like: without lora_training all weights are trained")
        return
    if "rank" not in adapter:
        recipe.fill("student.lora.rank, critic.lora.rank", "lora_training needs a lora_rank: 64 was put")
        adapter["rank"] = 64
    names = adapter.get("names", FASTVIDEO_DEFAULT)
    has_image = recipe.get("student.preset") == "i2v-14b"
    known = {other: ours for other, ours in FASTVIDEO_LAYERS.items() if has_image or not ours.endswith("_img")}
    found = [ours for other, ours in known.items() if any(name in other for name in names)]
    if "names" in adapter and (unknown := [name for name in names if not any(name in other for other in known)]):
        recipe.left.append(f"lora_target_modules: {', '.join(unknown)} (no linear layer of a block here)")
    if not found:
        recipe.fill("student.lora.targets, critic.lora.targets", "none was understood: the attention layers were put")
    put_adapter(recipe, ("student", "critic"), adapter, _short(found) or ATTENTION)


def _short(layers: list[str]) -> list[str]:
    """`q` for a layer that both attentions have, the whole name for one of a single one."""
    ends = [layer.rpartition(".")[2] for layer in layers]
    return list(dict.fromkeys(e if ends.count(e) == 2 else layer for e, layer in zip(ends, layers, strict=True)))


def finish_simpletuner(recipe: Recipe) -> None:
    """SimpleTuner's student is a LoRA on the attention layers by default; its critic trains all weights."""
    adapter = recipe.values.pop("adapter", {})
    if not adapter.get("on", True):
        if adapter.keys() - {"on"}:
            recipe.left.append("lora_rank and its like: model_type full trains all weights")
        return
    if "on" not in adapter:
        recipe.notes.append("model_type: not given, and a LoRA by its default")
    put_adapter(recipe, ("student",), {"rank": 16, **adapter}, ATTENTION)
    recipe.notes.append(
        "critic.lora: null, as its critic trains all weights; a critic.lora like the student's would save that copy"
    )
    if adapter.get("dropout", 0.1):
        said = adapter.get("dropout", "0.1 by its default")
        recipe.left.append(f"lora_dropout: {said} (an adapter has no dropout here)")

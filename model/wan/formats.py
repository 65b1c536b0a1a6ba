"""Whose names a Wan DiT's parameters have: Wan's own, which are ours, Diffusers', or those of FastVideo's modules. Pure
functions of names.

Shapes are the same in all formats: nothing is split, joined or transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from model.export import Format

# what trainers' wrappers leave in front of names, and what FSDP, checkpointing and torch.compile leave anywhere
PREFIXES = ("module.", "model.", "diffusion_model.", "net.", "pipe.dit.")
WITHIN = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

# native name -> Diffusers' name, of modules and bare parameters
TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    # image-to-video: CLIP tokens of the first frame
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "self_attn.to_gate_compress": "to_gate_compress",  # FastWan's gate of video sparse attention (arXiv 2505.13389)
} | {
    f"{native}.{part}": f"{other}.{their_part}"
    for native, other in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, their_part in (
        ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
    )
}  # fmt: skip

# native name -> FastVideo's name (fastvideo/configs/models/dits/wanvideo.py, param_names_mapping), where its training
# saves modules as they are
FASTVIDEO_TOP = {
    "patch_embedding": "patch_embedding.proj",
    "text_embedding.0": "condition_embedder.text_embedder.fc_in",
    "text_embedding.2": "condition_embedder.text_embedder.fc_out",
    "time_embedding.0": "condition_embedder.time_embedder.mlp.fc_in",
    "time_embedding.2": "condition_embedder.time_embedder.mlp.fc_out",
    "time_projection.1": "condition_embedder.time_modulation.linear",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.fc_in",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.fc_out",
}
FASTVIDEO_BLOCK = {
    "norm3": "self_attn_residual_norm.norm",
    "ffn.0": "ffn.fc_in",
    "ffn.2": "ffn.fc_out",
    "cross_attn.o": "attn2.to_out",
    "self_attn.o": "to_out",
} | {
    f"self_attn.{part}": name
    for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
}

GATE = re.compile(r"blocks\.\d+\.self_attn\.to_gate_compress\.")  # native names; only a sparse network has them
UNUSED = re.compile(r"norm_added_q\.")  # of the first I2V conversions to Diffusers: no network reads it


def detect_format(keys: Iterable[str]) -> Format:
    """Raises ValueError when the names are neither Wan's nor Diffusers'."""
    names = list(keys)
    if any(".attn1." in name or name.startswith("condition_embedder.") for name in names):
        return Format.DIFFUSERS
    if any(".self_attn." in name or name.startswith("time_projection.") for name in names):
        return Format.NATIVE
    raise ValueError(
        f"no Wan DiT: names like {names[:3]} are neither Wan's (blocks.0.self_attn.q) nor Diffusers' (attn1.to_q)"
    )


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """A key under the other format's name; one that the map does not know comes back as it is."""
    prefix, table, name = "", top, key
    if match := re.match(r"blocks\.\d+\.", key):
        prefix, table, name = match[0], block, key[match.end() :]
    module, dot, leaf = name.rpartition(".")
    if name in table:
        return prefix + table[name]
    return prefix + table[module] + dot + leaf if module in table else key


_TOP_BACK, _BLOCK_BACK = ({v: k for k, v in table.items()} for table in (TOP, BLOCK))
_BLOCK_BACK["attn1.to_gate_compress"] = "self_attn.to_gate_compress"  # some trainers keep it within the attention
_FASTVIDEO_BACK = tuple(
    back | {theirs: native for native, theirs in table.items()}
    for back, table in ((_TOP_BACK, FASTVIDEO_TOP), (_BLOCK_BACK, FASTVIDEO_BLOCK))
)
_BLOCKS = re.compile(r"(.+\.)blocks\.\d+\.")


def to_diffusers_key(key: str) -> str:
    """`blocks.0.self_attn.q.weight`, or `blocks.0.self_attn.q`, under Diffusers' name: `blocks.0.attn1.to_q...`."""
    return _rename(key, TOP, BLOCK)


def to_native_key(key: str) -> str:
    """The inverse of `to_diffusers_key`."""
    return _rename(key, _TOP_BACK, _BLOCK_BACK)


def is_fastvideos(keys: Iterable[str]) -> bool:
    """Whether they are names of FastVideo's modules."""
    return any(".self_attn_residual_norm." in name or ".ffn.fc_in." in name for name in keys)


def unwrapped(key: str) -> str:
    """A key without what wrappers put in front of it (`model.`, also twice) or within it (FSDP's, torch.compile's)."""
    for wrapper in WITHIN:
        key = key.replace(wrapper, "")
    while prefix := next((p for p in PREFIXES if key.startswith(p)), ""):
        key = key.removeprefix(prefix)
    return key


def native_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key of either format under Wan's own name, without those of wrappers.

    Raises ValueError when two keys become one, or they are not those of a Wan DiT.
    """
    plain: dict[str, str] = {}
    seen: set[str] = set()
    for key in keys:
        name = unwrapped(key)
        if name in seen:
            raise ValueError(f"weights hold '{name}' twice under different wrappers' names: keep one")
        seen.add(name)
        plain[key] = name
    if prefixed := next((match for name in plain.values() if (match := _BLOCKS.match(name))), None):
        raise ValueError(
            f"names begin with '{prefixed[1]}', which no wrapper that is known leaves there: known are "
            f"{', '.join(PREFIXES)}: rename them"
        )
    if is_fastvideos(plain.values()):
        return {key: _rename(name, *_FASTVIDEO_BACK) for key, name in plain.items()}
    if detect_format(plain.values()) is Format.DIFFUSERS:
        return {key: to_native_key(name) for key, name in plain.items()}
    return plain

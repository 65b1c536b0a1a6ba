"""`python -m scripts.tiny_models OUT`: small real folders, so that every command for Wan can be tried on a laptop.

The folders are what the libraries themselves save: pipelines of Diffusers with a text encoder, a tokenizer, a VAE, one
or two networks, and CLIP where the model has it. Their weights are random and seeded, so their videos show nothing.
Networks have the sizes of `configs/wan_tiny.yaml`. Beside them lie clips and pictures with captions, and prompts, under
the names of docs/wan_from_zero.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

import torch
from torch import Tensor

from configs.load import load_run
from model.experts import I2V_BOUNDARY, T2V_BOUNDARY
from model.family import families
from model.text_encoder import TextEncoder, toy_text_encoder
from utils.cli import Parser, run_cli
from utils.errors import UserError
from utils.video import write_video

ROOT = Path(__file__).parents[1]
OVERLAY = ROOT / "configs/wan_tiny.yaml"
RECIPE = ROOT / "configs/wan2.1_1.3b/self_forcing_dmd.yaml"  # any: the overlay gives all networks one size
SOURCES = {preset: source for family in families().values() for preset, source in family.sources.items()}
KINDS = (*SOURCES, "features", "media")
SHIFT = 3.0  # of the schedulers, as Wan's for 480p
COLOURS = {"red": (0.9, 0.2, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.2, 0.3, 0.9), "yellow": (0.9, 0.8, 0.1)}
WAYS = {"left": -1, "right": 1}
FRAMES, SIDE, SQUARE, FPS = 25, 128, 40, 16  # of a clip
VAES: dict[str, dict[str, Any]] = {
    "2.1": {"z_dim": 16, "base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    "2.2": {
        **{"z_dim": 48, "base_dim": 4, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        **{"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        **{"temperal_downsample": [False, True, True], "scale_factor_spatial": 16},
    },
}


# --------------------------------------------------------------------------------------------------- parts of pipelines


@cache
def small_vae(kind: str) -> Any:
    """An AutoencoderKLWan of Wan "2.1" or "2.2", with latents_mean and latents_std unlike 0 and 1. Its latents have the
    published channels."""
    from diffusers import AutoencoderKLWan

    channels = VAES[kind]["z_dim"]
    mean, std = [0.1 * i - 0.7 for i in range(channels)], [0.5 + 0.1 * i for i in range(channels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoencoderKLWan(**VAES[kind], latents_mean=mean, latents_std=std)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases that start at zero would hide a lost one
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def small_transformer(config: Any, seed: int) -> Any:
    """A WanTransformer3DModel of this geometry. None of its weights is zero or one, so that every parameter matters."""
    from diffusers import WanTransformer3DModel

    net: Any = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, cross_attn_norm=config.cross_attn_norm,
        qk_norm="rms_norm_across_heads", eps=config.eps, image_dim=config.image_dim,
        added_kv_proj_dim=None if config.image_dim is None else config.dim,
    )  # fmt: skip
    net.train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            is_scale = name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_k.weight", "norm2.weight"))
            scale = 0.3 if p.ndim == 1 or "scale_shift" in name else p[0].numel() ** -0.5
            p.copy_(float(is_scale) + scale * torch.randn(p.shape, generator=generator))
    return net


def small_text_encoder(texts: Sequence[str], width: int) -> TextEncoder:
    """A UMT5EncoderModel and its tokenizer, which knows the words of `texts` and takes any other for one unknown word.

    Its embeddings are large, so that a network with random weights tells one prompt from another.
    """
    text = toy_text_encoder(texts, 512, width, seed=0)
    with torch.no_grad():
        text.encoder.shared.weight.mul_(4)  # type: ignore[union-attr, operator]
    return text


def small_image_encoder(width: int) -> Any:
    """A CLIPVisionModel whose tokens have `width` numbers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPVisionModel(config).eval()


def small_image_processor() -> Any:
    """For `small_image_encoder`, of the shape of Wan2.1's own: the shorter side to the size, then the middle."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def save_image_encoder(folder: Path, width: int) -> None:
    """Both, as a pipeline's folder has them."""
    small_image_encoder(width).save_pretrained(folder / "image_encoder")
    small_image_processor().save_pretrained(folder / "image_processor")


def save_text_encoder(folder: Path, text: TextEncoder) -> None:
    """The encoder and its tokenizer, as a pipeline's folder has them."""
    text.encoder.save_pretrained(folder / "text_encoder")  # type: ignore[operator]
    text.tokenizer.save_pretrained(folder / "tokenizer")


def save_features(folder: Path) -> None:
    """A small DINOv2 with its preprocessor, for `evaluate.py --features`."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).eval().save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------ whole pipelines


def pipeline_class(config: Any) -> Any:
    """Diffusers' class for a geometry's task."""
    import diffusers

    return diffusers.WanPipeline if config.model_type == "t2v" else diffusers.WanImageToVideoPipeline


def save_pipeline(folder: Path, config: Any, text: TextEncoder, *, experts: bool = False, seed: int = 3) -> None:
    """A pipeline with random weights in Diffusers' layout.

    folder: which is made.
    config: geometry of the network, or of both experts.
    text: encoder and tokenizer.
    experts: whether there are two networks, as in Wan2.2 A14B; the second has the next seed.
    seed: of the network.
    """
    from diffusers import UniPCMultistepScheduler

    more: dict[str, Any] = {}
    if experts:
        more["transformer_2"] = small_transformer(config, seed + 1)
        more["boundary_ratio"] = I2V_BOUNDARY if config.model_type == "i2v" else T2V_BOUNDARY
    if config.model_type == "ti2v":
        more["expand_timesteps"] = True
    if config.image_dim is not None:
        more |= {"image_encoder": small_image_encoder(config.image_dim), "image_processor": small_image_processor()}
    vae = small_vae("2.2" if config.model_type == "ti2v" else "2.1")
    made = pipeline_class(config)(
        tokenizer=text.tokenizer, text_encoder=text.encoder, vae=vae, transformer=small_transformer(config, seed),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        **more,
    )  # fmt: skip
    made.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------- media


def captions() -> list[str]:
    return [f"a {colour} square moves {way}" for colour in COLOURS for way in WAYS]


def clip(caption: str) -> Tensor:
    """The video [T, 3, h, w] in [0, 1] that a caption names."""
    _, colour, *_, way = caption.split()
    ramp = torch.linspace(0.2, 0.6, SIDE)
    video = ramp.expand(FRAMES, 3, SIDE, SIDE).clone()
    top, middle = (SIDE - SQUARE) // 2, SIDE // 2 - SQUARE // 2
    for i, frame in enumerate(video):
        left = middle + WAYS[way] * 3 * (i - FRAMES // 2)
        frame[:, top : top + SQUARE, left : left + SQUARE] = torch.tensor(COLOURS[colour])[:, None, None]
    return video


def write_media(out: Path) -> None:
    """clips/ and pictures/ with a caption beside each file, and data/prompts.txt."""
    for number, caption in enumerate(captions()):
        pixels = clip(caption)
        for folder, suffix, frames in (("clips", "mp4", pixels), ("pictures", "png", pixels[:1])):
            write_video(out / folder / f"{number}.{suffix}", frames, FPS)
            (out / folder / f"{number}.txt").write_text(f"{caption}\n")
    (out / "data").mkdir()
    (out / "data/prompts.txt").write_text("".join(f"{caption}\n" for caption in captions()))


# -------------------------------------------------------------------------------------------------------------- program


def quiet() -> None:
    """The libraries' bars and notes about missing image backends say nothing here."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def write(out: Path, kinds: Sequence[str]) -> None:
    """Makes what the kinds name in an absent or empty folder. Raises UserError."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a new folder, or remove this one")
    quiet()
    network = load_run(RECIPE, [str(OVERLAY)]).student
    _, width = network.prompt_shapes["text"]
    text = small_text_encoder(captions(), width)
    for number, kind in enumerate(SOURCES):
        if kind in kinds:
            source = SOURCES[kind]
            folder = out / "weights" / source.repo.partition("/")[2]
            experts = "transformer_2" in source.parts
            save_pipeline(folder, replace(network, preset=kind).geometry(), text, experts=experts, seed=2 * number)
            print(f"{folder}: {kind}", flush=True)
    if "features" in kinds:
        save_features(folder := out / "weights/dinov2-base")
        print(f"{folder}: for evaluate.py --features")
    if "media" in kinds:
        write_media(out)
        print(f"{out}: clips, pictures and data/prompts.txt")


def main() -> int:
    parser = Parser(prog="scripts.tiny_models", description="Small real folders of Wan models, with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="make this only, may be given again (default: all)"
    )
    args = parser.parse_args()
    write(args.out, args.kind or KINDS)
    return 0


if __name__ == "__main__":
    run_cli(main)

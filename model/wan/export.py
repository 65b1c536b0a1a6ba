"""Wan as Diffusers' pipelines and other programs load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.export import Dtype, Format, Pipeline
from model.family import FirstFrame
from model.schedule import TIMESTEPS
from model.wan.config import WanConfig
from model.wan.lora_files import lora_to_comfyui, lora_to_diffusers, lora_to_peft
from model.wan.save import save_model
from model.weights import State, Weights

LIBRARY = "diffusers"
CHANNELS_OF_22 = 48  # latent channels of Wan2.2's own VAE, the 5B's; Wan2.1's has 16
PIPELINES = {"t2v": "WanPipeline", "ti2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}
BASES = {  # by model type, and whether the network sees CLIP's tokens: whose other parts fit
    ("t2v", False): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ("ti2v", False): "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    ("i2v", True): "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    ("i2v", False): "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
}


class WanExporter:
    """Weights in Wan's own layout or Diffusers', adapters in Diffusers', PEFT's or ComfyUI's."""

    formats = ("diffusers", "native", "lora")
    networks = ("transformer", "transformer_2")
    experts = ("high_noise_model", "low_noise_model")  # as in Wan2.2's own repositories

    def save(
        self, folder: Path, weights: Weights, geometry: WanConfig, names: Format, dtype: Dtype, shard_bytes: int | None
    ) -> None:
        save_model(folder, weights, geometry, names, dtype, shard_bytes)

    def pipeline(self, geometry: WanConfig, boundary: float | None) -> Pipeline:
        sees_clip, takes_image = geometry.image_dim is not None, geometry.first_frame is FirstFrame.channels
        index: dict[str, Any] = {
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "transformer": [LIBRARY, "WanTransformer3DModel"],
            "transformer_2": [None, None] if boundary is None else [LIBRARY, "WanTransformer3DModel"],
            "boundary_ratio": boundary,
            "vae": [LIBRARY, "AutoencoderKLWan"],
            "expand_timesteps": geometry.first_frame is FirstFrame.clean,
        }
        if takes_image:
            index["image_encoder"] = ["transformers", "CLIPVisionModel"] if sees_clip else [None, None]
            index["image_processor"] = ["transformers", "CLIPImageProcessor"] if sees_clip else [None, None]
        note = "With WanImageToVideoPipeline in its place, and image=IMAGE, it goes on from an image."
        return Pipeline(
            PIPELINES[geometry.model_type],
            BASES[geometry.model_type, sees_clip],
            ("vae", "text_encoder", "tokenizer", *(("image_encoder", "image_processor") if sees_clip else ())),
            index,
            takes_image,
            16 if geometry.out_dim == CHANNELS_OF_22 else 8,
            note if geometry.first_frame is FirstFrame.clean else "",
        )

    def scheduler(self, shift: float, *, few_steps: bool) -> dict[str, Any]:
        """UniPC for a many-step network, as in Wan's own folders; for a student the one that predicts x0 and noises it
        anew at each step, `stochastic_sampling`."""
        if few_steps:
            return {
                "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": int(TIMESTEPS), "shift": shift,
                "stochastic_sampling": True,
            }  # fmt: skip
        return {
            "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": int(TIMESTEPS), "flow_shift": shift,
            "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        }  # fmt: skip

    def lora_to_diffusers(self, state: Mapping[str, Tensor], alpha: float) -> State:
        return lora_to_diffusers(state, alpha)

    def lora_to_peft(self, state: Mapping[str, Tensor], alpha: float) -> tuple[State, dict[str, Any]]:
        return lora_to_peft(state, alpha)

    def lora_to_comfyui(self, state: Mapping[str, Tensor], alpha: float, differences: Mapping[str, Tensor]) -> State:
        return lora_to_comfyui(state, alpha, differences)

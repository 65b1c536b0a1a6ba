"""Small VAEs of both kinds, as Diffusers makes and saves them; their latents have the published channels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

KINDS = {
    "2.1": {"z_dim": 16, "base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    "2.2": {
        **{"z_dim": 48, "base_dim": 4, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        **{"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        **{"temperal_downsample": [False, True, True], "scale_factor_spatial": 16},
    },
}


@cache
def small_vae(kind: str) -> Any:
    """An AutoencoderKLWan with random weights and latents_mean, latents_std unlike 0 and 1."""
    from diffusers import AutoencoderKLWan

    channels = KINDS[kind]["z_dim"]
    mean, std = [0.1 * i - 0.7 for i in range(channels)], [0.5 + 0.1 * i for i in range(channels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKLWan(**KINDS[kind], latents_mean=mean, latents_std=std)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases that start at zero would hide a lost one
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)

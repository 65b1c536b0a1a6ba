"""Videos of another size than a run was trained on."""

from __future__ import annotations

from configs.sections import DataConfig
from model.network import NetworkConfig
from utils.errors import UserError


def resize(data: DataConfig, network: NetworkConfig, height: int, width: int) -> None:
    """Sets the size of a config's videos, in pixels. Raises UserError where they cannot have it."""
    try:
        if data.kind == "toy":
            if height != width:
                raise ValueError("the toy world is square")
            data.toy.canvas = height
            data.toy.__post_init__()
        elif data.kind == "wan":
            if data.vae.path is None:
                raise ValueError("data.vae.path is null, and only a VAE tells how large a latent is: give it")
            side = network.codecs.spatial(data.vae.path)
            if height % side or width % side:
                raise ValueError(f"give multiples of {side}")
            data.wan.height, data.wan.width = height // side, width // side
            data.wan.__post_init__()
            if data.images is not None:
                raise ValueError("this run's images are stored in one size: give --image, and a run with prompts")
            data.latents = None  # stored in the size that they have, and only training reads them
        else:
            raise ValueError(f"data of kind {data.kind} has one size")
    except (ValueError, OSError) as problem:
        raise UserError(f"--size {height}x{width}: {problem}") from None

"""Wan geometry: what a checkpoint's config.json says, under Wan's own names, and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.family import FirstFrame, replaced
from utils.fields import show

TIME_SCALE = 1000.0  # Wan embeds its noise level as a timestep in 0..1000
MODEL_TYPES = ("t2v", "i2v", "ti2v")


@dataclass(frozen=True)
class WanConfig:
    """Geometry of one Wan DiT (arXiv 2503.20314, section 4.2). All of it is derived from here, none typed elsewhere.

    dim: width of a token.
    ffn_dim: width of the MLP's hidden layer.
    num_heads: of self- and of cross-attention.
    num_layers: blocks.
    in_dim: latent channels and, for "i2v", those of the image conditioning beside them (4 of the mask, 16 of the given
    frames' latents).
    out_dim: latent channels of the velocity.
    text_dim: width of the text encoder's tokens.
    text_len: text tokens of each prompt, padding included.
    freq_dim: width of the sinusoidal embedding of time.
    patch_size: latent frames, rows and columns that make a token.
    qk_norm: whether queries and keys are normalised.
    cross_attn_norm: whether cross-attention's input is.
    eps: of all norms.
    model_type: as Wan names it: "t2v", "i2v" (Wan2.1 and Wan2.2 A14B), "ti2v" (5B: given frames are clean).
    image_dim: width of CLIP's image tokens, None for a network that sees none.

    Raises ValueError when the heads do not divide the width or a head cannot carry the 3-D RoPE.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    model_type: str = "t2v"
    image_dim: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "in_dim",
            "out_dim",
            "text_dim",
            "text_len",
            "freq_dim",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not isinstance(self.patch_size, (list, tuple)) or not all(isinstance(n, int) for n in self.patch_size):
            raise ValueError(f"patch_size must be three whole numbers (frames, height, width), got {self.patch_size!r}")
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if not isinstance(self.eps, (int, float)) or not 0 < self.eps < 1:
            raise ValueError(f"eps must be a number in (0, 1), got {self.eps!r}")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide dim {self.dim}: choose a divisor of dim")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"head dim {self.head_dim} (dim {self.dim} / heads {self.num_heads}) must be even and >= 6"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even: half of it is cosines")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size {self.patch_size} must be three positive numbers (frames, height, width)")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size} must not join frames: Wan's patches are (1, h, w)")
        self._check_task()

    def _check_task(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type '{self.model_type}' is unknown: choose one of {', '.join(MODEL_TYPES)}")
        if self.model_type == "i2v" and self.in_dim <= self.out_dim:
            raise ValueError(
                f"model_type 'i2v' takes image channels beside the latent's: in_dim {self.in_dim} must be more than "
                f"out_dim {self.out_dim} (Wan: 36 and 16)"
            )
        if self.image_dim is None:
            return
        if not isinstance(self.image_dim, int) or self.image_dim < 1:
            raise ValueError(f"image_dim must be a whole number of at least 1 or null, got {self.image_dim!r}")
        if self.model_type != "i2v":
            raise ValueError(f"image_dim {self.image_dim} needs model_type 'i2v', got '{self.model_type}'")

    @property
    def first_frame(self) -> FirstFrame:
        """How the network is given first frames."""
        return {"t2v": FirstFrame.none, "i2v": FirstFrame.channels, "ti2v": FirstFrame.clean}[self.model_type]

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width`; ValueError unless patches tile it."""
        _, ph, pw = self.patch_size
        if height % ph or width % pw:
            raise ValueError(f"latent size {height}x{width} is not a multiple of the patch {ph}x{pw}")
        return (height // ph) * (width // pw)


PRESETS: dict[str, WanConfig] = {
    "tiny": WanConfig(
        dim=96, ffn_dim=192, num_heads=3, num_layers=2, in_dim=4, out_dim=4, text_dim=48, text_len=24, freq_dim=64
    ),
    "toy": WanConfig(
        dim=128, ffn_dim=512, num_heads=2, num_layers=4, in_dim=4, out_dim=4, text_dim=64, text_len=8, freq_dim=64
    ),
    "bench": WanConfig(dim=512, ffn_dim=2048, num_heads=8, num_layers=8, text_dim=256, text_len=64),
    "1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48, model_type="ti2v"),
    "i2v-14b": WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, model_type="i2v", image_dim=1280
    ),
    # each of Wan2.2 A14B's two experts
    "a14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "i2v-a14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, model_type="i2v"),
}


def geometry(preset: str, overrides: dict[str, Any] | None = None) -> WanConfig:
    """A preset with some fields replaced. Raises ValueError naming the legal presets or fields."""
    if preset not in PRESETS:
        raise ValueError(f"unknown geometry preset {show(preset)}: choose one of {', '.join(PRESETS)}")
    return replaced(PRESETS[preset], overrides or {})

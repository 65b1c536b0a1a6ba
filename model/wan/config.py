"""Wan geometry: what a checkpoint's config.json says, under Wan's own names, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from model.wan.vsa.attention import SparseBackend
from model.wan.vsa.tiles import CUBES

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
        raise ValueError(f"unknown geometry preset '{preset}': choose one of {', '.join(PRESETS)}")
    fields = {field.name for field in dataclasses.fields(WanConfig)}
    unknown = sorted(set(overrides or {}) - fields)
    if unknown:
        raise ValueError(f"unknown geometry field '{unknown[0]}': choose among {', '.join(sorted(fields))}")
    return dataclasses.replace(PRESETS[preset], **(overrides or {}))


class Checkpointing(Enum):
    """What a pass with gradient keeps of each block. Members are lower case as YAML is."""

    none = "none"  # all activations
    full = "full"  # the block's input; the rest is computed again in backward
    selective = "selective"  # also what dense attention put out: in backward all but that is computed again


@dataclass
class LoraWeights:
    """A LoRA file or folder, local or on the Hub, and by how much it counts.

    path: of the file or folder, or its Hub name.
    scale: by how much it counts.
    """

    path: str
    scale: float = 1.0


TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # all of a text-to-video block


@dataclass
class LoraConfig:
    """An adapter that is trained in place of the weights themselves (LoRA, arXiv 2106.09685).

    rank: inner width of the adapter's two matrices: the weight is W + alpha / rank * up @ down.
    alpha: scale of the adapter, see rank; null takes alpha = rank.
    targets: which linear layers of each block get one.
    share: the adapter lies on the teacher's own copy of the weights, of which there is then one for all roles; false
        gives it a frozen copy of its own, which `init` may then take from elsewhere.
    """

    rank: int = 64
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    share: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be positive, or null for the rank, got {self.alpha}")
        if not self.targets:
            raise ValueError(f"targets is empty: choose among {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass
class SparseConfig:
    """Video sparse attention (arXiv 2505.13389) in place of the network's self-attention.

    sparsity: share of key tiles that a tile of queries leaves out.
    cube: a tile's tokens along frames, height and width, 64 in all where kernels compute it (FastWan: [4, 4, 4]); null
        for the one that pads a grid least, which may change as a cache grows.
    backend: 'reference', 'triton' or 'flex', null for Triton on CUDA and the reference elsewhere.
    ramp_step: sparsity grows from 0 by this every ramp_every iterations (FastVideo: 0.03), null for no ramp.
    ramp_every: iterations between two steps of the ramp (FastVideo: 30).
    """

    sparsity: float = 0.8
    cube: list[int] | None = None
    backend: str | None = None
    ramp_step: float | None = None
    ramp_every: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        exact = self.backend == "reference" and self.cube is not None and len(self.cube) == 3 and min(self.cube) > 0
        if self.cube is not None and tuple(self.cube) not in CUBES and not exact:
            choices = ", ".join(map(str, CUBES))
            raise ValueError(
                f"cube {self.cube} is not supported: choose among {choices}, or null; any three sides of at least 1 "
                "with backend reference"
            )
        if self.backend not in (None, "reference", "triton", "flex"):
            raise ValueError(f"backend '{self.backend}' is unknown: choose reference, triton or flex, or null")
        if (self.ramp_step is not None and self.ramp_step <= 0) or self.ramp_every < 1:
            raise ValueError(f"ramp_step must be positive, ramp_every >= 1, got {self.ramp_step}, {self.ramp_every}")

    @property
    def chosen(self) -> SparseBackend | None:
        return None if self.backend is None else SparseBackend(self.backend)

    def at(self, step: int) -> float:
        """The sparsity of iteration `step`, counted from 0."""
        if self.ramp_step is None:
            return self.sparsity
        return min(self.sparsity, self.ramp_step * (step // self.ramp_every))


@dataclass
class NetworkConfig:
    """One network of a run.

    preset: name of its geometry, one of PRESETS.
    overrides: fields of WanConfig that differ from the preset's.
    init: where its weights come from: a run or checkpoint folder of ours, a file or folder in Wan's, Diffusers' or
        Self-Forcing's format, a Hub repository (`owner/name`), null for random ones.
    init_weights: which weights of what has several, 'ema' (raw where it has none), 'raw' or 'critic'.
    init_lora_scale: by how much the adapter of a run that init names counts.
    expert: 'high' or 'low' (noise) of a model with two experts, null for one without.
    loras: LoRA files that are added to the weights as they are loaded.
    lora: an adapter to train while the weights are frozen; null trains the weights.
    sparse: sparse self-attention, null for dense.
    attention: backend of dense attention, 'sdpa', 'plain', 'flex' or 'flash'.
    checkpointing: what a pass with gradient keeps of each block.
    """

    preset: str = "toy"
    overrides: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    init_weights: str = "ema"
    init_lora_scale: float = 1.0
    expert: str | None = None
    loras: list[LoraWeights] = field(default_factory=list)
    lora: LoraConfig | None = None
    sparse: SparseConfig | None = None
    attention: str = "sdpa"
    checkpointing: Checkpointing = Checkpointing.none

    def __post_init__(self) -> None:
        self.geometry()
        backends = ("sdpa", "plain", "flex", "flash")
        if self.attention not in backends:
            raise ValueError(f"attention '{self.attention}' is unknown: choose one of {', '.join(backends)}")
        if self.init_weights not in ("ema", "raw", "critic"):
            raise ValueError(f"init_weights '{self.init_weights}' is unknown: choose ema, raw or critic")
        if self.expert not in (None, "high", "low"):
            raise ValueError(f"expert '{self.expert}' is unknown: choose high or low (noise), or null")
        if self.loras and self.init is None:
            raise ValueError("loras are added to the weights of init, which is null: set it")
        if self.init_lora_scale != 1 and self.init is None:
            raise ValueError("init_lora_scale is of an adapter in init, which is null: set it")

    def other_weights(self, other: NetworkConfig) -> str | None:
        """The first of what names the weights that differs, None where both start from the same: by what they say, not
        by what the files hold."""
        if self.geometry() != other.geometry():
            return "geometry"
        names = ("sparse", "init", "init_weights", "init_lora_scale", "expert", "loras")
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    def geometry(self) -> WanConfig:
        return geometry(self.preset, self.overrides)

"""What is chosen when a run is sampled: steps and guidance, the kind of sampler, the weights."""

from __future__ import annotations

from dataclasses import dataclass

from model.network import Expert, LoraWeights
from pipeline.bidirectional_inference import Solver
from utils.errors import UserError
from utils.limits import FRAMES, STEPS


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    steps: denoising steps, None takes the run's.
    frames: latent frames in all, first frames that are given included; None takes the run's.
    window: latent frames that a block of a causal student sees, None takes the run's.
    sinks: first latent frames that stay in the window, None takes the run's.
    guidance: the scale of a many-step network, None takes the run's.
    seed: keys all noise.
    guidance_2: the scale of the low-noise expert of two, None takes guidance.
    solver: the solver of a many-step network, 'euler' or 'unipc'; None takes its own.
    strength: share of the steps that are made where videos start from a clip.
    block_steps: steps of a causal student's first block, its second, and so on, the last for all after.
    noisy_context: see `StreamConfig`.
    """

    steps: int | None = None
    frames: int | None = None
    window: int | None = None
    sinks: int | None = None
    guidance: float | None = None
    seed: int = 0
    guidance_2: float | None = None
    solver: str | None = None
    strength: float | None = None
    block_steps: tuple[int, ...] = ()
    noisy_context: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for what no video has, before anything of its size is made."""
        for name, limit in {"frames": FRAMES, "window": FRAMES, "sinks": FRAMES, "steps": STEPS}.items():
            if (value := getattr(self, name)) is not None and value > limit:
                raise UserError(f"--{name} {value}: give a number of at most {limit}")
        if (most := max(self.block_steps, default=0)) > STEPS:
            raise UserError(f"--block_steps {most}: give numbers of at most {STEPS}")


@dataclass(frozen=True)
class Sampler:
    """Which kind of sampling a network was made for.

    causal: whether it samples block by block over a cache. None takes the run's.
    few_steps: whether it samples by the network's own step list, not by a many-step solver. None: every network except
        a bidirectional one of a diffusion run.
    solver: the solver of a many-step network, where the sampling names none.
    guidance_2: the scale of the low-noise expert of two, where the sampling names no guidance.
    first_block: noise levels of a causal student's first block, where they are others than those of later ones.
    start_scale: of the noise that a bidirectional student starts from.
    """

    causal: bool | None = None
    few_steps: bool | None = None
    solver: Solver = Solver.euler
    guidance_2: float | None = None
    first_block: tuple[float, ...] = ()
    start_scale: float = 1.0


@dataclass(frozen=True)
class StudentChoice:
    """Which weights of a run's student are loaded.

    weights: 'ema', their average, or 'raw'.
    loras: LoRA files that are added to the weights.
    lora_scale: the factor of the run's own adapter.
    expert: which of two that go together.
    """

    weights: str = "ema"
    loras: tuple[LoraWeights, ...] = ()
    lora_scale: float = 1.0
    expert: Expert | None = None

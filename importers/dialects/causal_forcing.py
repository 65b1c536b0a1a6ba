"""Causal-Forcing (thu-ml): Self-Forcing's options, and those of its other stages.

Its last stage is Self-Forcing's DMD, and is carried over. The stages before it (teacher-forced diffusion, ODE
regression, consistency distillation) have trainers here, and recipes of ours. Read in a copy of its YAML files
(AshadowZ/PackForcing-Unofficial at 775e2404), whose code is Self-Forcing's.
"""

from __future__ import annotations

from importers.dialects import self_forcing
from importers.recipe import Dialect, Rule
from importers.rules import LOGGING, harmless, must_be, refused

STAGE = "of another stage's trainer"
RULES: dict[str, Rule] = {
    **self_forcing.RULES,
    "grad_accum": must_be(1, why="its code ends each iteration with a batch: total_batch_size says the samples"),
    "generator_grad.model": must_be(True),
    "generator_task": must_be("causal_video"),
    "is_causal": must_be(True),
    "load_video_latent": refused("its DMD reads prompts alone"),
    **harmless(STAGE, "spatial_sf", "teacher_forcing", "discrete_cd_N"),
    **harmless(LOGGING, "wandb_name"),
}

DIALECT = Dialect(
    "causal_forcing",
    RULES,
    self_forcing.SHARED_DEFAULTS,
    self_forcing.DIALECT.start,
    self_forcing.finish,
)

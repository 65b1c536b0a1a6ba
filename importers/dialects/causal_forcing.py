"""Causal-Forcing (thu-ml): Self-Forcing's options, and those of its other stages.

Its last stage is Self-Forcing's DMD, and is carried over. The stages before it (teacher-forced diffusion, ODE
regression, consistency distillation) have trainers here, and recipes of ours. Read in a copy of its YAML files
(AshadowZ/PackForcing-Unofficial at 775e2404, kw7243/Causal-Forcing at d53ec74f), whose code is Self-Forcing's.
"""

from __future__ import annotations

from typing import Any

from importers.dialects import self_forcing
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import LOGGING, UNREAD, harmless, must_be, one_of, refused

STAGE = "of another stage's trainer"
# its other trainers, and the kind of ours that is theirs
STAGES = {"diffusion": "diffusion", "ode": "ode", "consistency_distillation": "consistency"}


def trainer(recipe: Recipe, value: Any) -> None:
    if value in STAGES:
        raise Untranslated(f"a stage before its DMD: write it as a recipe of ours, with trainer {STAGES[value]}")
    if value != "score_distillation":
        raise Untranslated("only score_distillation can be carried over")
    recipe.set("trainer", value)


RULES: dict[str, Rule] = {
    **self_forcing.RULES,
    "trainer": Rule(("trainer",), trainer),
    "distribution_loss": one_of("objective.kind", {"dmd": "dmd"}),
    "denoising_step_list_first_chunk": refused("steps of the first block's own are none of ours"),
    "grad_accum": must_be(1, why="its code ends each iteration with a batch: total_batch_size says the samples"),
    "generator_grad.model": must_be(True),
    "generator_task": must_be("causal_video"),
    "is_causal": must_be(True),
    "load_video_latent": refused("its DMD reads prompts alone"),
    **harmless(STAGE, "spatial_sf", "discrete_cd_N"),
    **harmless(f"{UNREAD}: the batch is the GPUs times batch_size", "total_batch_size"),
    **harmless(LOGGING, "wandb_name"),
}


def finish(recipe: Recipe) -> None:
    self_forcing.finish(recipe)
    recipe.notes["rollout.kind"] = "a file of its long_video folder has the same options, and another rollout"


DIALECT = Dialect(
    "causal_forcing",
    RULES,
    self_forcing.SHARED_DEFAULTS,
    self_forcing.DIALECT.start,
    finish,
)

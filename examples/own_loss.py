"""Shows how to train a student on a loss of one's own: DMD whose gradient has the same size for every sample.

python -m examples.own_loss --logdir logs/examples/own_loss
python -m examples.own_loss --config_path configs/toy/self_forcing_dmd.yaml objective.size=0.5 training.max_steps=100

The default recipe starts from logs/toy/teacher and logs/toy/causal_init: train configs/toy/teacher.yaml and
configs/toy/causal_init.yaml before. In a notebook the two classes are one cell. An objective that stays becomes a file
in model/objectives/, without `@register`: see docs/extending.md.
"""

import argparse
from dataclasses import dataclass

import fewstep
from model.dmd import dmd_loss, per_sample_mean
from model.objective import Draws, Objective, ObjectiveConfig, register
from model.query import ScoreQuery
from model.types import LossOutput


@dataclass
class EvenDMDConfig(ObjectiveConfig):
    """size: the root mean square of each sample's gradient."""

    takes = frozenset({"guidance_rescale"})

    kind: str = "even_dmd"
    size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size <= 0:
            raise ValueError(f"size must be positive, got {self.size}")


@register
class EvenDMD(Objective):
    """Half the mean of (x - sg(x - g))^2, whose gradient in x is g over the number of elements. g is DMD's, brought to
    one size a sample."""

    kind = "even_dmd"
    config_type = EvenDMDConfig
    config: EvenDMDConfig

    def student_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        dmd = dmd_loss(query)
        assert dmd.kl_gradient is not None
        mask, x0 = query.rollout.frame_mask, query.rollout.x0.float()
        rms = per_sample_mean(dmd.kl_gradient.square(), mask).sqrt().view(-1, 1, 1, 1, 1)
        gradient = self.config.size * dmd.kl_gradient / rms.clamp_min(1e-8)
        loss = 0.5 * per_sample_mean((x0 - (x0 - gradient).detach()).square(), mask).mean()
        return LossOutput(loss, dmd.metrics | {"loss": loss.detach(), "dmd_rms": rms.mean()}, gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description="Distils a student on this file's loss.")
    parser.add_argument("--config_path", default="configs/toy/self_forcing_dmd.yaml")
    parser.add_argument("--logdir", default="logs/examples/own_loss")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    folder = fewstep.train(args.config_path, "objective.kind=even_dmd", *args.overrides, logdir=args.logdir)
    print(f"{folder}: see metrics.jsonl, where student/dmd_rms is the size that DMD's own gradient had")


if __name__ == "__main__":
    main()

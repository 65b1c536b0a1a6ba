"""Score identity distillation (arXiv 2404.04057; with guidance 2406.01561).

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from model.dmd import per_sample_mean, scored
from model.query import ScoreQuery
from model.schedule import mix
from model.types import LossOutput


def sid_loss(query: ScoreQuery, *, alpha: float = 1.0) -> LossOutput:
    """mean gap ((real_x0 - x0) - alpha gap) / sg(mean|x0 - real_x0|) with gap = real_x0 - fake_x0 (arXiv 2404.04057).

    sg is stop-gradient; its mean runs over all elements of one sample, masked frames too. Gradient flows
    through x0 and through both scores' inputs; their weights must not require gradient, or the critic's would be
    computed for nothing. Raises ValueError for a query with weights of samples: SiD has none.
    """
    if query.weight is not None:
        raise ValueError("SiD does not weigh samples: leave the query's weight None")
    x0 = query.rollout.x0.float()
    fake_x0, real_x0 = scored(query, mix(x0, query.noise, query.sigma))
    gap = real_x0 - fake_x0
    scale = (x0 - real_x0).detach().abs().flatten(1).mean(1).reshape(-1, *(1,) * (x0.ndim - 1))
    loss = per_sample_mean(gap * ((real_x0 - x0) - alpha * gap) / scale, query.rollout.frame_mask).mean()
    metrics = {"loss": loss.detach(), "score_gap": gap.detach().abs().mean()}
    return LossOutput(loss, metrics)

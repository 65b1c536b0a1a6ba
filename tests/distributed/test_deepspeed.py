"""DeepSpeed trains as FSDP2 does, and their checkpoints are each other's. Two processes run tests/distributed/zero.py."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import rules
from configs.load import load_run
from tests import ROOT, forked
from tests.distributed import zero
from tests.small import NETWORKS, config, save_networks
from trainer.build import build_trainer
from utils.errors import ConfigError
from utils.parallel.mesh import EngineKind, ParallelConfig

RECIPE = ROOT / "configs/toy/self_forcing_dmd.yaml"
Seen = dict[str, Tensor]
PARTS = ("weight/student", "weight/critic", "square/student", "square/critic", "ema/student", "video")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    save_networks(folder)
    done = forked.run(2, "tests.distributed.zero", str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: load_file(folder / f"{name}.safetensors") for name in zero.RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zero.RUNS if name != "fsdp2"])
def test_zero_trains_as_fsdp2_and_resumes_either_way(seen: dict[str, Seen], name: str) -> None:
    """Losses and gradient norms of five steps, then weights, second moments and averages; clipping is active, one step
    is skipped, and half-way the run is saved and resumed, by the other engine in two cases."""
    result, whole = seen[name], seen["fsdp2"]
    assert result.keys() == whole.keys()
    metrics = [key for key in whole if key.startswith("metric/")]
    norms = [float(whole[key]) for key in metrics if key.endswith("grad_norm")]
    assert len(norms) == 2 * zero.STEPS
    assert min(norms) < zero.CLIP < max(norms)
    for key in metrics:
        assert float(result[key]) == pytest.approx(float(whole[key]), rel=2e-6, abs=1e-9), key
    for part in PARTS:
        keys = [key for key in whole if key.startswith(part)]
        a, b = (torch.cat([s[key].double().flatten() for key in keys]) for s in (result, whole))
        assert float((a - b).norm() / b.norm()) < 2e-6, part


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"deepspeed": {"zero_stage": 1}}, "parallel.deepspeed.zero_stage must be 2 or 3, got 1"),
        (
            {"deepspeed": {"offload_optimizer": "disk"}},
            "offload_optimizer: 'disk' is not allowed: give one of none, cpu, nvme",
        ),
        ({"deepspeed": {"offload_optimizer": "nvme"}}, "nvme_path go together"),
        ({"deepspeed": {"nvme_path": "x"}}, "nvme_path go together"),
        ({"deepspeed": {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "x"}}, "needs zero_stage 3"),
        ({"sequence": 2}, "sequence must be 1 with engine deepspeed"),
        ({"replicate": 2}, "replicate must be 1 with engine deepspeed"),
        ({"compile": True}, "compile is not for engine deepspeed"),
        ({"offload_optimizer": True}, "for engine deepspeed set deepspeed.offload_optimizer"),
    ],
)
def test_what_zero_cannot_do_is_refused_in_one_line(parallel: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(parallel={"engine": "deepspeed", **parallel})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "message"), [({"kind": "muon"}, "kind muon"), ({"clip_norm": None, "clip_value": 1.0}, "clip_value")]
)
def test_optimizers_of_whole_matrices_are_refused(optimizer: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"generator_training.optimizer: {message}.*fsdp2"):
        config(parallel={"engine": "deepspeed"}, generator_training={"optimizer": optimizer})


def test_the_page_lists_what_is_refused_and_all_of_it() -> None:
    """Each row of docs/scaling.md is refused for this engine alone, and whatever is refused for it has a row."""
    page = (ROOT / "docs/scaling.md").read_text().split("| not with DeepSpeed |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([^`]*=[^`]*)`", line.split(" | ")[0]) for line in page.splitlines()[2:]]
    common, said = ["data.real=true", *(f"{name}.attention=sdpa" for name in NETWORKS)], []
    for overrides in rows:
        load_run(RECIPE, [*common, *(text for text in overrides if "zero_stage" not in text)])
        with pytest.raises(ConfigError) as caught:
            load_run(RECIPE, [*common, "parallel.engine=deepspeed", *overrides])
        said.append(str(caught.value))
    tables = (*rules.DISTILLATION, *rules.OTHER_TRAINERS, *rules.NETWORKS, *rules.OPTIMIZERS)
    for rule in tables:
        ending = re.split(r"\{.*?\}", rule.says)[-1]
        assert "engine deepspeed" not in rule.says or any(line.endswith(ending) for line in said), rule.says
    for key in (field.name for field in fields(ParallelConfig) if field.default in (False, 1)):
        try:
            ParallelConfig(engine=EngineKind.deepspeed, **{key: 2 if key in ("replicate", "sequence") else True})
        except ValueError:
            assert any(line.startswith(f"parallel.{key} ") for line in said), key


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainer.base import RunOptions

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        build_trainer(config(parallel={"engine": "deepspeed"}), RunOptions(tmp_path, wandb=False))

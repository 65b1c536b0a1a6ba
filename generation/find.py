"""A network of a run's checkpoint, for whoever writes it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.load import run_from_state
from configs.schema import RunConfig
from model.export import Exporter
from model.family import Geometry
from model.network import NetworkConfig
from model.weights import Weights
from trainer.weight_sources import lag_of, open_group
from utils import checkpoint
from utils.checkpoint_folder import read_manifest
from utils.errors import UserError
from utils.logging import warn


@dataclass(frozen=True)
class Found:
    """One network of a checkpoint."""

    folder: Path
    group: str  # of the checkpoint
    network: NetworkConfig
    config: RunConfig
    label: str  # e.g. "student, averaged, step 600"

    @property
    def geometry(self) -> Geometry:
        return self.network.geometry()

    @property
    def exporter(self) -> Exporter:
        return self.network.family.exporter

    @property
    def is_critic(self) -> bool:
        return self.group.startswith("critic")

    def weights(self) -> Weights:
        """All of them: those of an adapter with what it was trained on. Raises UserError."""
        try:
            return open_group(self.folder, self.group)
        except ValueError as problem:
            raise UserError(str(problem)) from None


def find(run: Path, network: str, weights: str | None) -> Found:
    """A network of a run's latest checkpoint, or of one checkpoint. Raises UserError."""
    folder = None if str(run) in ("auto", "never") else checkpoint.resolve_resume(str(run), run)
    if folder is None:
        raise UserError(f"--run {run}: no run there: give a run's folder, or a checkpoint's")
    state = checkpoint.load_state(folder)
    config = run_from_state(state["config"])
    groups = checkpoint.tensor_names(folder)
    names = [name for name in ("student", "critic") if name in groups]
    if network not in names:
        raise UserError(f"--network {network}: {folder} has none of that name: choose {' or '.join(names)}")
    averaged = f"{network}_ema" in groups if weights is None else weights == "ema"
    if averaged and f"{network}_ema" not in groups:
        raise UserError(f"--weights ema: {folder} has no average of the {network}: use --weights raw")
    section: NetworkConfig | None = config.student if network == "student" else config.critic
    assert section is not None
    label = f"{network}, {'averaged' if averaged else 'raw'} weights, step {read_manifest(folder)['step']}"
    if averaged and network == "student" and (lag := lag_of(folder, "ema")):
        warn(f"--run {folder}: {lag}: choose the raw weights (--weights raw)")
    group = f"{network}_ema" if averaged else network
    return Found(folder, group, section, config, label)

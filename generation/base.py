"""What a run's weights began as: its base model, and the licence of that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from configs.load import run_from_state
from model.hub import hub_name
from model.network import InitWeights, NetworkConfig
from model.released import Source
from trainer.weight_sources import is_run
from utils import checkpoint
from utils.errors import UserError

_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")  # the Hub's own cache
MOST_RUNS = 100  # that can begin from one another; more are a circle


@dataclass(frozen=True)
class Base:
    """What weights began as.

    repo: its repository on the Hub, None where nothing says it for certain.
    named: the name of local weights of which no more is known, None where there are none.
    runs: names of the runs in between, the latest first.
    loras: names of the LoRA files that were added on the way.
    source: the repository, where the family knows it.
    """

    repo: str | None
    named: str | None
    runs: tuple[str, ...]
    loras: tuple[str, ...]
    source: Source | None

    @property
    def licence(self) -> str | None:
        """Its SPDX name. A LoRA file has a licence that nothing says, and so has the sum."""
        return None if self.source is None or self.loras else self.source.licence

    @property
    def is_whole_start(self) -> bool:
        """Whether the run began from a repository's own weights as they are, and the family knows its layout."""
        return self.source is not None and not self.runs and not self.loras

    @property
    def itself(self) -> str:
        """What the weights are that a network began from, in a few words."""
        if self.runs:
            return f"the run {self.runs[0]}"
        return self.repo or f"local weights named {self.named}"

    def told(self) -> str:
        """It in sentences."""
        if self.repo is not None:
            said = f"Base model: {self.repo} (licence: {self.source.licence if self.source else 'unknown'})."
        elif self.named is not None:
            said = f"Unknown base: training began from local weights named {self.named}, and no more is known."
        else:
            said = "No base model: training began from random weights."
        if self.runs:
            said += f" In between lie the runs {', '.join(self.runs)}."
        if self.loras:
            said += f" LoRA files were added: {', '.join(self.loras)}."
        return said

    def remedy(self, sources: dict[str, Source]) -> str:
        """What to do where the licence is unknown, in one clause."""
        alike = next((repo for repo in sources if repo.split("/")[1] == self.named), None)
        if alike is not None and not self.loras:
            return f"give --base {alike} if that is what {self.named} holds, or --licence NAME"
        return "give --licence NAME (as the Hub names it, e.g. apache-2.0)"


def sources_of(network: NetworkConfig) -> dict[str, Source]:
    """The repositories that a network's family knows, by name."""
    return {source.repo: source for source in network.family.sources.values()}


def base_of(network: NetworkConfig, stated: str | None = None) -> Base:
    """What a network's weights began as, through all runs before its own. stated: the repository that a user names."""
    runs: list[str] = []
    sources, loras = sources_of(network), [path_name(lora.path) for lora in network.loras]
    here: NetworkConfig | None = network
    while here is not None and here.init is not None and is_run(Path(here.init)) and len(runs) < MOST_RUNS:
        name, before = _before(here, Path(here.init))
        runs.append(name)
        loras += [path_name(lora.path) for lora in before.loras] if before is not None else []
        here = before
    start = here.init if here is not None else runs[-1]
    repo = stated or (None if start is None else _repo(start, sources))
    named = path_name(start) if repo is None and start is not None else None
    return Base(repo, named, tuple(runs), tuple(loras), sources.get(repo or ""))


def path_name(path: str) -> str:
    """The last part of a path that says something: cards are for others, and folders of a machine are not."""
    parts = [part for part in Path(path).parts if part not in ("transformer", "transformer_2", "/")]
    return parts[-1] if parts else path


def _before(network: NetworkConfig, run: Path) -> tuple[str, NetworkConfig | None]:
    """(name of the run that `network.init` is, the network that it took from it); None where it cannot be read."""
    try:
        folder = checkpoint.resolve_resume(str(run), run)
        assert folder is not None
        config = run_from_state(checkpoint.load_state(folder)["config"])
    except UserError:  # whoever reads the weights says so; here it only means that the base is unknown
        return run.name, None
    return config.name, config.critic if network.init_weights is InitWeights.critic else config.student


def _repo(init: str, sources: dict[str, Source]) -> str | None:
    """The repository that these weights certainly are of: one that the family knows, or one in the Hub's cache."""
    from huggingface_hub import constants

    if cached := _CACHED.search(init):
        return f"{cached['owner']}/{cached['name']}"
    if (name := hub_name(init)) is None:
        return None
    kept = Path(constants.HF_HUB_CACHE, f"models--{name['repo'].replace('/', '--')}")
    return name["repo"] if name["repo"] in sources or kept.is_dir() else None

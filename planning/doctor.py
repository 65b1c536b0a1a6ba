"""`python doctor.py [CONFIG]`: what this machine can do, and what a recipe lacks before it can start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.load import load_run
from configs.schema import RunConfig
from planning.disk import state_of
from planning.files import check_files
from planning.finding import Finding
from planning.launch import Recipe, asked_cluster, start_command
from planning.machine import Machine, Probes, check_machine
from planning.packages import check_core, check_python
from planning.plan import Cluster
from planning.recipe_checks import (
    check_disk,
    check_host,
    check_memory,
    check_ranks,
    check_run_folder,
    check_software,
    cluster_here,
    cluster_text,
    needed,
    needs_of,
)
from utils.cli import Parser
from utils.errors import ConfigError

NAME_WIDTH = 16


@dataclass(frozen=True)
class Asked:
    """What the command line says. gpus, gpu: other ones than this machine's to judge for."""

    recipe: Recipe | None = None
    gpus: int | None = None
    gpu: str | None = None
    as_json: bool = False

    @property
    def elsewhere(self) -> bool:
        """Whether it asks about other GPUs than those that are here."""
        return self.gpus is not None or self.gpu is not None


@dataclass
class Report:
    """All findings, by section, and the command that starts the recipe."""

    machine: list[Finding] = field(default_factory=list)
    recipe: list[Finding] = field(default_factory=list)
    command: str | None = None

    @property
    def missing(self) -> int:
        return sum(finding.blocks for finding in [*self.machine, *self.recipe])


def doctor_args(argv: Sequence[str] | None = None) -> Asked:
    """Parses the arguments of doctor.py (sys.argv by default). Raises UserError."""
    parser = Parser(prog="doctor.py", description="What this machine can do, and what a recipe lacks to start here.")
    parser.add_argument("config", nargs="*", metavar="CONFIG [key=value ...]", help="a recipe, as train.py takes it")
    parser.add_argument("--logdir", type=Path, help="run folder (default: as train.py chooses it)")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="judge for so many GPUs, in nodes of 8, not for those here"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="and for these: a100-40, a100-80, h100, h200, b200, l40s, rtx4090"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    space = parser.parse_intermixed_args(argv)
    if space.gpus is not None and space.gpus < 1:
        parser.error(f"--gpus {space.gpus}: give at least 1")
    if not space.config:
        if space.logdir is not None or space.gpus is not None or space.gpu is not None:
            parser.error("--logdir, --gpus and --gpu are about a recipe: name its YAML first")
        return Asked(as_json=space.json)
    path, *overrides = space.config
    if "=" in path:
        parser.error(f"{path}: name the recipe's YAML before what is laid over it")
    return Asked(Recipe(Path(path), tuple(overrides), space.logdir), space.gpus, space.gpu, space.json)


def doctor(asked: Asked, probes: Probes | None = None) -> int:
    """Looks and prints. Returns 0 if the recipe could start as it is (without one: if anything could), else 1.

    Raises UserError for a recipe that cannot be read, or that no machine could run.
    """
    machine, report = Machine(probes or Probes()), Report()
    config = None if asked.recipe is None else load_run(asked.recipe.path, asked.recipe.overrides)
    sections = [("this machine", report.machine, machine_findings(machine, config, asked))]
    if asked.recipe is not None and config is not None:
        title = f"{asked.recipe.path}: {config.name}, trainer {config.trainer.value}"
        sections.append((title, report.recipe, recipe_findings(asked, config, machine, report)))
    for title, found, findings in sections:
        if not asked.as_json:
            print(title, flush=True)
        for finding in findings:
            found.append(finding)
            if not asked.as_json:
                print("\n".join(lines(finding)), flush=True)
    if asked.as_json:
        print(json.dumps(as_json(asked, report), indent=1))
    else:
        print("\n".join(ending(asked, report)))
    return int(report.missing > 0)


def machine_findings(machine: Machine, config: RunConfig | None, asked: Asked) -> Iterator[Finding]:
    """Of this machine; what the recipe needs of it must be there, unless it is to run elsewhere."""
    yield check_python()
    yield from check_core(machine.probes.version)
    needs: dict[str, str] = {}
    for finding in check_machine(machine):
        yield needed(finding, needs)
        if finding.name == "GPU" and config is not None and not asked.elsewhere:  # the machine knows its device now
            needs = needs_of(config, on_gpu=bool(machine.gpus))


def recipe_findings(asked: Asked, config: RunConfig, machine: Machine, report: Report) -> Iterator[Finding]:
    """Of a recipe. Sets the report's command."""
    recipe = asked.recipe
    assert recipe is not None
    meant_for = recipe.hardware()
    here = cluster_here(machine)
    cluster = here
    if asked.elsewhere:
        cluster = asked_cluster(asked.gpus, asked.gpu, here if machine.gpus else meant_for)
    else:
        yield from check_software(config, machine)
    yield from check_files(recipe, config)
    yield check_run_folder(recipe, config)
    try:
        state = state_of(config)
    except ConfigError as problem:
        yield Finding("networks", False, str(problem), "change what it names")
        return
    except ImportError as problem:  # without peft an adapter cannot even be counted; that it is absent was said above
        yield Finding("networks", False, f"cannot be counted: {problem}", "install it first", needed=False)
        return
    yield check_disk(recipe, config, machine, state)
    ranks = check_ranks(config, cluster, meant_for)
    yield ranks
    memory = check_memory(recipe, config, cluster, state) if ranks.ok else None
    if memory is not None:
        yield memory
    if cluster is here and machine.gpus:
        yield check_host(config, machine, state)
    if asked.elsewhere or meant_for is None or (memory is not None and memory.ok):
        report.command = start_command(recipe, cluster)
        return
    report.command = start_command(recipe, meant_for)
    yield from _as_meant(recipe, config, meant_for)


def _as_meant(recipe: Recipe, config: RunConfig, meant_for: Cluster) -> Iterator[Finding]:
    """The planner's answer for the GPUs that the recipe's head names, where this machine is not enough."""
    if not check_ranks(config, meant_for, None).ok:
        return
    planned = check_memory(recipe, config, meant_for, state_of(config))
    what = f"{cluster_text(meant_for)}, as its head says: {planned.what}"
    yield dataclasses.replace(planned, name="meant for", what=what, needed=False)


# ------------------------------------------------------------------------------------------------------------ printing


def lines(finding: Finding) -> list[str]:
    """A finding as it is shown: a line, and one with the remedy of what is not right."""
    mark = "ok" if finding.ok else "MISSING" if finding.needed else "-"
    shown = [f"  {mark:8}{finding.name:{NAME_WIDTH}}  {finding.what}"]
    return shown if finding.ok or not finding.remedy else [*shown, f"{'':10}{'':{NAME_WIDTH}}  > {finding.remedy}"]


def ending(asked: Asked, report: Report) -> list[str]:
    """The command, and the last line."""
    title = "start it" if report.missing == 0 else "start it, once nothing is missing"
    shown = [] if report.command is None else [title, f"  {report.command}"]
    return [*shown, verdict(asked, report.missing)]


def verdict(asked: Asked, missing: int) -> str:
    """The last line, which counts what is missing."""
    does = "nothing can be trained here" if asked.recipe is None else "the recipe cannot start"
    if missing:
        return f"{missing} thing{'s are' if missing > 1 else ' is'} missing: {does}"
    return "nothing is missing: " + ("runs can be trained here" if asked.recipe is None else "the recipe could start")


def as_json(asked: Asked, report: Report) -> dict[str, object]:
    """The same for scripts."""
    return {
        "recipe": None if asked.recipe is None else str(asked.recipe.path),
        "overrides": [] if asked.recipe is None else list(asked.recipe.overrides),
        "machine": [dataclasses.asdict(finding) for finding in report.machine],
        "findings": [dataclasses.asdict(finding) for finding in report.recipe],
        "command": report.command,
        "missing": report.missing,
        "could_start": report.missing == 0,
    }

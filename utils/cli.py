"""Command line of ``train.py`` and the one place where an error becomes one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from utils import distributed
from utils.config import UserError
from utils.watchdog import EXIT_STUCK, CollectiveError


@dataclass(frozen=True)
class PlanArgs:
    """What to plan for."""

    nodes: int
    gpus_per_node: int
    gpu: str


@dataclass(frozen=True)
class TrainArgs:
    """What ``train.py`` was asked to do."""

    config_path: Path
    overrides: tuple[str, ...]  # key=value, laid over the YAML in this order
    logdir: Path
    resume: str  # "auto", "never" or a path: see checkpoint.resolve_resume
    max_steps: int | None  # stop after this step whatever the config says
    wandb: bool
    save: bool
    visualize: bool
    print_config: bool
    plan: PlanArgs | None  # say what the run needs, instead of running it


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors of one line; no abbreviations, so a typo is never taken for an option."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown.split("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            message = f"unknown option {unknown}: {hint}"
        raise UserError(message)


def train_args(argv: Sequence[str] | None = None) -> TrainArgs:
    """Parse the arguments of ``train.py`` (``sys.argv`` by default). Raises UserError."""
    parser = Parser(prog="train.py", description="Train or distil what a YAML file describes.")
    parser.add_argument("--config_path", "--config-path", type=Path, required=True, metavar="YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the YAML, e.g. seed=1")
    parser.add_argument("--logdir", type=Path, help="run folder (default: logs/<family>/<method> of the YAML's path)")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    parser.add_argument("--max_steps", "--max-steps", type=_positive, metavar="N", help="stop after step N")
    parser.add_argument("--disable-wandb", "--disable_wandb", action="store_true")
    parser.add_argument("--no_save", "--no-save", action="store_true", help="write no checkpoints")
    parser.add_argument("--no_visualize", "--no-visualize", action="store_true", help="make no validation videos")
    parser.add_argument("--print_config", "--print-config", action="store_true", help="print it checked, and exit")
    plan = parser.add_argument_group("planning", "what the run would need of its GPUs, found out without one")
    plan.add_argument("--plan", action="store_true", help="print it, and exit")
    plan.add_argument("--nodes", type=_positive, metavar="N", help="default: 1")
    plan.add_argument("--gpus_per_node", "--gpus-per-node", type=_positive, metavar="N", help="default: 8")
    plan.add_argument("--gpu", metavar="NAME", help="a100-40, a100-80, h100, h200 (default), b200, l40s, rtx4090")
    # intermixed: overrides may stand before, between and after options
    space = parser.parse_intermixed_args(argv)
    if not space.plan and (space.nodes or space.gpus_per_node or space.gpu):
        parser.error("--nodes, --gpus_per_node and --gpu say what to plan for: add --plan, or start with torchrun")
    return TrainArgs(
        config_path=space.config_path,
        overrides=tuple(space.overrides),
        logdir=space.logdir or default_logdir(space.config_path),
        resume=space.resume,
        max_steps=space.max_steps,
        wandb=not space.disable_wandb,
        save=not space.no_save,
        visualize=not space.no_visualize,
        print_config=space.print_config,
        plan=PlanArgs(space.nodes or 1, space.gpus_per_node or 8, space.gpu or "h200") if space.plan else None,
    )


def default_logdir(config_path: Path) -> Path:
    """``configs/toy/teacher.yaml`` -> ``logs/toy/teacher``; a YAML outside ``configs`` -> ``logs/<stem>``."""
    parts = config_path.with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts else parts[-1:]
    return Path("logs", *below)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def refuse_several_ranks(program: str) -> None:
    """Raises UserError under a launcher of several processes: ``program`` is one, and others would write its files."""
    if (ranks := distributed.world_size()) > 1:
        raise UserError(f"{program} runs as one process and was started as {ranks}: start it without torchrun")


SAME_ERROR_SECONDS = 2.0  # in which a launcher has ended the other ranks of a run after the first one's exit


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit: 0 or its return value; a UserError is one line on stderr and exit code 2; a lost rank,
    which the watchdog has reported, is exit code EXIT_STUCK. A MemoryError is one line, too, which names the function.

    Most UserErrors are every rank's: rank 0 says them at once, another rank only if it is still there
    SAME_ERROR_SECONDS later, for then it may be the only one.

    Anything else is a defect of ours and keeps its traceback. Where the environment names a folder EXIT_CODES, each
    rank leaves its code there: torchrun makes 1 of all codes, and a launcher has to tell a saved run from a failed one.
    """
    code = 1
    try:
        code = main() or 0
    except UserError as error:
        code, rank = 2, distributed.rank()
        if rank:
            time.sleep(SAME_ERROR_SECONDS)
        whose = f"rank {rank}: " if rank else ""
        print(f"{Path(sys.argv[0]).name}: error: {whose}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    except MemoryError as error:
        code = 2
        last = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"{Path(sys.argv[0]).name}: error: this machine's memory is too small for what {last.name} of "
            f"{Path(last.filename).name} makes: lower the sizes that the config or the command line asks for",
            file=sys.stderr,
            flush=True,
        )
    except CollectiveError:
        code = EXIT_STUCK
    except KeyboardInterrupt:
        code = 130
    finally:
        if folder := os.environ.get("EXIT_CODES"):
            Path(folder, f"rank_{distributed.rank()}").write_text(f"{code}\n")
    # after a failure of one rank, or of one it waits for, the group's orderly end would wait for the others
    distributed.leave(code, together=code not in (2, 130, EXIT_STUCK))

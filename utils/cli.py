"""What all command lines share, and the one place where an error becomes one line and exit code 2."""

from __future__ import annotations

import argparse
import codecs
import difflib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from utils import distributed, ranks
from utils.errors import AgreedError, UserError
from utils.fields import show
from utils.launcher import EXIT_STUCK, LauncherGone
from utils.reading import UTF8
from utils.watchdog import EXIT_REFUSED, CollectiveError, RefusedElsewhere
from utils.writing import REFUSALS, refusal


def text_encoding(name: str) -> str:
    """Type of an option: an encoding of text that Python knows. UTF-8 may begin with a mark."""
    try:
        b"text".decode(name, "replace")
        return UTF8 if codecs.lookup(name).name == "utf-8" else name
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no encoding of text: give utf-16, cp1252, gb18030, ..."
        ) from None


class ShowDefaults(argparse.HelpFormatter):
    """Help in which each option says whether it is required, or what its value is without it."""

    one_of: Mapping[str, str] = {}  # destination of an option -> all options of its group, one of which is required

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings:
            return text
        if action.required:
            return f"{text} (required)".lstrip()
        if action.dest in self.one_of:
            return f"{text} (one of {self.one_of[action.dest]} is required)".lstrip()
        if action.nargs == 0 or "default" in text:
            return text
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        shown = "none" if default is None or default == "" else str(default).replace("%", "%%")
        return f"{text} (default: {shown})".lstrip()


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors of one line; no abbreviations, so a typo is never taken for an option. Its
    help shows defaults."""

    def __init__(self, *args: object, **kwargs: object):
        usual = {"allow_abbrev": False, "formatter_class": ShowDefaults}
        super().__init__(*args, **{**usual, **kwargs})  # type: ignore[arg-type]

    def _get_formatter(self) -> argparse.HelpFormatter:
        formatter = super()._get_formatter()
        if isinstance(formatter, ShowDefaults):
            groups = [group._group_actions for group in self._mutually_exclusive_groups if group.required]
            formatter.one_of = {
                action.dest: ", ".join(other.option_strings[0] for other in group)
                for group in groups
                for action in group
            }
        return formatter

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        value = super()._get_value(action, arg_string)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise argparse.ArgumentError(action, f"{arg_string!r} is not finite: give a number")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise argparse.ArgumentError(action, f"{show(number)} is too large: give a number of at most 63 bits")
        return value

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown.split("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            message = f"unknown option {unknown}: {hint}"
        raise UserError(message)


def refuse_several_ranks(program: str) -> None:
    """Raises UserError under a launcher of several processes: ``program`` is one, and others would write its files."""
    if (started := distributed.world_size()) > 1:
        raise UserError(f"{program} runs as one process and was started as {started}: start it without torchrun")


LONGEST = 1200  # characters of an error that are worth reading


def one_line(error: object) -> str:
    """What an error says, in one line; of a very long one, which quotes what somebody's file holds, both ends."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


SAME_ERROR_SECONDS = 2.0  # in which a launcher has ended the other ranks of a run after the first one's exit


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit: 0 or its return value; a UserError is one line on stderr and exit code 2; a lost rank,
    which the watchdog has reported, and a lost launcher are exit code EXIT_STUCK. A MemoryError is one line, too, which
    names the function, and so is what a disk refuses, such as a full one.

    An AgreedError is every rank's, and rank 0 says it. Most UserErrors are too: rank 0 says them at once, another rank
    only if it is still there SAME_ERROR_SECONDS later, for then it may be the only one.

    Anything else is a defect of ours and keeps its traceback. Where the environment names a folder EXIT_CODES, each
    rank leaves its code there: torchrun makes 1 of all codes, and a launcher has to tell a saved run from a failed one.
    """
    code = 1
    try:
        ranks.adopt(os.environ)
        code = main() or 0
    except UserError as error:
        code = EXIT_REFUSED
        if distributed.is_main() or not isinstance(error, AgreedError):
            _say_error(one_line(error))
        else:  # a launcher that misses one rank ends the others: rank 0 has to speak first
            time.sleep(SAME_ERROR_SECONDS)
    except MemoryError as error:
        code = 2
        last = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"{Path(sys.argv[0]).name}: error: this machine's memory is too small for what {last.name} of "
            f"{Path(last.filename).name} makes: lower the sizes that the config or the command line asks for",
            file=sys.stderr,
            flush=True,
        )
    except OSError as error:
        refused = refusal(error) if error.errno in REFUSALS else None
        if refused is None:
            raise
        code = 2
        _say_error(one_line(": ".join(filter(None, (str(error.filename or ""), *refused)))))
    except (CollectiveError, RefusedElsewhere) as error:
        code = error.code
    except LauncherGone as error:
        code = EXIT_STUCK
        if distributed.is_main():
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    finally:
        if folder := os.environ.get("EXIT_CODES"):
            _leave_code(Path(folder, f"rank_{distributed.rank()}"), code)
    # after a failure of one rank, or of one it waits for, the group's orderly end would wait for the others
    distributed.leave(code, together=code not in (2, 130, EXIT_STUCK))


def _say_error(text: str) -> None:
    if rank := distributed.rank():
        time.sleep(SAME_ERROR_SECONDS)
    whose = f"rank {rank}: " if rank else ""
    print(f"{Path(sys.argv[0]).name}: error: {whose}{text}", file=sys.stderr, flush=True)


def _leave_code(file: Path, code: int) -> None:
    """Tells a launcher how this rank ended. Where that cannot be written it goes by torchrun's own code."""
    try:
        file.write_text(f"{code}\n")
    except OSError as problem:
        print(f"{file} cannot be written: {problem.strerror}: exit code {code}", file=sys.stderr, flush=True)

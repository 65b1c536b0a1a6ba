"""The one boundary of all files that somebody else made: whatever a library raises inside becomes one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.limits import check_size

REMEDY = "fetch it or make it again"
UTF8 = "utf-8-sig"  # which may begin with a mark
LONGEST = 300  # characters of a library's words that are worth showing
# no file's failure; the last is a defect of ours
_OTHERS = (KeyboardInterrupt, SystemExit, GeneratorExit, NameError)
_WORDS = {RecursionError: "it is nested too deep", MemoryError: "it asks for more memory than there is"}


@contextmanager
def reading(
    what: str,
    path: object,
    remedy: str = REMEDY,
    *,
    says: str = "cannot be read",
    error: type[ValueError] = UserError,
) -> Iterator[None]:
    """Anything that is raised inside becomes one line: what is read, the file, why, and what to do.

    what: what the file should be, such as "LoRA". Like `remedy` it may be empty.
    path: the file, or the place in it.
    remedy: what to do about it.
    says: what the file does, in words.
    error: the class of what is raised. It is one line already, and so is a UserError, which becomes it.
    """
    try:
        yield
    except error:
        raise
    except UserError as problem:
        raise error(str(problem)) from None
    except BaseException as problem:  # Rust's panics are no Exception
        if isinstance(problem, _OTHERS):
            raise
        said = f"{path} {says} ({reason(problem)})"
        raise error(": ".join(filter(None, (what, said, remedy)))) from problem


def reason(problem: BaseException) -> str:
    """What went wrong, in one line that is not too long."""
    if isinstance(problem, tuple(_WORDS)):
        return next(words for kind, words in _WORDS.items() if isinstance(problem, kind))
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split())
    if isinstance(problem, KeyError):
        text = f"it has no {text}"
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...") or type(problem).__name__


def read_text(what: str, path: Path, remedy: str = REMEDY, *, encoding: str = UTF8) -> str:
    """A text file, in which \\r\\n has become \\n. Raises UserError, also for one larger than `Limits.text`."""
    with reading(what, path, remedy):
        check_size("text", path.stat().st_size, path)
        return decoded(path.read_bytes(), f"{what}: {path}" if what else path, encoding).replace("\r\n", "\n")


def decoded(data: bytes, where: object, encoding: str = UTF8) -> str:
    """Text of these bytes. Raises UserError with the first line that has other ones."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as problem:
        before, byte = problem.object[: problem.start], problem.object[problem.start]
        line = before.decode(encoding, "replace").count("\n") + 1
        name = "UTF-8" if encoding == UTF8 else encoding
        raise UserError(
            f"{where}, line {line} is not in {name} (byte 0x{byte:02x}): save the file as UTF-8, or name its encoding "
            "where the command has --encoding"
        ) from None


def read_json(what: str, path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, one line."""
    text = read_text(what, path, remedy)
    with reading(what, path, remedy, says="is not JSON"):
        values = json.loads(text)
    if not isinstance(values, dict):
        said = f"{path} holds a {type(values).__name__} and no {{...}} at its top"
        raise UserError(": ".join(filter(None, (what, said, remedy))))
    return values

"""An exported folder to a repository of the Hub: `python export.py ... --push owner/name`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from generation.card import CARD, addressed, licence_of
from utils.errors import UserError
from utils.logging import console
from utils.writing import write_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OF_THE_HUB = {".gitattributes"}  # what it puts into a new repository


@dataclass(frozen=True)
class Push:
    """repo: `owner/name`. public: whether everybody may read it."""

    repo: str
    public: bool


def check_push(to: Push) -> None:
    """Raises UserError, before anything is written, where nothing could be uploaded: offline, no token, a wrong one."""
    with _failing(to, _token(to), "nothing was exported"):
        _api(to).whoami()


def push(folder: Path, to: Push) -> str:
    """Uploads all files of an exported folder in one repository, and returns its address.

    Code in the card then names the repository. What is there already is not sent again, so the same call goes on after
    an interruption. Raises UserError for a folder that is no export or whose card has no licence, a repository of other
    files or of another visibility, and for what failed on the way; the folder is as it was.
    """
    page = folder / CARD
    if not page.is_file():
        raise UserError(f"--out {folder}: no export lies there: it has no {CARD}: name one, or give --run and --format")
    if licence_of(page.read_text()) is None:
        raise UserError(
            f"--out {folder}: its {CARD} has no line `license:`: export it again with --licence NAME, or add the line"
        )
    write_text(page, addressed(page.read_text(), to.repo), "--out")
    again = f"python export.py --out {shlex.quote(str(folder))} --push {to.repo}{' --public' if to.public else ''}"
    with _failing(to, _token(to), f"{folder} is whole; go on with: {again}"):
        api = _api(to)
        address = str(api.create_repo(to.repo, private=not to.public, exist_ok=True))
        ours = {file.relative_to(folder).as_posix(): file.stat().st_size for file in _files(folder)}
        _check_repo(api, to, set(ours))
        api.upload_folder(repo_id=to.repo, folder_path=folder, commit_message="Exported by fewstep")
        arrived = _sizes(api, to.repo)
        if wrong := [name for name, size in ours.items() if arrived.get(name) != size]:
            raise ValueError(f"{len(wrong)} files did not arrive, first {wrong[0]}")
    return address


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _sizes(api: HfApi, repo: str) -> dict[str, int | None]:
    """Bytes of each file of a repository."""
    siblings = api.model_info(repo, files_metadata=True).siblings or []
    return {file.rfilename: file.size for file in siblings}


def _check_repo(api: HfApi, to: Push, ours: set[str]) -> None:
    """Raises UserError for a repository that was there before, and is not what was asked for."""
    info = api.model_info(to.repo)
    if bool(info.private) == to.public:
        is_now, remedy = ("private", "leave out --public") if info.private else ("public", "give --public")
        raise UserError(f"--push {to.repo}: it is {is_now} already: {remedy}, or change it on the Hub")
    if others := sorted({file.rfilename for file in info.siblings or []} - ours - OF_THE_HUB):
        raise UserError(
            f"--push {to.repo}: it holds {len(others)} files that this export does not have, first {others[0]}, and "
            "would be a mixture: name a new repository, or delete them there"
        )


def _api(to: Push) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=_token(to))


def _token(to: Push) -> str:
    """The user's token. Raises UserError where there is none, or where nothing may be asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {to.repo}: HF_HUB_OFFLINE is set: unset it, or push where there is a network")
    if (token := get_token()) is None:
        raise UserError(f"--push {to.repo}: no token of the Hub: run `hf auth login`, or set HF_TOKEN")
    return token


@contextmanager
def _failing(to: Push, token: str, state: str) -> Iterator[None]:
    """What the client raises inside becomes a UserError of one line, without the token. state: of the files."""
    try:
        yield
    except UserError:
        raise
    except KeyboardInterrupt:
        console.warning("--push %s: interrupted: %s", to.repo, state)
        raise
    except Exception as problem:  # many kinds, of three packages: none of them is ours
        reason = " ".join(str(problem).split()).replace(token, "(token)")
        raise UserError(f"--push {to.repo}: {type(problem).__name__}: {reason}: {state}") from None

"""Repositories of the Hub as local folders."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<inside>.+))?")


def hub_name(path: str | Path) -> re.Match[str] | None:
    """`owner/name[@revision][/path inside]` by its groups `repo`, `revision` and `inside`; None for a local path.

    A typing error in a local path is not to be looked for on the Hub, so what begins with a folder of ours is local.
    """
    if Path(path).exists() or Path(str(path).split("/")[0]).is_dir():
        return None
    return _NAME.fullmatch(str(path))


def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The local folder of a Hub repository, with the files of these patterns; what is there is not fetched again.

    Raises ValueError in one line, also where HF_HUB_OFFLINE forbids to ask.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as problem:  # many kinds, of three packages: none of them is ours
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            include = " ".join(f"--include '{pattern}'" for pattern in patterns)
            raise ValueError(
                f"'{repo}' is no local path, and HF_HUB_OFFLINE is set and the cache lacks it: fetch it where there is "
                f"a network (hf download {repo} {include}), or give a local folder (seen from {Path.cwd()})"
            ) from problem
        reason = (str(problem).strip().splitlines() or [""])[0]
        raise ValueError(
            f"'{repo}' is no local path, and cannot be had from the Hub ({type(problem).__name__}: {reason}): correct "
            f"the path (seen from {Path.cwd()}), or check the name, the network and your access"
        ) from problem

"""Why a run ends before its time, and what its last line says of what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """why: what happened. remedy: what to do about it."""

    why: str
    remedy: str

    def line(self, *, saves: bool, ruined: str | None, sound: Path | None) -> str:
        """The line of the run's end.

        saves: whether the run saves what it has.
        ruined: which weights are not finite, None for none.
        sound: the checkpoint that a resume takes, None for none.
        """
        if not saves:
            return f"{self.why}; --no_save: nothing is saved: {self.remedy}"
        if ruined is None:
            return f"{self.why}; the state is saved, and no older checkpoint was deleted for it: {self.remedy}"
        after = "there is no sound checkpoint" if sound is None else f"--resume auto goes on from {sound}"
        return f"{self.why}; the state is saved, but its weights are not finite ({ruined}): {after}: {self.remedy}"

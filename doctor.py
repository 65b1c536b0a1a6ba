"""`python doctor.py [CONFIG] [key=value ...]`: what this machine can do, and what a recipe lacks to start here."""

from __future__ import annotations

import os
import sys

# Before torch loads OpenMP: threads that spin while they wait starve another process on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before the Hub's client is loaded: looking must fetch nothing.
os.environ["HF_HUB_OFFLINE"] = "1"

from planning.packages import check_core, check_python


def main() -> int:
    """Looks at all. What it stands on is there."""
    from planning.doctor import doctor, doctor_args
    from utils.cli import refuse_several_ranks

    refuse_several_ranks("doctor.py")
    return doctor(doctor_args())


if __name__ == "__main__":
    if lacking := [finding for finding in (check_python(), *check_core()) if finding.blocks]:
        for finding in lacking:
            print(f"MISSING  {finding.name}: {finding.what}\n         > {finding.remedy}")
        sys.exit(f"{len(lacking)} thing{'s are' if len(lacking) > 1 else ' is'} missing: nothing can be trained here")
    from utils.cli import run_cli

    run_cli(main)

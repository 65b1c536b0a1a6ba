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
    """Without the packages that everything stands on, says which they are; else looks at all."""
    if lacking := [finding for finding in (check_python(), *check_core()) if finding.blocks]:
        for finding in lacking:
            print(f"MISSING  {finding.name}: {finding.what}\n         > {finding.remedy}")
        print(f"missing: {len(lacking)}")
        return 1
    from planning.doctor import doctor, doctor_args
    from utils.cli import refuse_several_ranks

    refuse_several_ranks("doctor.py")
    return doctor(doctor_args())


def _run() -> None:
    """As utils/cli.py runs each command, once what it stands on is there."""
    if any(finding.blocks for finding in (check_python(), *check_core())):
        sys.exit(main())
    from utils.cli import run_cli

    run_cli(main)


if __name__ == "__main__":
    _run()

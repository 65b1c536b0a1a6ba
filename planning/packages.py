"""Python and its packages: which are there, and whether they are as new as what is tested."""

# Python's own library alone: these lines must run where nothing is installed yet.

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from planning.finding import Finding

ROOT = Path(__file__).parents[1]
OLDEST_PYTHON = (3, 11)  # requires-python of pyproject.toml
# what nothing here runs without: the dependencies of pyproject.toml
CORE = ("torch", "numpy", "einops", "omegaconf", "safetensors", "huggingface_hub", "tqdm", "pillow")
OLDEST_TORCH = "2.11"

Version = Callable[[str], "str | None"]


def installed(package: str) -> str | None:
    """The version of an installed package, None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pins() -> dict[str, str]:
    """The versions that are tested, by package: of requirements.txt and requirements-gpu.txt."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-gpu.txt"))
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))


def older(version: str, than: str) -> bool:
    """Whether a version is older, by its numbers alone."""
    found, wanted = (tuple(map(int, re.findall(r"\d+", text.split("+")[0]))) for text in (version, than))
    return found < wanted


def install(*packages: str) -> str:
    """The command that installs these in the version that is tested."""
    known = pins()
    return "pip install " + " ".join(f"{name}=={known[name]}" if name in known else name for name in packages)


def check_python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", False, f"{found} is too old: nothing here runs", "install Python 3.11 or newer")
    return Finding("Python", True, found)


def check_core(version: Version = installed) -> list[Finding]:
    """Of torch, and of the other packages that nothing runs without."""
    found = {name: version(name) for name in CORE}
    missing = [name for name, known in found.items() if known is None]
    findings = []
    if (torch := found["torch"]) is not None:
        if older(torch, OLDEST_TORCH):
            what = f"{torch} is older than {OLDEST_TORCH}: nothing here runs"
            findings.append(Finding("torch", False, what, install("torch")))
        else:
            findings.append(Finding("torch", True, torch))
    if missing:
        what = f"without {', '.join(missing)}: nothing here runs"
        findings.append(Finding("packages", False, what, _remedy(missing)))
        return findings
    behind = _behind(version)
    if behind:
        what = f"older than what is tested: {', '.join(behind)}: errors may have this cause"
        findings.append(Finding("packages", False, what, "pip install -r requirements.txt", needed=False))
    else:
        findings.append(Finding("packages", True, "as new as what is tested, or newer"))
    return findings


def before_torch() -> dict[str, str]:
    """The environment that a program needs before it imports torch. Ends it in one line where a package is absent that
    nothing runs without."""
    imported = [name for name in CORE if name != "pillow"]  # which is asked for where a picture is
    if missing := [name for name in imported if importlib.util.find_spec(name) is None]:
        what = f"this Python has no {', '.join(missing)}: {_remedy(missing)}"
        print(f"{Path(sys.argv[0]).name}: error: {what}", file=sys.stderr)
        sys.exit(2)
    usual = {
        # threads of OpenMP that spin while they wait starve another process on the same few cores
        "OMP_WAIT_POLICY": "PASSIVE",
        # a warning of torch's C++ has its whole stack, at each try to reach a launcher that is gone
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {name: os.environ.get(name, value) for name, value in usual.items()}


def _remedy(missing: list[str]) -> str:
    environment = ROOT / ".venv"
    if (environment / "bin" / "python").exists() and Path(sys.prefix).resolve() != environment.resolve():
        return "source .venv/bin/activate: make installs into that environment, and this is another Python"
    return install(*missing)


def _behind(version: Version) -> list[str]:
    """The installed packages that are older than their pin."""
    found = {name: version(name) for name in pins()}
    return [
        f"{name} {known} (tested: {pin})"
        for name, pin in pins().items()
        if (known := found[name]) is not None and older(known, pin)
    ]


def check_package(name: str, why: str, version: Version = installed) -> Finding:
    """One package that a recipe needs. why: what of the recipe needs it."""
    known = version(name)
    if known is None:
        return Finding(f"package {name}", False, f"not installed, and {why} needs it", install(name))
    return Finding(f"package {name}", True, f"{known}, for {why}")

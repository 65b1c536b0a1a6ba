"""The two container files say the same, and what the Makefile, the requirements and README say. Nothing is built here."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from tests import ROOT

DOCKERFILE = (ROOT / "containers/Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "containers/apptainer.def").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/containers.md").read_text(encoding="utf-8")
PYTHON_OF = {"ubuntu24.04": (3, 12)}  # the python3 of a distribution


def joined(text: str) -> list[str]:
    """Lines without comments, continued ones in one, spaces made single."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace("\\\n", " ")
    return [" ".join(line.split()) for line in lines.splitlines() if line.strip()]


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in joined(DOCKERFILE) if line.startswith(f"{name} ")]


def section(name: str) -> list[str]:
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, re.M | re.S)
    assert found is not None
    return joined(found[1])


def base() -> str:
    (argument,) = instructions("ARG")
    return argument.removeprefix("BASE=")


def test_both_have_the_same_base_environment_and_steps() -> None:
    assert instructions("FROM") == ["${BASE}"]
    assert f"From: {base()}" in joined(DEFINITION)
    (environment,) = instructions("ENV")
    exported = [line.removeprefix("export ") for line in section("environment")]
    assert environment.split() == exported
    steps = [line for line in section("post") if not line.startswith(("set ", "export ", "cd "))]
    assert [run for run in instructions("RUN") if not run.startswith("useradd")] == steps
    assert [line.removeprefix("export ") for line in section("post") if line.startswith("export ")] == exported
    assert f"cd {instructions('WORKDIR')[0]}" in section("post")


def test_the_tag_is_a_full_one_and_its_python_is_one_that_the_project_takes() -> None:
    found = re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-(ubuntu\d+\.\d+)", base())
    assert found is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = tuple(int(part) for part in project["requires-python"].removeprefix(">=").split("."))
    version = PYTHON_OF[found[1]]
    assert version >= least
    for text in (DOCKERFILE, PAGE):
        assert f"Python {version[0]}.{version[1]}" in text
    assert f"Python {least[0]}.{least[1]} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"python{version[0]}.{version[1]}" in makefile


def test_packages_are_installed_as_the_makefile_does_and_pinned_in_one_place() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$$", "$")
    runs = instructions("RUN")
    installs = [run.removeprefix("pip install --no-cache-dir ") for run in runs if run.startswith("pip install")]
    assert installs == ["\"$(grep '^torch==' requirements.txt)\"", "-r requirements.txt", "--no-deps --editable ."]
    assert installs[0] in makefile
    assert len(re.findall(r"^torch==[\d.]+$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)) == 1
    assert (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").startswith("-r requirements.txt\n")
    assert not re.search(r"[a-z]==\d", DOCKERFILE + DEFINITION)
    assert "DS_BUILD_OPS := 0" in makefile
    assert "DS_BUILD_OPS=0" in DOCKERFILE
    system = shlex.split(runs[0].split("--no-install-recommends ")[1].split(" && ")[0])
    assert {"python3", "python3-venv", "make", "gcc"} <= set(
        system
    )  # README's "(with `venv`), `make` and a C compiler"


def test_no_secret_goes_in_and_no_run_is_roots() -> None:
    for text in (DOCKERFILE, DEFINITION, PAGE):
        assert not re.search(r"(TOKEN|KEY|SECRET|PASSWORD|WEBHOOK)\s*=", text)
    assert instructions("USER") == ["fewstep"]
    assert joined(DOCKERFILE).index("USER fewstep") > max(
        number for number, line in enumerate(joined(DOCKERFILE)) if line.startswith(("RUN", "COPY"))
    )
    assert "git archive HEAD | docker build" in PAGE
    assert any(line.startswith("git archive HEAD | tar -x") for line in section("setup"))


@pytest.mark.parametrize("text", [DOCKERFILE, DEFINITION], ids=["docker", "apptainer"])
def test_its_command_is_the_pages(text: str) -> None:
    command = re.search(r"^#   (.*)$", text, re.M)
    assert command is not None
    assert command[1] in PAGE.splitlines()


def test_the_pages_commands_are_those_of_the_project() -> None:
    for path in re.findall(r"(?:slurm|configs|containers)/[\w./]+\.(?:slurm|yaml|def)|containers/Dockerfile", PAGE):
        assert (ROOT / path).is_file(), path
    launcher = (ROOT / "slurm/common.sh").read_text(encoding="utf-8")
    for setting in set(re.findall(r"\bCONTAINER\w*", PAGE)):
        assert re.search(rf"\b{setting}\b", launcher), setting
    assert 'python", "train.py"' in DOCKERFILE
    assert (ROOT / "train.py").is_file()

"""`make methods`: what is trained from what, what is done again, and what the page claims."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.sections import TrainerKind
from scripts.methods import jobs
from scripts.methods_page import TOY, Line, behind, verdict
from scripts.methods_run import Job, Options
from scripts.methods_table import BY_KEY, GROUPS, METHODS, chosen
from tests import ROOT
from utils.errors import UserError


def options(tmp_path: Path, **changes: Any) -> Options:
    return replace(Options(tmp_path, count=8, quick=True), **changes)


@pytest.mark.parametrize("method", [method for method in METHODS if method.recipe], ids=lambda method: method.key)
def test_every_row_is_a_legal_run_of_the_networks_it_starts_from(method: Any, tmp_path: Path) -> None:
    for quick in (False, True):
        job = Job(method, 1, options(tmp_path, quick=quick))
        config = job.config()
        assert config is not None
        assert config.seed == 1
        networks = {"student": config.student, "teacher": config.teacher, "critic": config.critic}
        for name, network in networks.items():
            if config.trainer is TrainerKind.score_distillation or name == "student":
                start = method.start.get(name)
                assert (network is None or network.init is None) == (start is None), name
                if network is not None and start is not None:
                    assert network.init == str(job.folder_of(start))
                    assert network.geometry() == Job(BY_KEY[start], 0, job.options).config().student.geometry()  # type: ignore[union-attr]


def test_rows_are_chosen_with_all_that_they_start_from_and_each_group_has_its_naive_row() -> None:
    assert [m.key for m in chosen(["init_ode_causal"])] == ["teacher", "init_tf", "init_ode_causal"]
    order = [m.key for m in METHODS]
    assert len(set(order)) == len(order)
    for group in GROUPS:
        assert group.naive is None or group.naive in order
    for method in METHODS:
        assert method.needs() <= set(order)
        assert method.group in {"", *(g.key for g in GROUPS)}
    with pytest.raises(UserError, match="--only nonsense: choose among causal_2, causvid"):
        jobs(Options(Path("x")), 1, ["nonsense"])


def test_a_run_is_known_by_what_it_was_trained_with_and_a_result_also_by_how_it_was_judged(tmp_path: Path) -> None:
    job = Job(BY_KEY["sf_dmd"], 0, options(tmp_path))
    judged_otherwise = replace(job, options=options(tmp_path, split="dev"))
    assert job.trained() == judged_otherwise.trained()
    assert job.judged() != judged_otherwise.judged()
    assert replace(job, seed=1).trained() != job.trained()
    longer = replace(job, options=options(tmp_path, quick=False))  # so are the runs that it starts from
    assert longer.trained() != job.trained()
    assert replace(job, method=BY_KEY["causal_2"]).trained() != replace(job, method=BY_KEY["teacher_1"]).trained()


def line(right: list[float], distance: list[float]) -> Line:
    results = [{"metrics": {"prompt_right": a, "appearance_fd": b}} for a, b in zip(right, distance, strict=True)]
    return Line(BY_KEY["dmd"], (), tuple(results))


def test_clearly_better_means_by_two_deviations_in_both() -> None:
    naive = line([0.5], [50.0])
    assert behind(line([0.7, 0.72, 0.74], [30.0, 31.0, 32.0]), naive, TOY[:2]) == []
    assert behind(line([0.3, 0.72, 0.94], [30.0, 31.0, 32.0]), naive, TOY[:2]) == ["prompt right"]
    assert behind(line([0.7, 0.72, 0.74], [51.0, 52.0, 53.0]), naive, TOY[:2]) == ["appearance FD, %"]
    assert behind(line([0.9], [1.0]), naive, TOY[:2]) == ["prompt right", "appearance FD, %"]  # one seed proves nothing


def test_only_students_are_held_against_the_naive_row_and_not_by_one_training() -> None:
    naive, good = line([0.5], [50.0]), line([0.7, 0.72, 0.74], [30.0, 31.0, 32.0])
    assert verdict(good, naive, TOY[:2]) == "yes"
    assert verdict(line([0.5, 0.52, 0.48], [30.0, 31.0, 32.0]), naive, TOY[:2]) == "no"
    assert verdict(line([0.9], [1.0]), naive, TOY[:2]) == "one seed"
    assert verdict(replace(good, method=BY_KEY["teacher"]), naive, TOY[:2]) == ""


@pytest.mark.slow
def test_quick_trains_judges_and_describes_rows_of_every_trainer(tmp_path: Path) -> None:
    rows = ["init_ode_causal", "phased", "digits_ladd", "digits_1", "teacher_1"]
    command = [sys.executable, "-m", "scripts.methods", "--quick", "--root", str(tmp_path), "--only", *rows]

    def run() -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return (tmp_path / "methods.md").read_text()

    page = run()
    assert "its numbers mean nothing" in page
    for row in rows:
        assert f"| {BY_KEY[row].label} |" in page
    for group in ("baselines", "two_steps", "init", "digits"):
        assert (tmp_path / "methods" / f"{group}.png").stat().st_size > 1000
    numbers = {row["row"]: row["seeds"] for row in json.loads((tmp_path / "methods/results.json").read_text())}
    assert set(numbers) == {"teacher", "init_tf", "digits_teacher", *rows}
    trained = numbers["init_ode_causal"][0]["training"]
    # two pairs by three guided steps of three blocks, two of which are cached, and three updates of two videos
    assert trained["network_evaluations"] == pytest.approx(2 * 2 * (3 + 2 / 3) + 3 * 2 * 2)
    assert trained["peak_mb"] > 0
    assert numbers["teacher_1"][0]["evaluations"] == 2
    assert numbers["digits_ladd"][0]["evaluations"] == 1
    assert numbers["phased"][0]["evaluations"] == 2  # one of each expert

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/result.json")}
    assert run() == page
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

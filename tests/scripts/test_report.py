"""The quickstart's report: every method is in it, it needs nothing outside itself, and done work is not done again."""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.load import load_run
from evaluation.command import SPLITS, Row, eval_prompts
from generation.generator import Generator
from generation.sampling import Sampling
from scripts import report, report_html, report_samples
from scripts.report_plots import Panel, curves, held, short, side_by_side, thinned, write_comparison
from scripts.report_samples import METHODS, RUNS, TEACHER_ASSET, Method, Place
from trainer.network_factory import NetworkSpec, build_network
from utils import checkpoint
from utils.config import to_plain
from utils.errors import UserError
from utils.logging import RunLogger
from utils.video import read_video

CPU = torch.device("cpu")
COUNT = 3
WITH_ERROR = (
    *("prompt_right", "shape_right", "colour_right", "direction_right"),
    *("motion_error", "jitter", "saturation"),
)
WITHOUT = (
    *("appearance_fd", "diversity"),
    *("appearance_fd_floor", "appearance_fd_floor_sd"),
)
METRICS = (*WITH_ERROR, *(f"{name}_se" for name in WITH_ERROR), *WITHOUT)


class FixedJudge:
    """Numbers that name their metric, whatever the videos are."""

    def evaluate(self, latents: torch.Tensor, captions: list[str]) -> dict[str, float]:
        assert len(latents) == len(captions)
        return {name: 0.5 + number / 100 for number, name in enumerate(METRICS)}


def write_run(root: Path, run: str, seed: int = 0) -> None:
    """A run folder whose network was never trained."""
    small = ["student.overrides.num_layers=1", "student.init=null", "training.precision=fp32", f"seed={seed}"]
    if run.startswith("self"):
        small += ["teacher.init=null", "critic.init=null"]
    config = load_run(Path("configs/shapes") / f"{run}.yaml", small)
    weights = build_network(NetworkSpec(config.student, run, seed), CPU).state_dict()
    checkpoint.save(root / run / "checkpoints", 1, {"student": weights}, {"config": to_plain(config)})
    logger = RunLogger(root / run, {})
    for step in (1, 2, 3):
        spent = {"step_seconds": 2.0, "network_evaluations": 1000.0 * step, "peak_memory_gib": 0.25}
        logger.scalars(step, {"student/loss": 1 / step, "student/saturation": 0.05, "critic/loss": 0.3} | spent)
    logger.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    for run in RUNS:
        write_run(folder, run)
    (folder / "prompts.txt").write_text("a red circle moving up\na blue star moving left\n")
    (folder / "commands.txt").write_text("python train.py --logdir <here>\n")
    return folder


def place_of(root: Path) -> Place:
    return Place(root, root / "teacher")


def evaluation_of(root: Path) -> report.Evaluation:
    return report.Evaluation(place_of(root), root / "prompts.txt", COUNT, "test")


@pytest.fixture(scope="module")
def evaluated(root: Path) -> report.Evaluation:
    evaluation = evaluation_of(root)
    evaluation.run(workers=1)
    return evaluation


@pytest.fixture(scope="module")
def document(evaluated: report.Evaluation) -> str:
    return report_html.page(report.build(evaluated, evaluated.rows(FixedJudge())))  # type: ignore[arg-type]


def part_of(evaluation: report.Evaluation, key: str) -> report_samples.Part:
    return next(parts[0] for method, parts in evaluation.judged.items() if method.key == key)


def test_every_method_has_its_videos_and_its_row(document: str) -> None:
    assert len(METHODS) == 8
    assert document.count("<video autoplay loop muted playsinline ") == len(METHODS)
    table = document[document.index("<table>") : document.index("</table>")]
    for method in METHODS:
        assert f'<th scope="row">{method.short}</th>'.replace("'", "&#x27;") in table
    assert "not trained" not in document
    for column in report_html.COLUMNS:
        assert column.head in table
        assert column.says.replace("'", "&#x27;") in document


def test_report_needs_nothing_outside_itself(document: str) -> None:
    assert "http" not in document
    assert "<link" not in document
    assert "@import" not in document
    named = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", document) + re.findall(r"url\(([^)]*)\)", document)
    assert len(named) > len(METHODS)
    assert [name[:40] for name in named if not name.startswith(("data:video/mp4;base64,", "#"))] == []


def test_embedded_videos_decode(document: str, tmp_path: Path) -> None:
    videos = re.findall(r"base64,([A-Za-z0-9+/=]+)", document)
    shapes = set()
    for number, video in enumerate(videos):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(base64.b64decode(video, validate=True))
        shapes.add(tuple(read_video(path).shape))
    assert shapes == {(6 + 4, 3, 32 * 4, (2 * 32 + 1) * 4)}  # frames held at the end; two prompts with a gap


def test_page_tells_costs_commands_configs_and_escapes(document: str) -> None:
    assert "python train.py --logdir &lt;here&gt;" in document
    assert document.count("<details>") == len(RUNS)
    assert "muon_lr: 0.025" in document
    costs = document[document.index("What it cost") : document.index("How it was made")]
    assert "<td>3</td><td>6</td><td>3,000</td><td>0.25</td>" in costs
    assert torch.__version__ in document
    assert document.count("<svg") == 5  # the panels that these runs logged numbers for
    assert "red circle ↑" in document


def test_comparison_files_are_made(document: str, root: Path) -> None:
    for name in ("comparison.mp4", "comparison.gif"):
        frames = read_video(root / name)
        assert frames.shape[0] >= 6
        assert frames.std() > 0.01
    assert (root / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_are_counted_and_videos_do_not_depend_on_parts(evaluated: report.Evaluation, root: Path) -> None:
    counted = {m.key: report_samples.load(parts) for m, parts in evaluated.judged.items()}
    assert counted["teacher_50"].evaluations == 100
    assert counted["teacher_1"].evaluations == 2
    for key in ("causal_teacher", "causal_init", "dmd"):  # a step each, and two of three blocks once more
        assert counted[key].evaluations == pytest.approx(2 + 2 / 3)
    prompts = eval_prompts(evaluated.world.captions, COUNT, "test")
    sampling = Sampling(seed=SPLITS["test"])
    latents = Generator.load(root / "self_forcing_dmd", CPU)(prompts, sampling, range(COUNT))
    torch.testing.assert_close(counted["dmd"].latents, latents, atol=1e-4, rtol=1e-4)
    method = next(m for m in METHODS if m.key == "dmd")
    single = report_samples.parts(place_of(root), method, "single", prompts, SPLITS["test"], size=1)
    for part in single:
        report_samples.make_part(part)
    torch.testing.assert_close(report_samples.load(single).latents, latents, atol=1e-4, rtol=1e-4)


def test_done_parts_are_not_made_again_and_broken_ones_are(evaluated: report.Evaluation, root: Path) -> None:
    assert evaluation_of(root).todo() == []
    part = part_of(evaluated, "causal_init")
    whole = part.path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        part.path.write_bytes(broken)
        assert evaluation_of(root).todo() == [part]
    part.path.unlink()
    assert evaluation_of(root).todo() == [part]
    before = report_samples.load([part_of(evaluated, "teacher_1")]).latents
    report_samples.make_part(part)
    assert evaluation_of(root).todo() == []
    assert not torch.equal(report_samples.load([part]).latents, before)  # its own, not a neighbour's


def test_retrained_run_is_judged_again(root: Path, tmp_path: Path) -> None:
    for run in ("teacher", "causal_init"):
        write_run(tmp_path, run)
    teacher_4, causal = (next(m for m in METHODS if m.key == key) for key in ("teacher_4", "causal_teacher"))
    parts = [
        report_samples.parts(place_of(tmp_path), m, "x", ["a red circle moving up"], 0)[0] for m in (teacher_4, causal)
    ]
    for part in parts:
        report_samples.make_part(part)
        assert report_samples.is_done(part)
        assert not report_samples.is_done(replace(part, seed=1))
        assert not report_samples.is_done(replace(part, prompts=("a red circle moving down",)))
    write_run(tmp_path, "teacher", seed=1)
    again = [
        report_samples.parts(place_of(tmp_path), m, "x", ["a red circle moving up"], 0)[0] for m in (teacher_4, causal)
    ]
    assert [report_samples.is_done(part) for part in again] == [False, False]


def test_the_teacher_that_ships_is_sampled_as_its_recipe_says(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.teacher == TEACHER_ASSET
    assert [m.key for m in report_samples.available(place)[0]][:2] == ["real", "teacher_50"]
    prompts = ["a red circle moving up"]
    method = next(m for m in METHODS if m.key == "teacher_1")
    (part,) = report_samples.parts(place, method, "x", prompts, 3)
    report_samples.make_part(part)
    config = place.config("teacher")
    config.student.init = str(TEACHER_ASSET)
    assert config.validation.guidance == 2
    found = report_samples.load([part])
    assert found.evaluations == 2
    assert found.latents.std() > 0.3


def test_document_has_no_id_twice(document: str) -> None:
    identifiers = re.findall(r' id="([^"]*)"', document)
    assert len(identifiers) == len(set(identifiers)) > 5


def test_missing_runs_are_said_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moving up\n")
    with pytest.raises(UserError, match="no weights there"):
        evaluation_of(tmp_path)
    write_run(tmp_path, "teacher")
    present, missing = report_samples.available(place_of(tmp_path))
    assert [m.key for m in present] == ["real", "teacher_50", "teacher_4", "teacher_2", "teacher_1"]
    assert {m.key for m in missing} >= {"causal_teacher", "dmd"}
    line = report_html.Line("g", "label", "Short <one>", None)
    assert "Short &lt;one&gt;" in report_html._table([line])
    assert "not trained" in report_html._table([line])


def test_command_line_refuses_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in (
        (["--workers", "0"], "--workers 0"),
        (["--sample", "nothing"], "nothing"),
        ([], "no weights"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", "--root", str(tmp_path), "--teacher", str(tmp_path), *arguments])
        with pytest.raises(UserError, match=said):
            report.main()


def test_text_table_has_a_standard_error_and_all_rows() -> None:
    metrics = FixedJudge().evaluate(torch.zeros(1), ["x"])
    metrics |= {"prompt_right": 0.885, "prompt_right_se": 0.0159}
    lines = [report_html.Line("g", name, name, Row(name, metrics, 4.5, 0.0123)) for name in ("first", "second")]
    table = report_html.text_table(lines).splitlines()
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    assert "88.5 ±1.6" in table[2]
    assert table[2].split()[-1] == "4.5"
    assert len(table[0]) < 100


def test_method_labels_are_unique_and_short_ones_within_their_group() -> None:
    assert (
        len({m.key for m in METHODS}) == len({m.label for m in METHODS}) == len({(m.group, m.short) for m in METHODS})
    )
    assert Method("k", "Causal, diffusion forcing, 2 steps", "g").short == "Diffusion forcing, 2 steps"


def test_curves_take_the_pages_colour_and_average() -> None:
    entries = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    panel = Panel("Title", (("loss", "loss", entries),), log=True, level=("real", 10.0))
    empty = Panel("Nothing", (("loss", "absent", entries),))
    svgs = curves([panel, empty, panel])
    assert len(svgs) == 2
    assert all("currentColor" in svg and "http" not in svg for svg in svgs)
    first, second = (re.findall(r' id="([^"]*)"', svg) for svg in svgs)
    assert first and not set(first) & set(second), "elements of one page share an id"
    steps, values = thinned([(entry["step"], entry["loss"]) for entry in entries])  # type: ignore[misc]
    assert len(steps) <= 160
    assert steps == values
    assert values[0] == 4.0
    assert thinned([]) == ([], [])


def test_pictures_are_laid_out_in_order(tmp_path: Path) -> None:
    videos = torch.rand(3, 2, 5, 1, 4, 4)
    row = side_by_side(videos[0], padding=1, value=0.25)
    assert row.shape == (5, 1, 4, 9)
    assert torch.equal(row[..., :4], videos[0, 0])
    assert torch.equal(row[..., 5:], videos[0, 1])
    assert (row[..., 4] == 0.25).all()
    longer = held(videos, 2)
    assert longer.shape[2] == 7
    assert torch.equal(longer[:, :, 6], videos[:, :, 4])
    assert short("the digit seven moving left") == "seven ←"
    assert short("a red circle moving up") == "red circle ↑"
    assert short("a cat") == "a cat"
    write_comparison(tmp_path, ["a", "b", "c"], ["the digit one moving up", "a cat"], videos, 8)
    assert read_video(tmp_path / "comparison.mp4").shape[0] == 9

"""The report as one HTML page that needs nothing else: no network, no file beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from evaluation.command import Row


@dataclass(frozen=True)
class Column:
    """A column of the table.

    key: of its number in a row.
    head: its heading.
    form: format of the number.
    good: which numbers are good, a key of GOOD.
    says: what it measures.
    scale: what the number is multiplied by.
    error: key of its standard error.
    """

    key: str
    head: str
    form: str
    good: str
    says: str
    scale: float = 1.0
    error: str | None = None


COLUMNS = (
    Column("prompt_right", "prompt right, %", "{:.1f}", "high", "Share of videos in which colour, shape and direction "
           "are all what the prompt says.", scale=100, error="prompt_right_se"),
    Column("shape_right", "shape, %", "{:.1f}", "high", "Share in which the object, moved to the middle, is nearest to "
           "a drawing of the shape that was asked for, and near enough.", scale=100, error="shape_right_se"),
    Column("colour_right", "colour, %", "{:.1f}", "high", "Share in which the hue is of the colour that was asked for.",
           scale=100, error="colour_right_se"),
    Column("direction_right", "direction, %", "{:.1f}", "high", "Share in which the tracked centre moves the way that "
           "was asked for, at no less than a third of the true speed.", scale=100, error="direction_right_se"),
    Column("appearance_fd", "appearance FD, %", "{:.1f}", "low", "Fréchet distance between measures of these videos "
           "(likeness to each shape, size, colour, background, sharpness) and those of real ones, in percent of the "
           "real ones' variance."),
    Column("motion_error", "speed error, px/frame", "{:.3f}", "low", "How far the speed is from the true one, two "
           "pixels a frame, on average over the videos.", error="motion_error_se"),
    Column("jitter", "jitter, px", "{:.2f}", "low", "How much the motion from frame to frame departs from an even "
           "glide, as a standard deviation.", error="jitter_se"),
    Column("saturation", "saturation", "{:.4f}", "real", "Mean chroma of all pixels, 0 grey.", error="saturation_se"),
    Column("diversity", "diversity", "{:.2f}", "real", "How different the videos of one prompt are from each other, "
           "relative to real ones: below 1 the generator repeats itself."),
    Column("evaluations", "network evaluations", "{:.1f}", "low", "Passes of a whole video through the network for "
           "one video. Guidance costs the teacher two a step; a causal student pays one a step, and one more of each "
           "block but the last, to remember it."),
    Column("milliseconds", "ms a video", "{:.1f}", "low", "Processor time for one video, many videos at a time."),
)  # fmt: skip
IN_A_TERMINAL = ("prompt_right", "appearance_fd", "motion_error", "diversity", "evaluations")
GOOD = {"high": "higher is better", "low": "lower is better", "real": "the nearer to real videos the better"}


@dataclass(frozen=True)
class Line:
    """A row of the table with its heading; short: its label below the heading; `row` is None if there was no run."""

    group: str
    label: str
    short: str
    row: Row | None


@dataclass(frozen=True)
class Clip:
    """One method's videos of the shown prompts, side by side."""

    group: str
    label: str
    mp4: bytes


@dataclass(frozen=True)
class Stage:
    """What a run cost. seconds: of its iterations; evaluations: of any network, in videos."""

    title: str
    iterations: int
    seconds: float
    evaluations: float
    memory_gib: float


@dataclass(frozen=True)
class Page:
    summary: str
    prompts: tuple[str, ...]
    clips: tuple[Clip, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    curves: tuple[str, ...]
    stages: tuple[Stage, ...]
    commands: str
    configs: tuple[tuple[str, str], ...]
    machine: tuple[tuple[str, str], ...]


def value(row: Row, column: Column) -> float:
    costs = {"evaluations": row.evaluations, "milliseconds": row.seconds * 1000}
    return costs[column.key] if column.key in costs else row.metrics[column.key]


def cell(row: Row, column: Column) -> tuple[str, str]:
    """(number, its standard error or ""), as they are shown."""
    if row.evaluations == 0 and column.key in ("evaluations", "milliseconds"):
        return "–", ""
    error = "" if column.error is None else column.form.format(row.metrics[column.error] * column.scale)
    return column.form.format(value(row, column) * column.scale), error


def text_table(lines: Sequence[Line]) -> str:
    """The most important columns for a terminal, with standard errors for the first alone."""
    columns = [column for column in COLUMNS if column.key in IN_A_TERMINAL]
    heads = ["", *(column.head for column in columns)]
    body = []
    for line in lines:
        if line.row is not None:
            cells = [cell(line.row, column) for column in columns]
            first = f"{cells[0][0]} ±{cells[0][1]}"
            body.append([line.label, first, *(number for number, _ in cells[1:])])
    split = [_halves(head) for head in heads]
    table = [[top for top, _ in split], [low for _, low in split], *body]
    widths = [max(len(r[i]) for r in table) for i in range(len(heads))]
    padded = [[r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))] for r in table]
    return "\n".join("  ".join(r) for r in padded)


def _halves(head: str) -> tuple[str, str]:
    first, _, rest = head.partition(" ")
    return (first, rest) if rest else ("", first)


def page(content: Page) -> str:
    """The whole document."""
    figures = "".join(f"<figure>{svg}</figure>" for svg in content.curves)
    sections = [
        f"<header><h1>fewstep quickstart</h1>{_summary(content.summary)}</header>",
        _section("Videos", _videos(content)),
        _section("Numbers", _table(content.lines) + _paragraphs(content.notes) + _columns()),
        _section("Curves", f'<div class="curves">{figures}</div>'),
        _section("What it cost", _stages(content.stages)),
        _section("How it was made", _made(content)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fewstep quickstart</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _summary(text: str) -> str:
    return f'<p class="summary">{escape(text)}</p>'


def _videos(content: Page) -> str:
    heads = "".join(f"<span>{escape(prompt)}</span>" for prompt in content.prompts)
    out = [
        '<p>The same prompts and the same seed in every row. <button type="button" id="pause">pause</button></p>'
        f'<div class="clips" style="--columns:{len(content.prompts)}">'
        f'<div class="heads"><b></b><div>{heads}</div></div>'
    ]
    group = None
    for clip in content.clips:
        if clip.group != group:
            out.append(f'<p class="group">{escape(clip.group)}</p>')
            group = clip.group
        data = base64.b64encode(clip.mp4).decode()
        out.append(
            f'<div class="clip"><b>{escape(clip.label)}</b><video autoplay loop muted playsinline '
            f'src="data:video/mp4;base64,{data}"></video></div>'
        )
    return "".join(out) + "</div>"


def _table(lines: Sequence[Line]) -> str:
    heads = "".join(f'<th scope="col">{escape(c.head)}<small>{_SIGN[c.good]}</small></th>' for c in COLUMNS)
    body, group = [], None
    for line in lines:
        if line.group != group:
            group = line.group
            body.append(f'<tr class="group"><th colspan="{len(COLUMNS) + 1}"><span>{escape(group)}</span></th></tr>')
        shown = f'<td colspan="{len(COLUMNS)}">not trained</td>'
        if line.row is not None:
            cells = [cell(line.row, column) for column in COLUMNS]
            shown = "".join(f"<td>{n}{f'<small>±{e}</small>' if e else ''}</td>" for n, e in cells)
        body.append(f'<tr><th scope="row">{escape(line.short)}</th>{shown}</tr>')
    return _scrolling(f"<th></th>{heads}", "".join(body))


def _scrolling(heads: str, body: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _columns() -> str:
    items = [(escape(c.head), f"{escape(c.says)} <em>{GOOD[c.good].capitalize()}.</em>") for c in COLUMNS]
    return '<h3>What the columns say</h3><dl class="says">' + _definitions(items) + "</dl>"


def _definitions(items: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in items)


def _stages(stages: Sequence[Stage]) -> str:
    heads = ("", "iterations", "time, s", "network evaluations, videos", "peak memory of a process, GiB")
    body = []
    for s in stages:
        iterations, memory = str(s.iterations or ""), f"{s.memory_gib:.2f}" if s.memory_gib else ""
        cells = "".join(f"<td>{c}</td>" for c in (iterations, f"{s.seconds:.0f}", f"{s.evaluations:,.0f}", memory))
        body.append(f'<tr><th scope="row">{escape(s.title)}</th>{cells}</tr>')
    note = (
        "Time is that of the training iterations, without start-up, checkpoints and validation; for the evaluation it "
        "is processor time. A network evaluation is one pass of a whole video through a network, forward; backward "
        "passes are not counted."
    )
    return _scrolling("".join(f'<th scope="col">{text}</th>' for text in heads), "".join(body)) + f"<p>{note}</p>"


def _made(content: Page) -> str:
    facts = _definitions([(escape(name), escape(text)) for name, text in content.machine])
    configs = [
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in content.configs
    ]
    commands = f"<h3>Commands</h3><pre>{escape(content.commands)}</pre>" if content.commands else ""
    return f'<dl class="facts">{facts}</dl>{commands}<h3>Configurations</h3>{"".join(configs)}'


_SIGN = {"high": "↑ better", "low": "↓ better", "real": "≈ real"}

_SCRIPT = """
const videos = [...document.querySelectorAll('video')], button = document.getElementById('pause');
const together = () => videos.forEach(video => { video.currentTime = 0; video.play().catch(() => {}); });
Promise.all(videos.map(video => video.readyState > 1 ? 0 : new Promise(done => {
  video.addEventListener('loadeddata', done, {once: true}); video.addEventListener('error', done, {once: true});
}))).then(() => { if (button.textContent === 'pause') together(); });
button.onclick = () => {
  const stop = button.textContent === 'pause';
  stop ? videos.forEach(video => video.pause()) : together();
  button.textContent = stop ? 'play' : 'pause';
};
"""

_CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2230;--dim:#5b6475;--line:#dfe3ea;--soft:#f4f6f9;--accent:#2563eb}
@media(prefers-color-scheme:dark){:root{--bg:#12151c;--fg:#e4e7ee;--dim:#9aa3b5;--line:#2c3342;
--soft:#1a1f2a;--accent:#7aa5ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:.2em 0}h2{font-size:1.25rem;margin:2.2em 0 .6em;padding-bottom:.25em;
border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.6em 0 .4em}
p,dl{max-width:76ch}.summary{font-size:1.08rem}
button{font:inherit;color:var(--accent);background:none;border:1px solid var(--line);border-radius:6px;
padding:1px 10px;cursor:pointer}
.clips{max-width:980px}
.clip,.heads{display:grid;grid-template-columns:210px 1fr;gap:12px;align-items:center;margin:4px 0}
.heads div{display:grid;grid-template-columns:repeat(var(--columns),1fr);text-align:center;font-size:.8rem;
color:var(--dim)}
.clip b{font-weight:500;font-size:.92rem}.group{margin:14px 0 4px;color:var(--dim);font-size:.8rem;
letter-spacing:.03em}
video{width:100%;display:block;border-radius:4px;image-rendering:pixelated;background:#111}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:6px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
thead th{white-space:normal;vertical-align:bottom;font-weight:600;line-height:1.25}
th:first-child{text-align:left;position:sticky;left:0;background:var(--bg);font-weight:500}
td small,th small{display:block;white-space:nowrap;color:var(--dim);font-weight:400;font-size:.76rem}
tr.group th{font-size:.78rem;color:var(--dim);background:var(--soft);position:static}
tr.group span{position:sticky;left:9px}
dt{font-weight:600;margin-top:.6em}dd{margin:0 0 0 0}dd em{color:var(--dim)}
.says{display:grid;grid-template-columns:12rem 1fr;gap:6px 18px;max-width:96ch}.says dt{margin:0}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px}.facts dt,.facts dd{margin:0}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:14px}
figure{margin:0;min-width:0}svg{width:100%;height:auto;font-family:inherit}svg text{font-family:inherit!important}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:12px;overflow-x:auto;
font-size:.8rem;line-height:1.45}
details{margin:6px 0}summary{cursor:pointer}
@media(max-width:640px){.clip,.heads{grid-template-columns:1fr;gap:2px}.heads b{display:none}
.heads div{font-size:.58rem}
main{padding:12px 12px 48px}.facts,.says{grid-template-columns:1fr;gap:0}.facts dt,.says dt{margin-top:.6em}
tbody th{white-space:normal!important;min-width:8rem}}
"""

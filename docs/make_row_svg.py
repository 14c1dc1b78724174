"""Draw docs/row.svg, the path of a row: `python docs/make_row_svg.py`. A test keeps the two equal."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

SVG = Path(__file__).with_name("row.svg")
WIDTH, HEIGHT = 960, 316
BOX_WIDTH, BOX_HEIGHT, GAP, LEFT, TOP = 128, 104, 32, 16, 56

# Title, lines of text, and the kind of box: files on a disk, or the process that does the work.
STAGES = [
    ("manifest", ["Parquet, JSONL, CSV,", "tars, or a directory", "of images"], "file"),
    ("fetch", ["URL, file or bytes;", "checked, limited;", "ahead of the GPU"], "runner"),
    ("prepare", ["image workers, one", "per CPU: decode,", "tile, tokenize"], "workers"),
    ("engine", ["LMDeploy, or", "transformers;", "a process per GPU"], "engine"),
    ("journal", ["one record per row,", "on disk within", "a second"], "runner"),
    ("results", ["Parquet or JSONL:", "each row once, in", "the manifest's order"], "file"),
]
HAND_OVERS = ["rows", "bytes", "tensors", "answers", "merge"]
ABOVE = "Fetching and preparing run ahead, so that the engine always has rows to work on."
FAILED = "a row that fails is recorded with an error code"
BELOW = "An engine or worker that crashes or hangs is restarted; its rows are retried. The same command resumes a run."
LEGEND = [("file", "files"), ("runner", "the runner, one process"), ("workers", "image workers"), ("engine", "engines")]

STYLE = """
  .panel { fill: #ffffff; stroke: #d0d7de; }
  .box { stroke-width: 1.5; }
  .file { fill: #f3f4f6; stroke: #8b949e; }
  .runner { fill: #dbeafe; stroke: #3b82f6; }
  .workers { fill: #dcfce7; stroke: #16a34a; }
  .engine { fill: #ffedd5; stroke: #ea580c; }
  .line { stroke: #57606a; fill: none; stroke-width: 1.5; }
  .failure { stroke: #cf222e; stroke-dasharray: 5 4; }
  .head { fill: #57606a; }
  .failure-head { fill: #cf222e; }
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328; }
  .title { font-size: 16px; font-weight: 600; }
  .text { font-size: 11.5px; }
  .note { font-size: 11.5px; fill: #57606a; }
  .failed { font-size: 11.5px; fill: #cf222e; }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #0d1117; stroke: #30363d; }
    .file { fill: #21262d; stroke: #8b949e; }
    .runner { fill: #10233f; stroke: #58a6ff; }
    .workers { fill: #0f2a19; stroke: #3fb950; }
    .engine { fill: #331c0b; stroke: #f0883e; }
    .line { stroke: #9198a1; }
    .failure { stroke: #ff7b72; }
    .head { fill: #9198a1; }
    .failure-head { fill: #ff7b72; }
    text { fill: #e6edf3; }
    .note { fill: #9198a1; }
    .failed { fill: #ff7b72; }
  }
"""


def draw() -> str:
    """Return the drawing as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">',
        '<title id="t">The path of a row</title>',
        f'<desc id="d">{escape(description())}</desc>',
        f"<style>{STYLE}</style>",
        "<defs>",
        _arrowhead("arrow", "head"),
        _arrowhead("failure-arrow", "failure-head"),
        "</defs>",
        f'<rect class="panel" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        _text(
            "note", WIDTH / 2, 30, "Fetching and preparing run ahead, so that the engine always has rows to work on."
        ),
    ]
    middle = TOP + BOX_HEIGHT / 2
    for number, (title, lines, kind) in enumerate(STAGES):
        x = _left(number)
        parts.append(_box(kind, x, TOP, BOX_WIDTH, BOX_HEIGHT))
        parts.append(_text("title", x + BOX_WIDTH / 2, TOP + 28, title))
        parts += [_text("text", x + BOX_WIDTH / 2, TOP + 52 + 17 * i, line) for i, line in enumerate(lines)]
    for number, name in enumerate(HAND_OVERS):
        x = _left(number) + BOX_WIDTH
        parts.append(f'<path class="line" d="M{x} {middle} H{x + GAP - 2}" marker-end="url(#arrow)"/>')
        parts.append(_text("note", x + GAP / 2, TOP + BOX_HEIGHT + 16, name))

    # Failures leave fetch, prepare and engine at the bottom and enter the journal there.
    rail = TOP + BOX_HEIGHT + 44
    for number in (1, 2, 3):
        x = _center(number)
        parts.append(f'<path class="line failure" d="M{x} {TOP + BOX_HEIGHT + 2} V{rail}"/>')
    parts.append(
        f'<path class="line failure" d="M{_center(1)} {rail} H{_center(4)} V{TOP + BOX_HEIGHT + 3}"'
        ' marker-end="url(#failure-arrow)"/>'
    )
    parts.append(_text("failed", (_center(1) + _center(4)) / 2, rail + 18, FAILED))
    parts.append(_text("note", WIDTH / 2, rail + 44, BELOW))

    x = 190.0
    for kind, name in LEGEND:
        parts.append(_box(kind, x, HEIGHT - 32, 18, 14))
        parts.append(_text("note", x + 26, HEIGHT - 21, name, anchor="start"))
        x += 60 + 6.2 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def description() -> str:
    """Return the drawing in words, for readers who cannot see it."""
    stages = "; ".join(f"{title}: {' '.join(lines)}" for title, lines, _ in STAGES)
    return f"A row passes these stages. {stages}. A row that fails is recorded in the journal with an error code."


def _left(stage: int) -> int:
    return LEFT + stage * (BOX_WIDTH + GAP)


def _center(stage: int) -> int:
    return _left(stage) + BOX_WIDTH // 2


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    radius = 2 if kind == "file" else height / 8 if height > 20 else 5
    return f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="{radius:g}"/>'


def _text(style: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _arrowhead(name: str, style: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path class="{style}" d="M0 0 L8 4 L0 8 z"/></marker>'
    )


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")

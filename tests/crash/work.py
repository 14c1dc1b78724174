"""The work of the runs that are killed: a manifest with images, and the answers that are expected."""

from __future__ import annotations

import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchvl.results.record import schema

from ..manifest.writing import write
from ..runner.running import engine_options, image_digest, make_image

FAKE = {"delay": 0.02, "spread": 0.03, "rows": 16}
SETTINGS: dict[str, Any] = {"image_workers": 2, "commit_seconds": 0.02, "part_rows": 40, "batch_size": 8}
"""Small batches and parts and short commit intervals, so that a run of a second has many of each."""

SCHEMA = schema("string", pa.schema([("site", pa.string())]))
_IMAGES = 30
_VARYING = ("attempts", "seconds")
"""Columns that may differ from run to run."""


class Work:
    """A manifest whose rows have no image, one or two, as paths or bytes, some of them missing.

    Args:
        directory: Directory for the manifest and its images.
        rows: Number of rows.
        name: Name of the manifest, whose suffix is its format. The rows of a .jsonl are counted only when it is read.
        delay: Seconds that the engine takes for a batch; it computes two batches concurrently.
    """

    def __init__(self, directory: Path, rows: int, name: str = "m.parquet", delay: float = FAKE["delay"]) -> None:
        self.rows, self.manifest, self._fake = rows, directory / name, {**FAKE, "delay": delay}
        paths = [make_image(directory / f"{n}.png", n) for n in range(_IMAGES)]
        digests = [image_digest(path) for path in paths]
        data = [path.read_bytes() for path in paths]
        lines, self._answers = [], []
        for row in range(rows):
            chosen = [(row * 7 + n) % _IMAGES for n in range((1, 1, 2, 0)[row % 4])]
            images = [(data[n] if row % 3 else None, paths[n].name) for n in chosen]
            answer: str | None = " ".join([f"q {row}", *(digests[n] for n in chosen)])
            if row % 50 == 49:
                images, answer = [(None, "missing.png")], None
            cells = [_inline(*image) if name.endswith(".parquet") else _as_text(*image) for image in images]
            lines.append({"id": f"r{row}", "prompt": f"q {row}", "images": cells, "site": f"site {row % 5}"})
            self._answers.append(answer)
        write(self.manifest, lines)

    def options(self, out: Path) -> dict[str, Any]:
        """Return the options of `batchvl.run` for an output directory."""
        return {
            "output": str(out),
            "engine": "fake",
            "keep": ["site"],
            "engine_option": engine_options(self._fake),
            "accept_failures": "10%",
            **SETTINGS,
        }

    def command(self, out: Path) -> list[str]:
        """Return the same as a command line."""
        words = [sys.executable, "-m", "batchvl", "run", str(self.manifest)]
        for name, value in self.options(out).items():
            for element in value if isinstance(value, list) else [value]:
                words += ["--" + name.replace("_", "-"), str(element)]
        return words

    def answer(self, row: int) -> str | None:
        """Return the row's answer; None if it must fail."""
        return self._answers[row]

    def check(self, results: Path, undisturbed: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Check that each row is there once, in order, as expected and as in an undisturbed run; return the rows."""
        rows = pq.read_table(results).to_pylist()
        assert [row["row"] for row in rows] == list(range(self.rows))
        for row in rows:
            assert row["response"] == self.answer(row["row"]), row
            assert (row["status"] == "ok") == (row["response"] is not None)
            assert row["status"] == "ok" or row["error"]["code"] == "missing_file", row["error"]
        if undisturbed is not None:
            for before, after in zip(undisturbed, rows, strict=True):
                same = {name for name in before if name not in _VARYING}
                assert {n: before[n] for n in same} == {n: after[n] for n in same}
        return rows


def _inline(data: bytes | None, path: str) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _as_text(data: bytes | None, path: str) -> str:
    return path if data is None else f"data:image/png;base64,{b64encode(data).decode()}"

"""The work that is done while processes are killed: a manifest with pictures, and the answers that must come of it."""

from __future__ import annotations

import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchvl.results.record import schema

from ..manifest.writing import write
from ..runner.running import engine_options, picture, seen

FAKE = {"delay": 0.02, "spread": 0.03, "rows": 16}
SETTINGS: dict[str, Any] = {"image_workers": 2, "commit_seconds": 0.02, "part_rows": 40, "batch_size": 8}
"""Small lists, parts and pauses between commits, so that a run of a second makes many of each."""

SCHEMA = schema("string", pa.schema([("site", pa.string())]))
_PICTURES = 30
_FREE = ("attempts", "seconds")
"""Columns that tell how it went, and may differ from run to run."""


class Work:
    """A manifest of so many rows: with one picture or two, by path or by bytes, some of them missing, some without.

    name: the manifest's, whose ending is its format; how many rows a .jsonl has is known once it is read to its end.
    delay: seconds that the engine takes for a list, of which it has two at a time.
    """

    def __init__(self, folder: Path, rows: int, name: str = "m.parquet", delay: float = FAKE["delay"]) -> None:
        self.rows, self.manifest, self._fake = rows, folder / name, {**FAKE, "delay": delay}
        pictures = [picture(folder / f"{n}.png", n) for n in range(_PICTURES)]
        digests = [seen(path) for path in pictures]
        data = [path.read_bytes() for path in pictures]
        made, self._answers = [], []
        for row in range(rows):
            chosen = [(row * 7 + n) % _PICTURES for n in range((1, 1, 2, 0)[row % 4])]
            images = [(data[n] if row % 3 else None, pictures[n].name) for n in chosen]
            answer: str | None = " ".join([f"q {row}", *(digests[n] for n in chosen)])
            if row % 50 == 49:
                images, answer = [(None, "missing.png")], None
            cells = [_inline(*image) if name.endswith(".parquet") else _as_text(*image) for image in images]
            made.append({"id": f"r{row}", "prompt": f"q {row}", "images": cells, "site": f"site {row % 5}"})
            self._answers.append(answer)
        write(self.manifest, made)

    def options(self, out: Path) -> dict[str, Any]:
        """How it is answered: the options of `batchvl.run`."""
        return {
            "output": str(out), "engine": "fake", "keep": ["site"], "engine_option": engine_options(self._fake),
            "accept_failures": "10%", **SETTINGS,
        }  # fmt: skip

    def command(self, out: Path) -> list[str]:
        """The same as a command line."""
        words = [sys.executable, "-m", "batchvl", "run", str(self.manifest)]
        for name, value in self.options(out).items():
            for one in value if isinstance(value, list) else [value]:
                words += ["--" + name.replace("_", "-"), str(one)]
        return words

    def answer(self, row: int) -> str | None:
        """The row's answer; None where it must fail."""
        return self._answers[row]

    def check(self, results: Path, undisturbed: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Each row is there once, in order, with its answer, and as in an `undisturbed` run's results. Returns them."""
        found = pq.read_table(results).to_pylist()
        assert [row["row"] for row in found] == list(range(self.rows))
        for row in found:
            assert row["response"] == self.answer(row["row"]), row
            assert (row["status"] == "ok") == (row["response"] is not None)
            assert row["status"] == "ok" or row["error"]["code"] == "missing_file", row["error"]
        if undisturbed is not None:
            for before, after in zip(undisturbed, found, strict=True):
                same = {name for name in before if name not in _FREE}
                assert {n: before[n] for n in same} == {n: after[n] for n in same}
        return found


def _inline(data: bytes | None, path: str) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _as_text(data: bytes | None, path: str) -> str:
    return path if data is None else f"data:image/png;base64,{b64encode(data).decode()}"

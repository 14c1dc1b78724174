"""Every command of the README runs: a newcomer who types them in turn, in a fresh copy of what the project brings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A fenced block, and what the comment right above it says of it: "not run: WHY", "exit CODE: WHY" or "file: NAME".
BLOCKS = re.compile(r"(?:<!-- (?P<note>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(400)
def test_every_command_runs(tmp_path):
    for folder in ("manifests", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*-batchvl"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BATCHVL_")}
    ran = 0
    for block in BLOCKS.finditer(README):
        kind, _, detail = (block["note"] or "").partition(" ")
        text, expected = block["text"], 0
        if kind == "not":
            continue
        if kind == "file:":
            (tmp_path / detail).write_text(text)
            continue
        if kind == "exit":
            expected = int(detail.partition(":")[0])
        command = {"sh": ["bash", "-euo", "pipefail", "-c", text], "python": [sys.executable, "-c", text]}
        done = subprocess.run(
            command[block["language"]], cwd=tmp_path, env={**inherited, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == expected, f"{text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 4
    assert (tmp_path / "tried.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "captions" / "results.parquet").is_file()


def test_what_is_not_run_says_why_and_names_what_is_there():
    for block in BLOCKS.finditer(README):
        note = block["note"] or ""
        assert re.fullmatch(r"|not run: .+|exit \d+: .+|file: \S+", note), note
        for target in re.findall(r"^make (\S+)", block["text"], re.MULTILINE):
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
        for file in re.findall(r"(?:jobs|manifests)/[\w./-]+", block["text"]):
            assert (ROOT / file).exists() or f"<!-- file: {file} -->" in README, file


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/design.md",
        "docs/guarantees.md",
        "docs/lmdeploy.md",
        "docs/object-stores.md",
        "jobs/README.md",
        "manifests/README.md",
    ],
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


def test_it_is_under_two_screens():
    assert len(README.splitlines()) <= 130

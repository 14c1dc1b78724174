"""The README's commands run, its links lead somewhere, and its drawing and figures are up to date."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .timing import scaled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A fenced block, and the comment right above it, if any: "not run: WHY", "exit CODE: WHY" or "file: NAME".
BLOCKS = re.compile(r"(?:<!-- (?P<note>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "*/README.md") for path in ROOT.glob(pattern))


@pytest.mark.timeout(400)
def test_every_command_runs(tmp_path):
    for directory in ("manifests", "jobs"):
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("*-batchvl"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BATCHVL_")}
    commands_run = 0
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
        process = subprocess.run(
            command[block["language"]],
            cwd=tmp_path,
            env={**inherited, "PATH": path},
            capture_output=True,
            text=True,
            timeout=scaled(200),
        )
        assert process.returncode == expected, f"{text}\n{process.stdout}\n{process.stderr}"
        commands_run += 1
    assert commands_run >= 4
    assert (tmp_path / "tried.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "captions" / "results.parquet").is_file()


def test_blocks_that_do_not_run_say_why_and_name_files_that_exist():
    for block in BLOCKS.finditer(README):
        note = block["note"] or ""
        assert re.fullmatch(r"|not run: .+|exit \d+: .+|file: \S+", note), note
        for target in re.findall(r"^make (\S+)", block["text"], re.MULTILINE):
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
        for file in re.findall(r"(?:jobs|manifests)/[\w./-]+", block["text"]):
            assert (ROOT / file).exists() or f"<!-- file: {file} -->" in README, file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or page.parent.joinpath(link).exists(), link


def test_the_drawing_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "make_row_svg.py"))
    assert script["SVG"].read_text(encoding="utf-8") == script["draw"](), "run: python docs/make_row_svg.py"


def test_the_figures_of_the_readme_are_those_of_the_performance_page():
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = re.search(r"^\| model size.*?\n\n", README, re.MULTILINE | re.DOTALL)[0]
    figures = re.findall(r"\d+\.\d", table)
    assert len(figures) > 10
    assert [figure for figure in figures if figure not in performance] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150

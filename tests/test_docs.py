"""The documentation is up to date with the code."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_reference_page_is_up_to_date():
    page = runpy.run_path(str(DOCS / "make_reference.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["reference"](), "run: python docs/make_reference.py"


def test_each_guarantee_names_existing_tests():
    guarantees = re.split(r"^- \*\*", (DOCS / "guarantees.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(guarantees) > 15
    for guarantee in guarantees:
        files = re.findall(r"`(tests/[\w/]+\.py)`", guarantee)
        assert files, guarantee
        for file in files:
            assert re.search(r"^(?:async )?def test_", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), file

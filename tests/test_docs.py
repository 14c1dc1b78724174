"""The documents say what the code does."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_page_is_what_the_code_says():
    page = runpy.run_path(str(DOCS / "make_reference.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["reference"](), "run: python docs/make_reference.py"

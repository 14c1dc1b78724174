"""A hook of mkdocs: pages of the site that are not in docs/, such as the README.

In the repository, links lead from file to file. On the site docs/ is the root, so links to it lose that directory.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "jobs/README.md": "jobs/README.md",
    "manifests/README.md": "manifests/README.md",
    "training/README.md": "training/README.md",
}
DOWNLOADS = ("Makefile", "jobs/nightly.toml", "jobs/nightly.sbatch")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source in DOWNLOADS:
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, page: str) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    if page in PAGES.values():
        markdown = re.sub(r"\]\((\.\./)?docs/", r"](\1", markdown)
    else:
        markdown = re.sub(r"\]\(\.\./", "](", markdown)
    return re.sub(r"\]\(((?:\.\./)*)README\.md", r"](\1index.md", markdown)

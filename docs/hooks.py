"""MkDocs hooks: the site also holds the files outside docs/ that its pages link to, so that links work on both sides."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]


def on_files(files, config):
    """Add the pages of the root and every file that a page links to as ``../NAME``."""
    linked = {link for page in (ROOT / "docs").glob("*.md") for link in re.findall(r"\]\(\.\./([^)#]+)", page.read_text())}
    for name in sorted({*PAGES, *linked}):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, **_):
    """Give links the paths that files have in the site: ../CONTRIBUTING.md and docs/data.md are beside each other there."""
    return re.sub(r"\]\(docs/", "](", markdown) if page.file.src_uri in PAGES else markdown.replace("](../", "](")

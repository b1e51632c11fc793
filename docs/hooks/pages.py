"""Pages of the site that stand elsewhere in the repository, and links between the two."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

OUTSIDE = {
    "kernels/README.md": "kernels-package.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "threat-model.md",
    "bench/results/server-cpu.md": "bench/server-cpu.md",
    "bench/results/compiled-kernels.md": "bench/compiled-kernels.md",
}
"""Path in the repository to the page of the site."""

# A folder and the readme are linked as such on a code host; the site has a page for each.
_LINKED = {
    **OUTSIDE,
    "bench/results": OUTSIDE["bench/results/server-cpu.md"],
    "README.md": "index.md",
}
_SOURCE = {page: path for path, page in OUTSIDE.items()}
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand outside of ``docs``, and their figures."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for figure in sorted((ROOT / "bench" / "results").glob("*.png")):
        name = f"bench/{figure.name}"
        files.append(File.generated(config, name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links that are right in the repository into ones that are right in the site."""
    if page.parent is None:
        # A page that is alone under its tab has no neighbours to list.
        page.meta["hide"] = ["navigation"]
    here = page.file.src_uri
    folder = PurePosixPath(_SOURCE.get(here, f"docs/{here}")).parent.as_posix()

    def moved(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if ":" in target:
            return link[0]
        meant = normpath(f"{folder}/{target}")
        place = _LINKED.get(meant)
        if place is None and meant.startswith("bench/results/"):
            place = f"bench/{PurePosixPath(meant).name}"
        if place is None:
            place = meant.removeprefix("docs/")
        start = PurePosixPath(here).parent.as_posix()
        return relpath(place, start) + anchor

    return _LINK.sub(moved, markdown)

"""The pages of the documentation as Sybil's documents: every fence is an example."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]

OUTSIDE = (
    *("README.md", "kernels/README.md", "CONTRIBUTING.md"),
    *("bench/results/server-cpu.md", "bench/results/compiled-kernels.md"),
)
"""Pages that do not stand in ``docs``."""

PAGES = (
    *OUTSIDE,
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)

OUTPUT = ("", "text")
"""The languages of fences that hold output or an equation."""

_FENCES = RawFencedCodeBlockLexer(
    info_pattern=re.compile(r'[ \t]*(?P<language>[^\n]*?)(?: title="(?P<title>[\w.-]+)")?[ \t]*\n')
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")

Evaluator = Callable[[Example], None]


def read_page(
    page: str | Path, run: Mapping[str, Evaluator], check: Mapping[str, Evaluator]
) -> Document:
    """The page with every fence as an example, in their order.

    Args:
        page: a path, relative to the repository or absolute.
        run: language to what executes a block.
        check: language to what looks at a block that is marked ``<!-- not run: reason -->``.

    Raises:
        ValueError: a fence whose language nobody looks at, with page and line.
    """

    def examples(document: Document) -> Iterable[Region]:
        for region in _FENCES(document):
            language = region.lexemes["language"].strip()
            marked = _NOT_RUN.search(document.text, 0, region.start) is not None
            known = check if marked else run
            if language not in known:
                line = document.text.count("\n", 0, region.start) + 1
                kind = "which is not run " if marked else ""
                raise ValueError(
                    f"{document.path}:{line}: nobody looks at a fence {kind}of language "
                    f"{language!r}; there are {', '.join(repr(name) for name in known)}"
                )
            region.parsed, region.evaluator = region.lexemes["source"], known[language]
            yield region

    return Document.parse(str(ROOT / page), examples)

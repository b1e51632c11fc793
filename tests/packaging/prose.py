"""The word list: phrases that are not written here, with what is written instead.

``python -m tests.packaging.prose [PATH ...]`` prints every hit below the paths, or of the whole
project. Looked at are pages, docstrings, comments and string literals with a blank in them, and
what assignments call their targets. Inline code and formats (``formats.json``) are no prose.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "docs/**/*.md")
CODE = ("fedcore", "kernels", "theory", "bench")
TEMPLATES = (".toml", ".j2", ".html")

Kind = Literal["page", "docstring", "comment", "message"]
KINDS: tuple[Kind, ...] = ("page", "docstring", "comment", "message")

_UNITS = (
    "adapter|batch|block|byte|call|check|class|client|column|core|device|dimension|example|factor|"
    "family|file|group|image|kernel|label|layer|line|machine|matrix|message|method|model|module|"
    "node|number|op|operation|option|page|pair|parameter|process|program|round|row|run|second|seed|shape|"
    "side|site|size|slot|step|table|task|tensor|token|upload|value"
)
_THINGS = (
    "atoms?|bases|basis|bytes?|calls?|columns?|cores?|decompositions?|digests?|dots?|draws?|"
    "entry|entries|factors?|figures?|files?|flops|folders?|integers?|launch|launches|lines?|masks?|"
    "matrix|matrices|messages?|microseconds|milliseconds|minutes?|ms|numbers?|objects?|operations?|"
    "pages?|pairs?|passes|processes|process|programs?|records?|rotations?|rounds?|rows?|"
    "scales?|seconds?|seeds?|signs?|steps?|streams?|tables?|tensors?|times?|values?|vectors?|"
    "weights?|words?|work|one|once|two"
)


@dataclass(frozen=True)
class Pattern:
    """A phrase that is not written, and what is.

    Attributes:
        name: how lists call it.
        phrase: a regular expression; a blank in it is any white space.
        write: what to write instead.
        allowed: expressions around a hit that make it right.
        kinds: where it is looked for.
    """

    name: str
    phrase: str
    write: str
    allowed: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = KINDS

    @cached_property
    def _expressions(self) -> tuple[re.Pattern[str], ...]:
        return tuple(
            re.compile(expression.replace(" ", r"\s+"), re.IGNORECASE)
            for expression in (self.phrase, *self.allowed)
        )

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        """The matches in ``text`` that nothing allowed overlaps."""
        wrong, *right = self._expressions
        matches = list(wrong.finditer(text))
        if not matches:
            return
        spans = [match.span() for expression in right for match in expression.finditer(text)]
        for match in matches:
            if not any(start < match.end() and match.start() < end for start, end in spans):
                yield match


PATTERNS = (
    Pattern(
        "per",
        rf"\b(?:{_THINGS}) an? (?:{_UNITS})\b",
        "one weight per client, one row per module",
        allowed=(
            # A clause, or the client's own.
            rf"\b(?:{_THINGS}) an? (?:{_UNITS}) "
            r"(?:can|could|draws|ended|fits|gives|had|has|have|holds|is|keeps|lacks|leaves|makes|"
            r"may|needs|reads|receives|sends|sent|shows|takes|trains|was|will|writes)\b",
            rf"\b(?:{_THINGS}) an? (?:{_UNITS})'s",
            rf"\b(?:all|at|of|the|to) one an? (?:{_UNITS})\b",
        ),
    ),
    Pattern(
        "is no",
        r"\b(?:is|are|was|were|be) no [a-z]+",
        "is not a template",
        allowed=(
            r"\b(?:there|here) (?:is|are|was|were) no\b",
            r"\bthere (?:may|must|should|can|will|would) be no\b",
            r"\b(?:is|are|was|were|be) no (?:longer|more|less|better|worse|smaller|larger|greater|"
            r"fewer|faster|slower|farther|further|higher|lower|shorter|earlier|later|other)\b",
            r"\bis no guarantee\b",
        ),
    ),
    Pattern(
        "told",
        r"\b(?:told|tell|tells|telling)\b",
        "the client sends metadata; the config says; reports, states, shows",
        allowed=(r"\bt(?:ell|ells|elling|old) (?:\w+ ){0,4}(?:apart|from)\b",),
    ),
    Pattern("settled", r"\bsettl(?:e|es|ed|ing)\b", "converged"),
    Pattern("likeness", r"\blikeness(?:es)?\b", "similarity"),
    Pattern(
        "cut",
        r"\bcut(?:s|ting)?\b",
        "clip to norm 1, truncate to rank 4, cutoff",
        allowed=(
            r"\bcut(?:s|ting)?[ -]offs?\b",
            r"\bcut(?:s|ting)? (?:\w+ )?into\b",
        ),
    ),
    Pattern(
        "turn",
        r"\bturn(?:s|ed|ing)?\b",
        "align, rotate; a client's round for its turn",
        allowed=(
            r"\b(?:in|by) turns?\b",
            r"\btak(?:e|es|ing) turns\b",
            r"\bturn(?:s|ed|ing)? (?:out|off|on|over)\b",
            r"\bturn(?:s|ed|ing)? (?:\w+ ){0,6}(?:into|red|green)\b",
        ),
    ),
    Pattern(
        "goes on",
        r"\b(?:go|goes|gone|going|went) on\b",
        "resumes, continues",
        allowed=(r"\b(?:is|still|what is) going on\b",),
    ),
    Pattern(
        "unless given",
        r"\bunless (?:\w+ )?(?:given|told|asked|said)\b",
        "unless set; unless stated otherwise; by default",
    ),
    Pattern(
        "asked for",
        r"\b(?:not|is|was|were|are) asked for\b",
        "unexpected tensor `x`; requested, required",
    ),
    Pattern(
        "same bits",
        r"\bsame bits\b|\bto the bits?\b",
        "all 5 uploads are identical; bit for bit",
        kinds=("message",),
    ),
    Pattern(
        "order",
        r"\bserver's order\b|\border of (?:a|the|this|its) round\b|\border of FedLoRA\b|"
        r"\bthe order (?:is added|asks|says|names|holds)\b|\bround orders\b",
        "round configuration",
    ),
    Pattern(
        "nothing of",
        r"\b(?:has|have|holds?|keeps?|knows?|knew|says?|said|sees|shows?) nothing of\b",
        "has no state for, knows nothing about",
    ),
    Pattern(
        "allows to",
        r"\b(?:allow|allows|permit|permits) to\b",
        "allows aggregating, lets one aggregate",
    ),
    Pattern("thousand million", r"\bthousand million\b", "billion"),
    Pattern("workbench", r"\b(?:workbench(?:es)?|shelf)\b", "experiment, shared cache"),
)

NAMES = frozenset({"found", "kept", "held", "told", "own"})
NAMING = "name the content: factors, weights, refused"


@dataclass(frozen=True, order=True)
class Hit:
    """One phrase in one place; ``pattern`` is the name of its :class:`Pattern`."""

    pattern: str
    file: str
    line: int
    phrase: str
    write: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.phrase!r}; write: {self.write}"


@dataclass(frozen=True)
class Passage:
    """Text as people read it; ``lines`` has the source line of each of its own."""

    kind: Kind
    text: str
    line: int
    source: tuple[str, ...] = ()

    def line_of(self, match: re.Match[str]) -> int:
        """Where a match stands; a string in several pieces is searched for its first words."""
        if not self.source:
            return self.line + self.text.count("\n", 0, match.start())
        start = self.text.rfind(" ", 0, match.start()) + 1
        words = re.split(r"[\s\"']", self.text[start : match.end()])
        for count in range(len(words), 0, -1):
            beginning = " ".join(words[:count])
            for offset, line in enumerate(self.source):
                if beginning and beginning in line:
                    return self.line + offset
        return self.line


def find_hits(paths: Iterable[str] = ()) -> list[Hit]:
    """Every hit in the files whose path starts with one of ``paths``; in all of them without."""
    beginnings = tuple(paths)
    hits: list[Hit] = []
    for file in sorted(_files()):
        name = str(file.relative_to(ROOT))
        if not beginnings or name.startswith(beginnings):
            text = file.read_text(encoding="utf-8")
            hits += phrase_hits(name, text)
            if file.suffix == ".py":
                hits += name_hits(name, text)
    return sorted(hits)


def phrase_hits(name: str, text: str) -> list[Hit]:
    """The hits in one file's prose."""
    passages = list(_python(text) if name.endswith(".py") else [Passage("page", text, 1)])
    return [
        Hit(
            pattern.name,
            name,
            passage.line_of(match),
            " ".join(match.group().split()),
            pattern.write,
        )
        for passage in passages
        for pattern in PATTERNS
        if passage.kind in pattern.kinds
        for match in pattern.matches(_without_code(passage.text))
    ]


def name_hits(name: str, text: str) -> list[Hit]:
    """The assignments of one file whose target says a grammatical form and no content."""
    nodes = _nodes(text)
    fields = {
        id(statement.target)
        for node in nodes
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    return [
        Hit("names", name, node.lineno, node.id, NAMING)
        for node in nodes
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        if node.id in NAMES and id(node) not in fields
    ]


def _files() -> set[Path]:
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    code = {
        path
        for folder in CODE
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", *TEMPLATES) and "results" not in path.parts
    }
    return {path for path in pages | code if path.is_file()}


def _python(text: str) -> Iterator[Passage]:
    yield from _comments(text)
    yield from _strings(text)


@lru_cache(maxsize=1)
def _nodes(text: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(text)))


def _comments(text: str) -> Iterator[Passage]:
    """Comments, those of lines that follow each other as one."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    places = enumerate(comments)
    for _, numbered in groupby(places, lambda pair: pair[1].start[0] - pair[0]):
        block = [token for _, token in numbered]
        lines = (token.string.removeprefix("#").removeprefix(":") for token in block)
        yield Passage("comment", "\n".join(lines), block[0].start[0])


def _strings(text: str) -> Iterator[Passage]:
    """Docstrings, and literals that hold a blank and are no format."""
    nodes, lines = _nodes(text), text.split("\n")
    standing = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    inner: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            inner |= {id(piece) for piece in ast.walk(node)} - {id(node)}
            pieces = (p.value if isinstance(p, ast.Constant) else "x" for p in node.values)
            value = "".join(str(piece) for piece in pieces)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            value = node.value
        else:
            continue
        if id(node) in standing:
            yield Passage("docstring", value, node.lineno)
        elif id(node) not in inner and " " in value and value not in formats():
            source = tuple(lines[node.lineno - 1 : node.end_lineno])
            yield Passage("message", value, node.lineno, source)


def _without_code(text: str) -> str:
    """``text`` with inline code made one word of the same length."""
    return re.sub(r"``[^`]+``|`[^`\n]+`", lambda match: "x" * len(match.group()), text)


@cache
def formats() -> frozenset[str]:
    """Words and names that are formats; see :mod:`tests.packaging.test_formats`."""
    golden = json.loads(Path(__file__).with_name("formats.json").read_text(encoding="utf-8"))
    values: set[str] = set()

    def gather(part: object) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                values.add(key)
                gather(value)
        elif isinstance(part, list):
            for value in part:
                values.update([value, *re.split(r": | = |/|, ", value)])

    gather(golden)
    return frozenset(values)


def report(hits: Iterable[Hit]) -> str:
    """The hits by pattern, each with its count, after a table of rooms."""
    everything = sorted(hits)
    rooms = Counter(_room(hit.file) for hit in everything)
    lines = [f"{len(everything)} hits", ""]
    lines += [f"{count:6d}  {room}" for room, count in sorted(rooms.items())]
    for name, group in groupby(everything, lambda hit: hit.pattern):
        members = list(group)
        lines += ["", f"{name}: {len(members)}; write: {members[0].write}"]
        lines += [f"  {hit.file}:{hit.line}: {hit.phrase}" for hit in members]
    return "\n".join(lines)


def _room(file: str) -> str:
    parts = Path(file).parts
    depth = 3 if parts[0] in ("kernels", "theory") else 2
    return "/".join(parts[: min(depth, len(parts) - 1)]) or file


if __name__ == "__main__":
    print(report(find_hits(sys.argv[1:])))

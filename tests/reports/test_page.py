from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedcore.errors import FedcoreError
from fedcore.reports.page import write_comparison_page, write_run_page
from fedcore.reports.reading import read_run
from tests.reports.fake_run import write_fake_run

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags, outgoing references and visible text of a page."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [
            value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href", "data")
        ]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.text += data


def check_self_contained(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(ref.startswith(("#", "data:image/png;base64,")) for ref in page.references)
    for address in re.findall(r"url\(([^)]*)\)", text):
        assert address.startswith("#")
    assert "@import" not in text
    assert re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", text) is None
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    return page


def test_run_page_shows_the_run_and_needs_nothing_else(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", rounds=6)
    record = read_run(folder)
    path = write_run_page(folder)
    assert path == folder / "report.html"
    page = check_self_contained(path)
    assert f"held-out accuracy is {record.quality:.3f}" in page.text
    assert "client-01 (non-finite values)" in page.text
    assert record.recipe in page.text
    assert "made-up CPU" in page.text
    assert page.tags.count("figure") == page.tags.count("figcaption") == 6
    pictures = sorted(p.name for p in (folder / "plots").iterdir())
    assert pictures == [
        "accuracy-by-bytes.png",
        "accuracy-by-round.png",
        "aggregation-error.png",
        "clients.png",
        "factor-drift.png",
        "partition.png",
    ]
    for picture in (folder / "plots").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))


def test_names_are_escaped_everywhere(tmp_path: Path):
    folder = write_fake_run(
        tmp_path / "run",
        method=HOSTILE,
        client_name=HOSTILE,
        recipe=HOSTILE.replace("1", "2"),
        labels=(HOSTILE, "-->", "$\\frac$", "&amp;", "]]>"),
        rounds=5,
    )
    page = check_self_contained(write_run_page(folder))
    assert page.text.count(HOSTILE) >= 3
    comparison = write_comparison_page(
        [read_run(folder)], tmp_path / "c.html", [{HOSTILE: HOSTILE}]
    )
    assert HOSTILE in check_self_contained(comparison).text


def test_unfinished_and_tiny_runs_have_pages(tmp_path: Path):
    waiting = write_fake_run(tmp_path / "a", rounds=2, finished=False)
    metrics = waiting / "metrics.jsonl"
    metrics.write_text(re.sub(r'"(loss|train_loss)": [0-9.]+', r'"\1": NaN', metrics.read_text()))
    text = check_self_contained(write_run_page(waiting)).text
    assert "not finished" in text
    assert "were NaN or infinite" in text
    assert not re.search(r"\bnan\b", text)
    tiny = write_fake_run(tmp_path / "b", rounds=1, clients=1, modules=1, dropped=False)
    assert "After 1 round with 1 client," in check_self_contained(write_run_page(tiny)).text
    metrics.write_text("")
    page = check_self_contained(write_run_page(waiting))
    assert "No round has been evaluated yet" in page.text
    assert page.tags.count("figure") == 1


def test_a_broken_run_leaves_the_old_page(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", rounds=2)
    (folder / "report.html").write_text("old")
    (folder / "partition.json").write_text("{")
    with pytest.raises(FedcoreError, match=r"partition\.json is not JSON"):
        write_run_page(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not (folder / "plots").exists()


def test_comparison_page(tmp_path: Path):
    runs = [
        read_run(write_fake_run(tmp_path / f"{m}-{s}", method=m, seed=s, rounds=4, clients=3))
        for m in ("fedit", "florg.truncated", "head_only")
        for s in range(2)
    ]
    waiting = read_run(
        write_fake_run(tmp_path / "rolora-0", method="rolora", rounds=1, finished=False)
    )
    out = tmp_path / "new" / "comparison.html"
    assert write_comparison_page([*runs, waiting], out) == out
    page = check_self_contained(out)
    assert "Highest mean accuracy" in page.text
    assert "Not finished and left out of every number: rolora-0." in page.text
    assert page.tags.count("figure") == 3
    assert len(list((tmp_path / "new" / "plots").glob("*.png"))) == 3

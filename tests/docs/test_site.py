"""The site builds without a warning, needs no network, and shows what the packages export."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from importlib import import_module

import pytest

from tests.docs.pages import ROOT

PACKAGES = (
    "fedcore.data",
    "fedcore.merging",
    "fedcore.methods",
    "fedcore.privacy",
    "fedcore.tuners",
    "fedcore_kernels",
)
FORMULA = re.compile(r"</?(?!(?:h[1-6]|[abpi])\b)(?:[A-Z]|[a-z][\d_]|[a-z]\b)")
"""The beginning of what HTML takes for a tag and a formula means as an inequality."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def html(site):
    return {
        path.relative_to(site).as_posix(): path.read_text(encoding="utf-8")
        for path in site.rglob("*.html")
    }


@pytest.mark.slow
class TestSite:
    def test_nothing_comes_from_another_machine(self, html):
        for name, page in html.items():
            for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page):
                assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag), f"{name}: {tag}"

    def test_docstrings_are_read_as_markdown(self, html):
        for name, page in html.items():
            text = re.sub(r"<[^>]+>", "", page)
            assert not re.search(r":(?:func|class|meth|mod|attr|data|exc):", text), name
            quoted = re.findall(r"<blockquote>.*?</blockquote>", page, re.DOTALL)
            assert not [quote for quote in quoted if "&gt;" in quote], name

    def test_no_inequality_was_taken_for_a_tag(self, html):
        for name, page in html.items():
            bare = re.sub(r"<!.*?>|<(script|style|svg)\b.*?</\1>", "", page, flags=re.DOTALL)
            assert not FORMULA.search(bare), f"{name}: {FORMULA.findall(bare)}"

    def test_what_the_packages_export_is_shown(self, site):
        raw = (site / "objects.inv").read_bytes()
        listed = zlib.decompress(raw.split(b"zlib.\n", 1)[1]).decode()
        shown = {line.split(" ", 1)[0] for line in listed.splitlines()}
        for package in PACKAGES:
            module = import_module(package)
            for name in module.__all__:
                found = getattr(module, name)
                home = getattr(found, "__module__", package)
                assert {f"{package}.{name}", f"{home}.{name}"} & shown, f"{package}.{name}"

    def test_links_between_the_repository_and_the_site_hold(self, site, html):
        for name, page in html.items():
            if name == "404.html":
                continue
            here = (site / name).parent
            for target in re.findall(r"(?:href|src)=\"([^\"#?:]+)[\"#?]", page):
                assert (here / target).exists(), f"{name}: {target}"


def test_the_top_level_page_lists_all_names():
    import fedcore

    page = (ROOT / "docs" / "reference" / "fedcore.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE))
    assert listed == set(fedcore.__all__) - {"__version__"}

"""The page of methods says what the code says."""

import re
from pathlib import Path

import pytest

from fedcore.methods import METHODS, describe_methods
from fedcore.reports.adapters_table import adapters_markdown
from fedcore.reports.methods_table import methods_markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- methods table -->", "<!-- end of methods table -->"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sections(page):
    """Heading to text, for every heading of the second level outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^## (.*)$", prose, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_table_is_what_the_methods_say_of_themselves(page):
    assert page.count(BEGIN) == page.count(END) == 1
    table = page.split(BEGIN)[1].split(END)[0]
    fresh = methods_markdown(describe_methods())
    assert table.strip() == fresh.strip(), "put the output of `fedcore methods --markdown` there"


def test_the_table_of_adapters_is_what_the_gate_does():
    text = (PAGE.parent / "adapters.md").read_text(encoding="utf-8")
    table = text.split("<!-- adapters table -->")[1].split("<!-- end of adapters table -->")[0]
    wanted = adapters_markdown()
    assert table.strip() == wanted.strip(), "put the output of `fedcore adapters --markdown` there"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_has_one_section_that_names_its_source(method, sections):
    found = [text for heading, text in sections.items() if f"`{method.name}`" in heading]
    assert len(found) == 1, f"docs/methods.md has {len(found)} sections named `{method.name}`"
    for source in re.findall(r"\d{4}\.\d{5}", method().description.paper):
        assert source in found[0], f"the section of {method.name} does not name {source}"

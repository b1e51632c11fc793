"""Every block of every page runs, in the order of the page."""

from __future__ import annotations

import re

import pytest
import torch

from tests.docs.given import GIVEN, TRIED
from tests.docs.pages import PAGES, ROOT
from tests.docs.running import BlockError, blocks_of, evaluate
from tests.docs.tools import environment, installed, stand_in


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """The environment of the blocks' shells; this process sees the same commands."""
    tools = tmp_path / "tools"
    found = environment(tools)
    if not installed():
        monkeypatch.syspath_prepend(str(stand_in(tools / "here")))
    return found


def run_page(page, shell, folder, monkeypatch):
    """Its blocks, one after another in one namespace and one folder; the number of them."""
    document = blocks_of(page, shell)
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with torch.random.fork_rng():
        prepare = GIVEN.get(str(page))
        document.namespace.update(prepare(folder) if prepare else {})
        found = list(document.examples())
        for example in found:
            evaluate(example)
        if page in TRIED:
            TRIED[page](document.namespace)
    return len(found)


TRAINS = re.compile(r"(?<!-->\n)```(?:sh|console)\n(?:\$ )?fedcore (?:run|compare|audit)\b")

OFTEN = {"docs/index.md", "docs/engines/local.md", "docs/engines/flower.md"}
"""The pages that train and are read first; what the others show is run less often."""


def _marked(page):
    trains = TRAINS.search((ROOT / page).read_text(encoding="utf-8"))
    dear = [pytest.mark.slow] if str(page) in OFTEN else [pytest.mark.slow, pytest.mark.exhaustive]
    return pytest.param(page, marks=dear if trains else [])


@pytest.mark.parametrize("page", [_marked(page) for page in PAGES])
def test_the_page(page, shell, tmp_path, monkeypatch):
    try:
        run_page(page, shell, tmp_path / "work", monkeypatch)
    except BlockError as error:
        # A traceback would show the whole page.
        pytest.fail(str(error), pytrace=False)


BROKEN = {
    "python": (
        "```python\nx = 1\n```\n\n```python\nassert x == 1\nassert x == 2\n```",
        7,
        "Assert",
    ),
    "syntax": ("```python\nx = 1\nx = (\n```", 3, "SyntaxError"),
    "shell": ("```sh\ntrue\nfalse\ntrue\n```", 3, "exit status 1"),
    "pipe": ("```sh\nfalse | cat\n```", 2, "exit status 1"),
    "unset": ("```sh\necho $nothing_of_this_name\n```", 1, "exit status"),
    "session": ("```console\n$ echo one\none\n$ echo two\n2\n```", 1, "echo two printed\ntwo"),
    "key": ("```toml\n[partition]\nalfa = 1\n```", 1, "unknown recipe key"),
    "value": ("```toml\nrounds = 0\n```", 1, "recipe key rounds"),
    "option": (
        "<!-- not run: x -->\n```sh\nfedcore run bbc-news --metod ffa\n```",
        2,
        "--metod",
    ),
    "method": ("<!-- not run: x -->\n```sh\nfedcore run bbc-news --method x\n```", 2, "unknown"),
    "recipe": ("<!-- not run: x -->\n```sh\nfedcore run bbc-nws\n```", 2, "unknown recipe"),
    "setting": ("<!-- not run: x -->\n```sh\nfedcore run bbc-news --set a=1\n```", 2, "unknown"),
    "extra": ("<!-- not run: x -->\n```sh\npip install '.[exmples]'\n```", 2, "exmples"),
    "program": ("<!-- not run: x -->\n```sh\nfedcoer run\n```", 2, "fedcoer"),
    "import": (
        "<!-- not run: x -->\n```python\nfrom fedcore.data import Kohort\n```",
        2,
        "has no Kohort",
    ),
    "hidden": ("```\npip install fedcore-lora\n```", 1, "looks like code"),
    "command": ("```text\nfedcore recipes --jsn\n```", 1, "--jsn"),
}
"""A page, the line that is wrong, and what is said."""


@pytest.mark.parametrize(("text", "line", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_block_is_red(text, line, message, shell, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(BlockError) as error:
        run_page(page, shell, tmp_path / "work", monkeypatch)
    assert str(error.value).startswith(f"{page}:{line}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\ntrue\n```",
        "```py\nx = 1\n```",
        "```json\n{}\n```",
        "```python {.own}\nx = 1\n```",
        "<!-- not run: why -->\n```toml\nrounds = 0\n```",
        "<!-- not run: why -->\n```console\n$ false\n```",
        "- a list\n\n    ```javascript\n    x\n    ```",
    ],
)
def test_a_language_that_nobody_looks_at_is_red(text, shell, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page.md:\d+: nobody looks at a fence"):
        run_page(page, shell, tmp_path / "work", monkeypatch)


def test_a_mark_is_for_the_next_fence_alone(shell, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: why -->\n```sh\npip install x\n```\n\n```sh\nfalse\n```")
    with pytest.raises(BlockError, match=r"page.md:7: exit status 1"):
        run_page(page, shell, tmp_path / "work", monkeypatch)


def test_a_mark_needs_a_reason(shell, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: -->\n```sh\nfalse\n```")
    with pytest.raises(BlockError, match="exit status 1"):
        run_page(page, shell, tmp_path / "work", monkeypatch)


def test_blocks_share_names_and_a_folder(shell, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nvalue = 7\nopen('file', 'w').write('seven')\n```\n"
        '```toml title="own.toml"\nrounds = 3\n```\n'
        "```console\n$ cat file && grep -c rounds own.toml\nseven...1\n```\n"
        "```python\nassert value == 7\n```\n"
    )
    assert run_page(page, shell, tmp_path / "work", monkeypatch) == 4


def test_every_page_is_found():
    assert {"docs/index.md", "docs/how-to/export.md", "kernels/README.md"} <= set(PAGES)

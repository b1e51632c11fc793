"""Programs in a process with limits: what passes, what does not, and what is left."""

import os
import time
from pathlib import Path

import pytest

from fedcore.answers import sandbox
from fedcore.answers.sandbox import passes

RIGHT = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5"


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert passes(RIGHT, TESTS)
    assert not passes(RIGHT.replace("+", "-"), TESTS)
    assert not passes("def add(a, b:", TESTS)
    assert not passes(RIGHT, "assert add(2, 3) ==")


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        RIGHT + "x = '''",
        RIGHT + "big = bytearray(10 << 30)",
        RIGHT + "print('x' * (3 << 20), flush=True)",
        RIGHT + "open('big', 'wb').write(bytes(3 << 20))",
    ],
)
def test_leaving_early_or_taking_much_is_not_success(program):
    assert not passes(program, TESTS if "def" in program else "")


def test_what_a_program_prints_before_does_not_matter():
    assert passes(RIGHT + "print('hello')\nprint = None", TESTS)


def test_an_endless_loop_ends(monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    assert not passes("while True: pass", "")


def test_waiting_ends_with_everything_that_was_started(tmp_path):
    mark = tmp_path / "child"
    program = (
        "import os, time\n"
        f"if os.fork() == 0: open({str(mark)!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    assert not passes(program, "", seconds=3)
    child = Path(f"/proc/{mark.read_text()}")
    for _ in range(100):
        # Killed; whoever adopted it may not have waited for it yet.
        if not child.exists() or (child / "stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is alive")


def test_it_sees_neither_environment_nor_packages_and_leaves_nothing(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert passes("import os", "assert 'SECRET' not in os.environ")
    assert not passes("import torch", "")
    assert not passes("import fedcore", "")
    before = set(os.listdir())
    assert passes("open('here', 'w').write('x')", "import os; assert os.listdir() == ['here']")
    assert set(os.listdir()) == before

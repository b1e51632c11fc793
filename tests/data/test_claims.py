"""One process at a time works in a folder, and a dead one is in nobody's way."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.data import claims
from fedcore.data.claims import claimed
from fedcore.data.folders import is_free
from fedcore.data.locks import LOCK_FILE
from fedcore.errors import FedcoreError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def child_that_claims(folder: Path, then: Callable[[], None]) -> int:
    """A process that has claimed ``folder``, by its number; it runs ``then`` and waits."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with claimed(folder):
                then()
                os.write(told, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_process_is_refused_by_number_and_let_in_once_the_first_is_dead(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    child = child_that_claims(folder, lambda: None)
    try:
        refused = pytest.raises(FedcoreError, match=rf"run is in use by process {child} on ")
        with refused, claimed(folder):
            raise AssertionError("two processes in one folder")
    finally:
        kill(child)
    # The dead one's file is there still, and means nothing.
    assert (folder / LOCK_FILE).is_file()
    assert is_free(folder)
    with claimed(folder):
        assert f"process {os.getpid()} " in (folder / LOCK_FILE).read_text()
    assert not (folder / LOCK_FILE).exists()


def test_a_thread_is_refused_too_and_an_error_releases(tmp_path: Path) -> None:
    messages = []

    def second() -> None:
        try:
            with claimed(tmp_path):
                messages.append("claimed")
        except FedcoreError as error:
            messages.append(str(error))

    def in_a_thread() -> str:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return messages.pop()

    def fail() -> None:
        with claimed(tmp_path):
            assert f"in use by process {os.getpid()} " in in_a_thread()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert in_a_thread() == "claimed"


def test_a_child_leaves_the_claim_to_its_parent(tmp_path: Path) -> None:
    with claimed(tmp_path):
        child = os.fork()
        if child == 0:
            # As a worker that leaves the block by its own end.
            try:
                raise SystemExit
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / LOCK_FILE).is_file()
        with pytest.raises(FedcoreError, match="in use"), claimed(tmp_path):
            pass


def test_many_processes_take_it_in_turn(tmp_path: Path) -> None:
    """Nobody is let in beside another, whoever deletes the file between two lines of another."""
    log = tmp_path / "log"
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            done = 0
            while done < 25:
                try:
                    with claimed(tmp_path / "run"):
                        with open(log, "ab", buffering=0) as file:
                            file.write(b"<")
                            file.write(b">")
                        done += 1
                except FedcoreError:
                    continue
            os._exit(0)
        children.append(child)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}
    assert log.read_bytes() == b"<>" * 100


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open", "write"])
def test_a_claim_that_cannot_be_made_is_one_clear_line(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        refused = pytest.raises(
            FedcoreError, match=rf"cannot write .*\.lock: {os.strerror(number)}; "
        )
        with refused, claimed(tmp_path):
            raise AssertionError("nothing was claimed")
    with claimed(tmp_path):
        pass


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(FedcoreError, match=r"cannot write .*\.lock"), claimed(tmp_path / "run"):
        raise AssertionError
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_somebody_else_wrote_there_is_not_shown_raw(tmp_path: Path) -> None:
    child = child_that_claims(
        tmp_path, lambda: (tmp_path / LOCK_FILE).write_text("\x1b[31mprocess 1\n2") and None
    )
    try:
        with pytest.raises(FedcoreError, match="in use by another process: "), claimed(tmp_path):
            pass
    finally:
        kill(child)


def test_a_file_that_was_deleted_before_it_was_locked_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = claims.lock_descriptor, []

    def after_the_owner_left(handle: int, *, wait: bool) -> bool:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        return real(handle, wait=wait)

    monkeypatch.setattr(claims, "lock_descriptor", after_the_owner_left)
    with claimed(tmp_path):
        assert len(calls) == 2
        with pytest.raises(FedcoreError, match="in use by process"), claimed(tmp_path):
            pass

"""What stands in a folder is whole, whatever fails, whoever dies and whoever else writes."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from matplotlib.figure import Figure

import fedcore
from fedcore import aggregate
from fedcore.data.exchange import (
    BroadcastFolder,
    UploadFolder,
    read_broadcast,
    read_upload,
    write_broadcast,
    write_upload,
)
from fedcore.data.folders import (
    append_line,
    delete_folder,
    is_free,
    read_json,
    read_object,
    replace_folder,
    sweep,
    write_bytes,
    write_files,
    write_text,
)
from fedcore.data.peft_files import read_adapter, read_tensors, write_adapter
from fedcore.data.tensor_file import TensorFile
from fedcore.errors import FedcoreError
from fedcore.experiments.run_folder import RunFolder
from fedcore.federation.records import PartitionRecord
from fedcore.federation.state import ServerState, read_state, write_state
from fedcore.reports import page
from fedcore.reports.document import Picture
from fedcore.reports.reading import read_run
from tests.property.adapters import lora_state
from tests.reports.fake_run import write_fake_run

LIKE = lora_state(0)
LAYOUT = LIKE.layout()


def _partition(number: int) -> PartitionRecord:
    return PartitionRecord(
        label_names=("news",),
        client_ids=("site",),
        class_counts=((number,),),
        test_counts=((0,),),
    )


def _state(number: int) -> ServerState:
    row = torch.full((LAYOUT.size,), float(number))
    clients = {"site": {"step": torch.tensor(float(number))}}
    return ServerState(round=3, layout=LAYOUT, row=row, simulated_clients=clients)


def _upload(number: int) -> UploadFolder:
    return UploadFolder(LIKE.to_row(LAYOUT), 0, float(number), "frozen", "start")


def _number_of_adapter(folder: Path) -> int:
    stored = read_adapter(folder)
    module = next(iter(stored.factors))
    near = [
        number
        for number in range(3)
        if torch.allclose(stored.factors[module]["A"], lora_state(number).factors[module]["A"])
    ]
    return near[0]


def _merge(number: int, out: Path) -> None:
    aggregate({"a": lora_state(number)}, method="fedit", out=out, overwrite=True, compare=False)


def _write_page(number: int, folder: Path) -> None:
    run = folder.parent / "in" / str(number)
    if not run.exists():
        write_fake_run(run, rounds=1, clients=1, modules=1, method=f"made-up-{number}")
    page.write_comparison_page([read_run(run)], folder / "report.html")


class Writer(NamedTuple):
    """Something that writes one of several contents into a folder, and reads which it was."""

    write: Callable[[int, Path], Any]
    read: Callable[[Path], int]


WRITERS = {
    "broadcast": Writer(
        lambda n, out: write_broadcast(BroadcastFolder(lora_state(n), n, "fedit"), out),
        lambda out: read_broadcast(out).round,
    ),
    "upload": Writer(
        lambda n, out: write_upload(_upload(n), LAYOUT, LIKE, out, factors=True),
        lambda out: int(read_upload(out, LAYOUT, LIKE, factors=True, round=0).examples),
    ),
    "merged": Writer(_merge, _number_of_adapter),
    "state": Writer(
        lambda n, out: write_state(_state(n), out),
        lambda out: int(read_state(out / "round-0003").row[0]),
    ),
    "adapter": Writer(
        lambda n, out: write_adapter(lora_state(n), out), lambda out: _number_of_adapter(out)
    ),
    "json": Writer(
        lambda n, out: RunFolder(out).write_json("partition.json", _partition(n)),
        lambda out: json.loads((out / "partition.json").read_text())["class_counts"][0][0],
    ),
    "page": Writer(
        _write_page,
        lambda out: int(re.findall(r"made-up-(\d)", (out / "report.html").read_text())[0]),
    ),
}


@pytest.fixture(params=list(WRITERS))
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Writer:
    # A busy disk takes long; what is synced and when is the matter of another test.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    # Two empty pictures are as much to write as many, and drawn faster.
    empty = [Picture(name, "nothing", Figure((0.1, 0.1))) for name in ("one", "other")]
    monkeypatch.setattr(page, "comparison_pictures", lambda groups: empty)
    return WRITERS[request.param]


CALLS = ("rename", "replace", "link", "fsync")


@contextmanager
def failing(
    at: int | None,
    failure: Callable[[], BaseException],
    *,
    names: tuple[str, ...] = CALLS,
    lasting: bool = False,
) -> Iterator[list[str]]:
    """Let the call number ``at`` of those named fail, and all after it if lasting.

    Gives the names of the calls so far.
    """
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def counted(name: str) -> None:
            real = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                calls.append(name)
                if at is not None and (len(calls) > at if lasting else len(calls) == at + 1):
                    raise failure()
                return real(*arguments, **options)

            patch.setattr(os, name, call)

        for name in names:
            counted(name)
        yield calls


def content(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but those in hidden folders."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path: path.relative_to(folder) for path in files}
    return {
        str(name): path.read_bytes()
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def leftovers(home: Path) -> list[Path]:
    return list(home.rglob(".*"))


def give_up(writer: Writer, out: Path) -> None:
    """An attempt to write that fails once what was left before it is swept."""
    with suppress(KeyboardInterrupt), failing(0, KeyboardInterrupt, names=("fsync",)):
        writer.write(0, out)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def steps_of(writer: Writer, home: Path, *, old: bool) -> tuple[int, dict[str, bytes]]:
    """How many calls of a good write can fail, and what it writes."""
    out = home / "out"
    if old:
        writer.write(1, out)
    with failing(None, full_disk) as calls:
        writer.write(2, out)
    assert "fsync" in calls
    return len(calls), content(out)


@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("failure", [full_disk, KeyboardInterrupt], ids=["error", "interrupt"])
def test_a_call_that_fails_leaves_the_old_content(
    writer: Writer, tmp_path: Path, old: bool, failure: Callable[[], BaseException]
) -> None:
    steps, new = steps_of(writer, tmp_path / "good", old=old)
    assert steps >= 3
    for step in range(steps):
        home = tmp_path / str(step)
        out = home / "out"
        if old:
            writer.write(1, out)
        before = content(out)
        try:
            with failing(step, failure) as calls:
                writer.write(2, out)
            said = ""
        except (FedcoreError, KeyboardInterrupt) as error:
            said = str(error) or "interrupted"
        if said:
            assert content(out) == before, f"call {step} failed: {calls}"
            assert said.startswith(f"cannot write {out}") or failure is KeyboardInterrupt
        else:  # A disk need not have hard links.
            assert (calls[step], failure) == ("link", full_disk)
            assert content(out) == new
        if old:
            assert writer.read(out) in (1, 2)
        assert leftovers(home) == []
        writer.write(2, out)
        assert content(out) == new
        assert writer.read(out) == 2


def test_a_disk_that_fails_from_some_call_on_loses_nothing(writer: Writer, tmp_path: Path) -> None:
    steps, new = steps_of(writer, tmp_path / "good", old=True)
    for step in range(steps):
        home = tmp_path / str(step)
        out = home / "out"
        writer.write(1, out)
        before = content(out)
        with suppress(FedcoreError), failing(step, full_disk, lasting=True):
            writer.write(2, out)
        # The next attempt first undoes what the failed one left, even where it fails itself.
        give_up(writer, out)
        assert content(out) in (before, new), f"calls from {step} on failed"
        assert writer.read(out) in (1, 2)
        writer.write(2, out)
        assert content(out) == new
        assert leftovers(home) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_dies_loses_nothing(writer: Writer, tmp_path: Path) -> None:
    steps, new = steps_of(writer, tmp_path / "good", old=True)
    for step in range(steps):
        home = tmp_path / str(step)
        out = home / "out"
        writer.write(1, out)
        before = content(out)
        child = os.fork()
        if child == 0:

            def die() -> BaseException:
                os._exit(9)

            with failing(step, die):
                writer.write(2, out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        seen = {path.parent.name for path in home.glob("*/*.json")}
        assert seen <= {"out"}, "a server takes what is half written for a client"
        give_up(writer, out)
        assert content(out) in (before, new), f"killed at call {step}"
        assert writer.read(out) in (1, 2)
        writer.write(2, out)
        assert content(out) == new
        assert leftovers(home) == []


def test_everything_is_on_the_disk_before_it_is_renamed_in(tmp_path: Path) -> None:
    events: list[str] = []
    real = {name: getattr(os, name) for name in CALLS}
    with pytest.MonkeyPatch.context() as patch:

        def fsync(handle: int) -> None:
            events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
            real["fsync"](handle)

        def rename(source: Path, target: Path) -> None:
            events.append(f"{Path(source).name} -> {Path(target).name}")
            real["rename"](source, target)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", rename)
        for _ in range(2):
            events.clear()
            with replace_folder(tmp_path / "out") as new:
                (new / "inner").mkdir()
                (new / "a").write_text("1")
                (new / "inner" / "b").write_text("2")
    swap = events.index("new -> out")
    assert {"a", "b", "inner", "new"} == set(events[: swap - 1])
    assert events[swap - 1 :] == ["out -> old", "new -> out", tmp_path.name, "old -> done"]


def test_writers_of_one_folder_neither_meet_nor_sweep_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replace_folder(out) as first:
        (first / "file").write_text("first")
        with replace_folder(out) as second:
            (second / "file").write_text("second")
            (second / "more").write_text("second")
        assert content(out) == {"file": b"second", "more": b"second"}
        write_text("third", out / "file")
    assert content(out) == {"file": b"first"}
    assert leftovers(tmp_path) == []


def test_threads_that_write_one_folder_all_succeed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(5):
                write_broadcast(BroadcastFolder(lora_state(number), number, "fedit"), out)
                write_files(tmp_path / "files", {"a": b"%d" % number, "b": b"%d" % number})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert read_broadcast(out).round in range(6)
    assert len(set(content(tmp_path / "files").values())) == 1
    assert leftovers(tmp_path) == []


def test_what_earlier_versions_left_is_swept_and_an_old_folder_restored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.4242.new", ".out.4242.old", ".other.4242.new", ".round-0003.4242.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".note.4242.tmp").write_text("x")
    with suppress(KeyboardInterrupt), replace_folder(out):
        raise KeyboardInterrupt
    assert content(out) == {"file": b".out.4242.old"}
    write_text("x", tmp_path / "note")
    write_state(_state(1), tmp_path)
    assert [path.name for path in leftovers(tmp_path)] == [".other.4242.new"]


def test_a_folder_with_leftovers_alone_is_free(tmp_path: Path) -> None:
    assert is_free(tmp_path)
    assert is_free(tmp_path / "missing")
    (tmp_path / ".recipe.toml.0123abcd.tmp").mkdir()
    assert is_free(tmp_path)
    (tmp_path / ".gitignore").write_text("")
    assert not is_free(tmp_path)
    assert not is_free(tmp_path / ".gitignore")


def test_only_a_folder_with_the_mark_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    refused = pytest.raises(FedcoreError, match=r"out exists and holds no mark.json; pass another")
    with refused, replace_folder(out, "mark.json"):
        raise AssertionError("nothing may be written")
    (tmp_path / "file").write_text("x")
    refused = pytest.raises(FedcoreError, match="file is a file; pass a folder")
    with refused, replace_folder(tmp_path / "file"):
        raise AssertionError("nothing may be written")
    (out / "mark.json").write_text("{}")
    (tmp_path / "link").symlink_to(out)
    with replace_folder(tmp_path / "link", "mark.json") as new:
        (new / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert content(out) == {"a": b"1"}


def test_other_files_of_a_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    write_adapter(lora_state(1), tmp_path)
    write_adapter(lora_state(2), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert _number_of_adapter(tmp_path) == 2


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line("one", file)
    with failing(None, full_disk) as calls:
        append_line("two", file)
    assert calls == ["fsync"]
    for failure in (full_disk, KeyboardInterrupt):
        with pytest.raises((FedcoreError, KeyboardInterrupt)), failing(0, failure):
            append_line("three", file)
        assert file.read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "free space on that disk"),
        (errno.EROFS, "that disk is read-only: pass a place that can be written"),
        (errno.EACCES, "pass a place that can be written, or change its permissions"),
        (errno.EIO, "mend that, or pass another place"),
    ],
)
def test_a_failed_write_says_where_why_and_what_to_do(
    tmp_path: Path, number: int, message: str
) -> None:
    def failure() -> OSError:
        return OSError(number, os.strerror(number))

    out = tmp_path / "out"
    for write in (
        lambda: write_adapter(lora_state(0), out),
        lambda: write_broadcast(BroadcastFolder(lora_state(0), 0, "fedit"), out),
    ):
        with pytest.raises(FedcoreError) as caught, failing(0, failure):
            write()
        assert str(caught.value) == f"cannot write {out}: {os.strerror(number)}; {message}" + (
            ", or write to another" * (number == errno.ENOSPC)
        )


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    name = "n" * 300
    for write in (
        lambda: write_text("x", tmp_path / name),
        lambda: aggregate({"a": LIKE}, method="fedit", out=tmp_path / name),
        lambda: write_state(_state(1), tmp_path / name),
    ):
        with pytest.raises(FedcoreError, match=r"cannot write .*n{300}.*; pass a shorter name"):
            write()
    long = tmp_path / ("n" * 250)
    with suppress(KeyboardInterrupt), failing(1, KeyboardInterrupt):
        write_text("x", long)
    write_text("y", long)
    assert (long.read_text(), leftovers(tmp_path)) == ("y", [])


def test_the_file_is_there_at_every_moment(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_bytes(b"0", file)
    seen = set()
    for step in range(20):
        with suppress(KeyboardInterrupt), failing(step, KeyboardInterrupt) as calls:
            real, index = os.replace, step

            def replace(source: Path, target: Path, real: Any = real) -> None:
                seen.add(file.read_bytes())
                real(source, target)
                seen.add(file.read_bytes())

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "replace", replace)
                write_bytes(b"%d" % (index % 2), file)
        assert file.read_bytes() in (b"0", b"1")
        if len(calls) <= step:
            break
    assert seen == {b"0", b"1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read .*a.json: .*No such file"),
        ("[1]", r"a.json must hold a JSON object"),
        ("{", r"cannot read .*a.json: Expecting"),
        (b'{"a": "\xff"}', r"cannot read .*a.json: .*utf-8"),
        ('{"a": NaN}', r"cannot read .*a.json: NaN is not a finite number"),
        ('{"a": -Infinity}', r"-Infinity is not a finite number"),
        ('{"a": 1e999}', r"1e999 is not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", r"cannot read .*a.json: a number has 5000 digits"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", r"nested deeper than 32 levels"),
        ("[" * 100_000, r"nested deeper than 32 levels"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', r"it names 'a' twice"),
        (" " * (4 << 20) + "{}", r"holds more than 4194304 bytes"),
    ],
)
def test_what_is_not_an_object_of_finite_values_is_refused(
    tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    file = tmp_path / "a.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FedcoreError, match=f"client 3: .*{message}"):
        read_object(file, "client 3")


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/zero")):
        for read in (
            lambda file: read_object(file, "client 3"),
            lambda file: read_tensors(file, "client 3"),
            lambda file: TensorFile.open(file, "client 3", 100),
        ):
            with pytest.raises(FedcoreError, match=rf"client 3: cannot read {path}"):
                read(path)


def test_fields_have_their_types(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    values = {"b": True, "i": 3, "f": 2, "s": "x", "l": [1], "d": {}, "more": None}
    kinds = {"b": bool, "i": int, "f": float, "s": str, "l": list, "d": dict}
    write_text(json.dumps(values), file)
    found = read_object(file, "client 3", kinds)
    assert found == values
    assert [type(found[name]) for name in kinds] == list(kinds.values())
    wrong = [("i", True), ("i", 1.0), ("f", True), ("f", "1"), ("s", None)]
    for name, value in [*wrong, ("b", 1), ("l", {}), ("d", [])]:
        write_text(json.dumps({**values, name: value}), file)
        with pytest.raises(FedcoreError, match=rf"client 3: {name} is .*; it must be"):
            read_object(file, "client 3", kinds)
    write_text("{}", file)
    with pytest.raises(FedcoreError, match="client 3: b is None; it must be"):
        read_object(file, "client 3", kinds)


def test_what_was_measured_may_be_infinite(tmp_path: Path) -> None:
    write_text('{"loss": Infinity}', tmp_path / "a.json")
    assert read_json(tmp_path / "a.json", "run", finite=False) == {"loss": float("inf")}


def test_an_upload_with_too_large_a_number_is_that_clients_fault(tmp_path: Path) -> None:
    write_upload(_upload(1), LAYOUT, LIKE, tmp_path / "site", factors=True)
    file = tmp_path / "site" / "upload.json"
    write_text(json.dumps({**json.loads(file.read_text()), "examples": 10**400}), file)
    with pytest.raises(FedcoreError, match="a number has 401 digits, more than 40"):
        read_upload(tmp_path / "site", LAYOUT, LIKE, factors=True, round=0)


def test_nothing_else_in_the_package_writes_files() -> None:
    source = Path(fedcore.__file__).parent
    methods = {"write_text", "write_bytes", "rmtree", "rename", "unlink", "mkdir", "touch"}
    calls = set()
    # Locks are files that processes hold open, and are never replaced.
    writers = {source / "data" / name for name in ("folders.py", "locks.py", "claims.py")}
    # Programs that a model wrote run in a folder of their own, which goes with them.
    writers.add(source / "answers" / "sandbox.py")
    for file in set(source.rglob("*.py")) - writers:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = str(file.relative_to(source))
            match node.func:
                case ast.Attribute(value=ast.Name(id="os" | "shutil"), attr=attr):
                    calls.add((name, attr))
                case ast.Attribute(attr=attr) if attr in methods:
                    calls.add((name, attr))
                case ast.Name(id="open"):
                    calls.add((name, "open"))
    reading = {"cpu_count", "fstat", "getpid", "uname", "sysconf", "get_terminal_size"}
    reading |= {"lstat", "stat", "walk", "scandir"}
    assert {call for call in calls if call[1] not in reading} == set()


def test_a_folder_is_swept_of_all_that_dead_processes_left(tmp_path: Path) -> None:
    long = "a" * 64
    for name in (
        ".one.0123abcd.new",
        ".two.4242.tmp",
        f".{long}.0123abcd.new",
        ".mine",
        "three.new",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".four.0123abcd.new" / "old").mkdir(parents=True)
    (tmp_path / ".four.0123abcd.new" / "old" / "file").write_text("the only copy")
    with replace_folder(tmp_path / "five") as alive:
        (alive / "file").write_text("new")
        sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f".{long}.0123abcd.new", ".mine", "five", "four", "three.new")
    ]
    assert (tmp_path / "four" / "file").read_text() == "the only copy"
    sweep(tmp_path / "missing")


def test_a_folder_is_deleted_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("x")
    with failing(None, full_disk, names=("rename",)) as calls:
        with pytest.raises(FedcoreError, match="cannot write"), failing(0, full_disk):
            delete_folder(folder)
        assert content(folder) == {"inner/file": b"x"}
        delete_folder(folder)
    assert calls == ["rename"]
    assert list(tmp_path.iterdir()) == []

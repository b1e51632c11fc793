from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.claims import claimed
from fedcore.data.cohort import Cohort
from fedcore.data.exchange import read_broadcast
from fedcore.data.tensor_file import TensorFile
from fedcore.errors import FedcoreError
from fedcore.methods import create_method
from fedcore.methods.base import Broadcast
from fedcore.transports.folders import FileServer
from tests.training.trainer_rounds import (
    EXAMPLES,
    gram_llama,
    lora_bert,
    start_of,
    train_and_upload,
)

BUILD = {
    "fedit": lora_bert,
    "rolora": lora_bert,
    "florg": gram_llama,
    "florg.whitened": gram_llama,
    "flora": lora_bert,
}


def play(tmp_path: Path, method: str, rounds: int) -> list[FileServer]:
    """The server before and after each of ``rounds`` rounds of two clients."""
    build = BUILD[method]
    servers = [FileServer.create(tmp_path / "federation", start_of(build()), method)]
    for t in range(rounds):
        for site in EXAMPLES:
            train_and_upload(build, servers[-1].broadcast, tmp_path, site)
        servers.append(servers[-1].round(tmp_path / f"uploads-{t}"))
    return servers


@pytest.mark.parametrize("name", list(BUILD))
def test_two_rounds_give_what_the_method_gives_of_the_uploads(tmp_path: Path, name: str) -> None:
    method = create_method(name)
    servers = play(tmp_path, name, 2)
    for t, (before, after) in enumerate(pairwise(servers)):
        sent = method.upload_layout(before.state.layout, t)
        rows = []
        for site in EXAMPLES:
            factors = method.capabilities.uploads == "factors"
            file = "adapter_model.safetensors" if factors else "statistics.safetensors"
            named = load_file(tmp_path / f"uploads-{t}" / site / file)
            row = torch.zeros(sent.size)
            for slot in sent:
                key = {"A": "lora_A", "B": "lora_B", "": ""}[slot.factor]
                if method.family == "gram":
                    key = "gram_A" if factors else ".A"
                full = [k for k in named if slot.module in k and key in k]
                assert len(full) == 1, (slot.name, full)
                value = named.pop(full[0])
                sent.view(row, slot).copy_(value.T if slot.factor == "B" else value)
            assert not named, "the client sent more than the plan says"
            rows.append(row)
        assert not torch.equal(rows[0], rows[1])
        cohort = Cohort(
            sent,
            torch.stack(rows),
            torch.tensor([float(EXAMPLES[s]) for s in EXAMPLES], dtype=torch.float64),
            tuple(EXAMPLES),
            t,
            torch.full((2, len(sent.modules)), 3),
            torch.ones(2, len(sent.modules), dtype=torch.float64),
        )
        expected = method.aggregate(cohort, Broadcast(before.state.layout, before.state.row))
        torch.testing.assert_close(after.state.row, expected.row, rtol=0, atol=0)
        assert after.state.record["clients"] == {s: float(n) for s, n in EXAMPLES.items()}
        served = read_broadcast(after.broadcast)
        assert torch.equal(served.row, after.state.row)
        assert served.round == t + 1
        assert served.residual.keys() == after.state.residual.keys()
    again = FileServer.open(tmp_path / "federation")
    assert again.state.round == 2
    assert again.method == method
    assert torch.equal(again.state.row, servers[-1].state.row)
    assert again.served.identity == servers[-1].served.identity


class Repeatable(FileServer):
    """A server whose rounds are played in copies of its folder, so that any test can begin anew."""

    def round(self, *uploads: object, **options: object) -> FileServer:
        copy = Path(mkdtemp(dir=self.folder.parent)) / "federation"
        shutil.copytree(self.folder, copy)
        server = FileServer(copy, self.method, self.state, self.served)
        return server.round(*uploads, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rolora(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileServer, Path]:
    """A server before round 0 and the uploads of its clients."""
    folder = tmp_path_factory.mktemp("rolora")
    server = FileServer.create(folder / "federation", start_of(lora_bert()), "rolora")
    for site in EXAMPLES:
        train_and_upload(lora_bert, server.broadcast, folder, site)
    repeatable = Repeatable(server.folder, server.method, server.state, server.served)
    return repeatable, folder / "uploads-0"


def spoiled(uploads: Path, tmp_path: Path, **fields: object) -> dict[str, Path]:
    """The uploads, with ``fields`` of site-2's ``upload.json`` replaced."""
    bad = tmp_path / "site-2"
    bad.mkdir(parents=True)
    for file in (uploads / "site-2").iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    about = json.loads((bad / "upload.json").read_text())
    (bad / "upload.json").write_text(json.dumps({**about, **fields}))
    return {"site-1": uploads / "site-1", "site-2": bad}


def resent(
    uploads: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]
) -> dict[str, Path]:
    """The uploads, with the tensors of site-2 as ``change`` leaves them."""
    folders = spoiled(uploads, tmp_path)
    file = folders["site-2"] / "adapter_model.safetensors"
    named = load_file(file)
    change(named)
    save_file(named, file)
    return folders


def outer(named: Mapping[str, Tensor]) -> str:
    """The key of the first factor B."""
    return next(key for key in named if "lora_B" in key)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"round": 4}, r"client site-2: its upload is for round 4"),
        ({"frozen": "0" * 64}, r"client site-2: a frozen factor or frame differs"),
        ({"started_from": "0" * 64}, r"client site-2: it started from another broadcast"),
        ({"examples": -1}, r"client site-2: its weight is -1"),
        ({"examples": True}, r"client site-2: its upload: examples is True"),
        ({"examples": None}, r"client site-2: its upload: examples is None"),
        ({"round": "0"}, r"client site-2: its upload: round is '0'"),
    ],
)
def test_what_a_client_says_of_its_upload_is_checked(
    rolora: tuple[FileServer, Path], tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    server, uploads = rolora
    with pytest.raises(FedcoreError, match=message):
        server.round(spoiled(uploads, tmp_path, **fields))
    assert FileServer.open(server.folder).state.round == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[outer(t)].mul_(float("nan")), "values that are not finite"),
        (lambda t: t.update({outer(t): t[outer(t)][:, :1].clone()}), r"has shape \(24, 1\)"),
        (lambda t: t.pop(outer(t)), "is missing"),
    ],
)
def test_what_a_client_sends_is_checked(
    rolora: tuple[FileServer, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    server, uploads = rolora
    folders = resent(uploads, tmp_path, change)
    with pytest.raises(FedcoreError, match=f"round 0: client site-2: .*{message}"):
        server.round(folders)


def test_a_client_that_sends_what_is_frozen_is_refused(
    rolora: tuple[FileServer, Path], tmp_path: Path
) -> None:
    server, uploads = rolora
    folders = resent(
        uploads,
        tmp_path,
        lambda named: named.update({outer(named).replace("lora_B", "lora_A"): torch.ones(3, 24)}),
    )
    with pytest.raises(FedcoreError, match=r"client site-2: unexpected tensor .*lora_A.weight"):
        server.round(folders)


def test_another_scaling_is_refused(rolora: tuple[FileServer, Path], tmp_path: Path) -> None:
    server, uploads = rolora
    folders = spoiled(uploads, tmp_path)
    file = folders["site-2"] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 12}))
    with pytest.raises(FedcoreError, match=r"client site-2: module .* has scaling 4"):
        server.round(folders)


def test_a_bad_client_can_be_dropped(tmp_path: Path) -> None:
    server = FileServer.create(tmp_path / "federation", start_of(lora_bert()), "rolora")
    for site in EXAMPLES:
        train_and_upload(lora_bert, server.broadcast, tmp_path, site)
    folders = spoiled(tmp_path / "uploads-0", tmp_path, round=9)
    after = server.round(folders, on_invalid="drop")
    assert after.state.record["dropped"] == [
        {"client": "site-2", "reason": "its upload is for round 9"}
    ]
    assert after.state.record["clients"] == {"site-1": 6.0}


def test_identical_uploads_are_refused_where_they_mean_nothing_was_learnt(tmp_path: Path) -> None:
    server = FileServer.create(tmp_path / "federation", start_of(gram_llama()), "florg")
    train_and_upload(gram_llama, server.broadcast, tmp_path, "site-1")
    one = tmp_path / "uploads-0" / "site-1"
    with pytest.raises(FedcoreError, match="all 2 uploads are identical"):
        server.round({"a": one, "b": one})
    accepted = server.round({"a": one, "b": one}, allow_identical_uploads=True)
    assert accepted.state.round == 1


def test_uniform_weighting_ignores_the_examples(rolora: tuple[FileServer, Path]) -> None:
    server, uploads = rolora
    after = server.round(uploads, weighting="uniform")
    assert after.state.record["clients"] == {"site-1": 1.0, "site-2": 1.0}


def test_a_stopped_server_writes_the_broadcast_when_it_is_opened(tmp_path: Path) -> None:
    servers = play(tmp_path, "rolora", 1)
    for file in servers[-1].broadcast.iterdir():
        file.unlink()
    again = FileServer.open(tmp_path / "federation")
    assert torch.equal(read_broadcast(again.broadcast).row, servers[-1].state.row)


def test_a_residual_that_was_swapped_is_noticed(tmp_path: Path) -> None:
    server = play(tmp_path, "flora", 1)[-1]
    file = server.broadcast / "residual.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1e-3}, file)
    with pytest.raises(FedcoreError, match=r"tensors are not those that broadcast\.json announces"):
        read_broadcast(server.broadcast)


def test_a_federation_is_started_once_and_from_its_methods_family(tmp_path: Path) -> None:
    start: AdapterState = start_of(lora_bert())
    FileServer.create(tmp_path, start, "fedit")
    with pytest.raises(FedcoreError, match="holds a federation; open it"):
        FileServer.create(tmp_path, start, "fedit")
    with pytest.raises(FedcoreError, match=r"start: florg.truncated is not for adapters of"):
        FileServer.create(tmp_path / "other", start, "florg")
    with pytest.raises(FedcoreError, match="ce_lora sends statistics of the clients' examples"):
        FileServer.create(tmp_path / "other", start, "ce_lora")
    with pytest.raises(FedcoreError, match="holds no federation"):
        FileServer.open(tmp_path / "nothing")
    with pytest.raises(FedcoreError, match=r"holds no folder with upload.json"):
        FileServer.open(tmp_path).round(tmp_path / "nothing")


def dropped(server: FileServer, uploads: str | Path | dict[str, Path], **options: object) -> str:
    """Why the second of two sites was left out."""
    after = server.round(uploads, on_invalid="drop", **options)  # type: ignore[arg-type]
    (drop,) = after.state.record["dropped"]
    assert drop["client"] == "site-2"
    assert after.state.record["clients"].keys() == {"site-1"}
    return str(drop["reason"])


@pytest.mark.parametrize(
    "name", ["upload.json", "adapter_config.json", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("kind", ["link", "link to a device", "pipe", "folder", "dangling link"])
def test_an_upload_is_regular_files_alone(
    rolora: tuple[FileServer, Path], tmp_path: Path, name: str, kind: str
) -> None:
    server, uploads = rolora
    folders = spoiled(uploads, tmp_path)
    file = folders["site-2"] / name
    file.unlink()
    if kind == "link":
        file.symlink_to(uploads / "site-1" / name)
    elif kind == "link to a device":
        file.symlink_to("/dev/zero")
    elif kind == "dangling link":
        file.symlink_to(tmp_path / "nothing")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    reason = dropped(server, folders)
    assert f"cannot read {file}: " in reason
    assert ("it is a link" in reason) == ("link" in kind)


def copied(uploads: Path, to: Path) -> Path:
    """The two uploads in a folder of their own."""
    shutil.copytree(uploads, to)
    return to


def test_a_folder_of_uploads_holds_no_links(
    rolora: tuple[FileServer, Path], tmp_path: Path
) -> None:
    server, uploads = rolora
    everyone = copied(uploads, tmp_path / "all")
    shutil.rmtree(everyone / "site-2")
    (everyone / "site-2").symlink_to(everyone / "site-1")
    assert "its folder is a link; put the folder itself there" in dropped(server, everyone)
    # Who names every folder has chosen the link.
    named = {name: everyone / name for name in EXAMPLES}
    assert server.round(named).state.record["clients"].keys() == EXAMPLES.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"examples": 1e999}', "1e999 is not a finite number"),
        ('{"examples": 1%s}' % ("0" * 400), "a number has 401 digits"),
        ('{"examples": 1, "examples": 2}', "it names 'examples' twice"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested deeper than 32 levels"),
        ('{"flags": "\\ud800"', "cannot read"),
        ("", "cannot read"),
    ],
)
def test_what_an_upload_says_is_read_by_bounds(
    rolora: tuple[FileServer, Path], tmp_path: Path, text: str, message: str
) -> None:
    server, uploads = rolora
    for name in ("upload.json", "adapter_config.json"):
        folders = spoiled(uploads, tmp_path / name)
        (folders["site-2"] / name).write_text(text)
        assert message in dropped(server, folders)


def test_names_and_shapes_are_compared_before_values_are_read(
    rolora: tuple[FileServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, uploads = rolora
    folders = resent(
        uploads, tmp_path, lambda named: named.update({outer(named): torch.zeros(24, 1)})
    )
    read, genuine = [], TensorFile.read

    def noted(self: TensorFile, names: list[str]) -> dict[str, torch.Tensor]:
        read.append(self.path.parent.name)
        return genuine(self, names)

    monkeypatch.setattr(TensorFile, "read", noted)
    assert "has shape (24, 1), expected (24, 3)" in dropped(server, folders)
    assert "site-2" not in read


def test_a_header_of_many_names_is_refused_by_its_size(
    rolora: tuple[FileServer, Path], tmp_path: Path
) -> None:
    server, uploads = rolora
    many = {f"x{i}": torch.zeros(1) for i in range(20_000)}
    folders = resent(uploads, tmp_path, lambda named: named.update(many))
    assert "more than the budget" in dropped(server, folders)


@pytest.mark.parametrize("examples", [1e16, 1e308, 2**62])
def test_a_number_of_examples_that_cannot_be_is_refused(
    rolora: tuple[FileServer, Path], tmp_path: Path, examples: float
) -> None:
    server, uploads = rolora
    folders = spoiled(uploads, tmp_path, examples=examples)
    assert "more than 2**53" in dropped(server, folders)


def test_a_share_of_the_weight_can_be_capped(
    rolora: tuple[FileServer, Path], tmp_path: Path
) -> None:
    server, uploads = rolora
    folders = spoiled(uploads, tmp_path, examples=1e12)
    after = server.round(folders, largest_share=0.5)
    assert after.state.record["clients"] == {"site-1": 6.0, "site-2": 6.0}
    (flag,) = after.state.record["flags"]
    assert flag.startswith("site-2: its share of the weight is 1, above largest_share 0.5")
    equal = server.round(uploads, weighting="uniform")
    assert torch.equal(after.state.row, equal.state.row)


def test_a_result_that_is_too_large_leaves_the_state(tmp_path: Path) -> None:
    server = FileServer.create(tmp_path / "federation", start_of(lora_bert()), "product_svd")
    for site in EXAMPLES:
        train_and_upload(lora_bert, server.broadcast, tmp_path, site)
    file = tmp_path / "uploads-0" / "site-2" / "adapter_model.safetensors"
    named = load_file(file)
    save_file({key: torch.full_like(value, 3e38) for key, value in named.items()}, file)
    after = server.round(tmp_path / "uploads-0")
    assert after.state.round == 1
    assert torch.equal(after.state.row, server.state.row)
    (flag,) = after.state.record["flags"]
    assert "the largest uploads: site-2 (norm " in flag
    # The next clients start from it, and another process reads it.
    assert torch.equal(read_broadcast(after.broadcast).row, server.state.row)
    assert FileServer.open(server.folder).state.round == 1


NASTY = "\x1b]0;owned\x07[red]<script>\u202e\n"
SHOWN = r"\x1b]0;owned\x07[red]<script>\u202e\n"


def test_names_and_flags_of_clients_are_recorded_printable(
    rolora: tuple[FileServer, Path], tmp_path: Path
) -> None:
    server, uploads = rolora
    everyone = tmp_path / "all"
    good, bad = everyone / f"good {NASTY}", everyone / f"bad {NASTY}"
    shutil.copytree(uploads / "site-1", good)
    shutil.copytree(uploads / "site-2", bad)
    for folder, fields in ((good, {"flags": [NASTY] * 20_000}), (bad, {"round": 7})):
        about = json.loads((folder / "upload.json").read_text())
        (folder / "upload.json").write_text(json.dumps({**about, **fields}))
    record = server.round(everyone, on_invalid="drop").state.record
    assert record["clients"] == {f"good {SHOWN}": 6.0}
    assert record["dropped"] == [{"client": f"bad {SHOWN}", "reason": "its upload is for round 7"}]
    assert record["flags"][0] == f"good {SHOWN}: {SHOWN}"
    assert record["flags"][20:] == [f"good {SHOWN}: 19980 more flags"]
    with pytest.raises(FedcoreError) as caught:
        server.round(everyone)
    assert str(caught.value).isprintable()
    assert f"client bad {SHOWN}" in str(caught.value)


def test_an_unexpected_name_of_a_tensor_is_quoted_printable(
    rolora: tuple[FileServer, Path], tmp_path: Path
) -> None:
    server, uploads = rolora
    folders = resent(uploads, tmp_path, lambda named: named.update({NASTY: torch.ones(1)}))
    reason = dropped(server, folders)
    assert reason.isprintable()
    assert "is not a printable name" in reason


def test_a_start_of_a_rank_that_no_update_can_have_is_refused(tmp_path: Path) -> None:
    tensors = {"m.lora_A.weight": torch.ones(5, 3), "m.lora_B.weight": torch.ones(4, 5)}
    start = AdapterState.from_peft(tensors, {"r": 5, "lora_alpha": 5})
    with pytest.raises(FedcoreError, match="start: module m has rank 5, its update has at most 3"):
        FileServer.create(tmp_path, start, "fedit")


def test_a_federation_that_something_else_has_continued_is_refused(tmp_path: Path) -> None:
    server = FileServer.create(tmp_path / "federation", start_of(lora_bert()), "fedit")
    for site in EXAMPLES:
        train_and_upload(lora_bert, server.broadcast, tmp_path, site)
    other = FileServer.open(server.folder)
    with claimed(server.folder), pytest.raises(FedcoreError, match="in use by process"):
        server.round(tmp_path / "uploads-0")
    after = server.round(tmp_path / "uploads-0")
    with pytest.raises(FedcoreError, match="holds the state of round 1 already"):
        other.round(tmp_path / "uploads-0", weighting="uniform")
    assert torch.equal(FileServer.open(server.folder).state.row, after.state.row)
    weights = server.folder / "state" / "round-0001" / "server.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(FedcoreError, match=r"server.safetensors is not .* good state is that of"):
        FileServer.open(server.folder)

"""``fedcore bench`` as a user meets it, on the smallest setting."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import fedcore
from bench import kernels, server, session
from bench.case import Plan, one_operation
from bench.mixing import mixing_case
from bench.rounds import OTHERS, SKETCHED, TRUNCATED, florg_case
from bench.workloads import LLAMA_2_7B_ALL, ROBERTA_LARGE, Setting
from fedcore.cli import main
from fedcore.errors import FedcoreError

CPU = torch.device("cpu")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs ``fedcore bench`` in an empty folder and returns status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedcore", "bench", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def tiny(monkeypatch):
    """A machine with a cache of one page and one operation to measure."""
    operand = torch.ones(4, 1, 2, 16)

    def build():
        calls = {"plain sum": lambda: operand.sum(0)}
        return one_operation(
            "gram", "tiny", operand, lambda: operand.mean(0), calls, written=0, flops=1e3
        )

    monkeypatch.setattr("bench.timing.cache_bytes", lambda device: 4096)
    monkeypatch.setattr("bench.limits.cache_bytes", lambda device: 4096)
    monkeypatch.setattr("bench.limits._CPU_SIDE", 16)
    monkeypatch.setattr(kernels, "plans", lambda setting: [Plan("gram", build)])


def test_json_alone_prints_one_array_and_nothing_else(tiny, command):
    status, out, _ = command("kernels", "--json", "--repeats", "2")
    assert status == 0
    (row,) = json.loads(out)
    assert (row["op"], row["against"], row["shape"]) == ("gram", "plain sum", "tiny")
    assert row["bytes"] == 4 * 4 * 2 * 16


def test_json_with_a_path_writes_the_array_there(tiny, command, tmp_path):
    status, out, _ = command("kernels", "--repeats", "2", "--json", "rows.json")
    assert (status, out) == (0, "")
    assert json.loads((tmp_path / "rows.json").read_text())[0]["op"] == "gram"


def test_out_gets_the_page_the_rows_and_the_figure(tiny, command, tmp_path):
    status, out, _ = command("kernels", "--repeats", "2", "--out", "results")
    assert status == 0
    assert "gram" in out
    folder = tmp_path / "results"
    names = {"kernels-cpu.md", "kernels-cpu.json", "kernels-cpu-roofline.png"}
    assert {file.name for file in folder.iterdir()} == names
    page = (folder / "kernels-cpu.md").read_text()
    assert "`fedcore bench kernels --repeats 2 --device cpu --out results`" in page
    assert "of the processor" in page
    assert (folder / "kernels-cpu-roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_round_is_measured_against_what_is_named(command):
    arguments = ("--small", "--against", "mean,batched", "--repeats", "1", "--json")
    status, out, _ = command("server", *arguments)
    assert status == 0
    rows = json.loads(out)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    found = {(row["op"], row["against"]) for row in rows}
    assert (SKETCHED, "weighted_mean") in found
    assert ("weighted_mean", "batched torch, weights @ updates") in found
    assert not any("eager" in against or "published" in against for _, against in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["server", "--against", "publshed"], "unknown --against 'publshed'; did you mean publish"),
        (["server", "--against", "xyzzy"], "valid: adam, all, batched, eager, mean, peft"),
        (["server", "--against", ","], "--against is empty; valid: published, eager"),
        (["kernels", "--device", "gpu"], "unknown --device 'gpu'"),
        (["kernels", "rows.json"], "rows.json is given without --json"),
        (["kernels", "--out", "taken"], "--out taken is a file"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_measured(
    arguments, message, command, tmp_path, monkeypatch
):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(session, "measure_limits", lambda *_: pytest.fail("measured"))
    status, out, errors = command(*arguments)
    assert (status, out) == (2, "")
    (line,) = errors.strip().splitlines()
    assert line.startswith("fedcore: ")
    assert message in line
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_cuda_without_a_card_is_refused(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, errors = command("kernels", "--device", "cuda")
    assert status == 2
    assert "torch finds no CUDA device" in errors


@pytest.mark.parametrize("name", ["kernels", "server"])
def test_outside_a_checkout_one_line_says_so(name, command, monkeypatch, tmp_path):
    monkeypatch.setattr(fedcore, "__file__", str(tmp_path / "site-packages/fedcore/__init__.py"))
    status, out, errors = command(name)
    assert (status, out) == (2, "")
    (line,) = errors.strip().splitlines()
    assert "bench is not part of the installed package; run this from a checkout" in line


def test_against_takes_several_names_or_all():
    assert server.parse_against("mean, eager,mean") == ("mean", "eager")
    assert server.parse_against("all") == server.AGAINST
    assert set(server.AGAINST) == {"published", "eager", "batched", "peft", "mean", "adam"}
    with pytest.raises(FedcoreError, match="unknown --against"):
        server.parse_against("mean,nothing")


def test_every_plan_of_the_kernels_builds_and_runs():
    for plan in kernels.plans(Setting(CPU, small=True)):
        case = plan.build()
        for op, ours in case.ours.items():
            assert ours.bytes > 0, op
            assert ours.flops > 0, op
            assert set(ours.against) <= {*case.others, *case.ours}, op
            assert ours.against, op
            ours.call()


def test_mixing_is_measured_where_loops_are():
    names = [plan.name for plan in server.plans(Setting(CPU, small=True), ("eager", "mean"))]
    assert names[-1] == "CE-LoRA, 20 clients"
    assert not any("CE-LoRA" in p.name for p in server.plans(Setting(CPU), ("mean", "batched")))
    case = mixing_case(4)
    (name,) = case.others
    assert name == "eager loop of ot.emd2 (6 of 6 pairs)"
    assert case.others[name].share == 1
    mixing = case.ours["ce_lora mixing"].call()
    assert mixing.flags == ()
    assert torch.equal(mixing.weights.argmax(1), torch.arange(4))
    found = case.ours["client_distances"].call(), case.others[name].call()
    torch.testing.assert_close(*map(torch.from_numpy, found))
    assert next(iter(mixing_case(20).others.values())).share == 99 / 190


def test_part_of_the_modules_is_scaled_to_all_and_said():
    workload = replace(ROBERTA_LARGE, modules=12, width=32, clients=2, rank=2)
    case = florg_case(workload, CPU, torch.float32, list(OTHERS))
    assert case.others["published step (3 of 12 modules)"].share == 3 / 12
    assert case.others["eager loop, truncated (8 of 12 modules)"].share == 8 / 12
    assert len(case.others["published step (3 of 12 modules)"].call()) == 3
    assert len(case.others["eager loop, truncated (8 of 12 modules)"].call()) == 8
    assert case.ours[TRUNCATED].against[-1] == "weighted_mean"


def test_the_published_step_is_measured_in_fp32_alone():
    workload = replace(ROBERTA_LARGE, modules=2, width=32, clients=2, rank=2)
    case = florg_case(workload, CPU, torch.bfloat16, ["published", "mean"])
    assert not any("published" in name for name in case.others)


def test_a_card_gets_the_round_a_card_is_bought_for():
    assert Setting(torch.device("cuda")).rounds[-1] == LLAMA_2_7B_ALL
    assert (LLAMA_2_7B_ALL.modules, LLAMA_2_7B_ALL.clients) == (224, 100)
    assert Setting(CPU).rounds[-1].modules == 64

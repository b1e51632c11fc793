"""The command line as a user meets it: real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from fedcore.cli import main
from fedcore.recipes import to_toml
from tests.experiments.jobs import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "theory"))
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": PATHS,
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "160",
}
COMMAND = [sys.executable, "-c", "from fedcore.cli import main; main()"]


def fedcore(*arguments, cwd, check=True):
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    recipe = tiny_recipe(folder, rounds=2, **{"optimiser.state": "keep"})
    (folder / "tiny.toml").write_text(to_toml(recipe))
    return folder


def test_run_ends_with_tables_a_report_and_an_adapter(home, tmp_path):
    done = fedcore(
        "run",
        home / "tiny.toml",
        "--method",
        "rolora",
        "--seed",
        3,
        "--out",
        "r",
        "--set",
        "training.steps=1",
        cwd=tmp_path,
    )
    assert "report: r/report.html" in done.stdout
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert (summary["method"], summary["seed"], summary["rounds"]) == ("rolora", 3, 2)
    assert summary["peak_memory_bytes"] > 1e8
    assert summary["versions"]["torch"]
    page = (tmp_path / "r/report.html").read_text()
    assert "rolora" in page
    assert (tmp_path / "r/adapter/adapter_config.json").exists()
    assert "round   1" in done.stderr or "round 1" in done.stderr


@pytest.mark.exhaustive
def test_a_run_killed_at_any_instant_resumes_to_the_same_adapter(home, tmp_path):
    fedcore("run", home / "tiny.toml", "--rounds", 6, "--out", "whole", cwd=tmp_path)
    process = subprocess.Popen(
        [*COMMAND, "run", str(home / "tiny.toml"), "--rounds", "6", "--out", "cut"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    while not (tmp_path / "cut/state/round-0003").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "cut/summary.json").exists()
    fedcore("run", "--resume", "cut", cwd=tmp_path)
    for name in ("adapter", "adapter-lora"):
        files = [tmp_path / run / name / "adapter_model.safetensors" for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_interrupting_leaves_a_resumable_folder_and_says_how(home, tmp_path):
    # A suite that runs in the background of a shell hands down an ignored SIGINT.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*COMMAND, "run", str(home / "tiny.toml"), "--rounds", "50", "--out", "cut"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    )
    deadline = time.monotonic() + 400
    while not (tmp_path / "cut/state/round-0001").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "continue with: fedcore run --resume cut" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "cut/state/round-0001/state.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "bbc-nws"], "unknown recipe 'bbc-nws'; did you mean bbc-news"),
        (["run", "bbc-news", "--method", "flrog"], "unknown method 'flrog'; did you mean"),
        (
            ["run", "bbc-news", "--set", "ruonds=3"],
            "unknown recipe key 'ruonds'; did you mean rounds",
        ),
        (["run", "bbc-news", "--set", "model.source=minilmm"], "did you mean minilm"),
        (["run", "bbc-news", "--set", "data.source=bbc-nwes"], "did you mean bbc-news"),
        (["run"], "pass a recipe, or --resume"),
        (["run", "bbc-news", "--resume", "x"], "pass a recipe, or --resume"),
        (
            ["run", "bbc-news", "--from-round", "3"],
            "--from-round needs --resume with a run's folder",
        ),
        (["run", "--resume", "x", "--rounds", "3"], "--rounds cannot change a run that is resumed"),
        (["run", "--resume", "nowhere"], "nowhere holds no run"),
        (["compare", "bbc-news", "--methods", "fedt"], "did you mean"),
        (["compare", "bbc-news", "--vary", "clients"], "'clients' is not of the form"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_written(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedcore", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fedcore: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listing", ["methods", "recipes"])
def test_listings_print_tables_or_one_json_array(listing, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")

    def printed(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedcore", listing, *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    rows = json.loads(printed("--json"))
    assert all(not isinstance(v, dict | list) for row in rows for v in row.values())
    text = printed()
    assert all(row["name"] in text for row in rows)


def test_compare_prints_one_row_a_method_with_intervals(home, tmp_path):
    arguments = [
        "compare",
        home / "tiny.toml",
        "--methods",
        "fedit,florg",
        "--seeds",
        2,
        "--vary",
        "clients=2,3",
        "--set",
        "rounds=1",
        "--out",
        "c",
    ]
    rows = json.loads(fedcore(*arguments, "--json", cwd=tmp_path).stdout)
    assert [(row["method"], row["clients"]) for row in rows] == [
        ("fedit", 2),
        ("florg.truncated", 2),
        ("fedit", 3),
        ("florg.truncated", 3),
    ]
    assert all(row["runs"] == 2 and row["accuracy_half_width"] is not None for row in rows)
    again = fedcore(*arguments, cwd=tmp_path)
    assert "florg.truncated" in again.stdout
    assert (tmp_path / "c/comparison.html").exists()


@pytest.mark.exhaustive
def test_a_final_florg_adapter_serves_without_fedcore(home, tmp_path):
    fedcore("run", home / "tiny.toml", "--out", "r", cwd=tmp_path)
    fedcore("export", "r/adapter", "--out", "exported", cwd=tmp_path)
    ours = f"""
import torch, fedcore.tuners
from peft import PeftModel
from transformers import AutoModelForSequenceClassification as M
base = M.from_pretrained({str(home / "model")!r}, num_labels=3)
model = PeftModel.from_pretrained(base, "r/adapter").eval()
print(model(torch.arange(8)[None]).logits.tolist())
"""
    vanilla = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification as M
base = M.from_pretrained(%r, num_labels=3)
model = PeftModel.from_pretrained(base, %r).eval()
assert not any(name.startswith("fedcore") for name in sys.modules)
print(model(torch.arange(8)[None]).logits.tolist())
"""
    import torch

    logits = []
    for code, paths in (
        (ours, PATHS),
        (vanilla % (str(home / "model"), "r/adapter-lora"), ""),
        (vanilla % (str(home / "model"), "exported"), ""),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        logits.append(torch.tensor(json.loads(done.stdout)))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=1e-5)

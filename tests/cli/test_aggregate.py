"""`fedcore aggregate` as a user meets it."""

import json
import sys

import pytest
import torch

from fedcore.cli import main
from tests.property.folders import lora_folder
from tests.reference.merged import config_of, folder_products, mean_products, stored_tensors


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for n, name in enumerate("abc"):
        lora_folder(tmp_path / name, n)
    return tmp_path


@pytest.fixture
def fedcore(monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["fedcore", "aggregate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == code, printed.err
        return printed.out if code == 0 else printed.err

    return run


def test_the_best_rank_of_the_weighted_mean_is_written_beside_a_table(home, fedcore):
    text = fedcore("a", "b", "c/", "--rank", 2, "--weights", "3,1,2", "--out", "merged")
    assert "adapter: merged" in text
    assert "exact: no" in text
    written = folder_products(home / "merged")
    lost = norm = 0.0
    folders = [home / name for name in "abc"]
    for module, matrix in mean_products(folders, [3, 1, 2]).items():
        tail = torch.linalg.svdvals(matrix)[2:].norm()
        assert float((written[module] - matrix).norm()) == pytest.approx(float(tail), rel=1e-4)
        lost, norm = lost + float(tail) ** 2, norm + float(matrix.norm()) ** 2
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert f"{(lost / norm) ** 0.5:.2e}" in lines["product_svd"]
    assert "product_svd *" in lines["product_svd"]
    assert {"fedit", "fedex", "flora", "florist", "lora_fair", "flora_na"} <= set(lines)
    assert lines["flora"].split()[1] == "0"
    assert config_of(home / "merged")["r"] == 2


def test_weights_may_stand_in_a_file_and_options_on_the_line(home, fedcore):
    (home / "weights.json").write_text(json.dumps({"b/": 1, "a": 3, "c": 2}))
    fedcore("a", "b", "c", "--weights", "3,1,2", "--out", "one", "--no-compare")
    arguments = ("a", "b", "c", "--weights", "weights.json", "--option", "split=balanced")
    text = fedcore(*arguments, "--out", "two", "--no-compare", "--dtype", "fp64")
    assert "Error against" not in text
    one, two = folder_products(home / "one"), folder_products(home / "two")
    for module, matrix in one.items():
        torch.testing.assert_close(two[module], matrix, rtol=1e-4, atol=1e-5)
    tensors = stored_tensors(home / "two")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}
    a, b = (tensors[f"base_model.model.block.0.q.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close((a @ a.T).diagonal(), (b.T @ b).diagonal(), rtol=1e-4, atol=1e-5)


def test_bad_adapters_are_named_or_left_out(home, fedcore):
    file = home / "b/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    line = fedcore("a", "b", "c", "--out", "merged", code=2)
    assert line.startswith("fedcore: b: cannot read b/adapter_model.safetensors")
    assert len(line.strip().splitlines()) == 1
    assert not (home / "merged").exists()
    text = fedcore("a", "b", "c", "--out", "merged", "--drop-invalid")
    assert "left out b: cannot read" in text
    written = folder_products(home / "merged")
    assert written.keys() == folder_products(home / "a").keys()


def test_a_residual_is_written_beside_and_said(home, fedcore):
    text = fedcore("a", "b", "--method", "fedex", "--out", "merged")
    assert "adapter: merged, to be added to merged/residual" in text
    assert "exact: yes" in text
    parts = [folder_products(home / "merged"), folder_products(home / "merged/residual")]
    for module, matrix in mean_products([home / "a", home / "b"], [1, 1]).items():
        torch.testing.assert_close(parts[0][module] + parts[1][module], matrix, rtol=0, atol=1e-5)


def test_methods_that_need_equal_ranks_are_listed_with_the_reason(home, fedcore):
    lora_folder(home / "d", 9, 5)
    text = fedcore("a", "d", "--out", "merged")
    assert "cannot be used here" in text
    assert "fedit: client d has rank" in text or "fedit: client a has rank" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--method", "rolora"], "use one of fedit, ffa, florg.truncated"),
        (["a", "--method", "florg"], "these are of family 'lora'; usable: fedit, ffa, product_svd"),
        (["a", "--weights", "1,x"], "--weights is '1,x'; pass numbers"),
        (["a", "--weights", "w.json"], "--weights: cannot read w.json"),
        (["a", "b", "--weights", "1"], "weights has 1 entries for 2 adapters"),
        (["a", "--option", "split"], "'split' is not of the form key=value"),
        (["a", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["nowhere"], "nowhere/adapter_config.json is missing"),
        (["a", "a"], "a is given twice"),
        (["a", "b", "--method", "fedit", "--rank", "2"], "fedit does not choose"),
        (["a", "--out", "b"], "out is b, which is not empty"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_written(home, fedcore, arguments, message):
    before = sorted(path.name for path in home.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "merged"]
    line = fedcore(*arguments, *out, code=2)
    assert message in line
    assert len(line.strip().splitlines()) == 1
    assert sorted(path.name for path in home.rglob("*")) == before

"""What is refused is named, and nothing is written."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedcore import FedcoreError, aggregate
from fedcore.merging import methods_for_merging
from tests.property.adapters import gram_state
from tests.property.folders import lora_folder, write_folder
from tests.reference.merged import config_of, stored_tensors

FIRST = "base_model.model.block.0.q.lora_A.weight"


def _truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _corrupt(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def _value(value):
    def spoil(folder):
        tensors = load_file(str(folder / "adapter_model.safetensors"))
        tensors[FIRST][1, 2] = value
        save_file(tensors, str(folder / "adapter_model.safetensors"))

    return spoil


def _without(key):
    def spoil(folder):
        tensors = load_file(str(folder / "adapter_model.safetensors"))
        tensors.pop(key)
        save_file(tensors, str(folder / "adapter_model.safetensors"))

    return spoil


def _config(**fields):
    def spoil(folder):
        config = {**config_of(folder), **fields}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return spoil


def _pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


BAD = [
    (_truncate, r"cannot read .*lora_B.weight. has data_offsets .* bytes of data"),
    (_corrupt, "its header declares 18446744073709551615 bytes"),
    (_value(math.nan), r"block.0.q.A holds 1 values that are not finite, such as nan"),
    (_value(math.inf), r"block.0.q.A holds 1 values that are not finite, such as inf"),
    (_without(FIRST), "module block.0.q lacks factor A"),
    (_pickle, "only pickled weights are there"),
    (_config(r=5), r"has rank 3, its configuration says 5"),
    (_config(lora_alpha=-1), "lora_alpha is -1"),
    (_config(lora_alpha=True), "lora_alpha is True"),
    (_config(lora_alpha=10**400), "a number has 401 digits, more than 40"),
    (_config(lora_alpha=10**39), "lora_alpha is 1000"),
    (_config(use_rslora="no"), "use_rslora is 'no'"),
    (
        _config(alpha_pattern={"(": 2}),
        r"alpha_pattern: the pattern '\(' is not supported: it ends within a group",
    ),
    (_config(alpha_pattern=[1]), r"alpha_pattern is \[1\]"),
    (_config(rank_pattern={r"(.)\1": 2}), r"rank_pattern: the pattern .* is not supported"),
    (
        _config(rank_pattern={"(.|.)*X.*v": 2, "(.?.?)*q": 2}),
        "has rank 3, its configuration says 2",
    ),
    (_config(base_model_name_or_path="other"), "is 'other', that of .*a is 'tiny'"),
    (_config(fan_in_fan_out=True), "fan_in_fan_out is True, that of"),
    (_config(init_lora_weights="pissa_niter_4"), "PiSSA.* change the base weights"),
    (_config(lora_bias=True), "lora_bias is True and 0 tensors are lora_B.bias"),
    (_config(use_dora=True), "use_dora is True and 0 tensors are lora_magnitude_vector"),
    (_config(trainable_token_indices=[1]), r"trainable_token_indices is \[1\] and 0 tensors"),
    (_config(kasa_config={"beta": 1}), "kasa_config is set, which is not supported"),
    (_config(target_modules=["q"]), "block.0.v is adapted and not among target_modules"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_a_bad_adapter_is_named_and_refused_or_left_out(tmp_path, spoil, message):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("abc")]
    expected = aggregate([folders[0], folders[2]], [1, 2], compare=False).adapter.to_peft()
    spoil(folders[1])
    out = tmp_path / "out"
    with pytest.raises(FedcoreError, match=message) as caught:
        aggregate(folders, [1, 5, 2], out=out)
    assert str(caught.value).startswith(str(folders[1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    found = aggregate(folders, [1, 5, 2], on_invalid="drop", out=out)
    (dropped,) = found.dropped
    assert dropped.client_id == str(folders[1])
    # The others keep the ratio of their weights.
    assert all(torch.equal(stored_tensors(out)[key], expected[key]) for key in expected)


def test_extra_and_missing_modules_are_named(tmp_path):
    a = lora_folder(tmp_path / "a", 1)
    b = lora_folder(tmp_path / "b", 2, modules=[("block.0.q", 12, 10)])
    with pytest.raises(FedcoreError, match=r"b: block.0.v.A is missing"):
        aggregate([a, b])
    with pytest.raises(FedcoreError, match=r"a: unexpected tensor block.0.v.A"):
        aggregate([b, a])
    wide = lora_folder(tmp_path / "c", 2, modules=[("block.0.q", 13, 10)])
    with pytest.raises(FedcoreError, match=r"c: block.0.q.A has width 13, expected 12"):
        aggregate([b, wide])


def test_a_rank_of_one_is_never_broadcast(tmp_path):
    folders = [lora_folder(tmp_path / "a", 1, 4), lora_folder(tmp_path / "b", 2, 1)]
    for method in ("fedit", "fedex", "lora_fair", "flora_na"):
        with pytest.raises(FedcoreError, match=rf"{method} needs equal ranks; use one of"):
            aggregate(folders, method=method)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1], "b: its weight is -1"),
        ([1, math.nan], "b: its weight is nan"),
        ([math.inf, 1], "a: its weight is inf"),
        ([1, True], "b: its weight is True, not a number"),
        ([1, "2"], "b: its weight is '2', not a number"),
        ([1, 10**400], "b: its weight is too large"),
        ([0, 0], "the weights of all adapters are zero"),
        ([1], "weights has 1 entries for 2 adapters"),
        ({"a": 1}, "weights has no entry for b"),
        ({"a": 1, "b": 1, "bb": 1}, "unknown adapter in weights 'bb'"),
        ("12", "weights is a str"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    one = ({FIRST: torch.ones(1, 2), FIRST.replace("A", "B"): torch.ones(3, 1)}, {"r": 1})
    one[1]["lora_alpha"] = 1
    with pytest.raises(FedcoreError, match=message):
        aggregate({"a": one, "b": one}, weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rolora"}, r"rolora needs the rounds of a federation; use one of fedit, ffa"),
        ({"method": "prodct_svd"}, "unknown method 'prodct_svd'; did you mean product_svd"),
        ({"method": "florg"}, r"florg.truncated aggregates adapters of family 'gram', these"),
        ({"method": "fedit", "rank": 2}, "rank is 2: fedit does not choose .*product_svd"),
        ({"method": "flora", "rank": 2}, "rank is 2: flora does not choose"),
        ({"rank": 0}, "rank is 0; pass an integer of 1 or more"),
        ({"rank": 2.0}, "rank is 2.0; pass an integer of 1 or more"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"on_invalid": "ignore"}, "on_invalid is 'ignore'"),
        ({"options": {"split": "right"}}, "unknown split of product_svd 'right'"),
        ({"options": {"spilt": "left"}}, "unknown option of method product_svd 'spilt'"),
        ({"options": {"split": "balanced", "align": True}}, "align is true without an adapter"),
        ({"method": "fedit", "previous": {}}, "fedit makes no use of previous"),
        ({"budget": 10}, "more than the budget 10"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("ab")]
    with pytest.raises(FedcoreError, match=message):
        aggregate(folders, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FedcoreError, match="no adapters were given"):
        aggregate([])
    with pytest.raises(FedcoreError, match="adapters is a str"):
        aggregate(str(tmp_path))
    with pytest.raises(FedcoreError, match="is given twice"):
        aggregate([tmp_path, f"{tmp_path}/"])
    with pytest.raises(FedcoreError, match="adapter 1: an adapter is a int"):
        aggregate([3])
    with pytest.raises(FedcoreError, match="x is int64; pass a tensor"):
        aggregate([({"x": np.ones(3, dtype=np.int64)}, {})])
    with pytest.raises(FedcoreError, match="it holds no low-rank factor"):
        aggregate([({"x": np.ones(3, dtype=np.float32)}, {})])
    with pytest.raises(FedcoreError, match=r"no adapter is left; .*adapter_config.json is missing"):
        aggregate([tmp_path / "nowhere"], on_invalid="drop")


def test_gram_adapters_of_other_frames_or_starts_are_not_mixed():
    one, other = gram_state(1), gram_state(2)
    tensors = other.to_peft()
    start = torch.ones(3, 12)
    key = "base_model.model.layer.0.query.gram_A0"
    with pytest.raises(FedcoreError, match=r"b: frame_seed is 7, that of a is 0"):
        aggregate(
            {"a": one, "b": (tensors, {**other.config, "frame_seed": 7})}, method="florg.avg_a"
        )
    pair = {
        "a": ({**one.to_peft(), key: start}, one.config),
        "b": ({**tensors, key: start + 1e-6}, other.config),
    }
    with pytest.raises(FedcoreError, match=r"b: layer.0.query.gram_A0 differs from that of a"):
        aggregate(pair, method="florg.avg_a")
    with pytest.raises(FedcoreError, match="lacks gram_A0"):
        aggregate({"a": one, "b": other}, method="florg.avg_a")
    with pytest.raises(FedcoreError, match="its scaling differs from that of a"):
        aggregate({"a": one, "b": gram_state(2, alpha=9.0)}, method="florg")


def test_an_output_is_whole_or_not_there(tmp_path, monkeypatch):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("ab")]
    out = tmp_path / "out"
    out.mkdir()
    aggregate(folders, method="fedex", out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(before) == 4
    with pytest.raises(FedcoreError, match="which is not empty; pass another"):
        aggregate(folders, out=out)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FedcoreError, match=r"cannot write .*No space left"):
            aggregate(folders, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    aggregate(folders, out=out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["adapter_model.safetensors", "adapter_config.json"]
    )


def test_no_folder_of_something_else_is_overwritten(tmp_path):
    folders = [lora_folder(tmp_path / "in" / name, n) for n, name in enumerate("ab")]
    for out, message in (
        (folders[0], "holds the adapter"),
        (tmp_path / "in", "holds the adapter"),
        (tmp_path / "notes", "which holds .thesis.tex.: overwriting would delete it"),
        (tmp_path / "file", "is not a folder"),
    ):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes/thesis.tex").write_text("x")
        (tmp_path / "file").write_text("x")
        with pytest.raises(FedcoreError, match=message):
            aggregate(folders, out=out, overwrite=True)
    assert (tmp_path / "notes/thesis.tex").read_text() == "x"
    assert stored_tensors(folders[0])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("ab")]
    other = lora_folder(tmp_path / "other", 9)

    def replace(done, total):
        if done == 1:
            shutil.copy(other / "adapter_model.safetensors", folders[1])

    with pytest.raises(FedcoreError, match="changed while it was read"):
        aggregate(folders, out=tmp_path / "out", group_bytes=1, progress=replace)
    assert not (tmp_path / "out").exists()


def test_links_to_weights_are_followed(tmp_path):
    # Model caches keep files under their hashes and link to them.
    folder = lora_folder(tmp_path / "a", 1)
    blob = tmp_path / "blob"
    (folder / "adapter_model.safetensors").rename(blob)
    (folder / "adapter_model.safetensors").symlink_to(blob)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert aggregate([linked]).exact


def test_methods_that_need_no_rounds_are_listed():
    names = [method.name for method in methods_for_merging("lora")]
    assert {"fedit", "product_svd", "flora", "fedex", "florist", "lora_fair", "flora_na"} < set(
        names
    )
    assert "rolora" not in names
    assert [m.name for m in methods_for_merging("gram", previous=False)] == [
        "florg.truncated",
        "florg.avg_a",
    ]


def test_keys_of_live_models_are_written_as_files_have_them(tmp_path):
    tensors = stored_tensors(lora_folder(tmp_path / "a", 1))
    live = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    found = aggregate([(live, config_of(tmp_path / "a"))]).adapter
    assert found.to_peft().keys() == tensors.keys()
    folder = write_folder(tmp_path / "b", found.to_peft(), dict(found.config))
    assert aggregate([folder]).exact


def test_the_old_name_of_the_list_of_methods_is_the_same_function():
    from fedcore import merging

    assert merging.usable_methods is methods_for_merging
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = merging.nothing

"""Headers are believed only as far as the file bears them out."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from fedcore.data.tensor_file import TensorFile
from fedcore.errors import FedcoreError

BUDGET = 1 << 20


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def written(path, header, size, length=None):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    with path.open("ab") as file:
        file.write(bytes(range(size)))
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_float_dtype_are_read_to_the_bit(tmp_path, dtype):
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for name, shape in (("a", (3, 5)), ("b", ()), ("c", (2, 1, 3)), ("d", (7,)))
    }
    tensors["odd"] = torch.ones(3, dtype=torch.bfloat16)
    tensors["wide"] = torch.ones(2, dtype=torch.float64)
    save_file(tensors, str(tmp_path / "x"))
    file = TensorFile.open(tmp_path / "x", "client 3", BUDGET)
    for names in (list(tensors), ["c", "a"], ["odd", "wide"], []):
        found = file.read(names)
        assert set(found) == set(names)
        assert all(torch.equal(found[name], tensors[name]) for name in names)
        assert all(found[name].dtype == tensors[name].dtype for name in names)
    assert torch.equal(file.read_flat("a", 4, 9), tensors["a"].reshape(-1)[4:9])


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "the data of 'a' and 'b' do not adjoin"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "the data of 'a' and 'b' do not adjoin"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "the data of 'a' and 'b' do not adjoin"),
        ({"a": entry(4, 12)}, 12, "its tensors fill bytes 4 to 12 of 12 of data"),
        ({"a": entry(0, 8)}, 12, "its tensors fill bytes 0 to 8 of 12 of data"),
        ({"a": entry(0, 16)}, 12, r"'a' has data_offsets \[0, 16\] in 12 bytes of data"),
        ({"a": entry(-4, 4)}, 8, r"'a' has data_offsets \[-4, 4\]"),
        ({"a": entry(0, 8, [2, 2])}, 8, "'a' has 8 bytes of data, its shape .* needs 16"),
        ({"a": entry(0, 8, [2**62, 4])}, 8, "axes are whole numbers from 1 to the file's"),
        ({"a": entry(0, 0, [0])}, 0, "axes are whole numbers from 1"),
        ({"a": entry(0, 8, [True, 2])}, 8, "axes are whole numbers from 1"),
        ({"a": entry(0, 8, [1] * 9 + [2])}, 8, "8 of them at most"),
        ({"a": entry(0, 8, dtype="I32")}, 8, "'a' has dtype 'I32'; a float dtype is needed"),
        ({"a": {**entry(0, 8), "more": 1}}, 8, "and nothing else"),
        ({"a\n": entry(0, 8)}, 8, r"'a\\n' is not a printable name"),
        ('{"a": %s, "a": %s}' % ((json.dumps(entry(0, 8)),) * 2), 8, "it names 'a' twice"),
        ("[]", 0, "its header is not a JSON object"),
        ("[" * 100_000, 0, "cannot read"),
        ("{", 0, "cannot read"),
    ],
)
def test_headers_that_do_not_fit_the_file_are_refused(tmp_path, header, size, message):
    path = written(tmp_path / "x", header, size)
    with pytest.raises(FedcoreError, match=message) as caught:
        TensorFile.open(path, "client 3", BUDGET)
    assert str(caught.value).startswith(f"client 3: cannot read {path}: ")


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 60])
def test_a_declared_length_is_compared_with_the_file(tmp_path, length):
    path = written(tmp_path / "x", {"a": entry(0, 8)}, 8, length)
    with pytest.raises(FedcoreError, match=rf"its header declares {length} bytes|cannot read"):
        TensorFile.open(path, "client 3", BUDGET)


def test_no_more_than_the_budget_is_looked_at(tmp_path):
    path = written(tmp_path / "x", {"a": entry(0, 8)}, 8)
    with pytest.raises(FedcoreError, match="more than the budget 70"):
        TensorFile.open(path, "client 3", 70)


def test_a_file_that_was_replaced_or_cut_is_not_read(tmp_path):
    path = written(tmp_path / "x", {"a": entry(0, 8)}, 8)
    file = TensorFile.open(path, "client 3", BUDGET)
    assert file.read(["a"])["a"].shape == (2,)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(FedcoreError, match=r"client 3: .* changed while it was read"):
        file.read(["a"])
    path.unlink()
    with pytest.raises(FedcoreError, match="client 3: cannot read"):
        file.read(["a"])

"""Arrays of others: a header is believed only as far as the bytes bear it out."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.npy import DTYPES, NpyArray
from fedcore.errors import FedcoreError


def saved(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=True)
    return buffer.getvalue()


def with_header(header: str, values: bytes, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text + values


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0, 4), (1, 2, 3, 1)])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_array_comes_back_bit_by_bit(name, shape, version):
    generator = np.random.default_rng(0)
    array = generator.integers(-100, 100, shape).astype(name)
    found = NpyArray.open(saved(array, version))
    assert found.shape == shape
    tensor = found.tensor()
    assert tensor.dtype == found.dtype == DTYPES[name]
    assert np.array_equal(tensor.numpy(), array)
    if array.size:
        tensor.view(-1)[0] = 5


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an array in the .npy format"),
        (b"no", "not an array in the .npy format"),
        (b"PK\x03\x04garbage", "not an array in the .npy format"),
        (b"\x93NUMPY", "not an array in the .npy format"),
        (b"\x93NUMPY\x09\x00", "not an array in the .npy format"),
        (b"\x93NUMPY\x01\x00", "its header ends at byte 10 of 8"),
        (b"\x93NUMPY\x01\x00\xff\xff", "its header ends at byte 65545 of 10"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "its header ends at byte 4294967307"),
        (with_header(PLAIN + " " * 5000, b"\0" * 8), "its header ends at byte 5"),
        (with_header(PLAIN, b"\0" * 7), r"7 bytes of values, its shape \(2,\) needs 8"),
        (with_header(PLAIN, b"\0" * 9), r"9 bytes of values, its shape \(2,\) needs 8"),
        (with_header(PLAIN.replace("2,", f"{10**12},"), b""), "0 bytes of values"),
        (with_header(PLAIN.replace("2,", f"{3 * 10**9},"), b"\0" * 8), "needs 12000000000"),
        (with_header(PLAIN.replace("2,", "9" * 400 + ","), b""), "its header is not one"),
        (with_header(PLAIN.replace("2,", "-2,"), b""), "its header is not one"),
        (with_header(PLAIN.replace("(2,)", "(2)"), b"\0" * 8), "its header is not one"),
        (with_header(PLAIN.replace("2,", "1, " * 9 + "2"), b"\0" * 8), "its header is not one"),
        (with_header(PLAIN.replace("False", "True"), b"\0" * 8), "column-major"),
        (with_header(PLAIN.replace("<f4", ">f4"), b"\0" * 8), "dtype >f4; send one of <f8"),
        (with_header(PLAIN.replace("<f4", "<c8"), b"\0" * 16), "dtype <c8"),
        (with_header(PLAIN.replace("<f4", "|O"), b"\0" * 16), r"dtype \|O"),
        (with_header(PLAIN.replace("<f4", "<U9"), b"\0" * 72), "dtype <U9"),
        (with_header("{'a': " * 600, b""), "its header is not one"),
        (with_header("__import__('os').abort()", b""), "its header is not one"),
        (with_header(PLAIN.replace(", }", ", 'x': 1}"), b"\0" * 8), "its header is not one"),
        (with_header(PLAIN + PLAIN, b"\0" * 8), "its header is not one"),
    ],
)
def test_what_does_not_bear_its_header_out_is_refused_and_nothing_allocated(data, message):
    tracemalloc.start()
    try:
        with pytest.raises(FedcoreError, match=message):
            NpyArray.open(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_neither_pickles_nor_archives_are_opened():
    with pytest.raises(FedcoreError, match=r"dtype \|O"):
        NpyArray.open(saved(np.array([{}], dtype=object)))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.npy", saved(np.zeros(3)))
    with pytest.raises(FedcoreError, match="not an array"):
        NpyArray.open(archive.getvalue())
    with pytest.raises(FedcoreError, match="header is not one"):
        NpyArray.open(saved(np.zeros(2, dtype=[("a", "<f4"), ("b", "<i4")])))


@given(
    st.lists(st.tuples(st.integers(0, 143), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(-20, 20),
)
def test_a_damaged_array_is_refused_or_what_numpy_reads(changes, grown):
    data = bytearray(saved(np.arange(4, dtype="<f4")))
    for place, value in changes:
        data[place % len(data)] = value
    data = data[:grown] if grown < 0 else data + bytes(grown)
    try:
        tensor = NpyArray.open(bytes(data)).tensor()
    except FedcoreError:
        return
    expected = np.load(io.BytesIO(bytes(data)), allow_pickle=False)
    assert tensor.shape == expected.shape
    assert tensor.numpy().tobytes() == expected.tobytes()
    assert str(tensor.dtype) == f"torch.{torch.from_numpy(expected.copy()).dtype}".replace(
        "torch.torch.", "torch."
    )

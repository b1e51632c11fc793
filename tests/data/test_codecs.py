from __future__ import annotations

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.codecs import CODECS, Encoded, codec_error, find_codec
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

LAYOUT = FactorLayout.build(
    [("a", "A", 3, 33), ("a", "B", 3, 7), ("b", "A", 1, 64), ("b", "B", 1, 1)],
    [("head", (5, 13)), ("bias", (5,))],
)
# 99 + 21 + 64 + 1 + 65 + 5 numbers, in 2 + 1 + 1 + 1 + 2 + 1 blocks of 64.
NUMBERS, BLOCKS = 255, 8
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def row_of(values):
    """A row whose slots are filled from ``values`` in order, over and over."""
    row = torch.zeros(LAYOUT.size, dtype=torch.float32)
    source = torch.tensor(values, dtype=torch.float32)
    start = 0
    for slot in LAYOUT:
        places = (torch.arange(slot.numel) + start) % len(source)
        row[slot.offset : slot.offset + slot.numel] = source[places]
        start += slot.numel
    return row


def normal_row(seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return row_of(torch.randn(NUMBERS, generator=random).tolist()).to(dtype)


def round_trip(name, row, layout=LAYOUT):
    codec = find_codec(name)
    return codec.decode(codec.encode(row, layout), layout)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fp32", 4 * NUMBERS), ("bf16", 2 * NUMBERS), ("int8", NUMBERS + 4 * BLOCKS)],
)
def test_sizes_are_exact_and_known_before_anything_is_sent(name, expected):
    codec = find_codec(name)
    assert LAYOUT.numel == NUMBERS < LAYOUT.size
    encoded = codec.encode(normal_row(), LAYOUT)
    assert codec.bytes(LAYOUT) == len(encoded) == len(encoded.payload) == expected
    assert isinstance(encoded.payload, bytes)
    assert encoded.codec == codec.name == name


@given(st.lists(st.floats(width=32), min_size=1, max_size=300))
def test_fp32_is_the_identity_to_the_bit(values):
    row = row_of(values)
    assert torch.equal(bits(round_trip("fp32", row)), bits(row))


@given(st.lists(st.floats(width=32), min_size=1, max_size=300))
def test_bf16_keeps_the_bits_of_bf16_and_rounds_the_rest_to_nearest_even(values):
    row = row_of(values)
    short = row.to(torch.bfloat16)
    for sent in (short, row):
        found = round_trip("bf16", sent)
        assert found.dtype == torch.float32
        finite = torch.isfinite(short)
        assert torch.equal(bits(found.to(torch.bfloat16))[finite], bits(short)[finite])
        assert torch.equal(found.isnan(), short.isnan())
        assert torch.equal(found == inf, short == inf)
    # By hand: the upper half of the word, plus one where the rest is above half or a tie at odd.
    exact = row[torch.isfinite(row)]
    words = bits(exact).long() & 0xFFFFFFFF
    upper, rest = words >> 16, words & 0xFFFF
    upper += ((rest > 0x8000) | ((rest == 0x8000) & (upper % 2 == 1))).long()
    got = bits(round_trip("bf16", row)[torch.isfinite(row)]).long() & 0xFFFFFFFF
    assert torch.equal(got, upper << 16)


@given(st.lists(FLOATS, min_size=1, max_size=300))
def test_int8_is_within_a_half_of_the_steps_of_its_block(values):
    row = row_of(values)
    found = round_trip("int8", row).double()
    for slot in LAYOUT:
        part = slice(slot.offset, slot.offset + slot.numel)
        for exact, got in zip(row[part].double().split(64), found[part].split(64), strict=True):
            largest = float(exact.abs().max())
            # The scale and the product are rounded to fp32; scales below its range are lost.
            allowed = largest / 254 * (1 + 1e-4) + 127 * 2.0**-149
            assert float((got - exact).abs().max()) <= allowed
            assert bool((got[exact == 0] == 0).all())


def test_int8_by_hand():
    layout = FactorLayout.build([("m", "A", 1, 66)])
    row = torch.zeros(layout.size)
    row[:4] = torch.tensor([127.0, -63.5, 1.4, 0.4])
    row[64:66] = torch.tensor([0.001, -0.002])
    encoded = find_codec("int8").encode(row, layout)
    scales = torch.frombuffer(bytearray(encoded.payload[:8]), dtype=torch.float32)
    codes = torch.frombuffer(bytearray(encoded.payload[8:]), dtype=torch.int8)
    torch.testing.assert_close(scales, torch.tensor([1.0, 0.002 / 127]))
    # Halves go to the even neighbour; a second block keeps numbers that the first would lose.
    assert codes[:4].tolist() == [127, -64, 1, 0]
    assert codes[64:].tolist() == [64, -127]
    assert not codes[4:64].any()
    found = round_trip("int8", row, layout)
    torch.testing.assert_close(found[64:66], torch.tensor([0.002 * 64 / 127, -0.002]))


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-44])
def test_a_block_without_a_scale_is_sent_as_zeros(value):
    encoded = find_codec("int8").encode(row_of([value]), LAYOUT)
    assert encoded.payload == bytes(len(encoded))


def test_blocks_do_not_cross_tensors():
    row = normal_row()
    loud = row.clone()
    LAYOUT.view(loud, LAYOUT.by_name["head"]).mul_(1e6)
    quiet, noisy = round_trip("int8", row), round_trip("int8", loud)
    for slot in LAYOUT.factor_slots:
        assert torch.equal(LAYOUT.view(quiet, slot), LAYOUT.view(noisy, slot))


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("slot", ["b.B", "bias"])
def test_int8_refuses_what_no_scale_can_hold_and_names_it(value, slot):
    row = normal_row()
    LAYOUT.view(row, LAYOUT.by_name[slot]).view(-1)[0] = value
    with pytest.raises(FedcoreError, match=rf"codec int8: {slot} holds 1 values .* {value}"):
        find_codec("int8").encode(row, LAYOUT)
    beyond = normal_row(dtype=torch.float64)
    LAYOUT.view(beyond, LAYOUT.by_name[slot]).view(-1)[0] = 1e300
    with pytest.raises(FedcoreError, match=rf"codec int8: {slot} holds 1 values"):
        find_codec("int8").encode(beyond, LAYOUT)
    for name in ("fp32", "bf16"):
        found = round_trip(name, row)
        assert torch.equal(torch.isfinite(found), torch.isfinite(row))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_codecs_are_pure_leave_padding_zero_and_settle_after_one_trip(codec):
    row = normal_row()
    padding = torch.ones(LAYOUT.size, dtype=torch.bool)
    for slot in LAYOUT:
        padding[slot.offset : slot.offset + slot.numel] = False
    row[padding] = 3.0
    before = row.clone()
    once = codec.decode(codec.encode(row, LAYOUT), LAYOUT)
    assert torch.equal(row, before)
    assert padding.any()
    assert not once[padding].any()
    twice = codec.decode(codec.encode(once, LAYOUT), LAYOUT)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)
    zero = torch.zeros(LAYOUT.size)
    assert torch.equal(codec.decode(codec.encode(zero, LAYOUT), LAYOUT), zero)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        same = codec.decode(codec.encode(row.to(dtype), LAYOUT), LAYOUT)
        torch.testing.assert_close(same, once, rtol=0, atol=0.05)
        assert same.dtype == torch.float32


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_an_empty_layout_is_no_bytes(codec):
    empty = FactorLayout.build()
    encoded = codec.encode(torch.zeros(0), empty)
    assert encoded.payload == b""
    assert codec.bytes(empty) == 0
    assert codec.decode(encoded, empty).shape == (0,)


@pytest.mark.parametrize(("name", "most", "least"), [("fp32", 0, 0), ("bf16", 2e-3, 1e-3)])
def test_the_error_of_a_round_trip_is_reported(name, most, least):
    row = normal_row(1)
    assert least <= codec_error(row, round_trip(name, row)) <= most
    found = codec_error(row, round_trip("int8", row))
    # Uniform in a step of absmax / 127, about 2.4 / 127 here: 0.55 percent.
    assert 0.004 < found < 0.008
    assert codec_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)


def test_the_error_of_zero():
    zero = torch.zeros(3)
    assert codec_error(zero, zero) == 0
    assert codec_error(zero, torch.ones(3)) == inf


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_bad_input_is_refused_before_anything_is_decoded(codec):
    row = normal_row()
    encoded = codec.encode(row, LAYOUT)
    for bad in (row[1:], row[None], row.long()):
        with pytest.raises(FedcoreError, match=r"row is torch\..*; pass a floating-point row"):
            codec.encode(bad, LAYOUT)
    for payload in (encoded.payload[:-1], encoded.payload + b"0", b""):
        with pytest.raises(FedcoreError, match=rf"payload has {len(payload)} bytes, this layout"):
            codec.decode(Encoded(codec.name, payload), LAYOUT)
    with pytest.raises(FedcoreError, match="an upload of codec 'other' was given to codec"):
        codec.decode(Encoded("other", encoded.payload), LAYOUT)


@pytest.mark.parametrize("scale", [nan, inf, -1.0])
def test_a_scale_that_is_none_is_refused(scale):
    codec = find_codec("int8")
    payload = bytearray(codec.encode(normal_row(), LAYOUT).payload)
    payload[4:8] = torch.tensor([scale]).numpy().tobytes()
    with pytest.raises(FedcoreError, match="codec int8: a scale is negative or not finite"):
        codec.decode(Encoded("int8", bytes(payload)), LAYOUT)


def test_names_are_unique_and_a_wrong_one_gets_the_nearest():
    assert [codec.name for codec in CODECS] == ["fp32", "bf16", "int8"]
    with pytest.raises(FedcoreError, match=r"unknown codec 'fp16'; did you mean .*bf16"):
        find_codec("fp16")

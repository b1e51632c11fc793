import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedcore.errors import FedcoreError
from fedcore.transports.flower.messages import BF16_TAG, from_arrays, to_arrays

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    numbers = (100 * torch.rand(3, 5, generator=generator)).to(dtype)
    sent = {"a.weight": numbers, "scalar": numbers[0, 0], "turned": numbers.T}
    found = from_arrays(to_arrays(sent))
    assert list(found) == list(sent)
    for key, tensor in sent.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], tensor)


def test_bf16_keeps_its_odd_values_and_its_size():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    record = to_arrays({"w": every})
    assert list(record) == ["w" + BF16_TAG]
    assert record["w" + BF16_TAG].numpy().nbytes == 2**17
    assert torch.equal(from_arrays(record)["w"].view(torch.int16), every.view(torch.int16))


def test_what_comes_back_is_writable_and_its_own():
    tensor = torch.zeros(3)
    found = from_arrays(to_arrays({"w": tensor}))["w"]
    found += 1
    assert torch.equal(tensor, torch.zeros(3))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            ArrayRecord({"w" + BF16_TAG: Array(torch.zeros(2).numpy())}),
            "w:bf16 holds torch.float32; bf16 travels as int16",
        ),
        (
            ArrayRecord(
                {
                    "w": Array(torch.zeros(2).numpy()),
                    "w" + BF16_TAG: Array(torch.zeros(2, dtype=torch.int16).numpy()),
                }
            ),
            "w is there twice",
        ),
        (
            ArrayRecord(
                {"w": Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b"no")}
            ),
            "w cannot be read",
        ),
    ],
)
def test_what_is_no_tensor_is_named(record, message):
    with pytest.raises(FedcoreError, match=message):
        from_arrays(record)


def test_a_key_cannot_pretend():
    with pytest.raises(FedcoreError, match="marks tensors of bf16"):
        to_arrays({"w" + BF16_TAG: torch.zeros(1)})

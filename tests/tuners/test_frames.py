from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.tuners.gram.frames import (
    DenseFrame,
    FrameRecipe,
    StructuredFrame,
    check_same_frames,
    qr_frame,
)

SHAPES = [
    (1, 1),
    (1, 5),
    (5, 1),
    (2, 2),
    (3, 7),
    (7, 3),
    (33, 33),
    (24, 41),
    (768, 768),
    (1000, 33),
]


def recipe(out_features: int, in_features: int, **fields: object) -> FrameRecipe:
    known = {"kind": "structured", "seed": 3, "module": "encoder.layer.0.query"}
    return FrameRecipe(out_features=out_features, in_features=in_features, **{**known, **fields})


def sides(frame, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    identity = torch.eye(k, dtype=dtype)
    return frame.times_left_t(identity).T.double(), frame.times_right(identity).double()


def defined(out_features: int, in_features: int, frame: StructuredFrame) -> torch.Tensor:
    """Rows of the orthonormal DCT-II matrix, chosen and signed, by the textbook formula."""
    w = max(out_features, in_features)
    j, i = np.arange(w)[:, None], np.arange(w)[None]
    dct = np.sqrt(2 / w) * np.cos(np.pi * (2 * i + 1) * j / (2 * w))
    dct[0] /= np.sqrt(2)
    return torch.from_numpy(dct)[frame.rows] * frame.signs.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_structured_frame_is_its_definition(shape):
    frame = StructuredFrame(recipe(*shape))
    k = min(shape)
    left, right = sides(frame, k, torch.float64)
    small, large = (right, left.T) if shape[0] >= shape[1] else (left, right)
    assert torch.equal(small, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(large, defined(*shape, frame), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_frames_are_isometries(shape, dtype, bound):
    k = min(shape)
    eye = torch.eye(k, dtype=torch.float64)
    for frame in (StructuredFrame(recipe(*shape)), qr_frame(recipe(*shape, kind="qr"))):
        left, right = sides(frame, k, dtype)
        tolerance = 1e-6 if isinstance(frame, DenseFrame) else bound
        assert (left.T @ left - eye).abs().max() <= tolerance
        assert (right @ right.T - eye).abs().max() <= tolerance


def test_casting_the_model_leaves_the_frame_alone():
    frame = StructuredFrame(recipe(48, 40))
    before = sides(frame, 40, torch.float32)
    holder = torch.nn.Sequential(frame, torch.nn.Linear(2, 2))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        holder.to(dtype)
        after = sides(frame, 40, torch.float32)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


def test_gradient_passes_through_the_transform():
    frame = StructuredFrame(recipe(9, 6))
    rows = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frame.times_left_t, (rows,))
    wide = StructuredFrame(recipe(6, 9))
    assert torch.autograd.gradcheck(wide.times_right, (rows,))


def test_recipe_pins_every_integer():
    # A changed derivation would move every adapter ever saved into another frame.
    frame = StructuredFrame(FrameRecipe("structured", 0, "bert.encoder.layer.0.query", 6, 4))
    assert frame.frame_id == "3d3e657fcfcaf1525f91013981863607"
    assert frame.rows.tolist() == [2, 4, 3, 5]
    assert frame.signs.tolist() == [1, 1, 1, -1, -1, -1]


@pytest.mark.parametrize(
    "changed", [{"seed": 4}, {"module": "encoder.layer.1.query"}, {"out_features": 65}]
)
def test_every_part_of_the_recipe_matters(changed):
    first = recipe(64, 32)
    fields = {"kind": "structured", "seed": 3, "module": first.module, "out_features": 64}
    other = FrameRecipe(in_features=32, **{**fields, **changed})
    assert first.frame_id != other.frame_id
    left = StructuredFrame(first)
    right = StructuredFrame(other)
    assert not torch.equal(left.rows, right.rows)
    assert not torch.equal(left.signs[:64], right.signs[:64])


def test_signs_and_rows_look_random():
    frame = StructuredFrame(recipe(4096, 1024))
    assert abs(frame.signs.sum().item()) < 5 * 4096**0.5
    assert frame.rows.unique().numel() == 1024
    assert abs(frame.rows.double().mean().item() - 2047.5) < 5 * 4096 / (12 * 1024) ** 0.5


def test_frame_spreads_a_unit_vector():
    left, _ = sides(StructuredFrame(recipe(1024, 1024)), 1024, torch.float64)
    assert left.abs().max() <= (2 / 1024) ** 0.5 + 1e-12


def test_bit_equal_in_another_process():
    frame = StructuredFrame(recipe(300, 77))
    script = (
        "from fedcore.tuners.gram.frames import FrameRecipe, StructuredFrame\n"
        f"frame = StructuredFrame({recipe(300, 77)!r})\n"
        "print(frame.frame_id, frame.rows.tolist(), frame.signs.tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_path()
    )
    assert done.stdout.strip() == f"{frame.frame_id} {frame.rows.tolist()} {frame.signs.tolist()}"


def _path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}


def test_bytes_identify_a_dense_frame():
    frame = qr_frame(recipe(6, 5, kind="qr"))
    again = DenseFrame(frame.left.clone(), frame.right.clone())
    assert frame.frame_id == again.frame_id
    again.right[0, 0] = torch.nextafter(again.right[0, 0], torch.tensor(2.0))
    assert frame.frame_id != again.frame_id


def test_other_frames_are_refused_by_name():
    check_same_frames({"a": "1", "b": "2"}, {"b": "2", "c": "9"}, "client-7")
    with pytest.raises(FedcoreError, match=r"client-7: module b has frame 3, not 2"):
        check_same_frames({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "client-7")

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from bench.case import Row
from bench.cost import SIZES, cost_figure, cost_points, sizes
from bench.limits import Limits
from bench.roofline import roofline_figure
from bench.rounds import MEAN, SKETCHED, TRUNCATED
from bench.workloads import Setting

LIMITS = Limits(copy=10e9, read=20e9, flops={"float32": 100e9, "float64": 50e9})


def row(op: str, flops: float, seconds: float, dtype: str = "float32") -> Row:
    return Row(op, "s", "torch", "x", seconds, 1.0, 1_000_000, 1.0, dtype, 1, 0.0, flops)


@pytest.fixture
def roofline():
    rows = [row(f"operation_{i}", 1e6 * 2**i, 1e-3 * (1 + i % 3)) for i in range(12)]
    return roofline_figure([*rows, row("operation_0", 3e6, 2e-3, "bfloat16")], LIMITS)


def test_a_point_is_intensity_against_speed(roofline):
    (axes,) = roofline.axes
    points = [line.get_xydata()[0] for line in axes.lines if len(line.get_xydata()) == 1]
    # 4e6 flops on 1e6 bytes in 3 ms.
    assert any(np.allclose(point, (4.0, 4e6 / 3e-3 / 1e9)) for point in points)


def test_roofs_stand_at_what_was_measured(roofline):
    (axes,) = roofline.axes
    lines = [line.get_xydata() for line in axes.lines]
    slopes = [xy for xy in lines if len(xy) == 2 and np.allclose(xy[:, 1], 10 * xy[:, 0])]
    assert len(slopes) == 1
    assert slopes[0][1, 1] == pytest.approx(100.0)
    flats = {xy[0, 1] for xy in lines if len(xy) == 2 and xy[0, 1] == xy[1, 1] and xy[1, 0] > 50}
    assert {100.0, 50.0} <= flats


def test_names_do_not_cover_each_other(roofline):
    (axes,) = roofline.axes
    roofline.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 12 + 3
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)


def test_costs_are_of_every_operation_and_size():
    found = sizes(Setting(torch.device("cpu"), small=True))
    assert {size.axis for size in found} == set(SIZES)
    clock_calls = []

    def clock(call):
        clock_calls.append(call())
        return 0.002

    points = cost_points(found, torch.device("cpu"), clock, 1)
    assert len(points) == 3 * len(found)
    assert {point.op for point in points} == {MEAN, SKETCHED, TRUNCATED}
    figure = cost_figure(points)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "clients N",
        "rank r",
        "width k",
        "modules L",
    ]


def test_guides_are_in_proportion_to_the_size():
    found = sizes(Setting(torch.device("cpu"), small=True))
    points = cost_points(found, torch.device("cpu"), lambda call: 0.002, 1)
    for axes in cost_figure(points).axes:
        guides = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "--"]
        assert len(guides) == 3
        for guide in guides:
            for (x, y), (next_x, next_y) in pairwise(guide):
                assert next_y / y == pytest.approx(next_x / x)

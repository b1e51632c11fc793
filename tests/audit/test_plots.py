from __future__ import annotations

import numpy as np
import pytest

from fedcore.audit.plots import nearness, picture_rows
from fedcore.errors import FedcoreError


def test_pictures_stand_in_their_rows_and_columns():
    rows = {"a": np.arange(12.0).reshape(3, 4) / 12, "b": np.ones((3, 4))}
    figure = picture_rows(rows)
    (axes,) = figure.axes
    mosaic = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert mosaic.shape == (5, 8)
    assert np.array_equal(mosaic[:2, 3:5], rows["a"][1].reshape(2, 2))
    assert np.isnan(mosaic[2]).all()
    assert np.isnan(mosaic[:, [2, 5]]).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_bad_pictures_are_refused():
    with pytest.raises(FedcoreError, match="pass square ones"):
        picture_rows({"a": np.ones((2, 5))})
    with pytest.raises(FedcoreError, match=r"rows have the shapes \[\(1, 4\), \(2, 4\)\]"):
        picture_rows({"a": np.ones((2, 4)), "b": np.ones((1, 4))})
    with pytest.raises(FedcoreError, match="groups is empty"):
        nearness({}, [], "PSNR")


def test_nearness_draws_means_and_intervals():
    figure = nearness({"one": [3.0], "two": [1.0, 2.0, 3.0]}, ["two"], "PSNR, dB")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["3.0", "2.0"]
    # Dots and mean for the single value; dots, interval and mean for the three.
    assert len(axes.lines) == 5
    low, high = axes.lines[3].get_xdata()
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)

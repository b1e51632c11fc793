from __future__ import annotations

import pytest

from bench.busy import Usage, describe_others, usage


def test_others_are_what_was_used_and_not_by_us():
    before, after = Usage(100.0, 40.0, 10.0), Usage(120.0, 56.0, 14.0)
    # 20 processor seconds passed, 16 of them used, 4 of these by us.
    assert before.others_until(after) == pytest.approx(0.6)


def test_a_share_stays_between_nothing_and_everything():
    start = Usage(0.0, 0.0, 0.0)
    assert start.others_until(Usage(10.0, 3.0, 3.5)) == 0.0
    assert start.others_until(Usage(0.0, 0.0, 0.0)) == 0.0


def test_idling_and_waiting_for_disks_are_not_use(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 200 300 1000 400 0 0 50 7 7\ncpu0 1 1 1 1\n")
    found = usage(stat)
    assert found is not None
    assert (found.total, found.used) == (20.5, 6.5)
    assert usage(tmp_path / "absent") is None


@pytest.mark.parametrize(("used", "warned"), [(0.5, False), (5.0, True)])
def test_a_busy_machine_is_said_with_a_warning(used, warned):
    text = describe_others(Usage(0.0, 0.0, 0.0), Usage(10.0, used, 0.0))
    assert text.startswith(f"Others used {10 * used:.0f}% of the processor.")
    assert ("NOT TO BE QUOTED" in text) is warned


def test_an_unknown_share_is_said_to_be_unknown():
    assert "not known" in describe_others(None, Usage(0.0, 0.0, 0.0))

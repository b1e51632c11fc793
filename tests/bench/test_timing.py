from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from bench import timing
from bench.timing import MINIMUM, PATIENCE, Call, Timing, cache_bytes, cold_clock, take_turns


@dataclass
class FakeClock:
    """Runs a call and returns the seconds that the call itself names."""

    ran: list[str] = field(default_factory=list)

    def __call__(self, call: Call) -> float:
        name, seconds = call()  # type: ignore[misc]
        self.ran.append(name)
        return seconds


def test_a_timing_is_the_median_and_the_interquartile_range():
    found = Timing((1.0, 9.0, 2.0, 4.0, 3.0))
    assert (found.seconds, found.spread) == (3.0, 2.0)
    assert (Timing((7.0,)).seconds, Timing((7.0,)).spread) == (7.0, 0.0)


def test_calls_take_turns_after_one_warm_up_each():
    clock = FakeClock()
    found = take_turns({"a": lambda: ("a", 0.1), "b": lambda: ("b", 0.2)}, clock, 3)
    assert "".join(clock.ran) == "ab" * 4
    assert found == {"a": Timing((0.1,) * 3), "b": Timing((0.2,) * 3)}


def test_a_slow_call_stops_at_the_minimum_and_a_fast_one_goes_on():
    clock = FakeClock()
    calls = {"slow": lambda: ("slow", PATIENCE), "fast": lambda: ("fast", PATIENCE / 100)}
    found = take_turns(calls, clock, 20)
    assert len(found["slow"].times) == MINIMUM
    assert len(found["fast"].times) == 20


def test_fewer_repeats_than_the_minimum_are_kept_to():
    found = take_turns({"slow": lambda: ("slow", PATIENCE)}, FakeClock(), 1)
    assert found["slow"].times == (PATIENCE,)


def test_the_first_call_of_each_is_not_counted():
    seconds = iter((100.0, 1.0, 2.0, 3.0))
    found = take_turns({"a": lambda: ("a", next(seconds))}, FakeClock(), 3)
    assert found["a"].times == (1.0, 2.0, 3.0)


def test_the_cpu_clock_reads_four_caches_before_it_starts(monkeypatch):
    read, events = [], []
    plain = torch.Tensor.amax
    monkeypatch.setattr(
        torch.Tensor, "amax", lambda t: (events.append("read"), read.append(t.nbytes), plain(t))[2]
    )
    ticks = iter((5.0, 5.25))
    monkeypatch.setattr(
        timing.time, "perf_counter", lambda: (events.append("tick"), next(ticks))[1]
    )
    clock = cold_clock(torch.device("cpu"))
    assert clock(lambda: events.append("call")) == 0.25
    assert events == ["read", "tick", "call", "tick"]
    assert read == [4 * cache_bytes(torch.device("cpu"))]


def test_cuda_is_timed_between_two_events_on_the_stream(monkeypatch):
    events: list[str] = []

    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("record")

        def elapsed_time(self, end: FakeEvent) -> float:
            events.append("elapsed")
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    assert timing._cuda_seconds(lambda: events.append("call")) == 1.5
    assert events == ["record", "call", "record", "synchronize", "elapsed"]


def test_the_cache_of_a_card_is_its_l2(monkeypatch):
    card = type("Card", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert cache_bytes(torch.device("cuda")) == 50 << 20
    assert cache_bytes(torch.device("cpu")) >= 1 << 18


@pytest.mark.parametrize("repeats", [1, 2, 7])
def test_every_call_gets_the_same_number_of_repeats(repeats):
    calls = {name: lambda name=name: (name, 1e-6) for name in "abc"}
    found = take_turns(calls, FakeClock(), repeats)
    assert [len(timing.times) for timing in found.values()] == [repeats] * 3

"""Whatever one client replies, the round ends without it, by name, as the honest others have it."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedcore.errors import FedcoreError
from fedcore.federation.acceptance import Limits
from fedcore.transports.flower import FedLoRA, from_arrays, to_arrays
from tests.transports.flower.grid import FakeGrid
from tests.transports.flower.test_strategy import HEAD, A, B, adapter, client, run, trained

NODES = (1, 2, 3)


def quiet(method="product_svd", **options):
    return FedLoRA(method, fraction_evaluate=0.0, on_invalid="drop", **options)


def npy(header: str, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + values


def array(data: bytes, shape=(4, 6), dtype="float32", stype="numpy.ndarray") -> ArrayRecord:
    """Honest arrays but for the one of A."""
    record = to_arrays(trained(2, adapter(0)))
    record[A] = Array(dtype=dtype, shape=shape, stype=stype, data=data)
    return record


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (SHAPE), }"


def claims(shape: str) -> bytes:
    return npy(HEADER.replace("SHAPE", shape))


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


ARRAYS: dict[str, Callable[[], ArrayRecord]] = {
    "zip magic": lambda: array(b"PK\x03\x04garbage"),
    "npy of 4 TB": lambda: array(claims(f"{10**12},"), shape=(10**12,)),
    "npy of 12 GB": lambda: array(claims(f"{3 * 10**9},"), shape=(3 * 10**9,)),
    "npy whose record lies": lambda: array(claims(f"{10**12},")),
    "header without end": lambda: array(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f"),
    "header that nests": lambda: array(npy("[" * 60_000)),
    "pickle": lambda: array(pickled(), dtype="object", shape=(1,)),
    "empty": lambda: array(b""),
    "another serialisation": lambda: array(b"", stype="pickle\x1b"),
    "negative axis": lambda: array(claims("-4, 6")),
    "text": lambda: array(npy(HEADER.replace("SHAPE", "1,").replace("f4", "U3"), b"\0" * 12)),
}  # fmt: skip


def replying(record=None, metrics=None, **records) -> Callable[..., Message]:
    """Node 2 with these arrays and metrics in place of its own, and further records."""

    def handle(message, context):
        content = client(2)(message, context).content
        if record is not None:
            content["arrays"] = record
        if metrics is not None:
            content["metrics"] = MetricRecord(metrics)
        for name, further in records.items():
            content[name] = further
        return Message(content, reply_to=message)

    return handle


METRICS = {
    "a list": {"num-examples": 2.0, "loss": [1.0, 2.0]},
    "a list of another length": {"num-examples": 2.0, "loss": []},
    "nan": {"num-examples": 2.0, "loss": float("nan")},
    "inf": {"num-examples": 2.0, "loss": float("inf")},
    "an integer beyond fp64": {"num-examples": 2.0, "loss": 10**400},
    "10**400 examples": {"num-examples": 10**400, "loss": 1.0},
    "1e308 examples": {"num-examples": 1e308, "loss": 1.0},
    "2**62 examples": {"num-examples": 2**62, "loss": 1.0},
    "examples as a list": {"num-examples": [2.0], "loss": 1.0},
    "minus one example": {"num-examples": -1, "loss": 1.0},
    "no examples": {"loss": 1.0},
    "too many": {"num-examples": 2.0, **{f"m{i}": 1.0 for i in range(200)}},
}

RECORDS = {
    "two metric records": {"more": MetricRecord({"num-examples": 1.0})},
    "two array records": {"more": to_arrays({A: torch.zeros(4, 6)})},
    "a name that is a number": {"fedcore": ConfigRecord({"client": 3})},
    "flags that are bytes": {"fedcore": ConfigRecord({"flags": b"\xff"})},
    "a round that is text": {"fedcore": ConfigRecord({"round": "0"})},
    "threads that are text": {"fedcore": ConfigRecord({"threads": "many"})},
    "a list for a digest": {"fedcore": ConfigRecord({"frozen": ["a"]})},
    "data statistics": {"told": to_arrays({"weights": torch.ones(3)})},
    "damaged data statistics": {"told": array(b"PK\x03\x04")},
}

CASES: dict[str, Callable[..., Message]] = {
    **{name: replying(make()) for name, make in ARRAYS.items()},
    **{f"metrics, {name}": replying(metrics=metrics) for name, metrics in METRICS.items()},
    **{name: replying(**records) for name, records in RECORDS.items()},
    "no content that fits": lambda message, context: Message(RecordDict(), reply_to=message),
}


def outcome(handlers, method="product_svd", **options):
    strategy = quiet(method, **options)
    result, _ = run(strategy, handlers)
    return strategy, result


def honest(method="product_svd"):
    def dead(message, context):
        raise TimeoutError

    return outcome({2: dead}, method)


def assert_without_node_2(strategy, result):
    """The round is that of nodes 1 and 3, and node 2 is named."""
    (dropped,) = strategy.state.record["dropped"]
    assert dropped["client"] == "node-2"
    assert strategy.state.round == 1
    alone, expected = honest(strategy.method.name)
    assert torch.equal(strategy.state.row, alone.state.row)
    assert strategy.state.record["clients"] == {"node-1": 1.0, "node-3": 3.0}
    assert dict(result.train_metrics_clientapp[1]) == dict(expected.train_metrics_clientapp[1])
    return dropped["reason"]


@pytest.mark.parametrize("name", CASES)
def test_a_bad_reply_costs_its_client_the_round_and_nobody_else(name):
    reason = assert_without_node_2(*outcome({2: CASES[name]}))
    assert reason.isprintable()
    assert len(reason) <= 500
    with pytest.raises(FedcoreError, match="round 0: client node-2: "):
        run(FedLoRA("product_svd", fraction_evaluate=0.0), {2: CASES[name]})


def test_a_node_that_replies_twice_is_left_out():
    class Twice(FakeGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            return [*replies, *(r for r in replies if r.metadata.src_node_id == 2)]

    strategy = quiet()
    grid = Twice({n: client(n) for n in NODES})
    result = strategy.start(grid, to_arrays(adapter(0)), num_rounds=1)
    assert "reported twice" in assert_without_node_2(strategy, result)


def test_an_exception_that_nobody_thought_of_is_that_clients_too(monkeypatch):
    from fedcore.transports.flower import strategy as module

    genuine = module.read_reply

    def read(content, key_map, layout, client, *rest, **options):
        if client == "node-2":
            raise MemoryError
        return genuine(content, key_map, layout, client, *rest, **options)

    monkeypatch.setattr(module, "read_reply", read)
    reason = assert_without_node_2(*outcome({}))
    assert reason == "its reply cannot be read (MemoryError)"


def test_metrics_that_one_client_invents_are_not_averaged():
    _, result = outcome({2: replying(metrics={"num-examples": 2.0, "loss": 2.0, "score": 1e6})})
    metrics = result.train_metrics_clientapp[1]
    assert dict(metrics) == {"loss": pytest.approx((1 + 4 + 9) / 6)}


def test_a_finite_upload_whose_result_is_not_leaves_the_state_as_it_was():
    huge = replying(to_arrays({**trained(2, adapter(0)), A: torch.full((4, 6), 3e38)}))
    for method in ("product_svd", "florist"):
        strategy, result = outcome({2: huge}, method)
        assert strategy.state.round == 1
        assert bool(strategy.state.row.isfinite().all())
        assert all(bool(t.isfinite().all()) for t in from_arrays(result.arrays).values())
        (flag,) = [f for f in strategy.state.record["flags"] if "not accepted" in f]
        assert "the largest uploads: node-2 (norm 1.47e+39), node-1" in flag
        assert torch.equal(from_arrays(result.arrays)[A], adapter(0)[A])


def test_the_bounds_are_the_users():
    strategy = quiet(max_growth=3.0, largest_share=0.25)
    assert strategy._limits == Limits(3.0, 0.25)
    with pytest.raises(FedcoreError, match=r"max_growth is 0.5; pass a finite number >= 1"):
        quiet(max_growth=0.5)


def test_a_share_of_the_weight_is_capped_and_flagged():
    liar = replying(metrics={"num-examples": 1e12, "loss": 1.0})
    free, _ = outcome({2: liar}, "fedit")
    capped, _ = outcome({2: liar}, "fedit", largest_share=0.5)
    equal, _ = outcome({2: client(2, weight=4.0)}, "fedit")
    assert torch.equal(capped.state.row, equal.state.row)
    assert not torch.equal(free.state.row, equal.state.row)
    assert capped.state.record["clients"] == {"node-1": 1.0, "node-2": 4.0, "node-3": 3.0}
    (flag,) = capped.state.record["flags"]
    assert flag == ("node-2: its share of the weight is 1, above largest_share 0.5; it counts 0.5")
    with pytest.raises(FedcoreError, match="largest_share is 0; pass"):
        quiet(largest_share=0)


def test_uniform_weighting_is_the_servers_own():
    liar = replying(metrics={"num-examples": 1e12, "loss": 1.0})
    silent = replying(metrics={"loss": 1.0})
    for handler in (liar, silent):
        strategy, result = outcome({2: handler}, "fedit", weighting="uniform")
        assert strategy.state.record["clients"] == dict.fromkeys(
            ("node-1", "node-2", "node-3"), 1.0
        )
        mean = sum(trained(n, adapter(0))[HEAD] for n in NODES) / 3
        torch.testing.assert_close(from_arrays(result.arrays)[HEAD], mean)
        assert result.train_metrics_clientapp[1]["loss"] == pytest.approx((1 + 1 + 3) / 3)
    with pytest.raises(FedcoreError, match="unknown weighting of FedLoRA 'exampels'"):
        quiet(weighting="exampels")


NASTY = "\x1b]0;owned\x07[/red]<script>\u202e"


def test_flags_are_recorded_printable_and_few(caplog):
    noisy = replying(fedcore=ConfigRecord({"flags": "\n".join([NASTY] * 200_000)}))
    with caplog.at_level(logging.DEBUG, logger="flwr"):
        strategy, _ = outcome({2: noisy})
    flags = strategy.state.record["flags"]
    assert len(flags) == 21
    assert flags[0] == r"node-2: \x1b]0;owned\x07[/red]<script>\u202e"
    assert flags[-1] == "node-2: 199980 more flags"
    assert "\x1b" not in caplog.text


def test_names_keys_and_errors_of_others_are_printable(caplog):
    def broken(message, context):
        raise RuntimeError(NASTY * 1000)

    key = f"{NASTY}\nround 1: all is well"
    odd = replying(to_arrays({**trained(2, adapter(0)), key: torch.zeros(1)}))
    for handler in (broken, odd):
        with caplog.at_level(logging.DEBUG, logger="flwr"):
            strategy, result = outcome({2: handler})
        reason = assert_without_node_2(strategy, result)
        assert r"\x1b" in reason
        assert len(reason) <= 500
        assert "\x1b" not in caplog.text
        assert "\nround 1: all is well" not in caplog.text


EVALUATIONS = {
    "a list": {"num-examples": 2.0, "loss": [1.0, 2.0]},
    "nan": {"num-examples": 2.0, "loss": float("nan")},
    "no examples": {"loss": 1.0},
    "minus one example": {"num-examples": -1.0, "loss": 1.0},
}


@pytest.mark.parametrize("name", [*EVALUATIONS, "two records", "nothing", "an error"])
def test_a_bad_reply_to_an_evaluation_does_not_end_the_run(name):
    def evaluating(node):
        def handle(message, context):
            if message.metadata.message_type == "train":
                return client(node)(message, context)
            records = {"metrics": MetricRecord({"num-examples": float(node), "loss": float(node)})}
            if node == 2 and name in EVALUATIONS:
                records = {"metrics": MetricRecord(EVALUATIONS[name])}
            elif node == 2 and name == "two records":
                records["more"] = MetricRecord({"num-examples": 1.0})
            elif node == 2 and name == "nothing":
                records = {}
            elif node == 2:
                raise RuntimeError("out of memory")
            return Message(RecordDict(records), reply_to=message)

        return handle

    def strategy(on_invalid):
        return FedLoRA("fedit", on_invalid=on_invalid, min_evaluate_nodes=3)

    handlers = {n: evaluating(n) for n in NODES}
    result, _ = run(strategy("drop"), handlers, rounds=2)
    for round in (1, 2):
        metrics = dict(result.evaluate_metrics_clientapp[round])
        assert metrics == {"loss": pytest.approx((1 + 9) / 4)}
    if name != "an error":
        with pytest.raises(FedcoreError, match="round 0: client node-2: its "):
            run(strategy("raise"), handlers)


def test_a_start_of_a_rank_that_no_update_can_have_is_refused():
    wide = {A: torch.randn(7, 6), B: torch.randn(5, 7), HEAD: torch.randn(3, 5)}
    with pytest.raises(
        FedcoreError, match=r"initial_arrays: module .*query has rank 7, its upd.* 5"
    ):
        run(quiet(), initial=wide)

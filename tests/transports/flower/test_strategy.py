"""FedLoRA with clients that know nothing of fedcore: state dicts by PEFT's keys, in and out."""

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedcore.errors import FedcoreError
from fedcore.federation.state import latest_state, read_state
from fedcore.methods import create_method
from fedcore.transports.flower import FedLoRA, from_arrays, to_arrays
from tests.transports.flower.grid import FakeGrid

MODULE = "base_model.model.encoder.layer.0.query"
A, B, HEAD = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight", "base_model.model.head.weight"
SHAPES = {A: (4, 6), B: (5, 4), HEAD: (3, 5)}


def adapter(seed, rank=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {k: torch.randn(shape, generator=generator) for k, shape in SHAPES.items()}
    return {k: t.to(dtype) for k, t in {**found, A: found[A][:rank], B: found[B][:, :rank]}.items()}


def trained(node, tensors):
    """What a client's training makes of what it was sent: its own, but of the same ranks."""
    return {k: t + 0.1 * adapter(node)[k][tuple(map(slice, t.shape))] for k, t in tensors.items()}


def client(node, change=None, weight=None, config=None):
    def handle(message, context):
        tensors = trained(node, from_arrays(message.content["arrays"]))
        tensors = change(tensors) if change else tensors
        record = tensors if isinstance(tensors, ArrayRecord) else to_arrays(tensors)
        metrics = {"num-examples": float(node) if weight is None else weight, "loss": 1.0 * node}
        content = {"arrays": record, "metrics": MetricRecord(metrics)}
        if config is not None:
            content["fedcore"] = ConfigRecord(config)
        return Message(RecordDict(content), reply_to=message)

    return handle


def run(strategy, handlers=None, rounds=1, initial=None, **options):
    grid = FakeGrid({n: client(n) for n in (1, 2, 3)} | (handlers or {}))
    arrays = to_arrays(initial or adapter(0))
    return strategy.start(grid, arrays, num_rounds=rounds, **options), grid


def quiet(method="fedit", **options):
    return FedLoRA(method, fraction_evaluate=0.0, **options)


def test_fedit_is_what_fedavg_does():
    ours, _ = run(quiet(), rounds=2)
    theirs, _ = run(FedAvg(fraction_evaluate=0.0), rounds=2)
    for key, tensor in from_arrays(theirs.arrays).items():
        torch.testing.assert_close(from_arrays(ours.arrays)[key], tensor)
    assert ours.train_metrics_clientapp[1]["loss"] == pytest.approx((1 + 4 + 9) / 6)


def test_an_exact_method_sends_the_mean_of_products():
    result, _ = run(quiet(create_method("product_svd")))
    found = from_arrays(result.arrays)
    mean = sum(
        n / 6 * trained(n, adapter(0))[B].double() @ trained(n, adapter(0))[A].double()
        for n in (1, 2, 3)
    )
    u, s, v = torch.linalg.svd(mean)
    best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    torch.testing.assert_close((found[B] @ found[A]).double(), best, rtol=1e-4, atol=1e-5)


def test_bf16_uploads_count_as_what_they_are():
    def short(tensors):
        return {k: t.bfloat16() for k, t in tensors.items()}

    result, _ = run(quiet(), {n: client(n, short) for n in (1, 2, 3)})
    for key, tensor in from_arrays(result.arrays).items():
        exact = sum(n / 6 * trained(n, adapter(0))[key].bfloat16().double() for n in (1, 2, 3))
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_order_of_keys_and_replies_changes_nothing():
    def shuffled(tensors):
        return dict(reversed(tensors.items()))

    one, _ = run(quiet())
    other, _ = run(quiet(), {2: client(2, shuffled)})
    for key, tensor in from_arrays(one.arrays).items():
        assert torch.equal(tensor, from_arrays(other.arrays)[key])


def changed(key, value):
    return lambda tensors: {**tensors, key: value(tensors[key])}


def poisoned(tensor):
    bad = tensor.clone()
    bad[0, 1] = float("nan")
    return bad


BAD = {
    "nan": (changed(A, poisoned), r"query\.A holds 1 values that are not finite, such as nan"),
    "broadcast": (
        changed(A, lambda t: t[:1]),
        r"lora_A.weight has shape \(1, 6\), expected \(4, 6\)",
    ),
    "rank": (
        changed(B, lambda t: t[:, :2]),
        r"lora_B.weight has shape \(5, 2\), expected \(5, 4\)",
    ),
    "missing": (lambda t: {A: t[A], HEAD: t[HEAD]}, r"query\.B is missing"),
    "extra": (lambda t: {**t, "other.weight": t[A]}, "unexpected tensor other.weight"),
    "integers": (changed(HEAD, lambda t: t.long()), "head.weight has dtype torch.int64"),
    "twice": (
        lambda t: {**t, A.replace("weight", "default.weight"): t[A]},
        r"names .*query\.A, which another key names too",
    ),
    "garbage": (
        lambda t: ArrayRecord({A: Array("float32", (4, 6), "numpy.ndarray", b"zz")}),
        "lora_A.weight cannot be read",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_an_invalid_upload_is_refused_by_its_node_or_left_out(case, tmp_path):
    change, message = BAD[case]
    bad = {2: client(2, change)}
    with pytest.raises(FedcoreError, match=f"round 0: client node-2: .*{message}"):
        run(quiet(), bad, checkpoint_dir=tmp_path)
    # Nothing moved.
    assert read_state(latest_state(tmp_path)).round == 0
    strategy = quiet(on_invalid="drop")
    result, _ = run(strategy, bad)
    assert [d["client"] for d in strategy.state.record["dropped"]] == ["node-2"]
    without, _ = run(quiet(), {2: client(2, weight=0.0)})
    for key, tensor in from_arrays(without.arrays).items():
        assert torch.equal(tensor, from_arrays(result.arrays)[key])


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (client(2, weight=-4.0), "its weight is -4.0"),
        (client(2, weight=float("nan")), "its num-examples is not a finite number"),
        (client(2, weight=[1, 2]), "its num-examples is of type list; send a number"),
        (client(2, config={"round": 5}), "its upload is for round 5"),
        (client(2, config={"frozen": "0" * 64}), "differs from the broadcast"),
        (client(2, config={"client": "node-3"}), "its reply is from 'node-3'"),
    ],
)
def test_what_a_reply_says_is_checked(handler, message):
    with pytest.raises(FedcoreError, match=f"client node-2: .*{message}"):
        run(quiet(), {2: handler})


def test_all_weights_zero_is_said():
    with pytest.raises(FedcoreError, match="the weights of all clients are zero"):
        run(quiet(), {n: client(n, weight=0.0) for n in (1, 2, 3)})


def test_a_frozen_factor_may_come_along_unless_it_changed():
    frozen = changed(A, lambda t: adapter(0)[A])
    good = {n: client(n, frozen) for n in (1, 2, 3)}
    result, _ = run(quiet("ffa"), good)
    assert torch.equal(from_arrays(result.arrays)[A], adapter(0)[A])
    with pytest.raises(FedcoreError, match=r"client node-2: .*lora_A.weight is frozen in this"):
        run(quiet("ffa"), {**good, 2: client(2)})


def test_the_plan_of_a_round_is_told():
    strategy = quiet("rolora", on_invalid="drop")
    _, grid = run(strategy, rounds=2)
    told = [
        (m.content["config"]["server-round"], m.content["config"]["fedcore.trains"])
        for m in grid.sent
    ]
    assert told == [(1, "B")] * 3 + [(2, "A")] * 3


def test_clients_of_lower_rank_get_and_send_their_own():
    shapes = []

    def seen(tensors):
        shapes.append(tuple(tensors[A].shape))
        return tensors

    strategy = quiet("product_svd", ranks={2: 1})
    run(strategy, {2: client(2, seen)}, rounds=2)
    assert shapes == [(1, 6), (1, 6)]
    assert strategy.state.held_for_clients.keys() == {"node-2"}
    assert not strategy.state.simulated_clients
    with pytest.raises(FedcoreError, match=r"client node-2: .*shape \(4, 6\), expected \(1, 6\)"):
        run(quiet("product_svd", ranks={2: 1}), {2: client(2, lambda t: trained(2, adapter(0)))})


def test_a_dead_node_and_an_error_cost_their_uploads_alone():
    def dead(message, context):
        raise TimeoutError

    def broken(message, context):
        raise RuntimeError("out of memory")

    strategy = quiet()
    result, _ = run(strategy, {1: dead, 2: broken})
    dropped = {d["client"]: d["reason"] for d in strategy.state.record["dropped"]}
    assert dropped["node-1"] == "it did not report"
    assert dropped["node-2"] == "its node sent an error: out of memory"
    for key, tensor in trained(3, adapter(0)).items():
        torch.testing.assert_close(from_arrays(result.arrays)[key], tensor)
    everyone = quiet()
    result, _ = run(everyone, dict.fromkeys((1, 2, 3), dead), rounds=2)
    assert everyone.state.round == 2
    for key, tensor in adapter(0).items():
        assert torch.equal(from_arrays(result.arrays)[key], tensor)


@pytest.mark.parametrize("method", ["fedit", "rolora", "fedex", "product_svd"])
def test_a_run_that_ends_early_goes_on_to_the_same_bits(method, tmp_path):
    only = {"rolora": lambda r: B if r % 2 == 0 else A}.get(method)

    def handler(node):
        def handle(message, context):
            sent = from_arrays(message.content["arrays"])
            trained = message.content["config"]["fedcore.round"]
            frozen = {only(trained + 1): sent[only(trained + 1)]} if only else {}
            return client(node, lambda t: {**t, **frozen})(message, context)

        return handle

    handlers = {n: handler(n) for n in (1, 2, 3)}
    whole, _ = run(quiet(method), handlers, rounds=4)
    run(quiet(method), handlers, rounds=2, checkpoint_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"round-000{i}" for i in range(3)]
    with pytest.raises(FedcoreError, match="holds states already"):
        run(quiet(method), handlers, rounds=4, checkpoint_dir=tmp_path)
    seen = []
    options = {"checkpoint_dir": tmp_path, "resume": True}
    result, _ = run(
        quiet(method), handlers, rounds=4, evaluate_fn=lambda r, a: seen.append(r), **options
    )
    assert seen == [2, 3, 4]
    assert list(result.train_metrics_clientapp) == [3, 4]
    for key, tensor in from_arrays(whole.arrays).items():
        assert torch.equal(tensor, from_arrays(result.arrays)[key])
    again, grid = run(quiet(method), handlers, rounds=4, **options)
    assert not grid.sent
    assert from_arrays(again.arrays).keys() == SHAPES.keys()
    other = {k.replace("query", "value"): t for k, t in adapter(0).items()}
    with pytest.raises(FedcoreError, match="of another adapter than the one"):
        run(quiet(method), rounds=4, initial=other, **options)


def test_a_share_of_the_nodes_takes_part_drawn_by_the_seed():
    def asked(seed):
        strategy = quiet(fraction_train=0.5, min_train_nodes=1, seed=seed)
        handlers = {n: client(n) for n in range(1, 7)}
        _, grid = run(strategy, handlers, rounds=4)
        found = [m.metadata.dst_node_id for m in grid.sent]
        return [sorted(found[i : i + 3]) for i in range(0, len(found), 3)]

    drawn = asked(0)
    assert len(drawn) == 4
    assert all(len(set(nodes)) == 3 for nodes in drawn)
    assert len({tuple(nodes) for nodes in drawn}) > 1
    assert drawn == asked(0) != asked(1)


def test_who_goes_on_sends_everything_since_nodes_may_have_lost_what_they_held(tmp_path):
    def sent(strategy, rounds, **options):
        _, grid = run(
            strategy,
            {n: keeper(n) for n in (1, 2, 3)},
            rounds=rounds,
            checkpoint_dir=tmp_path,
            **options,
        )
        return [len(m.content["arrays"]) for m in grid.sent]

    assert sent(quiet("rolora", send="changed"), 2) == [3] * 3 + [2] * 3
    assert sent(quiet("rolora", send="changed"), 3, resume=True) == [3] * 3


def keeper(node):
    """A client that keeps what it was sent and replies with what the order asks for."""
    held = {}

    def handle(message, context):
        held.update(from_arrays(message.content["arrays"]))
        sends = message.content["config"]["fedcore.sends"].split(",")
        asked = {"A": A, "B": B}
        keys = [HEAD, *(asked[factor] for factor in sends)]
        return client(node, lambda _: trained(node, {k: held[k] for k in keys}))(message, context)

    return handle


def test_uploads_of_the_same_bits_are_refused_where_they_would_hide_a_sum():
    same = {n: client(1, weight=1.0) for n in (1, 2, 3)}
    with pytest.raises(FedcoreError, match="all 3 uploads are identical"):
        run(quiet("fedex"), same)
    run(quiet("fedex", allow_identical_uploads=True), same)
    run(quiet("fedit"), same)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quiet("fedti"), "unknown method 'fedti'; did you mean fedit"),
        (lambda: quiet("local_only"), "local_only exchanges nothing"),
        (lambda: quiet(on_invalid="ignore"), "on_invalid is 'ignore'"),
        (lambda: quiet(send="some"), "send is 'some'"),
        (lambda: quiet().state, "no state before start"),
        (lambda: run(quiet("florg")), r"initial_arrays: florg.* is not for adapters"),
        (lambda: run(quiet(), resume=True), "resume needs checkpoint_dir"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(FedcoreError, match=message):
        make()


def test_it_runs_inside_flowers_differential_privacy_and_goes_on_from_the_noise():
    """The wrapper drives the strategy by itself and changes what a round returned."""
    noisy, still = (
        DifferentialPrivacyServerSideFixedClipping(
            quiet(), noise_multiplier=noise, clipping_norm=1e6, num_sampled_clients=3
        )
        for noise in (1e-3, 0.0)
    )
    sent = {}
    for name, wrapped in (("noisy", noisy), ("still", still)):
        grid = FakeGrid({n: client(n) for n in (1, 2, 3)})
        wrapped.start(grid, to_arrays(adapter(0)), num_rounds=2)
        sent[name] = [from_arrays(message.content["arrays"]) for message in grid.sent[3:]]
    plain, _ = run(quiet())
    for key, tensor in from_arrays(plain.arrays).items():
        torch.testing.assert_close(sent["still"][0][key], tensor)
        assert (sent["noisy"][0][key] - tensor).abs().min() > 0.1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("product_svd", "its result is not a mean of the uploads"),
        (
            "rolora",
            r"a wrapper changed encoder\.layer\.0\.query\.A, which rolora froze in the last",
        ),
    ],
)
def test_noise_that_promises_nothing_is_refused(method, message):
    wrapped = DifferentialPrivacyServerSideFixedClipping(
        quiet(method), noise_multiplier=1e-3, clipping_norm=1e6, num_sampled_clients=3
    )
    grid = FakeGrid({n: client(n, change=plan_only(method)) for n in (1, 2, 3)})
    with pytest.raises(FedcoreError, match=message):
        wrapped.start(grid, to_arrays(adapter(0)), num_rounds=2)


def plan_only(method):
    """Clients that train what the first round's plan says and send the rest as it was."""
    trains = create_method(method).plan(0).trains

    def change(tensors):
        if "A" in trains:
            return tensors
        return {**tensors, A: adapter(0)[A]}

    return change


def test_an_fp64_adapter_stays_fp64():
    strategy = quiet()
    start = adapter(0, dtype=torch.float64)
    result, _ = run(strategy, rounds=2, initial=start)
    assert strategy.state.row.dtype == torch.float64
    expected = start
    for _ in range(2):
        parts = [trained(n, expected) for n in (1, 2, 3)]
        expected = {
            k: sum(n / 6 * p[k] for n, p in zip((1, 2, 3), parts, strict=True)) for k in start
        }
    for key, tensor in from_arrays(result.arrays).items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, expected[key], rtol=1e-13, atol=1e-13)

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.data.rows import tensors_from_row
from fedcore.errors import FedcoreError
from fedcore.methods import create_method
from fedcore.methods.base import Broadcast, Method
from fedcore.methods.requirements import EXCHANGES, methods_meeting, of_family
from fedcore.training.base_identity import identity_of
from fedcore.training.live_adapter import live_adapter
from fedcore.training.trainer_client import FederatedClient
from fedcore_kernels.layout import FactorLayout
from tests.training.trainer_rounds import EXAMPLES, gram_llama, lora_bert, trainer
from tests.transports.nvflare_stand_in import PARTS, install
from tests.tuners.tiny import bert

install()

from nvflare.app_common.abstract.fl_model import FLModel  # noqa: E402

from fedcore.engines import nvflare  # noqa: E402
from fedcore.transports.nvflare import AdapterPersistor, FedLoRAAggregator  # noqa: E402

BUILD: Mapping[str, Callable[[], Any]] = {
    "fedit": lora_bert,
    "rolora": lora_bert,
    "fedsa": lora_bert,
    "florg": gram_llama,
    "florg.whitened": gram_llama,
}
WEIGHTS = {"site-1": 6.0, "site-2": 10.0}
LORA_METHODS = [type(m) for m in methods_meeting((EXCHANGES, of_family("lora")))]


def random_row(layout: FactorLayout, seed: int) -> torch.Tensor:
    """Numbers where ``layout`` has tensors, zeros between them."""
    full = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    row = torch.zeros(layout.size)
    for slot in layout:
        layout.view(row, slot).copy_(layout.view(full, slot))
    return row


def cohort_of(
    sent: FactorLayout,
    rows: torch.Tensor,
    weights: Sequence[float],
    clients: tuple[str, ...],
    round: int,
) -> Cohort:
    shape = (len(clients), len(sent.modules))
    return Cohort(
        sent,
        rows,
        torch.tensor(weights, dtype=torch.float64),
        clients,
        round,
        torch.full(shape, 3),
        torch.ones(*shape, dtype=torch.float64),
    )


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str], str]:
    """The folder of a method's initial adapter, away from zero."""

    def build(method: str) -> str:
        adapter = live_adapter(BUILD[method]())
        layout = adapter.layout()
        noise = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
        moved = adapter.with_row(adapter.to_row(layout) + 0.1 * noise, layout)
        return str(write_adapter(moved, tmp_path / "start"))

    return build


def upload(aggregator: FedLoRAAggregator, client: str) -> Any:
    """What ``client`` sends in the aggregator's round: the plan's part, at random."""
    state = aggregator.state
    sent = create_method(aggregator.method).upload_layout(state.layout, state.round)
    seed = 10 * state.round + int(client[-1])
    row = random_row(sent, seed)
    keys = read_adapter(aggregator.adapter).keys
    params = {keys[name]: t.numpy() for name, t in tensors_from_row(row, sent).items()}
    known = {
        "params_type": "FULL",
        "params": params,
        "metrics": {"loss": float(client[-1]), "note": "text"},
        "current_round": state.round,
        "meta": {"client_name": client, "NUM_STEPS_CURRENT_ROUND": WEIGHTS[client]},
    }
    return FLModel(**known)


def expected(aggregator: FedLoRAAggregator) -> torch.Tensor:
    """The method's own result of what :func:`upload` sends."""
    state, method = aggregator.state, create_method(aggregator.method)
    sent = method.upload_layout(state.layout, state.round)
    rows = [random_row(sent, 10 * state.round + int(client[-1])) for client in WEIGHTS]
    cohort = cohort_of(sent, torch.stack(rows), list(WEIGHTS.values()), tuple(WEIGHTS), state.round)
    return method.aggregate(cohort, Broadcast(state.layout, state.row)).row


@pytest.mark.parametrize("method", ["fedit", "rolora", "fedsa", "florg", "florg.whitened"])
def test_rounds_give_what_the_method_gives_in_any_order_of_arrival(
    start: Callable[[str], str], method: str
) -> None:
    one, other = (FedLoRAAggregator(start(method), method) for _ in range(2))
    for _ in range(3):
        wanted = expected(one)
        for client in WEIGHTS:
            one.accept_model(upload(one, client))
        for client in reversed(WEIGHTS):
            other.accept_model(upload(other, client))
        result, again = one.aggregate_model(), other.aggregate_model()
        assert torch.equal(one.state.row, wanted)
        keys = read_adapter(one.adapter).to_peft().keys()
        assert result.params.keys() == keys
        assert all(np.array_equal(result.params[key], again.params[key]) for key in keys)
        served = AdapterState.from_peft(
            {key: torch.from_numpy(value) for key, value in result.params.items()},
            read_adapter(one.adapter).config,
        )
        assert torch.equal(served.to_row(one.state.layout), wanted)
        assert str(result.params_type.value) == "FULL"
        assert result.metrics == {"loss": pytest.approx((6 * 1 + 10 * 2) / 16)}
    assert one.state.round == 3


def change(key: str, value: Any) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        name = next(name for name in model.params if key in name)
        changed = value(model.params[name]) if callable(value) else value
        model.params = {**model.params, name: changed}
        return model

    return apply


def with_fields(**fields: Any) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        for name, value in fields.items():
            setattr(model, name, value)
        return model

    return apply


def without(key: str) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        model.params = {name: v for name, v in model.params.items() if key not in name}
        return model

    return apply


def frozen(value: float) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        name = next(name for name in model.params if "lora_B" in name)
        extra = {name.replace("lora_B", "lora_A"): np.full((3, 24), value, np.float32)}
        model.params = {**model.params, **extra}
        return model

    return apply


REFUSALS: list[tuple[Callable[[Any], Any], str]] = [
    (change("lora_B", lambda v: v * np.nan), r"\.B holds 72 values that are not finite"),
    (change("lora_B", lambda v: v[:, :1]), r"lora_B.* has shape \(24, 1\)"),
    (change("lora_B", lambda v: v.astype(np.int64)), r"has dtype torch.int64; a float dtype"),
    (change("lora_B", "text"), r"lora_B.weight is a str, not a tensor"),
    (without("classifier.weight"), r"classifier.weight is missing"),
    (frozen(1.0), r"lora_A.weight is frozen in this round and differs from the broadcast"),
    (with_fields(current_round=5), r"its upload is for round 5"),
    (with_fields(params_type="DIFF"), r"send FULL ones"),
    (with_fields(meta={"client_name": "site-2"}), r"NUM_STEPS_CURRENT_ROUND = None; pass"),
    (
        with_fields(meta={"client_name": "site-2", "NUM_STEPS_CURRENT_ROUND": -1}),
        r"its weight is -1",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSALS)
def test_a_bad_upload_is_refused_by_name_or_dropped(
    start: Callable[[str], str], spoil: Callable[[Any], Any], message: str
) -> None:
    folder = start("rolora")
    for on_invalid in ("raise", "drop"):
        aggregator = FedLoRAAggregator(folder, "rolora", on_invalid=on_invalid)  # type: ignore[arg-type]
        before = aggregator.state
        aggregator.accept_model(upload(aggregator, "site-1"))
        aggregator.accept_model(spoil(upload(aggregator, "site-2")))
        if on_invalid == "raise":
            with pytest.raises(FedcoreError, match=f"round 0: client site-2: .*{message}"):
                aggregator.aggregate_model()
            assert aggregator.state is before
        else:
            aggregator.aggregate_model()
            (dropped,) = aggregator.state.record["dropped"]
            assert dropped["client"] == "site-2"
            alone = upload(FedLoRAAggregator(folder, "rolora"), "site-1").params
            key = next(key for key in alone if "lora_B" in key)
            np.testing.assert_array_equal(aggregator.global_params()[key], alone[key])


def test_the_whole_adapter_may_be_sent_where_the_rest_is_unchanged(
    start: Callable[[str], str],
) -> None:
    plain, whole = (FedLoRAAggregator(start("rolora"), "rolora") for _ in range(2))
    for client in WEIGHTS:
        plain.accept_model(upload(plain, client))
        model = upload(whole, client)
        model.params = {**whole.global_params(), **model.params}
        whole.accept_model(model)
    plain.aggregate_model()
    whole.aggregate_model()
    assert torch.equal(plain.state.row, whole.state.row)


def test_private_factors_do_not_reach_the_state(start: Callable[[str], str]) -> None:
    aggregator = FedLoRAAggregator(start("fedsa"), "fedsa")
    model = upload(aggregator, "site-1")
    model.params = {**aggregator.global_params(), **model.params}
    aggregator.accept_model(model)
    with pytest.raises(FedcoreError, match=r"client site-1: unexpected tensor .*lora_B.weight"):
        aggregator.aggregate_model()


def test_a_round_without_uploads_keeps_the_state_and_says_so(
    start: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    aggregator = FedLoRAAggregator(start("fedit"))
    monkeypatch.setattr(aggregator, "warning", said.append)
    before = aggregator.state.row.clone()
    result = aggregator.aggregate_model()
    assert torch.equal(aggregator.state.row, before)
    assert (aggregator.state.round, result.metrics) == (1, None)
    assert said == ["round 0: no valid upload: the global state is kept"]


def test_a_client_that_reports_twice_is_refused(start: Callable[[str], str]) -> None:
    aggregator = FedLoRAAggregator(start("fedit"))
    for _ in range(2):
        aggregator.accept_model(upload(aggregator, "site-1"))
    with pytest.raises(FedcoreError, match="client site-1: it reported twice"):
        aggregator.aggregate_model()
    aggregator.accept_model(upload(aggregator, "site-1"))
    aggregator.reset_stats()
    aggregator.accept_model(upload(aggregator, "site-1"))
    aggregator.aggregate_model()


def test_references_to_files_are_read(start: Callable[[str], str]) -> None:
    class Reference:
        def __init__(self, value: Any) -> None:
            self.value = value

        def materialize(self) -> torch.Tensor:
            return torch.from_numpy(self.value)

    aggregator = FedLoRAAggregator(start("fedit"))
    wanted = expected(aggregator)
    for client in WEIGHTS:
        model = upload(aggregator, client)
        model.params = {key: Reference(value) for key, value in model.params.items()}
        aggregator.accept_model(model)
    aggregator.aggregate_model()
    assert torch.equal(aggregator.state.row, wanted)


def test_a_job_goes_on_from_its_checkpoints(start: Callable[[str], str], tmp_path: Path) -> None:
    folder, kept = start("rolora"), str(tmp_path / "kept")
    straight = FedLoRAAggregator(folder, "rolora")
    for t in range(2):
        stopped = FedLoRAAggregator(folder, "rolora", checkpoints=kept)
        assert stopped.state.round == t
        for aggregator in (straight, stopped):
            for client in WEIGHTS:
                aggregator.accept_model(upload(aggregator, client))
            aggregator.aggregate_model()
    assert torch.equal(straight.state.row, stopped.state.row)
    persistor = AdapterPersistor(folder, str(tmp_path / "final"), checkpoints=kept)
    served, wanted = persistor.load_model(None)["weights"], straight.global_params()
    assert all(np.array_equal(served[key], value) for key, value in wanted.items())
    with pytest.raises(
        FedcoreError, match="is of another adapter than the one that the run starts from"
    ):
        FedLoRAAggregator(start("florg"), "florg", checkpoints=kept)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ce_lora", {}, "ce_lora sends statistics of the clients' examples"),
        ("local_only", {}, "local_only exchanges nothing"),
        ("florg", {}, "adapter: florg.truncated is not for adapters of"),
        ("fedit", {"on_invalid": "ignore"}, "on_invalid is 'ignore'"),
    ],
)
def test_what_an_aggregator_cannot_do_is_refused(
    start: Callable[[str], str], method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedcoreError, match=message):
        FedLoRAAggregator(start("fedit"), method, **options)


@pytest.mark.parametrize("method", ["flora", "fedex", "florist"])
def test_a_method_that_updates_base_weights_is_refused_before_anyone_trains(
    start: Callable[[str], str], method: str
) -> None:
    with pytest.raises(FedcoreError, match=f"{method} updates base weights"):
        FedLoRAAggregator(start("fedit"), method)
    with pytest.raises(FedcoreError, match=f"robust_median with host {method} updates base"):
        FedLoRAAggregator(start("fedit"), "robust_median", {"host": method})


@pytest.mark.parametrize("method", LORA_METHODS, ids=lambda method: method.name)
def test_methods_say_whether_they_update_base_weights(method: type[Method]) -> None:
    adapter = live_adapter(lora_bert())
    layout, made = adapter.layout(), method()
    sent = made.upload_layout(layout, 0)
    rows = [random_row(sent, seed) for seed in range(1, 6)]
    cohort = cohort_of(sent, torch.stack(rows), (1.0, 2.0, 3.0, 4.0, 5.0), tuple("abcde"), 0)
    result = made.aggregate(cohort, Broadcast(layout, random_row(layout, 0)))
    assert bool(result.residual) == made.capabilities.updates_base


def test_the_stand_ins_take_what_nvflare_takes() -> None:
    """Against NVFlare's own classes where it is installed."""

    def arguments(thing: Any) -> list[tuple[str, Any]]:
        found = signature(thing).parameters.values()
        return [(p.name, p.default) for p in found]

    for name, content in PARTS.items():
        real = importlib.import_module(name)
        for item, ours in content.items():
            theirs = getattr(real, item)
            if item == "ParamsType":
                assert {p.name: p.value for p in ours} == {p.name: p.value for p in theirs}
                continue
            assert arguments(ours) == arguments(theirs), item
            for method in vars(ours):
                if not method.startswith("_"):
                    assert arguments(getattr(ours, method)) == arguments(getattr(theirs, method))
            assert getattr(ours, "__abstractmethods__", set()) <= {
                *getattr(theirs, "__abstractmethods__", set()),
                *vars(theirs),
            }


def test_a_job_is_written_as_the_arguments_of_the_aggregator(start: Callable[[str], str]) -> None:
    arguments = {
        "adapter": start("florg"),
        "method": "florg",
        "options": {"align": False},
        "weight_key": "examples",
        "on_invalid": "drop",
        "checkpoints": None,
    }
    aggregator = FedLoRAAggregator(**arguments)  # type: ignore[arg-type]
    assert {name: getattr(aggregator, name) for name in arguments} == arguments


def test_a_job_starts_from_an_adapter_and_saves_one(
    start: Callable[[str], str], tmp_path: Path
) -> None:
    first = read_adapter(start("florg"))
    persistor = AdapterPersistor(str(tmp_path / "start"), str(tmp_path / "final"))
    model = persistor.load_model(None)
    assert model["weights"].keys() == first.to_peft().keys()
    layout = first.layout()
    moved = first.with_row(first.to_row(layout) + 1, layout)
    model["weights"] = {key: tensor.numpy() for key, tensor in moved.to_peft().items()}
    persistor.save_model(model, None)
    found = read_adapter(tmp_path / "final")
    assert torch.equal(found.to_row(layout), moved.to_row(layout))
    assert found.config == first.config


def test_statistics_take_the_place_of_factors_where_a_method_sends_them(
    tmp_path: Path, start: Callable[[str], str]
) -> None:
    method = create_method("florg.whitened")
    aggregator = FedLoRAAggregator(start("florg.whitened"), "florg.whitened")
    layout, before = aggregator.state.layout, aggregator.state.row.clone()
    sent = method.upload_layout(layout, 0)
    rows = []
    for site in EXAMPLES:
        model = gram_llama()
        client = FederatedClient(model, method="florg.whitened")
        served = FLModel(params_type="FULL", params=aggregator.global_params(), current_round=0)
        nvflare.receive(client, served)
        trainer(model, tmp_path, client, site).train()
        answer = nvflare.reply(client)
        answer.meta["client_name"] = site
        aggregator.accept_model(answer)
        made = method.prepare_upload(
            live_adapter(model).to_row(layout), layout, Broadcast(layout, before), 0
        )
        rows.append(made.row)
    cohort = cohort_of(sent, torch.stack(rows), list(EXAMPLES.values()), tuple(EXAMPLES), 0)
    wanted = method.aggregate(cohort, Broadcast(layout, before))
    aggregator.aggregate_model()
    assert torch.equal(aggregator.state.row, wanted.row)
    assert not torch.equal(aggregator.state.row, before)


@pytest.mark.parametrize(("begins", "total", "expected"), [(0, 5, 5), (2, 5, 7), (0, None, None)])
def test_a_client_knows_how_many_rounds_there_are(
    start: Callable[[str], str], begins: int, total: int | None, expected: int | None
) -> None:
    """A job that starts again at round 2 and runs 5 more has 7."""
    served = FedLoRAAggregator(start("fedit"), "fedit").global_params()
    rounds: dict[str, Any] = {
        "current_round": begins,
        "start_round": begins,
        "total_rounds": total,
    }
    client = FederatedClient(lora_bert(), method="fedit")
    nvflare.receive(client, FLModel(params_type="FULL", params=served, **rounds))
    if expected is not None:
        assert client.total_rounds == expected
        return
    with pytest.raises(FedcoreError, match="does not say how many rounds"):
        _ = client.total_rounds


def test_trainers_take_part(tmp_path: Path, start: Callable[[str], str]) -> None:
    """Receive, train, reply, for both phases of RoLoRA."""
    aggregator = FedLoRAAggregator(start("rolora"), "rolora")
    clients = {}
    for site in EXAMPLES:
        model = lora_bert()
        clients[site] = (model, FederatedClient(model, method="rolora"))
    for t, trained in enumerate(("lora_B", "lora_A")):
        before = aggregator.global_params()
        replies = []
        for site, (model, client) in clients.items():
            sent = FLModel(params_type="FULL", params=before, current_round=t)
            nvflare.receive(client, sent)
            trainer(model, tmp_path, client, site).train()
            answer = nvflare.reply(client)
            assert answer.meta["NUM_STEPS_CURRENT_ROUND"] == EXAMPLES[site]
            assert {trained in key or "classifier" in key for key in answer.params} == {True}
            own = live_adapter(model).to_peft()
            assert all(torch.equal(value, own[key]) for key, value in answer.params.items())
            # A job for PyTorch leaves out whatever is no tensor.
            assert all(isinstance(value, torch.Tensor) for value in answer.params.values())
            answer.meta["client_name"] = site
            replies.append(answer)
            aggregator.accept_model(answer)
        after = aggregator.aggregate_model().params
        for key, value in after.items():
            if key not in replies[0].params:
                np.testing.assert_array_equal(value, before[key])
                continue
            mean = (6 * replies[0].params[key] + 10 * replies[1].params[key]) / 16
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-7)
            assert not np.array_equal(value, before[key])


def test_a_trainer_on_another_base_does_not_train(
    tmp_path: Path, start: Callable[[str], str]
) -> None:
    folder = start("fedit")
    identity_of(bert()).save(folder)
    served = AdapterPersistor(folder, str(tmp_path / "final")).load_model(None)

    def received(model: Any, change: float = 0.0) -> FederatedClient:
        params = {key: value + np.float32(change) for key, value in served["weights"].items()}
        client = FederatedClient(model, method="fedit")
        sent = FLModel(params_type="FULL", params=params, current_round=0, meta=served["meta"])
        nvflare.receive(client, sent)
        return client

    foreign = lora_bert()
    with torch.no_grad():
        foreign.get_base_model().bert.pooler.dense.weight.add_(1)
    with pytest.raises(FedcoreError, match=r"in its weights, first bert\.pooler\.dense\.weight"):
        received(foreign)
    with pytest.raises(FedcoreError, match=r"not what its message announces: .*leave out filters"):
        received(lora_bert(), change=1e-3)
    aggregator = FedLoRAAggregator(folder, "fedit", plain_clients=False)
    for site in EXAMPLES:
        client = received(model := lora_bert())
        trainer(model, tmp_path, client, site).train()
        answer = nvflare.reply(client)
        answer.meta["client_name"] = site
        aggregator.accept_model(answer)
    assert aggregator.aggregate_model().meta["fedcore"]
    assert aggregator.state.record["dropped"] == []
    assert aggregator.state.repeating == tuple(sorted(EXAMPLES))


def test_identical_uploads_are_refused_unless_they_are_accepted(
    start: Callable[[str], str],
) -> None:
    folder = start("florg")

    def answer(**options: Any) -> Any:
        aggregator = FedLoRAAggregator(folder, "florg", **options)
        for client in WEIGHTS:
            one = upload(aggregator, "site-1")
            one.meta["client_name"] = client
            aggregator.accept_model(one)
        return aggregator.aggregate_model()

    with pytest.raises(FedcoreError, match="all 2 uploads are identical"):
        answer()
    assert answer(allow_identical_uploads=True).current_round == 0


def test_an_fp64_adapter_stays_fp64(tmp_path: Path) -> None:
    adapter = live_adapter(lora_bert().double())
    folder = str(write_adapter(adapter, tmp_path / "start"))
    aggregator = FedLoRAAggregator(folder, "fedit")
    assert aggregator.state.row.dtype == torch.float64
    for client in WEIGHTS:
        aggregator.accept_model(upload(aggregator, client))
    answer = aggregator.aggregate_model()
    assert {array.dtype for array in answer.params.values()} == {np.dtype("float64")}


class Explodes:
    """A reference to a file that cannot be read, in a way that nobody thought of."""

    def materialize(self) -> torch.Tensor:
        raise MemoryError("the data of a client: 42")


WEIGHT_KEY = "NUM_STEPS_CURRENT_ROUND"


def with_meta(**fields: Any) -> Callable[[Any], Any]:
    return with_fields(meta={"client_name": "site-2", WEIGHT_KEY: 10.0, **fields})


UNREADABLE: list[tuple[Callable[[Any], Any], str]] = [
    (change("lora_B", Explodes()), r"it cannot be read \(MemoryError\)"),
    (with_fields(params=3), r"it cannot be read \(AttributeError\)"),
    (with_fields(params={3: torch.zeros(1)}), r"it cannot be read \(AttributeError\)"),
    (with_fields(metrics=[1.0]), r"it cannot be read \(TypeError\)"),
    (with_fields(metrics={"loss": float("nan")}), "its loss is not a finite number"),
    (with_fields(metrics={"loss": 10**400}), "its loss is not a finite number"),
    (with_fields(current_round=np.array([0, 0])), r"it cannot be read \(ValueError\)"),
    (with_meta(**{WEIGHT_KEY: 10**400}), f"its {WEIGHT_KEY} is not a finite number"),
    (with_meta(**{WEIGHT_KEY: 1e308}), "its weight is too large: more than 2"),
    (with_meta(**{WEIGHT_KEY: True}), "pass its weight"),
    (change("lora_B", lambda v: v.astype(object)), "is a ndarray, not a tensor"),
]


@pytest.mark.parametrize(("spoil", "message"), UNREADABLE)
def test_whatever_one_upload_holds_the_round_is_that_of_the_others(
    start: Callable[[str], str], spoil: Callable[[Any], Any], message: str
) -> None:
    folder = start("rolora")
    aggregator = FedLoRAAggregator(folder, "rolora", on_invalid="drop")
    aggregator.accept_model(upload(aggregator, "site-1"))
    aggregator.accept_model(spoil(upload(aggregator, "site-2")))
    result = aggregator.aggregate_model()
    (dropped,) = aggregator.state.record["dropped"]
    assert dropped["client"] == "site-2"
    assert re.search(message, dropped["reason"])
    assert "42" not in dropped["reason"]
    alone = FedLoRAAggregator(folder, "rolora")
    alone.accept_model(upload(alone, "site-1"))
    assert result.metrics == alone.aggregate_model().metrics
    assert torch.equal(aggregator.state.row, alone.state.row)


def test_a_name_that_does_not_print_is_recorded_escaped(start: Callable[[str], str]) -> None:
    aggregator = FedLoRAAggregator(start("rolora"), "rolora", on_invalid="drop")
    nasty = "\x1b]0;owned\x07\u202e\n"
    aggregator.accept_model(with_meta(client_name=nasty)(upload(aggregator, "site-2")))
    aggregator.aggregate_model()
    assert list(aggregator.state.record["clients"]) == [r"\x1b]0;owned\x07\u202e\n"]


def test_a_result_that_is_too_large_leaves_the_state(
    start: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    aggregator = FedLoRAAggregator(start("fedit"), "product_svd")
    monkeypatch.setattr(aggregator, "warning", said.append)
    before = aggregator.state.row.clone()
    aggregator.accept_model(upload(aggregator, "site-1"))
    aggregator.accept_model(
        change("lora_B", lambda v: np.full_like(v, 3e38))(
            change("lora_A", lambda v: np.full_like(v, 3e38))(upload(aggregator, "site-2"))
        )
    )
    aggregator.aggregate_model()
    assert aggregator.state.round == 1
    assert torch.equal(aggregator.state.row, before)
    (warning,) = said
    assert "the largest uploads: site-2 (norm " in warning


def test_weights_are_capped_or_the_servers_own(start: Callable[[str], str]) -> None:
    folder = start("fedit")
    rows = []
    for options, claim in (
        ({"weighting": "uniform"}, 1e12),
        ({"weighting": "uniform"}, None),
        ({"largest_share": 0.5}, 1e12),
    ):
        aggregator = FedLoRAAggregator(folder, "fedit", **options)  # type: ignore[arg-type]
        aggregator.accept_model(upload(aggregator, "site-1"))
        aggregator.accept_model(with_meta(**{WEIGHT_KEY: claim})(upload(aggregator, "site-2")))
        assert aggregator.aggregate_model().metrics == {"loss": pytest.approx(1.5)}
        rows.append(aggregator.state.row)
    assert torch.equal(rows[0], rows[1])
    torch.testing.assert_close(rows[0], rows[2])
    with pytest.raises(FedcoreError, match="unknown weighting of FedLoRAAggregator 'all'"):
        FedLoRAAggregator(folder, weighting="all")  # type: ignore[arg-type]


def test_means_of_metrics_do_not_overflow(start: Callable[[str], str]) -> None:
    aggregator = FedLoRAAggregator(start("fedit"))
    for client in WEIGHTS:
        model = upload(aggregator, client)
        model.metrics = {"loss": 1.7e308}
        aggregator.accept_model(model)
    assert aggregator.aggregate_model().metrics == {"loss": pytest.approx(1.7e308)}


def test_a_start_of_a_rank_that_no_update_can_have_is_refused(tmp_path: Path) -> None:
    tensors = {"m.lora_A.weight": torch.ones(5, 3), "m.lora_B.weight": torch.ones(4, 5)}
    folder = write_adapter(AdapterState.from_peft(tensors, {"r": 5, "lora_alpha": 5}), tmp_path)
    with pytest.raises(FedcoreError, match="adapter: module m has rank 5, its update has at most"):
        FedLoRAAggregator(str(folder))

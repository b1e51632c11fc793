"""What holds of every method, behind every transport that takes it.

A law is stated once and asked of each method that claims it. What a method is for, its defining
identity, is in the file of that method.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import count
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort
from fedcore.data.low_rank import LowRank
from fedcore.data.rows import row_from_tensors, tensors_from_row
from fedcore.errors import FedcoreError
from fedcore.federation.server_round import OpenRound
from fedcore.methods import METHODS, Broadcast, Method, create_method
from fedcore.methods.base import EMPTY_ROUND, FACTORS
from fedcore_kernels.layout import FactorLayout
from tests.property.method_rounds import client_rows, random_row
from tests.property.mixtures import random_statistics
from tests.property.transports import (
    RANK,
    TRANSPORTS,
    Direct,
    Federation,
    Outcome,
    Sent,
    start_adapter,
)


@dataclass(frozen=True, eq=False)
class Case:
    """A method with some of its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def method(self) -> Method:
        return create_method(self.name, **self.options)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{name}={v}" for name, v in self.options.items())])


DEFAULTS = tuple(Case(method.name) for method in METHODS)
OTHER_OPTIONS = (
    Case("florg.truncated", {"align": False}),
    Case("product_svd", {"split": "balanced", "align": True}),
    Case("fedex", {"residual_rank": 2}),
    Case("florist", {"tau": 1.0}),
    Case("fedrot", {"strength": 1.0, "reference": "both"}),
    Case("flora_na", {"align": True, "affine": True, "sweeps": 20}),
    Case("ce_lora", {"similarity": "cka", "weight_by_examples": True}),
    Case("robust_clip", {"host": "fedit"}),
    Case("robust_krum", {"faulty": 0}),
    Case("robust_geomedian", {"host": "fedex"}),
)
CASES = (*(c for c in DEFAULTS if c.method.capabilities.population == "clients"), *OTHER_OPTIONS)

BY_ROUND = ("rolora", "fedrot")
"""What these do depends on the round."""


def takes(transport: str, method: Method) -> bool:
    """Whether a server behind ``transport`` can run ``method``."""
    claims = method.capabilities
    if claims.population != "clients":
        return False
    # Folders carry an adapter and uploads alone; an aggregator of NVFlare answers with one adapter.
    carries_one_adapter = method.family != "none" and not claims.wants_features
    return {
        "folders": carries_one_adapter,
        "nvflare": carries_one_adapter and not claims.updates_base,
        "direct from round 1": method.name in BY_ROUND,
    }.get(transport, True)


def pairs(
    transports: Iterable[str], cases: Iterable[Case] = CASES, every_option: bool = False
) -> Any:
    """A mark: the cases with each of the transports that take them.

    Args:
        every_option: also methods with other options behind folders and messages; for most laws
            it is enough that these give the same bits.
    """
    taken = [
        pytest.param(case, transport, id=f"{case}-{transport}")
        for case in cases
        for transport in transports
        if takes(transport, case.method)
        and (case in DEFAULTS or transport in IN_MEMORY or every_option)
    ]
    return pytest.mark.parametrize(("case", "transport"), taken)


DIRECT = ("direct", "direct from round 1")
IN_MEMORY = (*DIRECT, "local")
CARRIED = tuple(transport for transport in TRANSPORTS if transport not in DIRECT)

adapter = cache(start_adapter)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what survives a machine that dies nor what Flower logs is judged here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)


@pytest.fixture(scope="module")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("laws")
    return (root / str(n) for n in count())


@pytest.fixture
def folder(_folders: Iterator[Path]) -> Path:
    """An empty folder; ``tmp_path`` looks at all that it made before, of which there are many."""
    path = next(_folders)
    path.mkdir()
    return path


def opened(
    case: Case,
    transport: str,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Federation:
    start = adapter(case.method.family, dtype)
    return TRANSPORTS[transport](case.method, start, folder, **settings)


def uploads_of(
    federation: Federation, weights: Sequence[float], statistics: bool = True
) -> list[Sent]:
    """Clients ``node-1, node-2, ...``, each with a model of its own."""
    method, previous, t = federation.method, federation.previous, federation.state.round
    tells = statistics and method.capabilities.wants_features and t == 0
    return [
        Sent(
            f"node-{n}",
            client_rows(method, previous, t, seed=100 * t + n)[1],
            weight,
            statistics=random_statistics(n) if tells else {},
        )
        for n, weight in enumerate(weights, start=1)
    ]


def least_clients(method: Method, clients: int = 1) -> int:
    """``clients``, or as many as the method's rule needs."""
    while method.rule is not None:
        try:
            method.rule.check_clients(clients)
        except FedcoreError:
            clients += 1
        else:
            break
    return clients


@dataclass(frozen=True)
class Played:
    """The rounds of clients of unequal weights under the method itself.

    Attributes:
        uploads: by round.
        outcomes: by round.
        start: what the clients of the first round start from.
        model: after the first round.
    """

    uploads: tuple[list[Sent], ...]
    outcomes: tuple[Outcome, ...]
    start: Broadcast
    model: Tensor


@cache
def played(
    case: Case,
    transport: str = "direct",
    *,
    dtype: torch.dtype = torch.float64,
    rounds: int = 1,
    statistics: bool = True,
) -> Played:
    """The rounds that transports are measured by: three clients, or as many as the method needs."""
    method = opened(case, transport, Path(), dtype)
    start = method.previous
    weights = [3.0, 0.7, 1.9, 1.0, 2.2][: least_clients(case.method, 3)]
    uploads, outcomes, models = [], [], []
    for _ in range(rounds):
        uploads.append(uploads_of(method, weights, statistics))
        outcomes.append(method.play(uploads[-1]))
        models.append(model_of(method, outcomes[-1]))
    return Played(tuple(uploads), tuple(outcomes), start, models[0])


def twin(transport: str) -> str:
    """The direct way in the rounds of ``transport``."""
    return transport if transport in DIRECT else "direct"


def model(
    layout: FactorLayout, row: Tensor, family: str, residual: Mapping[str, LowRank] | None = None
) -> Tensor:
    """The updates of all modules and the dense tensors of ``row``, one vector in fp64."""
    parts = []
    for module in layout.modules:
        factors = {
            name: layout.view(row, layout.by_name[f"{module}.{name}"]).double()
            for name in FACTORS[family]
        }
        core = factors.get("R", torch.eye(RANK, dtype=torch.float64))
        update = factors.get("B", factors["A"]).T @ core @ factors["A"]
        if residual and module in residual:
            update = update + residual[module].outer.double().T @ residual[module].inner.double()
        parts.append(update.flatten())
    parts += [layout.view(row, slot).double().flatten() for slot in layout.dense_slots]
    return torch.cat(parts)


def model_of(federation: Federation, outcome: Outcome) -> Tensor:
    """The model that the clients have after a round, but for what is their own."""
    family = federation.method.family
    return model(federation.state.layout, outcome.row, family, outcome.residual)


def sent_model(federation: Federation, sent: Sent) -> Tensor:
    """The model that an upload of the coming round describes."""
    method, previous, t = federation.method, federation.previous, federation.state.round
    if method.family == "gram" and method.capabilities.uploads == "statistics":
        number = int(sent.client.removeprefix("node-"))
        row, _ = client_rows(method, previous, t, seed=100 * t + number)
    else:
        row = previous.layout.scatter(previous.row, federation.upload_layout, sent.row)
    return model(previous.layout, row, method.family)


def assert_close(got: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    gap, size = float((got - expected).norm()), float(expected.norm())
    assert gap <= relative * size, f"off by {gap / size:.1e}"


def assert_same_bits(got: Outcome, expected: Outcome) -> None:
    assert got.row.dtype == expected.row.dtype
    assert torch.equal(got.row, expected.row)
    assert got.residual.keys() == expected.residual.keys()
    for module, part in got.residual.items():
        assert all(map(torch.equal, part, expected.residual[module]))
    assert got.personal.keys() == expected.personal.keys()
    for client, row in got.personal.items():
        assert torch.equal(row, expected.personal[client])
    assert got.weights == expected.weights
    assert got.flags == expected.flags


def assert_refused(federation: Federation, uploads: Sequence[Sent], message: str) -> None:
    """A round of ``uploads`` is refused and leaves the state as it was."""
    before, row = federation.state, federation.state.row.clone()
    with pytest.raises(FedcoreError, match=message):
        federation.play(uploads)
    assert federation.state is before
    assert torch.equal(before.row, row)


def cohort_of(federation: Federation, uploads: Sequence[Sent]) -> Cohort:
    assert isinstance(federation, Direct)
    return federation.cohort(uploads)


@pairs(CARRIED, every_option=True)
def test_every_transport_gives_the_bits_of_the_method(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder, torch.float32)
    method = played(case, dtype=torch.float32, rounds=2)
    for uploads, expected in zip(method.uploads, method.outcomes, strict=True):
        assert_same_bits(federation.play(uploads), expected)
    assert federation.state.round == 2


@pairs(DIRECT)
def test_a_method_gives_what_it_claims_and_no_more(case: Case, transport: str) -> None:
    claims, (outcome,) = case.method.capabilities, played(case, transport).outcomes
    assert outcome.row.isfinite().all()
    assert bool(outcome.residual) == claims.updates_base
    if claims.personalised:
        assert outcome.personal or case.method.plan(0).keeps
    if outcome.personal:
        assert claims.personalised
        assert outcome.personal.keys() == outcome.weights.keys()


@pairs(DIRECT)
def test_nothing_is_written_to_and_what_did_not_change_is_as_it_was(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder)
    cohort = cohort_of(federation, played(case, transport).uploads[0])
    previous = federation.previous
    before = [tensor.clone() for tensor in (cohort.updates, cohort.weights, previous.row)]
    result = case.method.aggregate(cohort, previous)
    for now, then in zip((cohort.updates, cohort.weights, previous.row), before, strict=True):
        assert torch.equal(now, then)
    # Clients draw the adapter of a fresh start themselves, so that it is not sent.
    if not case.method.capabilities.restarts:
        names = {slot.name for slot in result.changed}
        rest = previous.layout.part(s.name for s in previous.layout if s.name not in names)
        rows = [previous.layout.gather(row, rest) for row in (result.row, previous.row)]
        assert torch.equal(*rows)


@pairs(TRANSPORTS)
def test_an_empty_round_keeps_the_state_and_says_so(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder, on_invalid="drop")
    before, t = federation.previous, federation.state.round
    uploads = played(case, twin(transport)).uploads[0][:2]
    broken = [replace(sent, row=sent.row * nan) for sent in uploads]
    outcome = federation.play([] if transport in DIRECT else broken)
    assert torch.equal(outcome.row, before.row)
    assert torch.equal(federation.state.row, before.row)
    assert outcome.flags == (EMPTY_ROUND,)
    assert not outcome.residual
    assert not outcome.personal
    assert not outcome.weights
    assert federation.state.round == t + 1


def model_of_one(federation: Federation, case: Case, transport: str, sent: Sent) -> Tensor:
    """The model after a round in which all clients are ``sent``."""
    if case.name == "florist" and case.options.get("tau") != 1.0:
        # The energy that it drops is missing from the model of a single client too.
        alone = opened(case, twin(transport), Path())
        return model_of(alone, alone.play([sent]))
    return sent_model(federation, sent)


@pairs(TRANSPORTS, [case for case in CASES if least_clients(case.method) == 1])
def test_one_client_keeps_its_model(case: Case, transport: str, folder: Path) -> None:
    federation = opened(case, transport, folder)
    sent = played(case, twin(transport)).uploads[0][0]
    expected = model_of_one(federation, case, transport, sent)
    outcome = federation.play([sent])
    assert_close(model_of(federation, outcome), expected)
    for row in outcome.personal.values():
        assert_close(row, sent.row)


@pairs(TRANSPORTS)
def test_equal_clients_keep_their_model_whatever_their_weights(
    case: Case, transport: str, folder: Path
) -> None:
    linear = case.method.capabilities.linear
    federation = opened(case, transport, folder, allow_identical_uploads=not linear)
    first, *others = played(case, twin(transport)).uploads[0]
    expected = model_of_one(federation, case, transport, first)
    outcome = federation.play([first, *(replace(sent, row=first.row) for sent in others)])
    assert_close(model_of(federation, outcome), expected)
    if linear:
        assert torch.equal(outcome.row, opened(case, twin(transport), Path()).play([first]).row)
    for row in outcome.personal.values():
        assert_close(row, first.row)


@pairs(CARRIED, [case for case in CASES if not case.method.capabilities.linear])
def test_identical_uploads_are_refused_where_a_mean_is_not_enough(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder)
    first, *others = played(case).uploads[0]
    identical = [first, *(replace(sent, row=first.row) for sent in others)]
    message = rf"all {len(identical)} uploads are identical.*pass allow_identical_uploads=True"
    assert_refused(federation, identical, message)


@pairs(CARRIED)
def test_the_order_of_arrival_changes_no_bit(case: Case, transport: str, folder: Path) -> None:
    federation = opened(case, transport, folder)
    (uploads,), (expected,) = played(case).uploads, played(case).outcomes
    assert_same_bits(federation.play([*uploads[1::2], *reversed(uploads[::2])]), expected)


@pairs(DIRECT)
def test_the_name_of_a_client_decides_nothing(case: Case, transport: str) -> None:
    federation, method = opened(case, transport, Path()), played(case, transport)
    (uploads,), (expected,) = method.uploads, method.outcomes
    other_names = dict(
        zip([s.client for s in uploads], [s.client for s in reversed(uploads)], strict=True)
    )
    outcome = federation.play([replace(s, client=other_names[s.client]) for s in uploads])
    assert_close(model_of(federation, outcome), method.model, 1e-8)
    for client, row in expected.personal.items():
        assert_close(outcome.personal[other_names[client]], row)


def counts_by_share(case: Case) -> bool:
    """Whether a client in two halves is the same client: rules judge every client as one, and
    CE-LoRA counts them unless it weights by examples.
    """
    if case.name == "ce_lora":
        return bool(case.options.get("weight_by_examples"))
    return case.method.rule is None


@pairs(TRANSPORTS)
def test_a_client_counts_by_its_share_of_the_weights(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder)
    # Data are compared relative to the median of all pairs, in which two halves count twice.
    method = played(case, twin(transport), statistics=False)
    (uploads,), (expected,) = method.uploads, method.outcomes
    others = [replace(sent, weight=7 * sent.weight) for sent in uploads]
    if counts_by_share(case):
        first = others[0]
        others[0] = replace(first, weight=0.25 * first.weight)
        others.append(replace(first, client="node-8", weight=0.75 * first.weight))
    others.append(Sent("node-9", 100 * uploads[0].row, 0.0))
    outcome = federation.play(others)
    assert outcome.dropped == ("node-9",)
    assert_close(model_of(federation, outcome), method.model, 1e-8)
    for client, row in expected.personal.items():
        assert_close(outcome.personal[client], row)


@pairs(TRANSPORTS, [case for case in CASES if case.method.capabilities.always_exact])
def test_an_exact_method_gives_the_mean_of_the_clients_models(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder)
    uploads = played(case, twin(transport)).uploads[0]
    shares = torch.tensor([sent.weight for sent in uploads], dtype=torch.float64)
    models = torch.stack([sent_model(federation, sent) for sent in uploads])
    outcome = federation.play(uploads)
    assert_close(model_of(federation, outcome), shares @ models / shares.sum(), 1e-12)


@pairs(DIRECT)
def test_the_mean_of_the_uploads_is_enough_for_linear_methods_alone(
    case: Case, transport: str
) -> None:
    federation, method = opened(case, transport, Path()), played(case, transport)
    cohort = cohort_of(federation, method.uploads[0])
    opening = OpenRound(case.method, federation.state, cohort.client_ids)
    mean = cohort.shares @ cohort.updates
    if case.method.capabilities.linear:
        closed = opening.close_on_mean(mean)
        torch.testing.assert_close(closed.state.row, method.outcomes[0].row, rtol=1e-10, atol=1e-12)
        return
    with pytest.raises(FedcoreError, match=f"{case.method.name} needs every upload"):
        opening.close_on_mean(mean)


@cache
def widened(case: Case) -> tuple[list[Sent], Outcome]:
    """Uploads in bf16, and what the method makes of their values in fp32."""
    method = opened(case, "direct", Path(), torch.float32)
    uploads = played(case, dtype=torch.float32, rounds=2).uploads[0]
    short = [replace(sent, row=sent.row.bfloat16()) for sent in uploads]
    return short, method.play([replace(sent, row=sent.row.float()) for sent in short])


@pairs(CARRIED)
def test_uploads_of_lower_precision_arrive_as_they_are(
    case: Case, transport: str, folder: Path
) -> None:
    short, expected = widened(case)
    assert_same_bits(opened(case, transport, folder, torch.float32).play(short), expected)


@pairs(DIRECT)
def test_uploads_of_lower_precision_lose_only_the_last_rounding(case: Case, transport: str) -> None:
    narrow = adapter(case.method.family, torch.float32)
    tensors = {key: tensor.double() for key, tensor in narrow.to_peft().items()}
    wide = AdapterState.from_peft(tensors, narrow.config)
    uploads = played(case, transport).uploads[0]
    for dtype in (torch.float32, torch.bfloat16):
        short = [replace(sent, row=sent.row.to(dtype)) for sent in uploads]
        federation, exact = (
            TRANSPORTS[transport](case.method, start, Path()) for start in (narrow, wide)
        )
        outcome = federation.play(short)
        expected = exact.play([replace(sent, row=sent.row.double()) for sent in short])
        assert outcome.row.dtype == torch.float32
        assert {part.outer.dtype for part in outcome.residual.values()} <= {torch.float32}
        assert_close(model_of(federation, outcome), model_of(exact, expected), 1e-5)
        for client, row in expected.personal.items():
            assert_close(outcome.personal[client].double(), row, 1e-5)


def is_whole(case: Case) -> bool:
    """Whether an upload is the whole adapter, as in a folder that was trained elsewhere."""
    layout = adapter(case.method.family).layout()
    whole = case.method.upload_layout(layout, 0) == layout and case.method.family != "none"
    return whole and case.method.capabilities.uploads == "factors"


SCALINGS: Sequence[Mapping[str, Any]] = (
    {"lora_alpha": 3},
    {"lora_alpha": 12},
    {"lora_alpha": 5, "use_rslora": True},
    {"lora_alpha": 1, "alpha_pattern": {"m1": 7}},
    {"lora_alpha": 2},
    {"lora_alpha": 9},
)
SCALED: Mapping[str, Mapping[str, float]] = {"lora": {"B": 1.0}, "gram": {"A": 0.5}}
"""By which power of a scaling a factor is divided so that the update stays what it is."""


@pairs(["direct"], [case for case in CASES if is_whole(case)])
def test_equal_updates_at_other_scalings_give_equal_results(case: Case, transport: str) -> None:
    method, start = case.method, adapter(case.method.family)
    layout, rows = start.layout(), []
    for shift in range(2):
        states = {}
        for n in range(least_clients(method, 3)):
            config = {**start.config, **SCALINGS[n + shift]}
            scaled = AdapterState.from_peft(start.to_peft(), config)
            row = random_row(layout, n)
            for slot in layout.factor_slots:
                power = SCALED[method.family].get(slot.factor, 0.0)
                layout.view(row, slot).div_(scaled.scaling[slot.module] ** power)
            states[f"node-{n}"] = scaled.with_row(row, layout)
        cohort = Cohort.from_states(states, {client: 1.0 + n for n, client in enumerate(states)})
        rows.append(method.aggregate(cohort, Broadcast(layout, start.to_row(layout))).row)
    assert_close(rows[0], rows[1])


@pairs(CARRIED)
def test_an_invalid_upload_is_refused_by_name_and_nothing_moves(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder)
    (uploads,), (expected,) = played(case).uploads, played(case).outcomes
    broken = [uploads[0], replace(uploads[1], row=uploads[1].row * inf), *uploads[2:]]
    assert_refused(federation, broken, r"round 0: client node-2: .* not finite, such as")
    assert_same_bits(federation.play(uploads), expected)


@pairs(CARRIED)
def test_an_invalid_upload_is_left_out_where_that_is_asked_for(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder, on_invalid="drop")
    (uploads,), (expected,) = played(case).uploads, played(case).outcomes
    outcome = federation.play([Sent("node-0", -uploads[0].row, -1.0), *uploads])
    assert outcome.dropped == ("node-0",)
    assert_same_bits(outcome, expected)


KINDS = [c for c in DEFAULTS if c.name in ("rolora", "florg.whitened", "fed_sb", "ce_lora")]
"""A method for each kind of upload: some factors, statistics, a core with and without the head."""


@pairs(CARRIED, KINDS)
def test_an_upload_of_another_round_or_with_a_wrong_weight_is_refused_by_name(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder)
    good, bad = uploads_of(federation, [1.0, 2.0])
    for broken, message in (
        (replace(bad, round=5), "its upload is for round 5"),
        (replace(bad, weight=-4.0), "its weight is -4.0"),
    ):
        assert_refused(federation, [good, broken], f"round 0: client node-2: {message}")


@pairs(["folders", "flower", "nvflare"], KINDS)
def test_an_upload_of_other_tensors_is_refused_by_name(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder)
    good, bad = uploads_of(federation, [1.0, 2.0])
    layout = federation.upload_layout
    name, tensor = next(iter(bad.named(layout).items()))
    for broken, message in (
        (replace(bad, tensors={name: None}), rf"{name} is missing"),
        (replace(bad, tensors={name: tensor[:1]}), r"\S+ has shape \(.*\), expected \("),
    ):
        assert_refused(federation, [good, broken], f"round 0: client node-2: {message}")


@pairs(CARRIED, KINDS)
def test_a_round_without_any_weight_is_refused(case: Case, transport: str, folder: Path) -> None:
    federation = opened(case, transport, folder)
    uploads = uploads_of(federation, [0.0, 0.0])
    assert_refused(federation, uploads, "round 0: the weights of all clients are zero")


def of_lower_rank(federation: Federation, sent: Sent, rank: int) -> Sent:
    """What a client of ``rank`` sends after the same training."""
    method, previous, t = federation.method, federation.previous, federation.state.round
    ranks = dict.fromkeys(previous.layout.modules, rank)
    number = int(sent.client.removeprefix("node-"))
    trained, row = client_rows(method, previous, t, seed=100 * t + number)

    def leading(row: Tensor, layout: FactorLayout) -> Tensor:
        return row_from_tensors(tensors_from_row(row, layout, ranks), layout, ranks)

    if method.capabilities.uploads == "statistics":
        # They have the shape of the broadcast, whatever the rank.
        read = method.read_layout(previous.layout, t)
        trained = leading(previous.layout.gather(trained, read), read)
        return replace(sent, row=method.prepare_upload(trained, read, previous, t).row)
    return replace(sent, row=leading(row, federation.upload_layout), ranks=ranks)


@pairs(DIRECT, [c for c in CASES if c.method.family == "lora" and not c.method.capabilities.linear])
def test_an_upload_that_lacks_a_tensor_is_refused_by_the_method_too(
    case: Case, transport: str
) -> None:
    federation = opened(case, transport, Path())
    cohort = cohort_of(federation, played(case, transport).uploads[0])
    first = cohort.layout.factor_slots[0].name
    part = cohort.layout.part(slot.name for slot in cohort.layout if slot.name != first)
    lacking = replace(cohort, layout=part, updates=cohort.layout.gather(cohort.updates, part))
    with pytest.raises(FedcoreError, match=rf"{case.name} needs .*{first} is missing"):
        case.method.aggregate(lacking, federation.previous)


WITH_FACTORS = [case for case in CASES if case.method.family != "none"]
RANKED = ("direct", "local", "flower")


@pairs(RANKED, [case for case in WITH_FACTORS if case.method.capabilities.mixed_ranks])
def test_clients_of_lower_rank_count_alike_everywhere(
    case: Case, transport: str, folder: Path
) -> None:
    federation = opened(case, transport, folder, ranks={"node-2": 1})
    method = opened(case, "direct", folder)
    uploads = list(played(case).uploads[0])
    uploads[1] = of_lower_rank(method, uploads[1], 1)
    outcome = federation.play(uploads)
    assert_same_bits(outcome, method.play(uploads))
    assert not torch.allclose(model_of(federation, outcome), played(case).model)


def named_methods(message: str) -> set[str]:
    """The methods of ``METHODS`` that ``message`` names."""
    return {
        method.name
        for method in METHODS
        for name in (method.name, *method.aliases)
        if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", message)
    }


@pytest.mark.parametrize(
    "case", [c for c in WITH_FACTORS if not c.method.capabilities.mixed_ranks], ids=str
)
def test_methods_for_equal_ranks_refuse_others_and_name_those_that_take_them(case: Case) -> None:
    federation = opened(case, "direct", Path())
    uploads = list(played(case).uploads[0])
    uploads[1] = replace(uploads[1], ranks=dict.fromkeys(federation.previous.layout.modules, 1))
    with pytest.raises(
        FedcoreError, match=r"client node-2 has rank 1 in m0.*needs equal"
    ) as caught:
        federation.play(uploads)
    others = named_methods(str(caught.value)) - {case.name, getattr(case.method, "host", "")}
    takers = {
        other.name
        for other in DEFAULTS
        if other.method.capabilities.mixed_ranks and other.method.family == case.method.family
    }
    assert others <= takers
    assert others or not takers


NOT_TAKEN = [
    pytest.param(case, transport, id=f"{case}-{transport}")
    for transport in ("folders", "flower", "nvflare")
    for case in (*DEFAULTS, *OTHER_OPTIONS)
    if not takes(transport, case.method)
]


@pytest.mark.parametrize(("case", "transport"), NOT_TAKEN)
def test_a_transport_refuses_by_the_names_of_the_methods_that_it_takes(
    case: Case, transport: str, folder: Path
) -> None:
    with pytest.raises(FedcoreError) as caught:
        opened(case, transport, folder)
    names = named_methods(str(caught.value))
    assert case.name in names
    own = {case.name, case.options.get("host")}
    takers = {other.name for other in DEFAULTS if takes(transport, other.method)}
    assert names - own == takers - own


OUT_OF_RANGE: Mapping[tuple[str, str], tuple[object, ...]] = {
    ("florg.truncated", "align"): (1, "yes", None),
    ("florg.whitened", "scale"): (0, -1.0, inf, nan, True, "2", None),
    ("florg.whitened", "eps_rel"): (1, -1e-9, nan, False, "0", None),
    ("flora", "max_rank"): (0, True, 2.0),
    ("flora", "seed"): (None, inf),
    ("fedex", "residual_rank"): (0, -1, True, 2.0, "2"),
    ("florist", "tau"): (0, 1.01, nan, True, "0.9"),
    ("florist", "max_rank"): (0, 1.5, True),
    ("florist", "seed"): (0.5,),
    ("lora_fair", "lam"): (-1e-9, -1, nan, inf, "0.1", True, None),
    ("fedrot", "strength"): (-0.1, 1.5, nan, inf, "0.5", True, None),
    ("flora_na", "sweeps"): (0, True, 2.5),
    ("flora_na", "tolerance"): (-1e-9, nan),
    ("flora_na", "align"): (1,),
    ("ce_lora", "lam"): (-0.1, 1.1, nan, "1", True),
    ("ce_lora", "temperature"): (0, -1.0, inf, nan, "1", True, None),
    ("ce_lora", "min_per_component"): (0, -3, 2.0, True),
    ("ce_lora", "share_counts"): ("no",),
    ("ce_lora", "weight_by_examples"): (1,),
    ("robust_clip", "limit"): (0, -1.0, inf, nan, True, "1"),
    ("robust_clip", "weight_cap"): (0, -1.0, nan, inf, True, "3"),
    ("robust_krum", "faulty"): (-1, 1.0, True),
    ("robust_krum", "keep"): (0, 2.0, False, "1"),
    ("robust_krum", "weight_cap"): (0, -1.0, nan, inf, True, "3"),
    ("robust_median", "cutoff"): (0, -1.0, inf, nan, True, "1", None),
    ("robust_median", "weight_cap"): (0, -1.0, nan, inf, True, "3"),
    ("robust_geomedian", "smoothing"): (0, -1.0, inf, nan, True, None),
    ("robust_geomedian", "sweeps"): (0, 1.5, True),
    ("robust_geomedian", "weight_cap"): (0, -1.0, nan, inf, True, "3"),
}
"""Values beside what an option may be, among them those next to its bounds."""

UNKNOWN_NAMES: Mapping[tuple[str, str], tuple[object, ...]] = {
    ("product_svd", "split"): ("lef", None),
    ("fedrot", "reference"): ("bot",),
    ("ce_lora", "similarity"): ("cosin",),
    ("ce_lora", "reference"): ("previous",),
    ("ce_lora.projected", "init"): ("ce",),
    **{
        (rule, "host"): ("ffa", "rolora", "local_only", "florg", "robust_krum", "svd", "")
        for rule in ("robust_clip", "robust_krum", "robust_median", "robust_geomedian")
    },
}


@pytest.mark.parametrize(("name", "option"), [*OUT_OF_RANGE, *UNKNOWN_NAMES])
def test_an_option_is_refused_by_its_name_its_value_and_what_to_pass(
    name: str, option: str
) -> None:
    for value in OUT_OF_RANGE.get((name, option), ()):
        with pytest.raises(FedcoreError) as caught:
            create_method(name, **{option: value})
        assert str(caught.value).startswith(f"{name}: {option} is {value!r}; pass ")
    for value in UNKNOWN_NAMES.get((name, option), ()):
        with pytest.raises(FedcoreError) as caught:
            create_method(name, **{option: value})
        message = str(caught.value)
        assert message.startswith(f"unknown {option} of {name} {str(value)!r}; ")
        assert "did you mean" in message or "valid:" in message
        assert "\n" not in message

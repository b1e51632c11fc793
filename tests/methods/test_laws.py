"""What holds of every method, behind every transport that takes it.

A law is stated once and asked of each method that claims it. What a method is for, its defining
identity, is in the file of that method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort
from fedcore.data.keyed_rows import at_ranks, row_from_tensors, tensors_from_row
from fedcore.data.low_rank import LowRank
from fedcore.errors import FedcoreError
from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import ServerState
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


def able(method: Method | type[Method]) -> SimpleNamespace:
    """What ``method`` claims: the one place that knows where it is written."""
    return SimpleNamespace(
        always_exact=method.traits.exact == "yes",
        linear=method.traits.linear,
        mixed_ranks=method.traits.mixed_ranks,
        personalised=method.traits.personalised,
        population=method.population,
        uploads=method.uploads,
        updates_base=method.updates_base,
        wants_features=method.wants_features,
    )


@dataclass(frozen=True)
class Case:
    """A method with some of its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return create_method(self.name, **self.options)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{name}={v}" for name, v in self.options.items())])


OTHER_OPTIONS = (
    Case("florg.truncated", {"align": False}),
    Case("product_svd", {"split": "balanced", "align": True}),
    Case("fedex", {"residual_rank": 2}),
    Case("florist", {"tau": 1.0}),
    Case("fedrot", {"strength": 1.0, "reference": "both"}),
    Case("flora_na", {"align": True, "sweeps": 20}),
    Case("ce_lora", {"weight_by_examples": True}),
    Case("robust_clip", {"host": "fedit"}),
    Case("robust_krum", {"faulty": 0}),
    Case("robust_geomedian", {"host": "fedex"}),
)
CASES = (
    *(Case(method.name) for method in METHODS if able(method).population == "clients"),
    *OTHER_OPTIONS,
)


def takes(transport: str, method: Method) -> bool:
    """Whether a server behind ``transport`` can run ``method``."""
    claims = able(method)
    if transport not in ("folders", "nvflare"):
        return claims.population == "clients"
    one_for_all = claims.population == "clients" and method.family != "none"
    # Folders carry uploads alone, an aggregator of NVFlare answers with one adapter.
    return (
        one_for_all
        and not claims.wants_features
        and not (transport == "nvflare" and claims.updates_base)
    )


def pairs(*transports: str, cases: Sequence[Case] = CASES) -> list[Any]:
    """The cases with each of the transports that take them."""
    return [
        pytest.param(case, transport, id=f"{case}-{transport}")
        for case in cases
        for transport in transports
        if takes(transport, case.method)
    ]


PLAIN = ("direct", "direct from round 1")
CARRIED = tuple(transport for transport in TRANSPORTS if transport not in PLAIN)

everywhere = pytest.mark.parametrize(("case", "transport"), pairs(*TRANSPORTS))
carried = pytest.mark.parametrize(("case", "transport"), pairs(*CARRIED))
plain = pytest.mark.parametrize(("case", "transport"), pairs(*PLAIN))

adapter = cache(start_adapter)


def opened(
    case: Case,
    transport: str,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Federation:
    return TRANSPORTS[transport](case.method, adapter(case.method.family, dtype), folder, **settings)


def twin(case: Case, federation: Federation, dtype: torch.dtype = torch.float64) -> Federation:
    """The method itself, in the round of ``federation``."""
    of_round = "direct from round 1" if federation.state.round == 1 else "direct"
    return opened(case, of_round, federation.folder, dtype)


def uploads_of(
    federation: Federation, weights: Sequence[float], statistics: bool = True
) -> list[Sent]:
    """Clients ``node-1, node-2, ...``, each with a model of its own."""
    method, previous, t = federation.method, federation.previous, federation.state.round
    tells = statistics and able(method).wants_features and t == 0
    return [
        Sent(
            f"node-{n}",
            client_rows(method, previous, t, seed=100 * t + n)[1],
            weight,
            statistics=random_statistics(n) if tells else {},
        )
        for n, weight in enumerate(weights, start=1)
    ]


def at_least(method: Method, clients: int) -> int:
    """``clients``, or the number that the method's rule needs."""
    if method.rule is not None:
        while True:
            try:
                method.rule.check_clients(clients)
                break
            except FedcoreError:
                clients += 1
    return clients


def unequal(method: Method, clients: int = 3) -> list[float]:
    """Weights for that many clients, or for as many as the method needs."""
    return [3.0, 0.7, 1.9, 1.0, 2.2][: at_least(method, clients)]


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
    method, previous = federation.method, federation.previous
    if method.family == "gram" and able(method).uploads == "statistics":
        seed, t = int(sent.client.removeprefix("node-")), federation.state.round
        row, _ = client_rows(method, previous, t, seed=100 * t + seed)
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


@carried
def test_every_transport_gives_the_bits_of_the_method(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path, torch.float32)
    method = twin(case, federation, torch.float32)
    for _ in range(2):
        uploads = uploads_of(method, unequal(case.method))
        assert_same_bits(federation.play(uploads), method.play(uploads))
    assert federation.state.round == 2


@plain
def test_a_method_gives_what_it_claims_and_no_more(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path)
    claims, t = able(case.method), federation.state.round
    uploads = uploads_of(federation, unequal(case.method))
    outcome = federation.play(uploads)
    assert bool(outcome.residual) == claims.updates_base
    if claims.personalised:
        assert outcome.personal.keys() == outcome.weights.keys() or case.method.plan(t).keeps
    else:
        assert not outcome.personal
    assert outcome.row.isfinite().all()


@plain
def test_nothing_is_written_to_and_what_is_not_called_changed_is_as_it_was(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path)
    cohort = cohort_of(federation, uploads_of(federation, unequal(case.method)))
    previous = federation.previous
    before = [tensor.clone() for tensor in (cohort.updates, cohort.weights, previous.row)]
    result = case.method.aggregate(cohort, previous)
    for now, then in zip((cohort.updates, cohort.weights, previous.row), before, strict=True):
        assert torch.equal(now, then)
    again = case.method.aggregate(cohort, previous)
    assert torch.equal(result.row, again.row)
    names = {slot.name for slot in result.changed}
    for slot in previous.layout:
        if slot.name not in names:
            rows = result.row, previous.row
            assert torch.equal(*(previous.layout.view(row, slot) for row in rows)), slot.name


def cohort_of(federation: Federation, uploads: Sequence[Sent]) -> Cohort:
    assert isinstance(federation, Direct)
    return federation.cohort(uploads)


@everywhere
def test_an_empty_round_keeps_the_state_and_says_so(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path, on_invalid="drop")
    before, t = federation.previous, federation.state.round
    broken = [replace(sent, row=sent.row * nan) for sent in uploads_of(federation, [1.0, 2.0])]
    outcome = federation.play([] if transport in PLAIN else broken)
    assert torch.equal(outcome.row, before.row)
    assert torch.equal(federation.state.row, before.row)
    assert outcome.flags == (EMPTY_ROUND,)
    assert not outcome.residual
    assert not outcome.personal
    assert not outcome.weights
    assert federation.state.round == t + 1


def expected_of_one(federation: Federation, case: Case, sent: Sent) -> Tensor:
    """The model after a round in which all clients are ``sent``."""
    if case.name == "florist" and case.options.get("tau") != 1.0:
        # The energy that it drops is missing from the model of a single client too.
        alone = twin(case, federation)
        return model_of(alone, alone.play([sent]))
    return sent_model(federation, sent)


@pytest.mark.parametrize(
    ("case", "transport"),
    pairs(*TRANSPORTS, cases=[case for case in CASES if at_least(case.method, 1) == 1]),
)
def test_one_client_keeps_its_model(case: Case, transport: str, tmp_path: Path) -> None:
    federation = opened(case, transport, tmp_path)
    (sent,) = uploads_of(federation, [4.0])
    expected = expected_of_one(federation, case, sent)
    outcome = federation.play([sent])
    assert_close(model_of(federation, outcome), expected)
    for row in outcome.personal.values():
        assert_close(row, sent.row)


@everywhere
def test_equal_clients_keep_their_model_whatever_their_weights(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path, allow_identical_uploads=True)
    first, *others = uploads_of(federation, unequal(case.method))
    expected = expected_of_one(federation, case, first)
    outcome = federation.play([first, *(replace(sent, row=first.row) for sent in others)])
    assert_close(model_of(federation, outcome), expected)
    if able(case.method).linear:
        alone = twin(case, Direct(case.method, federation.start, tmp_path)
                     if transport != "direct from round 1" else opened(case, transport, tmp_path))
        assert torch.equal(outcome.row, alone.play([first]).row)
    for row in outcome.personal.values():
        assert_close(row, first.row)


@carried
def test_identical_uploads_are_refused_where_they_hide_what_is_needed(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path)
    before = federation.state
    first, *others = uploads_of(federation, unequal(case.method))
    identical = [first, *(replace(sent, row=first.row) for sent in others)]
    if able(case.method).linear:
        assert federation.play(identical).weights.keys() == {sent.client for sent in identical}
        return
    message = rf"all {len(identical)} uploads are identical.*pass allow_identical_uploads=True"
    with pytest.raises(FedcoreError, match=message):
        federation.play(identical)
    assert federation.state is before


@carried
def test_the_order_of_arrival_changes_no_bit(case: Case, transport: str, tmp_path: Path) -> None:
    federation = opened(case, transport, tmp_path)
    method = twin(case, federation)
    uploads = uploads_of(method, unequal(case.method))
    shuffled = [*uploads[1::2], *reversed(uploads[::2])]
    assert_same_bits(federation.play(shuffled), method.play(uploads))


@plain
def test_a_client_s_name_decides_nothing(case: Case, transport: str, tmp_path: Path) -> None:
    federation = opened(case, transport, tmp_path)
    uploads = uploads_of(federation, unequal(case.method))
    renamed = [
        replace(sent, client=other.client)
        for sent, other in zip(uploads, reversed(uploads), strict=True)
    ]
    outcome = twin(case, federation).play(uploads)
    other = federation.play(renamed)
    assert_close(model_of(federation, other), model_of(federation, outcome), 1e-8)
    for one, two in zip(uploads, renamed, strict=True):
        if one.client in outcome.personal:
            assert_close(other.personal[two.client], outcome.personal[one.client])


def counts_by_share(case: Case) -> bool:
    """Whether a client in two halves is the same client: rules judge every client as one, and so
    does CE-LoRA unless it weights by examples.
    """
    if case.name == "ce_lora":
        return bool(case.options)
    return case.method.rule is None


@everywhere
def test_a_client_counts_by_its_share_of_the_weights(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path)
    method = twin(case, federation)
    uploads = uploads_of(method, unequal(case.method), statistics=False)
    expected = method.play(uploads)
    others = [replace(sent, weight=7 * sent.weight) for sent in uploads]
    if counts_by_share(case):
        first = others[0]
        others[0] = replace(first, weight=0.25 * first.weight)
        others.append(replace(first, client="node-8", weight=0.75 * first.weight))
    others.append(Sent("node-9", 100 * uploads[0].row, 0.0))
    outcome = federation.play(others)
    assert outcome.dropped == ("node-9",)
    assert_close(model_of(federation, outcome), model_of(federation, expected), 1e-8)
    for client, row in expected.personal.items():
        assert_close(outcome.personal[client], row)


@pytest.mark.parametrize(
    ("case", "transport"),
    pairs(*TRANSPORTS, cases=[case for case in CASES if able(case.method).always_exact]),
)
def test_an_exact_method_gives_the_mean_of_the_clients_models(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path)
    uploads = uploads_of(federation, [3.0, 0.25, 5.0])
    total = sum(sent.weight for sent in uploads)
    expected = sum(sent.weight / total * sent_model(federation, sent) for sent in uploads)
    assert isinstance(expected, Tensor)
    assert_close(model_of(federation, federation.play(uploads)), expected, 1e-12)


@plain
def test_the_mean_of_the_uploads_is_enough_for_linear_methods_alone(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path)
    cohort = cohort_of(federation, uploads_of(federation, unequal(case.method)))
    mean = cohort.shares @ cohort.updates
    opening = partial(OpenRound, case.method, federation.state, cohort.client_ids)
    if able(case.method).linear:
        expected = case.method.aggregate(cohort, federation.previous).row
        closed = opening().close_on_mean(mean)
        torch.testing.assert_close(closed.state.row, expected, rtol=1e-10, atol=1e-12)
        return
    with pytest.raises(FedcoreError, match=f"^{case.name} needs every upload"):
        opening().close_on_mean(mean)


@carried
def test_uploads_of_lower_precision_are_taken_as_they_are(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path, torch.float32)
    method = twin(case, federation, torch.float32)
    short = [
        replace(sent, row=sent.row.bfloat16()) for sent in uploads_of(method, unequal(case.method))
    ]
    expected = method.play([replace(sent, row=sent.row.float()) for sent in short])
    assert_same_bits(federation.play(short), expected)


@plain
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uploads_of_lower_precision_lose_only_the_last_rounding(
    case: Case, transport: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path, torch.float32)
    short = [
        replace(sent, row=sent.row.to(dtype))
        for sent in uploads_of(federation, unequal(case.method))
    ]
    outcome = federation.play(short)
    assert outcome.row.dtype == torch.float32
    wide = opened(case, transport, tmp_path)
    start = AdapterState.from_peft(
        {key: tensor.double() for key, tensor in adapter(case.method.family, torch.float32).to_peft().items()},
        federation.start.config,
    )
    wide = TRANSPORTS[transport](case.method, start, tmp_path)
    exact = wide.play([replace(sent, row=sent.row.double()) for sent in short])
    assert_close(model_of(federation, outcome), model_of(wide, exact), 1e-5)
    for client, row in exact.personal.items():
        assert_close(outcome.personal[client].double(), row, 1e-5)


@carried
def test_an_invalid_upload_is_refused_by_name_and_nothing_moves(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path)
    method, before = twin(case, federation), federation.state
    uploads = uploads_of(method, unequal(case.method))
    broken = [uploads[0], replace(uploads[1], row=uploads[1].row * inf), *uploads[2:]]
    with pytest.raises(FedcoreError, match=r"round 0: client node-2: .* not finite, such as"):
        federation.play(broken)
    assert federation.state is before
    assert_same_bits(federation.play(uploads), method.play(uploads))


@carried
def test_an_invalid_upload_is_left_out_where_that_is_asked_for(
    case: Case, transport: str, tmp_path: Path
) -> None:
    federation = opened(case, transport, tmp_path, on_invalid="drop")
    method = twin(case, federation)
    uploads = uploads_of(method, [*unequal(case.method), 1.0])
    broken = [uploads[0], replace(uploads[1], weight=-1.0), *uploads[2:]]
    outcome = federation.play(broken)
    assert outcome.dropped == ("node-2",)
    assert_same_bits(outcome, method.play([uploads[0], *uploads[2:]]))

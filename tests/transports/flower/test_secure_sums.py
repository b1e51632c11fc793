"""Any linear method behind Flower's own SecAgg+, in this process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

from fedcore.errors import FedcoreError
from fedcore.federation.state import latest_state, read_state
from fedcore.transports.flower.secure_aggregation import SecureFedLoRA, named_tensors, upload_arrays
from tests.transports.flower.grid import FakeGrid
from tests.transports.flower.test_strategy import HEAD, A, B, adapter, trained

EXAMPLES = {1: 30, 2: 10, 3: 60, 4: 20}
# Four clients' stochastic rounding on Flower's default grid, over the mean weight.
STEP = 2 * 8.0 / 2**22 * 60 / 30


class Site(NumPyClient):
    """A client as its user writes it; ``fails`` is the round in which it does not answer."""

    def __init__(self, node, seen, fails=None):
        self.node, self.seen, self.fails = node, seen, fails

    def fit(self, parameters, config):
        if config["fedcore.round"] == self.fails:
            raise RuntimeError("power cut")
        received = named_tensors(parameters, config)
        self.seen.append((config["fedcore.round"], self.node, received, dict(config)))
        return upload_arrays(trained(self.node, received), config), EXAMPLES[self.node], {"n": 1.0}


def run(strategy, rounds=2, failing=None, mods=(secaggplus_mod,), secured=True):
    """What the clients received, after ``rounds`` rounds of Flower's workflow."""
    seen = []

    def handler(node):
        def make(context):
            return Site(node, seen, 1 if node == failing else None).to_client()

        return ClientApp(client_fn=make, mods=list(mods))

    grid = FakeGrid({node: handler(node) for node in EXAMPLES})
    context = LegacyContext(grid.contexts[1], ServerConfig(num_rounds=rounds), strategy)
    workflow = SecAggPlusWorkflow(4, 2, max_weight=60.0) if secured else None
    DefaultWorkflow(fit_workflow=workflow)(grid, context)
    return seen


def secure(method="fedit", start=0, **options):
    options = {"min_fit_clients": 4, "min_available_clients": 4, **options}
    return SecureFedLoRA(method, adapter(start), fraction_evaluate=0.0, **options)


def mean(tensors, weights):
    total = sum(weights.values())
    return sum(weights[n] / total * tensors[n].double() for n in weights)


@pytest.mark.parametrize(
    ("method", "sent"),
    [("fedit", [{A, B, HEAD}] * 2), ("ffa", [{B, HEAD}] * 2), ("rolora", [{B, HEAD}, {A, HEAD}])],
)
def test_the_server_ends_with_the_mean_of_what_was_sent(method, sent):
    strategy = secure(method)
    seen = run(strategy)
    expected = adapter(0)
    for t in range(2):
        received = {node: tensors for round, node, tensors, _ in seen if round == t}
        assert sorted(received) == [1, 2, 3, 4]
        for tensors in received.values():
            assert list(tensors) == [A, B, HEAD]
            for key, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2 * STEP)
        for key in sent[t]:
            own = {node: trained(node, received[node])[key] for node in received}
            expected[key] = mean(own, EXAMPLES).float()
        assert {c["fedcore.sends"] for round, _, _, c in seen if round == t} == {
            "\n".join(k for k in (A, B, HEAD) if k in sent[t])
        }
    for key, tensor in strategy.adapter().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=3 * STEP)
        frozen = all(key not in names for names in sent)
        assert torch.equal(tensor, adapter(0)[key]) == frozen
    assert strategy.state.round == 2


def test_a_client_that_fails_within_a_round_costs_the_mean_its_examples():
    strategy = secure()
    seen = run(strategy, failing=3)
    received = {node: tensors for round, node, tensors, _ in seen if round == 1}
    assert sorted(received) == [1, 2, 4]
    weights = {n: w for n, w in EXAMPLES.items() if n != 3}
    for key, tensor in strategy.adapter().items():
        own = {node: trained(node, received[node])[key] for node in received}
        torch.testing.assert_close(tensor.double(), mean(own, weights), rtol=0, atol=3 * STEP)
    assert strategy.state.record["uploads"] == 3


def test_states_are_written_and_gone_on_from(tmp_path):
    whole = secure("rolora", checkpoint_dir=tmp_path)
    run(whole, rounds=1)
    assert read_state(latest_state(tmp_path)).round == 1
    again = secure("rolora", checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(again.state.row, whole.state.row)
    seen = run(again, rounds=1)
    assert {round for round, *_ in seen} == {1}
    assert again.state.round == 2
    with pytest.raises(FedcoreError, match="holds states already; pass resume=True"):
        secure("rolora", checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("product_svd", "product_svd needs every upload, and a sum shows the server their mean"),
        ("fedex", "fedex needs every upload"),
        ("local_only", "local_only exchanges nothing"),
        ("florg.whitened", "florg.whitened sends what its clients compute"),
        ("florg.avg_a", "adapter: florg.avg_a is not for adapters of family 'lora'"),
    ],
)
def test_what_a_sum_is_not_enough_for_is_refused(method, message):
    with pytest.raises(FedcoreError, match=message):
        secure(method)


@pytest.mark.parametrize("examples", [[10], [10, 0], [10, -3]])
def test_a_sum_of_too_few_clients_is_skipped_and_flagged(examples, tmp_path):
    strategy = secure(checkpoint_dir=tmp_path)
    before = strategy.state
    replies = [(None, replace(reply(lists(1))[1], num_examples=count)) for count in examples]
    parameters, _ = strategy.aggregate_fit(1, replies, [])
    assert strategy.state.round == 1
    assert torch.equal(strategy.state.row, before.row)
    assert (
        "1 of the clients in the sum have weight, fewer than min_cohort = 2"
        in (strategy.state.record["flags"][0])
    )
    assert strategy.state.record["uploads"] == len(examples)
    assert read_state(latest_state(tmp_path)).round == 1
    assert parameters is not None
    with pytest.raises(FedcoreError, match="min_cohort is 1; pass an integer of 2 or more"):
        secure(min_cohort=1)


def reply(arrays):
    parameters = ndarrays_to_parameters(arrays)
    return None, FitRes(Status(Code.OK, ""), parameters, 10, {})


def lists(node):
    return [trained(node, adapter(0))[key].numpy() for key in (A, B, HEAD)]


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([lists(1), lists(2)], r"round 0: the uploads differ, so nobody summed them"),
        ([lists(1)[:2]] * 2, r"round 0: the mean has 2 tensors, not 3"),
        ([[lists(1)[0][:, :5], *lists(1)[1:]]] * 2, r"lora_A.weight has shape \(4, 5\)"),
        ([[np.full((4, 6), np.nan), *lists(1)[1:]]] * 2, "values that are not finite"),
    ],
)
def test_what_is_no_mean_of_this_round_is_refused_and_changes_nothing(replies, message):
    strategy = secure()
    before = strategy.state
    with pytest.raises(FedcoreError, match=message):
        strategy.aggregate_fit(1, [reply(arrays) for arrays in replies], [])
    assert strategy.state is before


def test_without_the_workflow_the_uploads_are_seen_to_differ():
    with pytest.raises(FedcoreError, match="run SecureFedLoRA in DefaultWorkflow"):
        run(secure(), mods=(), secured=False)


def test_the_users_own_configuration_comes_along():
    strategy = secure(on_fit_config_fn=lambda round: {"rate": 0.1 * round})
    seen = run(strategy, rounds=1)
    assert [config["rate"] for *_, config in seen] == [0.1] * 4


def test_a_client_says_what_it_misses():
    strategy = secure()
    config = strategy.on_fit_config_fn(1)
    with pytest.raises(FedcoreError, match=r"lora_B\.weight is missing"):
        upload_arrays({A: torch.ones(4, 6), HEAD: torch.ones(3, 5)}, config)
    bad = {**adapter(1), HEAD: torch.full((3, 5), torch.inf)}
    with pytest.raises(FedcoreError, match=r"head\.weight holds values that are not finite"):
        upload_arrays(bad, config)
    with pytest.raises(FedcoreError, match=r"no fedcore\.keys; the server runs no SecureFedLoRA"):
        named_tensors([], {})
    with pytest.raises(FedcoreError, match="2 tensors were received for 3 keys"):
        named_tensors([np.ones(1)] * 2, config)

"""What is timed on adapter folders is the aggregation, against all of the files."""

import torch

from bench import server
from bench.folders import READING, folders_case
from bench.workloads import Setting
from tests.reference.merged import mean_products


def test_folders_are_aggregated_and_read_whole():
    case = folders_case(3, 2)
    found = case.ours["aggregate fedit"].call().adapter
    assert len(found.factors) == 4
    read = case.others[READING].call()
    assert len(read) == 3 * 8
    best = case.ours["aggregate product_svd"].call().adapter
    home, folders, _ = case.ours["aggregate fedit"].call.args
    wanted = mean_products(folders, [1, 1, 1])
    tail = {m: torch.linalg.svdvals(matrix)[16:].norm() for m, matrix in wanted.items()}
    for module, matrix in wanted.items():
        product = best.factors[module]["B"].double() @ best.factors[module]["A"].double()
        torch.testing.assert_close((product - matrix).norm(), tail[module], rtol=1e-4, atol=0)
    assert case.ours["aggregate fedit"].bytes > 3 * sum(
        tensor.nbytes for tensor in found.to_peft().values()
    )
    home.cleanup()


def test_folders_are_measured_where_peft_is():
    plans = server.plans(Setting(torch.device("cpu"), small=True), ("peft",))
    assert plans[-1].name == "adapter folders"

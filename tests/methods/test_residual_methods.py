"""What holds for every method that moves a part of the round into the base weights."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedcore.data.low_rank import accumulated
from fedcore.experiments.run import start
from fedcore.methods import Broadcast, create_method
from fedcore_kernels.layout import FactorLayout
from tests.experiments.jobs import tiny_recipe
from tests.processes import ONE_THREAD
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round
from tests.reference.largest import Largest
from tests.reference.residuals import received, residual
from tests.reference.updates import mean_update, update

SHAPES = ((33, 7), (64, 33), (7, 33), (64, 33))
EXACT = (("flora", {}), ("fedex", {}), ("florist", {"tau": 1.0}))
CASES = (*EXACT, ("fedex", {"residual_rank": 2}), ("florist", {}))
IDS = ["flora", "fedex", "florist-all", "fedex-2", "florist"]
EVERY = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
EXACTLY = pytest.mark.parametrize(("name", "options"), EXACT, ids=IDS[:3])


@EXACTLY
@pytest.mark.parametrize(
    ("kind", "weights"),
    [("random", [3.0]), ("identical", [1.0, 2.0, 4.0]), ("near", [1.0, 2.0]), ("zero", [1.0, 1.0])],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_model_that_arrives_is_the_mean_of_those_sent(name, options, kind, weights, dtype):
    case = make_lora_round(kind, weights, SHAPES, 3, dtype=dtype)
    result = create_method(name, **options).aggregate(case.cohort, case.previous)
    assert result.row.dtype == case.previous.row.dtype
    for module in case.cohort.layout.modules:
        target = mean_update(case.cohort, module)
        gap = received(case.cohort.layout, result, module) - target
        allowed = 1e-14 if dtype == torch.float64 else 1e-6
        assert float(gap.norm()) <= allowed * float(target.norm())
    parts = result.residual.values()
    assert {side.dtype for part in parts for side in part} <= {case.previous.row.dtype}


@given(lora_rounds(kinds=("random", "near", "repeated_row")), st.sampled_from(CASES))
def test_inputs_are_left_alone_and_not_held_on_to(case: LoraRound, chosen):
    before, held = case.cohort.updates.clone(), case.previous.row.clone()
    result = create_method(chosen[0], **chosen[1]).aggregate(case.cohort, case.previous)
    assert torch.equal(case.cohort.updates, before)
    assert torch.equal(case.previous.row, held)
    uploads = case.cohort.updates.untyped_storage().data_ptr()
    for part in result.residual.values():
        for side in part:
            assert side.is_contiguous()
            assert side.untyped_storage().data_ptr() != uploads
            # Nor on to the modules it was computed with.
            assert side.untyped_storage().nbytes() == side.numel() * side.element_size()


@EVERY
def test_modules_of_equal_shape_are_batched_and_do_not_mix(name, options):
    """Interleaved shapes: three modules share the group of A and two of them that of B."""
    method = create_method(name, **options)
    case = make_lora_round("random", [1.0, 2.0, 3.0], SHAPES, 3)
    layout = case.cohort.layout
    whole = method.aggregate(case.cohort, case.previous)
    for j, module in enumerate(layout.modules):
        own = [s for s in layout.factor_slots if s.module == module]
        part = FactorLayout.build([(s.module, s.factor, s.rows, s.width) for s in own])
        cohort = replace(
            case.cohort,
            layout=part,
            updates=layout.gather(case.cohort.updates, part),
            ranks=case.cohort.ranks[:, j : j + 1],
            scalings=case.cohort.scalings[:, j : j + 1],
        )
        alone = method.aggregate(cohort, Broadcast(part, layout.gather(case.previous.row, part)))
        torch.testing.assert_close(layout.gather(whole.row, part), alone.row)
        for side, expected in zip(whole.residual[module], alone.residual[module], strict=True):
            torch.testing.assert_close(side, expected, rtol=1e-10, atol=1e-10)
        assert whole.steps[module].rank == alone.steps[module].rank


@EXACTLY
def test_every_round_stands_alone(name, options):
    """Uploads are updates of base weights that hold all residuals; more rank than width occurs."""
    method = create_method(name, **options)
    layout = make_lora_round("random", [1.0], SHAPES, 3).cohort.layout
    base = dict.fromkeys(layout.modules, 0.0)
    held = {}
    for t in range(4):
        case = make_lora_round("random", [1.0, 2.0, 0.5], SHAPES, 3, seed=t)
        cohort = replace(case.cohort, round=t)
        result = method.aggregate(cohort, case.previous)
        held = accumulated(held, result.residual)
        for module in layout.modules:
            target = base[module] + mean_update(cohort, module)
            outer, inner = held[module]
            got = outer.T @ inner + update(layout, result.row, module)
            assert float((got - target).norm()) < 1e-13 * float(target.norm())
            assert held[module].rank <= 4 * 9
            base[module] = base[module] + residual(layout, result, module)
    assert held["m0"].rank == 7


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 9), (6, 6)])
@pytest.mark.parametrize("conv", [False, True])
@EXACTLY
def test_the_residual_lies_as_peft_adapters_do(name, options, conv, d_in, d_out):
    """Merged by PEFT it changes the layer by ``x M^T``, stored either way round."""
    case = make_lora_round("random", [1.0, 2.0], ((d_out, d_in),), 2, dtype=torch.float32)
    result = create_method(name, **options).aggregate(case.cohort, case.previous)
    outer, inner = result.residual["m0"]
    layer = Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out)
    x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(0))
    before = layer(x).detach()
    rank = result.residual["m0"].rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["m0"], fan_in_fan_out=conv)
    model = get_peft_model(nn.ModuleDict({"m0": layer}), config)
    adapted = model.base_model.model["m0"]
    with torch.no_grad():
        adapted.lora_A["default"].weight.copy_(inner)
        adapted.lora_B["default"].weight.copy_(outer.T)
    merged = model.merge_and_unload()["m0"](x).detach()
    change = residual(case.cohort.layout, result, "m0").float()
    torch.testing.assert_close(merged - before, x @ change.T, rtol=1e-4, atol=1e-4)


@EVERY
def test_no_matrix_of_the_size_of_a_weight_is_formed(name, options):
    case = make_lora_round("random", [1.0, 2.0, 3.0], ((900, 800),), 4, dtype=torch.float32)
    with Largest() as seen:
        create_method(name, **options).aggregate(case.cohort, case.previous)
    # The upload matrix is the largest thing there is.
    assert seen.numel <= case.cohort.updates.numel() * 4 // 3 < 900 * 800 / 10


MEMORY = """
import torch
from pathlib import Path
from fedcore.data.cohort import Cohort
from fedcore.methods import Broadcast, create_method
from fedcore_kernels.layout import FactorLayout

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

n, r, method = 10, 8, create_method("{name}", **{options})

def data(modules, k):
    slots = [(f"m{{i}}", factor, r, k) for i in range(modules) for factor in "AB"]
    layout = FactorLayout.build(slots)
    updates = torch.empty(n, layout.size).normal_()
    ranks = torch.full((n, modules), r)
    ids = tuple(f"c{{i}}" for i in range(n))
    one = torch.ones(n, dtype=torch.float64)
    cohort = Cohort(layout, updates, one, ids, 0, ranks, torch.ones(n, modules).double())
    return cohort, Broadcast(layout, updates[0].clone())

method.aggregate(*data(2, 256))
arguments = data(8, 4096)
before = peak()
method.aggregate(*arguments)
print(peak() - before, arguments[0].updates.numel() * 4)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@EXACTLY
def test_a_round_takes_the_residual_and_little_more(name, options):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", MEMORY.format(name=name, options=options)],
        capture_output=True,
        text=True,
        check=True,
        # Freed blocks go back to the system, so that the peak is what was needed at once.
        env={
            "PYTHONPATH": f"{root}:{root / 'kernels'}",
            **ONE_THREAD,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    extra, uploads = map(int, result.stdout.split())
    # The residual is as large as the uploads, 21 MB, and the decomposition's factors exist beside
    # it; one 4096 x 4096 matrix would be 67 MB more.
    assert extra < (3 if name == "florist" else 2) * uploads + (24 << 20)


@EVERY
def test_zero_updates_give_a_zero_product(name, options):
    case = make_lora_round("zero", [1.0, 2.0], SHAPES, 3)
    result = create_method(name, **options).aggregate(case.cohort, case.previous)
    for module in case.cohort.layout.modules:
        assert not received(case.cohort.layout, result, module).any()
    assert torch.isfinite(result.row).all()


def test_rounds_of_a_run_are_exact_where_fedit_is_not(tmp_path):
    """The second round starts from base weights that hold the residual of the first."""
    found = {}
    for name in ("flora", "fedex", "florist", "fedit"):
        settings = {"method.name": name, "rounds": 2, "training.steps": 4, "clients": 3}
        start(tiny_recipe(tmp_path / "home", **settings), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["modules"] for line in lines[1:]]
    for t in range(2):
        for flora, fedex, florist, fedit in zip(*(found[name][t] for name in found), strict=True):
            assert flora["aggregation_error"] < 1e-6
            assert fedex["aggregation_error"] < 1e-6
            assert 1e-3 < florist["aggregation_error"] <= 0.1**0.5
            assert fedit["aggregation_error"] > 1e-3
            assert (flora["kept_rank"], fedex["kept_rank"]) == (6, 4)
            assert florist["kept_rank"] < 6

"""Adapters as files against the dense definition of their mean update."""

from itertools import permutations

import numpy as np
import pytest
import torch

import fedcore
from fedcore import FedcoreError, aggregate
from fedcore.data import read_adapter
from tests.property.adapters import gram_state
from tests.property.folders import MODULES, lora_folder
from tests.reference.merged import (
    config_of,
    folder_products,
    mean_products,
    stored_tensors,
    tail,
)

WEIGHTS = [3.0, 1.0, 2.0]


@pytest.fixture
def mixed(tmp_path):
    """Ranks 2, 3 and (1, 4, 4); plain alpha, rsLoRA, patterns; fp32, bf16 and fp32."""
    return [
        lora_folder(tmp_path / "a", 1, 3, lora_alpha=12),
        lora_folder(tmp_path / "b", 2, 2, lora_alpha=5, use_rslora=True, dtype=torch.bfloat16),
        lora_folder(
            tmp_path / "c",
            3,
            4,
            ranks={"block.0.q": 1},
            lora_alpha=4,
            alpha_pattern={"v": 7},
        ),
    ]


@pytest.mark.parametrize("rank", [None, 1, 2, 7, 40])
def test_mixed_adapters_reach_the_eckart_young_bound_of_the_dense_mean(mixed, tmp_path, rank):
    found = aggregate(mixed, WEIGHTS, rank=rank, out=tmp_path / "out")
    wanted = mean_products(mixed, WEIGHTS)
    written = folder_products(tmp_path / "out")
    lost = 0.0
    largest = {"block.0.q": 3, "block.0.v": 4, "block.1.q": 4}
    stacked = {"block.0.q": 6, "block.0.v": 9, "block.1.q": 9}
    for module, matrix in wanted.items():
        kept = largest[module] if rank is None else min(rank, stacked[module], *matrix.shape)
        a = stored_tensors(tmp_path / "out")[f"base_model.model.{module}.lora_A.weight"]
        # Beyond its own rank a module has zeros, up to the largest of any.
        assert int(a.any(dim=1).sum()) == kept
        error = float((matrix - written[module]).norm())
        bound = tail(matrix, kept)
        assert error == pytest.approx(bound, abs=2e-6 * float(matrix.norm()))
        lost += error**2
    norm = sum(float(matrix.norm()) ** 2 for matrix in wanted.values())
    assert found.errors[0].error == pytest.approx((lost / norm) ** 0.5, abs=1e-6)
    config = config_of(tmp_path / "out")
    assert config["lora_alpha"] == config["r"]
    assert config["use_rslora"] is False
    assert config["base_model_name_or_path"] == "tiny"


def test_the_result_does_not_depend_on_the_order_of_the_adapters(tmp_path):
    folders = [lora_folder(tmp_path / name, n, 2 + n) for n, name in enumerate("cab")]
    weights = dict(zip(map(str, folders), WEIGHTS, strict=True))
    rows = []
    for order in permutations(folders):
        state = aggregate(order, weights, compare=False).adapter
        rows.append(state.to_peft())
    for row in rows[1:]:
        assert all(torch.equal(row[key], rows[0][key]) for key in rows[0])


@pytest.mark.parametrize("method", ["fedit", "product_svd", "flora"])
def test_adapters_are_summed_in_the_order_of_their_names(tmp_path, method):
    """Weights this far apart let the order of summation show in the last bits."""
    folders = [lora_folder(tmp_path / f"{n}", n, head=True, dtype=torch.float64) for n in range(6)]
    weights = [1.0, 1e3, 7.0, 0.3, 2e4, 11.0]

    def bits(names, order):
        named = {names[n]: folders[n] for n in order}
        reported = {names[n]: weights[n] for n in range(6)}
        found = aggregate(named, reported, method=method, compare=False).adapter.to_peft()
        return b"".join(tensor.numpy().tobytes() for _, tensor in sorted(found.items()))

    expected = bits("abcdef", range(6))
    orders = [[5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3], [4, 1, 0, 3, 5, 2]]
    assert all(bits("abcdef", order) == expected for order in orders)
    # Other names in the same order given: other bits.
    assert any(bits(names, range(6)) != expected for names in ("fedcba", "cafbed", "ebadfc"))


@pytest.mark.parametrize("group_bytes", [1, 3000, 1 << 30])
@pytest.mark.parametrize("method", ["fedit", "product_svd", "fedex", "flora", "lora_fair"])
def test_groups_of_modules_of_any_size_give_the_same_bits(tmp_path, method, group_bytes):
    folders = [lora_folder(tmp_path / name, n, head=True) for n, name in enumerate("abc")]
    whole = aggregate(folders, WEIGHTS, method=method)
    seen = []
    parts = aggregate(
        folders,
        WEIGHTS,
        method=method,
        group_bytes=group_bytes,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n + 1, len(seen)) for n in range(len(seen))]
    if group_bytes == 1:
        assert len(seen) == 3 + 20
    for one, other in zip(
        (whole.adapter, whole.residual), (parts.adapter, parts.residual), strict=True
    ):
        if one is None or other is None:
            assert one is other
            continue
        expected, found = one.to_peft(), other.to_peft()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
    assert parts.errors[0].error == pytest.approx(whole.errors[0].error, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "tolerance"), [("flora", 1e-6), ("fedex", 1e-6), ("florist", 1e-6)]
)
def test_exact_methods_keep_the_mean_of_the_products(tmp_path, method, tolerance):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("abc")]
    options = {"tau": 1.0} if method == "florist" else {}
    found = aggregate(folders, WEIGHTS, method=method, out=tmp_path / "out", options=options)
    written = folder_products(tmp_path / "out")
    assert (tmp_path / "out/residual").exists() == (method == "fedex")
    if method == "fedex":
        beside = folder_products(tmp_path / "out/residual")
        written = {module: matrix + beside[module] for module, matrix in written.items()}
    for module, matrix in mean_products(folders, WEIGHTS).items():
        assert float((written[module] - matrix).norm()) <= tolerance * float(matrix.norm())
    assert found.exact
    assert found.errors[0].error == 0


def test_stacks_of_mixed_ranks_have_the_rank_of_every_module(mixed, tmp_path):
    found = aggregate(mixed, WEIGHTS, method="flora", out=tmp_path / "out")
    written = folder_products(tmp_path / "out")
    for module, matrix in mean_products(mixed, WEIGHTS).items():
        assert float((written[module] - matrix).norm()) <= 1e-6 * float(matrix.norm())
    assert set(found.adapter.ranks.values()) == {9}
    found = aggregate(mixed, WEIGHTS, method="flora", keep_patterns=True)
    ranks = {module: found.adapter.rank(module) for module in found.adapter.factors}
    assert ranks == {"block.0.q": 3 + 2 + 1, "block.0.v": 9, "block.1.q": 9}
    assert {row.method for row in found.errors if row.refused} == {
        "fedit",
        "fedex",
        "lora_fair",
        "flora_na",
    }


@pytest.mark.parametrize("first", [0, 1, 2])
def test_whose_configuration_is_kept_does_not_change_the_update(mixed, tmp_path, first):
    order = [mixed[first], *mixed[:first], *mixed[first + 1 :]]
    weights = [WEIGHTS[mixed.index(folder)] for folder in order]
    aggregate(order, weights, method="flora", dtype="fp32", out=tmp_path / "out", compare=False)
    written = folder_products(tmp_path / "out")
    for module, matrix in mean_products(mixed, WEIGHTS).items():
        assert float((written[module] - matrix).norm()) <= 1e-6 * float(matrix.norm())


def test_factor_means_are_the_means_of_scaled_factors(tmp_path):
    folders = [lora_folder(tmp_path / "a", 1, lora_alpha=6), lora_folder(tmp_path / "b", 2)]
    state = aggregate(folders, [1, 3], method="fedit").adapter
    one, other = (stored_tensors(folder) for folder in folders)
    for module, _, _ in MODULES:
        key = f"base_model.model.{module}.lora_"
        a = (one[f"{key}A.weight"].double() + 3 * other[f"{key}A.weight"].double()) / 4
        b = (2 * one[f"{key}B.weight"].double() + 3 * 2 * other[f"{key}B.weight"].double()) / 4
        torch.testing.assert_close(state.factors[module]["A"].double(), a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state.factors[module]["B"].double(), b, rtol=1e-6, atol=1e-6)


def test_heads_are_averaged_and_large_ones_in_pieces(tmp_path):
    folders = [lora_folder(tmp_path / name, n, head=True) for n, name in enumerate("ab")]
    key = "base_model.model.classifier.weight"
    heads = [stored_tensors(folder)[key].double() for folder in folders]
    for size in (8, 1 << 20):
        found = aggregate(folders, [1, 3], group_bytes=size, out=tmp_path / f"out{size}")
        written = stored_tensors(tmp_path / f"out{size}")[key].double()
        torch.testing.assert_close(written, (heads[0] + 3 * heads[1]) / 4, rtol=1e-6, atol=1e-6)
        assert found.adapter.dense["classifier.weight"].shape == (5, 4)


def test_dora_magnitudes_are_averaged_and_nothing_is_called_exact(tmp_path):
    folders = [lora_folder(tmp_path / name, n, dora=True) for n, name in enumerate("ab")]
    found = aggregate(folders, method="flora", out=tmp_path / "out")
    written = stored_tensors(tmp_path / "out")
    for module, _, _ in MODULES:
        key = f"base_model.model.{module}.lora_magnitude_vector"
        mean = sum(stored_tensors(folder)[key].double() for folder in folders) / 2
        torch.testing.assert_close(written[key].double(), mean, rtol=1e-6, atol=1e-6)
    assert not found.exact
    assert config_of(tmp_path / "out")["use_dora"] is True
    with pytest.raises(FedcoreError, match="fedex leaves a residual beside the adapter, and DoRA"):
        aggregate(folders, method="fedex")
    plain = lora_folder(tmp_path / "c", 5)
    with pytest.raises(FedcoreError, match=r"c: use_dora is False, that of .* is True"):
        aggregate([*folders, plain])


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16", "bf16", None])
def test_the_result_has_the_dtype_asked_for_or_the_first_adapters(tmp_path, dtype):
    folders = [
        lora_folder(tmp_path / "a", 1, dtype=torch.bfloat16),
        lora_folder(tmp_path / "b", 2, dtype=torch.float64),
    ]
    found = aggregate(folders, dtype=dtype, rank=6)
    wanted = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16}
    expected = wanted.get(dtype, torch.bfloat16)
    assert {tensor.dtype for tensor in found.adapter.to_peft().values()} == {expected}
    bound = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 2e-3}.get(expected, 1e-2)
    # What was lost by rounding is in the error: it is of what is written.
    assert found.errors[0].error < bound
    assert (found.errors[0].error > 1e-4) == (expected in (torch.float16, torch.bfloat16))


def test_a_result_that_does_not_fit_its_dtype_is_refused(tmp_path):
    folders = [lora_folder(tmp_path / name, 1, lora_alpha=3e5) for name in "ab"]
    with pytest.raises(FedcoreError, match=r"not finite in torch.float16; pass a wider dtype"):
        aggregate(folders, dtype="fp16", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_of_every_kind_give_the_same_result(tmp_path):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("ab")]
    names = [str(folder) for folder in folders]
    expected = aggregate(folders, [1, 3]).adapter.to_peft()
    tensors = [stored_tensors(folder) for folder in folders]
    config = config_of(folders[0])
    arrays = [{key: tensor.numpy() for key, tensor in own.items()} for own in tensors]
    arrays[0] = {key: np.asfortranarray(array) for key, array in arrays[0].items()}
    arrays[1] = {key: array.astype(">f4") for key, array in arrays[1].items()}
    for kind in (
        [{**own, "config": config} for own in tensors],
        [(own, config) for own in tensors],
        [(own, config) for own in arrays],
        [read_adapter(folder) for folder in folders],
    ):
        named = dict(zip(names, kind, strict=True))
        found = aggregate(named, [1, 3]).adapter.to_peft()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_one_adapter_and_an_adapter_of_all_the_weight_keep_their_update(tmp_path):
    folders = [lora_folder(tmp_path / name, n, 2 + n) for n, name in enumerate("ab")]
    alone = aggregate(folders[:1])
    heavy = aggregate(folders, [1, 0])
    assert [d.reason for d in heavy.dropped] == ["its weight is zero"]
    for module, matrix in folder_products(folders[0]).items():
        for found in (alone, heavy):
            named = found.adapter.factors[module]
            product = named["B"].double() @ named["A"].double()
            assert float((product - matrix).norm()) <= 2e-6 * float(matrix.norm())
            assert named["A"].shape[0] == 2


def test_scaled_weights_and_split_adapters_change_nothing(tmp_path):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("ab")]
    twin = lora_folder(tmp_path / "b2", 1)
    expected = aggregate(folders, [1, 3]).adapter
    for found in (
        aggregate(folders, [1e9, 3e9]).adapter,
        aggregate([*folders, twin], [1, 1.5, 1.5]).adapter,
    ):
        for module, named in expected.factors.items():
            one = named["B"].double() @ named["A"].double()
            other = found.factors[module]["B"].double() @ found.factors[module]["A"].double()
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_adapters_that_cancel_give_zero_without_nan(tmp_path):
    one = lora_folder(tmp_path / "a", 1)
    tensors, config = stored_tensors(one), config_of(one)
    minus = {key: -t if "lora_B" in key else t for key, t in tensors.items()}
    for method in ("product_svd", "flora", "florist", "fedex", "fedit"):
        found = aggregate({"a": (tensors, config), "b": (minus, config)}, method=method)
        total = {
            module: named["B"].double() @ named["A"].double()
            for module, named in found.adapter.factors.items()
        }
        assert all(float(matrix.norm()) <= 1e-6 for matrix in total.values()), method
        assert total.keys() == {module for module, _, _ in MODULES}


def test_ffa_takes_a_common_a_to_the_bit_and_nothing_less(tmp_path):
    folders = [lora_folder(tmp_path / name, n, common_a=True) for n, name in enumerate("ab")]
    found = aggregate(folders, [1, 3], method="ffa", out=tmp_path / "out")
    for module, matrix in mean_products(folders, [1, 3]).items():
        error = (folder_products(tmp_path / "out")[module] - matrix).norm()
        assert float(error) <= 1e-6 * float(matrix.norm())
    assert found.exact
    tensors, config = stored_tensors(folders[1]), config_of(folders[1])
    tensors["base_model.model.block.1.q.lora_A.weight"][0, 0] += 1e-6
    with pytest.raises(FedcoreError, match=r"b: block.1.q.A differs from that of a; ffa needs"):
        aggregate({"a": folders[0], "b": (tensors, config)}, method="ffa")


def test_gram_adapters_give_the_best_gram_with_or_without_a_previous_one():
    states = {name: gram_state(n, alpha=6.0) for n, name in enumerate("ab")}
    states = {name: _without_offset(state) for name, state in states.items()}
    wanted = {
        module: sum(
            2 * s.factors[module]["A"].double().T @ s.factors[module]["A"].double() / 2
            for s in states.values()
        )
        for module in next(iter(states.values())).factors
    }
    loose = aggregate(states, method="florg")
    previous = _without_offset(gram_state(7, alpha=6.0))
    turned = aggregate(states, method="florg", previous=previous)
    for module, gram in wanted.items():
        bound = tail(gram, 3)
        for found in (loose, turned):
            a = found.adapter.factors[module]["A"].double()
            assert found.adapter.scaling[module] == 1.0
            assert float((a.T @ a - gram).norm()) == pytest.approx(bound, rel=1e-5)
        ours = turned.adapter.factors[module]["A"].double()
        along = ours @ previous.factors[module]["A"].double().T
        torch.testing.assert_close(along, along.T, rtol=1e-4, atol=1e-4)
    assert loose.errors[0].method == "florg.truncated"
    assert loose.errors[0].error < loose.errors[1].error
    whole = aggregate(states, method="florg", rank=6)
    assert whole.errors[0].error == 0
    assert whole.adapter.config["r"] == 6
    with pytest.raises(FedcoreError, match="aligned to previous keep its rank"):
        aggregate(states, method="florg", previous=previous, rank=2)
    with pytest.raises(FedcoreError, match=r"florg.sketched needs the adapter that all clients"):
        aggregate(states, method="florg.sketched")
    sketched = aggregate(states, method="florg.sketched", previous=previous)
    assert loose.errors[0].error < sketched.errors[0].error < 1


def _without_offset(state):
    return type(state).from_peft(state.to_peft(), {**state.config, "offset": False})


def test_the_errors_of_all_methods_are_those_of_dense_matrices(tmp_path):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("abc")]
    wanted = mean_products(folders, WEIGHTS)
    norm = sum(float(matrix.norm()) ** 2 for matrix in wanted.values()) ** 0.5
    rows = {row.method: row for row in aggregate(folders, WEIGHTS).errors}
    assert set(rows) == {
        "product_svd",
        "fedit",
        "flora",
        "fedex",
        "florist",
        "lora_fair",
        "flora_na",
    }
    for method, row in rows.items():
        found = aggregate(folders, WEIGHTS, method=method)
        total, worst = 0.0, ("", -1.0)
        for module, matrix in wanted.items():
            result = torch.zeros_like(matrix)
            for state in (found.adapter, found.residual):
                if state is not None:
                    named = state.factors[module]
                    result += named["B"].double() @ named["A"].double()
            lost = float((matrix - result).norm())
            total += lost**2
            worst = max(worst, (module, lost / float(matrix.norm())), key=lambda item: item[1])
        assert row.error == pytest.approx(total**0.5 / norm, rel=1e-5, abs=2e-7), method
        assert row.worst == pytest.approx(worst[1], rel=1e-5, abs=2e-7), method
        if row.error > 1e-6:
            assert row.worst_module == worst[0]
        size = sum(
            tensor.nbytes
            for state in (found.adapter, found.residual)
            if state is not None
            for tensor in state.to_peft().values()
        )
        assert row.bytes == size


def test_without_comparison_nothing_is_measured(tmp_path):
    folders = [lora_folder(tmp_path / name, n) for n, name in enumerate("ab")]
    assert aggregate(folders, compare=False).errors == ()
    assert fedcore.aggregate is aggregate

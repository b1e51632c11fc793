import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.layout import ALIGNMENT, FactorLayout

FACTORS = st.lists(
    st.tuples(
        st.sampled_from([f"layer.{i}.q" for i in range(6)]),
        st.sampled_from(["A", "B"]),
        st.integers(1, 5),
        st.integers(1, 40),
    ),
    unique_by=lambda item: item[:2],
    max_size=8,
)
DENSE = st.lists(
    st.tuples(st.sampled_from(["head.w", "head.b", "norm"]), st.sampled_from([(), (3,), (2, 5)])),
    unique_by=lambda item: item[0],
)


@given(FACTORS, DENSE)
def test_slots_are_aligned_disjoint_and_hold_what_is_written(factors, dense):
    layout = FactorLayout.build(factors, dense)
    row = torch.full((layout.size,), float("nan"))
    for i, slot in enumerate(layout):
        assert slot.offset % ALIGNMENT == 0
        layout.view(row, slot).fill_(i)
    for i, slot in enumerate(layout):
        assert bool((layout.view(row, slot) == i).all())
    assert int((~row.isnan()).sum()) == layout.numel


@given(FACTORS, DENSE, st.randoms())
def test_the_order_of_the_tensors_does_not_matter(factors, dense, random):
    shuffled_factors, shuffled_dense = list(factors), list(dense)
    random.shuffle(shuffled_factors)
    random.shuffle(shuffled_dense)
    one = FactorLayout.build(factors, dense)
    other = FactorLayout.build(shuffled_factors, shuffled_dense)
    assert one == other
    assert hash(one) == hash(other)


@given(FACTORS, DENSE, st.integers(1, 3))
def test_a_group_is_a_view_of_its_slots(factors, dense, clients):
    layout = FactorLayout.build(factors, dense)
    updates = torch.arange(clients * layout.size, dtype=torch.float32).reshape(clients, -1)
    seen = 0
    for group in layout.groups:
        stack = group.view(updates)
        assert stack.data_ptr() == updates[..., group.offset :].data_ptr()
        for j, module in enumerate(group.modules):
            slot = layout.by_name[f"{module}.{group.factor}"]
            assert torch.equal(stack[:, j], layout.view(updates, slot))
            seen += 1
    assert seen == len(layout.factor_slots)


def test_gather_and_scatter_are_inverse_on_the_part():
    layout = FactorLayout.build([("q", "A", 2, 5), ("q", "B", 2, 7)], [("head", (3,))])
    part = layout.select("B")
    row = torch.randn(layout.size)
    values = torch.randn(part.size)
    scattered = layout.scatter(row, part, values)
    assert torch.equal(layout.gather(scattered, part)[:14], values[:14])
    kept = layout.select("A", dense=False)
    assert torch.equal(layout.gather(scattered, kept), layout.gather(row, kept))
    assert not torch.equal(scattered, row)


def test_bad_layouts_are_refused():
    with pytest.raises(KernelInputError, match=r"'q\.A' appears twice"):
        FactorLayout.build([("q", "A", 2, 5), ("q", "A", 2, 5)])
    with pytest.raises(KernelInputError, match="0 x 5; both must be at least 1"):
        FactorLayout.build([("q", "A", 0, 5)])
    with pytest.raises(KernelInputError, match="last axis must be 16"):
        FactorLayout.build([("q", "A", 2, 5)]).check(torch.zeros(3, 15))


def test_task_table_covers_every_column_once():
    layout = FactorLayout.build([("a", "A", 2, 70), ("b", "A", 2, 70), ("c", "A", 2, 33)])
    table = layout.task_table(32)
    covered = torch.zeros(layout.size, dtype=torch.int64)
    for g, j, offset, first, last in table.tolist():
        group = layout.groups[g]
        assert offset == layout.by_name[f"{group.modules[j]}.A"].offset
        covered[offset + first : offset + last] += 1
    for slot in layout:
        assert bool((covered[slot.offset : slot.offset + slot.width] == 1).all())

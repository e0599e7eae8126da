"""Experts that no row chose cost nothing, and whichever product is taken gives the same output.

Shape letters: T rows, K top-k, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moe_serve.model.all2all.base import Sorted
from moe_serve.model.all2all.rows import add_to_rows, sort_gathered
from moe_serve.model.all2all.shape import ExpertLayout
from moe_serve.model.moe.experts import Experts, grouped_linear, padding_pays, rounded_rows
from tests.support.oracle import random_experts

CPU = torch.device("cpu")
PRODUCTS = {"mm", "bmm", "mv", "addmv", "_grouped_mm"}
SMALL, TINY = 3 << 20, 192 << 10
"""Bytes of an expert of the two presets."""


class WeightsRead(TorchDispatchMode):
    """Counts the numbers of some tensors that products are made with."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self._memory = {weight.untyped_storage().data_ptr() for weight in weights}
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function.__name__.split(".")[0] in PRODUCTS:
            tensors = [each for each in given if isinstance(each, Tensor)]
            self.numbers += sum(t.numel() for t in tensors if t.untyped_storage().data_ptr() in self._memory)
        return function(*given, **(named or {}))


@contextmanager
def counting(experts: Experts) -> Iterator[WeightsRead]:
    with WeightsRead(experts.gate_up, experts.down) as read:
        yield read


def random_layer(num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> Experts:
    dense = random_experts(num_experts, hidden, width, seed=4)
    experts = Experts(num_experts, hidden, width, dtype, CPU)
    experts.gate_up.copy_(dense.gate_up)
    experts.down.copy_(dense.down)
    return experts


def routed(num_rows: int, num_experts: int, top_k: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    chance = torch.Generator().manual_seed(num_rows)
    ids_TK = torch.rand((num_rows, num_experts), generator=chance).argsort(dim=1)[:, :top_k]
    x_TD = torch.randn((num_rows, hidden), generator=chance).to(dtype)
    return x_TD, ids_TK.to(torch.int32), torch.rand((num_rows, top_k), generator=chance)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_only_the_experts_that_a_row_chose_are_read(dtype: torch.dtype, rows: int) -> None:
    experts = Experts(16, 1024, 512, dtype, CPU)
    experts.gate_up.zero_()
    experts.down.zero_()
    parts = routed(rows, 16, 3, 1024, dtype)
    arrived = sort_gathered(parts, [rows], ExpertLayout(16, (0, 16)), 0)
    with counting(experts) as read:
        experts(arrived)
    chosen = len(parts[1].unique())
    assert read.numbers == chosen * 3 * 1024 * 512, f"{chosen} of 16 experts were chosen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 33, 128, 600])
@pytest.mark.parametrize("num_experts", [3, 8, 64])
def test_every_number_of_rows_gives_what_a_dense_computation_gives(
    dtype: torch.dtype, rows: int, num_experts: int
) -> None:
    experts = random_layer(num_experts, 32, 16, dtype)
    x_TD, ids_TK, weights_TK = routed(rows, num_experts, 3, 32, dtype)
    arrived = sort_gathered((x_TD, ids_TK, weights_TK), [rows], ExpertLayout(num_experts, (0, num_experts)), 0)
    ticket: Any = arrived.ticket
    found = add_to_rows(experts(arrived), ticket.pairs, weights_TK, dtype)
    expected = random_experts(num_experts, 32, 16, seed=4)(x_TD, ids_TK, weights_TK)
    tolerance = 4e-6 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "counts",
    [[0, 0, 1, 0, 0, 0], [0, 40, 0, 0, 1, 0], [17, 16, 1, 2, 0, 3], [200, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 300]],
    ids=str,
)
def test_skewed_counts_in_bfloat16_give_what_a_dense_computation_gives(counts: list[int]) -> None:
    experts = random_layer(len(counts), 24, 8, torch.bfloat16)
    ids_TK = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
    rows = torch.randn((sum(counts), 24), generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = random_experts(len(counts), 24, 8, seed=4)(rows, ids_TK, torch.ones(ids_TK.shape))
    for product in (experts, lambda arrived: experts._one_by_one(arrived.rows, counts)):
        found = product(Sorted(rows, torch.tensor(counts), None))
        torch.testing.assert_close(found.double(), expected, atol=5e-2, rtol=5e-2)
    for capacity in (max(counts), max(counts) + 17):
        found = experts._padded(rows, torch.tensor(counts), capacity)
        torch.testing.assert_close(found.double(), expected, atol=5e-2, rtol=5e-2)


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), float32=st.booleans())
def test_products_without_the_empty_ones_have_the_bits_of_the_grouped_product(counts: list[int], float32: bool) -> None:
    chance, dtype = torch.Generator().manual_seed(len(counts)), torch.float32 if float32 else torch.bfloat16
    rows = torch.randn((sum(counts), 32), generator=chance).to(dtype)
    weights = torch.randn((len(counts), 24, 32), generator=chance).to(dtype)
    counts_e = torch.tensor(counts)
    ends = counts_e.cumsum(0).to(torch.int32)
    grouped = functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    assert torch.equal(grouped_linear(rows, weights, counts_e), grouped)


class Products(TorchDispatchMode):
    """Notes how many rows each product has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "grouped" not in str(func), "whose products cannot be seen"
        if func is torch.ops.aten.mm.default:
            self.sizes.add(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_products_in_bfloat16_have_few_sizes_because_each_costs_a_kernel_that_is_kept() -> None:
    weights = torch.randn((2, 8, 16), generator=torch.Generator().manual_seed(1)).bfloat16()
    with Products() as products:
        for count in range(1, 1200):
            rows = torch.full((count + 9, 16), 0.5, dtype=torch.bfloat16)
            out = grouped_linear(rows, weights, torch.tensor([count, 9]))
            assert out.shape == (count + 9, 8)
    assert max(products.sizes) >= 1200
    assert len(products.sizes) <= 50


@given(count=st.integers(1, 1 << 20))
def test_sizes_are_little_more_than_the_rows_that_there_are(count: int) -> None:
    assert count <= rounded_rows(count) < count + max(8, count // 8 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_weighted_with_the_bits_of_a_product_of_mixed_types(dtype: torch.dtype) -> None:
    x_TD, ids_TK, weights_TK = routed(50, 8, 3, 20, dtype)
    ticket: Any = sort_gathered((x_TD, ids_TK, weights_TK), [50], ExpertLayout(8, (0, 6)), 0).ticket
    outputs = torch.randn((len(ticket.pairs), 20), generator=torch.Generator().manual_seed(1)).to(dtype)
    mixed = (outputs * weights_TK.reshape(-1, 1)[ticket.pairs]).float()
    expected = torch.zeros((50, 20)).index_add_(0, ticket.pairs // 3, mixed).to(dtype)
    assert torch.equal(add_to_rows(outputs, ticket.pairs, weights_TK, dtype), expected)


def test_padding_is_for_experts_that_nearly_all_have_rows_or_that_are_small() -> None:
    assert not padding_pays([1] * 8 + [0] * 56, SMALL)
    assert not padding_pays([2] * 40 + [0] * 24, SMALL)
    assert padding_pays([2] * 60 + [0] * 4, SMALL)
    assert padding_pays([1] * 12 + [0] * 20, TINY)
    assert not padding_pays([1] * 4 + [0] * 28, TINY)
    assert not padding_pays([1] * 63 + [100], SMALL), "one expert has most of the rows"

"""Property and unit tests of the KV block pool."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from moe_serve.engine.block_pool import ROOT, BlockPool, chain_hash, extend_chain

BLOCK_SIZE = 2


def chain_of(tokens: list[int]) -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, tokens, len(tokens) // BLOCK_SIZE, BLOCK_SIZE)
    return chain


def hold(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Allocate blocks for `tokens`, sharing what can be shared, and publish the full ones."""
    chain = chain_of(tokens)
    shared = pool.find(chain)
    blocks = pool.allocate(-(-len(tokens) // BLOCK_SIZE) - len(shared), shared)
    assert blocks is not None
    for block, name in zip(blocks, chain, strict=False):
        pool.publish(block, name)
    return blocks


def test_equal_prefixes_have_equal_names_and_different_ones_do_not() -> None:
    assert chain_of([1, 2, 3, 4]) == chain_of([1, 2, 3, 4, 5])
    assert chain_of([1, 2, 3, 4])[0] == chain_of([1, 2, 9, 9])[0]
    assert chain_of([1, 2, 3, 4])[1] != chain_of([9, 9, 3, 4])[1]
    assert chain_hash(ROOT, [1, 23]) != chain_hash(ROOT, [12, 3])
    assert chain_hash(ROOT, [0]) != chain_hash(ROOT, [0, 0])


def test_a_chain_is_extended_without_naming_known_blocks_again() -> None:
    chain = chain_of([1, 2])
    extend_chain(chain, [1, 2, 3, 4, 5, 6], 3, BLOCK_SIZE)
    assert chain == chain_of([1, 2, 3, 4, 5, 6])


def test_a_second_holder_shares_the_blocks_of_a_common_beginning() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    first = hold(pool, [1, 2, 3, 4])
    second = hold(pool, [1, 2, 3, 4, 5, 6])
    assert second[:2] == first
    assert pool.num_free == 5
    pool.release(first)
    assert pool.num_free == 5
    pool.check([second])


def test_released_blocks_stay_findable_until_they_are_needed() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    blocks = hold(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.find(chain_of([1, 2, 3, 4])) == blocks
    assert pool.allocate(2) is not None  # the blank block and the end of the idle chain
    assert pool.find(chain_of([1, 2, 3, 4])) == blocks[:1]
    assert pool.allocate(1) is not None
    assert pool.find(chain_of([1, 2, 3, 4])) == []
    assert pool.num_free == 0


def test_the_longest_released_prefix_is_evicted_first() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    old, young = hold(pool, [1, 1]), hold(pool, [2, 2])
    pool.release(old)
    pool.release(young)
    pool.release(hold(pool, [1, 1]))  # used again, so now the younger
    pool.allocate(2)
    assert pool.find(chain_of([2, 2])) == []
    assert pool.find(chain_of([1, 1])) == old


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    idle = hold(pool, [1, 2, 3, 4])
    pool.release(idle)
    assert pool.allocate(2, idle) is None  # the idle blocks it would share are not free for it
    pool.check([])
    assert pool.allocate(1, idle) is not None


def test_equal_blocks_computed_twice_are_published_once() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    name = chain_hash(ROOT, [1, 2])
    pool.publish(first[0], name)
    pool.publish(second[0], name)
    assert pool.find([name]) == first
    pool.release(second)
    pool.check([first])


def test_nothing_is_shared_when_caching_is_off() -> None:
    pool = BlockPool(4, BLOCK_SIZE, caching=False)
    pool.release(hold(pool, [1, 2, 3, 4]))
    assert pool.find(chain_of([1, 2])) == []
    pool.check([])


def test_releasing_twice_is_noticed() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


def test_check_notices_a_leaked_block() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="tables"):
        pool.check([])


class PoolMachine(RuleBasedStateMachine):
    """Random sequences come, grow, are published and go; the books must agree after every action."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 12), caching=st.booleans())
    def make(self, num_blocks: int, caching: bool) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, caching=caching)
        self.held: dict[int, list[int]] = {}
        self.contents: dict[int, bytes] = {}
        self.count = 0

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def come(self, tokens: list[int]) -> object:
        chain = chain_of(tokens)
        shared = self.pool.find(chain)
        assert [self.contents[block] for block in shared] == chain[: len(shared)]
        free = self.pool.num_free
        needed = -(-len(tokens) // BLOCK_SIZE) - len(shared)
        blocks = self.pool.allocate(needed, shared)
        if blocks is None:
            assert self.pool.num_free == free
            return multiple()
        assert not set(blocks[len(shared) :]) & {block for table in self.held.values() for block in table}
        for block, name in zip(blocks, chain, strict=False):
            self.contents[block] = name
            self.pool.publish(block, name)
        self.count += 1
        self.held[self.count] = blocks
        return self.count

    @rule(table=consumes(tables))
    def go(self, table: int) -> None:
        self.pool.release(self.held.pop(table))

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.held.values())


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase

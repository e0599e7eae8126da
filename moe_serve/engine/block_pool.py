"""The engine's KV blocks: which are free, which are held, and which hold a known prefix that can be shared.

Only full, computed blocks are published. A published block that nobody holds stays findable until it is
needed for something else (least recently released first). Knows block numbers, not tensors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

ROOT = bytes(32)
"""Parent of a sequence's first block."""


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block: SHA-256 of its parent's name and its tokens; equal names mean equal prefixes."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def extend_chain(chain: list[bytes], token_ids: Sequence[int], num_blocks: int, block_size: int) -> None:
    """Append names to `chain` until it names the first `num_blocks` blocks of `token_ids`."""
    for index in range(len(chain), num_blocks):
        parent = chain[-1] if chain else ROOT
        chain.append(chain_hash(parent, token_ids[index * block_size : (index + 1) * block_size]))


class BlockPool:
    """A block is blank (free, worth nothing), idle (free, published) or held (by one request or several).

    `prefix_queries` and `prefix_hits` count tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._holders = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}  # oldest release first
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that could be handed out now; idle ones count."""
        return len(self._blank) + len(self._idle)

    def find(self, chain: Iterable[bytes]) -> list[int]:
        """Published blocks for the longest known beginning of `chain`. Takes no hold on them."""
        found: list[int] = []
        for name in chain:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Hold the `shared` blocks (from find()) and `count` fresh ones; all, or None and nothing held."""
        if count > self.num_free - sum(not self._holders[block] for block in shared):
            return None
        for block in shared:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1
        return [*shared, *(self._take() for _ in range(count))]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a request's hold on its blocks, in the order of its sequence.

        Last block first, so that a chain is evicted from its end and what is left of it stays findable.
        """
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is released more often than held"
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._name_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds these held blocks any more: what they hold may be unsound. Who shares them keeps them."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is forgotten but not held"
            if block in self._name_of:
                del self._block_of[self._name_of.pop(block)]

    def publish(self, block: int, name: bytes) -> None:
        """Make a held block, full and computed, findable; of equal blocks the first wins."""
        assert self._holders[block] > 0, f"block {block} is published but not held"
        if self.caching and name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def count_query(self, tokens: int, hits: int) -> None:
        """Note a prefix lookup of `tokens`, of which `hits` need no computing."""
        self.prefix_queries += tokens
        self.prefix_hits += hits

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that the books agree with each other and, if given, with the requests' block tables."""
        blank, idle = set(self._blank), set(self._idle)
        held = {block for block, holders in enumerate(self._holders) if holders}
        assert len(blank) == len(self._blank), "a blank block is listed twice"
        assert len(blank) + len(idle) + len(held) == self.num_blocks, "a block is in two states or in none"
        assert blank | idle | held == set(range(self.num_blocks)), "a block is missing"
        assert not blank & self._name_of.keys(), "a blank block is published"
        assert idle <= self._name_of.keys(), "an idle block is not published"
        assert {name: block for block, name in self._name_of.items()} == self._block_of, "names disagree"
        if tables is not None:
            counted = Counter(block for table in tables for block in table)
            assert counted == {block: self._holders[block] for block in held}, "holders disagree with tables"

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._block_of[self._name_of.pop(block)]
        self._holders[block] = 1
        return block

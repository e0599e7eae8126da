"""Expert weights move between real ranks piece by piece, and arrive or stay; nobody waits for anybody inside a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.topology import Topology
from moe_serve.model.moe.experts import Experts, ExpertSlots
from moe_serve.worker.eplb.migrate import Flow, Migrator, Stage, cut_into_pieces, flows_of, parts_in
from tests.support.oracle import random_experts
from tests.support.ranks import Ranks, Seat

CPU = torch.device("cpu")
E, D, F, LAYERS = 6, 8, 4, 3
OFFSETS = (0, 3, 5, 8, 9)  # ragged: nine slots on four ranks
ROW_BYTES = 3 * F * D * 4


def random_row(generator: torch.Generator) -> list[int]:
    """Every expert once, the other slots anything."""
    extra = torch.randint(0, E, (OFFSETS[-1] - E,), generator=generator).tolist()
    row = [*range(E), *extra]
    return [row[place] for place in torch.randperm(len(row), generator=generator).tolist()]


def placements(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [random_row(generator) for _ in range(LAYERS)]


@dataclass
class PackedExperts:
    """Experts of three tensors: packed bytes (an odd number), a float32 scale, and bfloat16 zeros."""

    weights: list[torch.Tensor]

    @property
    def slot_bytes(self) -> int:
        return 13 + 4 + 2 * 3

    def parts(self, slot: int) -> list[torch.Tensor]:
        return [weight[slot] for weight in self.weights]

    def targets(self, slot: int) -> dict[str, torch.Tensor]:
        return {}

    def finish_loading(self) -> None:
        pass


MakeExperts = Callable[[int, list[int]], ExpertSlots]


def plain(layer: int, held: list[int]) -> ExpertSlots:
    dense = random_experts(E, D, F, seed=layer)
    experts = Experts(len(held), D, F, torch.float32, CPU)
    experts.gate_up.copy_(dense.gate_up[held])
    experts.down.copy_(dense.down[held])
    return experts


def packed(layer: int, held: list[int]) -> ExpertSlots:
    generator = torch.Generator().manual_seed(layer)
    everyone = [
        torch.randint(0, 256, (E, 13), dtype=torch.uint8, generator=generator),
        torch.randn((E,), generator=generator),
        torch.randn((E, 3), generator=generator).to(torch.bfloat16),
    ]
    return PackedExperts([weight[held] for weight in everyone])


def load(migrator_rows: list[list[int]], rank: int, kind: MakeExperts = plain) -> list[ExpertSlots]:
    """The experts a rank holds under a placement, out of one set of all per layer."""
    return [kind(layer, row[OFFSETS[rank] : OFFSETS[rank + 1]]) for layer, row in enumerate(migrator_rows)]


def same(first: list[ExpertSlots], second: list[ExpertSlots], rank: int) -> bool:
    """Bit by bit."""
    pairs = [
        (one.parts(slot), other.parts(slot))
        for one, other in zip(first, second, strict=True)
        for slot in range(OFFSETS[rank + 1] - OFFSETS[rank])
    ]
    return all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def make(seat: Seat, seed: int, max_bytes: int, kind: MakeExperts = plain) -> tuple[Migrator, list[ExpertSlots]]:
    experts = load(placements(seed), seat.rank, kind)
    rows = dict(enumerate(placements(seed)))
    return Migrator(dict(enumerate(experts)), seat.group(), OFFSETS, rows, max_bytes_per_step=max_bytes), experts


def poll_until(migrator: Migrator, done: str, seconds: float = 10) -> int:
    """Poll until the stage is "staged", "failed" or "gone"; how many polls it took."""
    deadline, polls = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        migrator.poll()
        polls += 1
        status = migrator.status
        if (done == "gone" and status is None) or (status is not None and done != "gone" and getattr(status, done)):
            return polls
        time.sleep(0.001)
    raise AssertionError(f"not {done} after {polls} polls: {migrator.status}")


def move_and_commit(seat: Seat, max_bytes: int, kind: MakeExperts) -> list[bool]:
    """Through several placements; after each commit the rank holds what a fresh load would give it."""
    migrator, experts = make(seat, 0, max_bytes, kind)
    good = []
    for epoch in range(1, 6):
        time.sleep(0.01 * seat.rank)  # ranks hear of a stage at different times
        migrator.begin(Stage(epoch, dict(enumerate(placements(epoch)))))
        before = load(placements(epoch - 1), seat.rank, kind)
        poll_until(migrator, "staged")
        good.append(same(experts, before, seat.rank))  # nothing changes before the commit
        migrator.commit(epoch)
        good.append(same(experts, load(placements(epoch), seat.rank, kind), seat.rank))
        good.append(migrator.rows == dict(enumerate(placements(epoch))))
    return good


def drop_and_go_on(seat: Seat) -> tuple[bool, bool, int]:
    """Rank 3 takes no stage up, the others have posted pieces. A drop leaves all as it was, and the next works."""
    migrator, experts = make(seat, 0, ROW_BYTES)
    if seat.rank != 3:
        migrator.begin(Stage(1, dict(enumerate(placements(1)))))
        for _ in range(20):
            migrator.poll()
    posted = 0 if migrator.status is None else migrator.status.pieces_posted
    votes = seat.groups(Topology(tp=4)).tp  # a group of its own, as in the product
    most = int(votes.all_gather(torch.tensor([posted])).max())
    if migrator.status is None:
        migrator.begin(Stage(1, dict(enumerate(placements(1)))))
    migrator.drop(most)
    poll_until(migrator, "gone")
    unchanged = same(experts, load(placements(0), seat.rank), seat.rank) and migrator.rows == dict(
        enumerate(placements(0))
    )
    migrator.begin(Stage(2, dict(enumerate(placements(2)))))
    poll_until(migrator, "staged")
    migrator.commit(2)
    return unchanged, same(experts, load(placements(2), seat.rank), seat.rank), most


def corrupt(seat: Seat) -> str:
    """Rank 0 changes a weight between checksum and sending."""
    migrator, experts = make(seat, 0, 1 << 20)
    if seat.rank == 0:
        pack = migrator._pack

        def spoiled(flows: Sequence[Flow]) -> torch.Tensor:
            packed = pack(flows)
            packed[:, 5] ^= 1
            return packed

        migrator._pack = spoiled  # type: ignore[method-assign]
    migrator.begin(Stage(1, dict(enumerate(placements(1)))))
    receives = any(
        flow.source == 0 and flow.target == seat.rank != 0
        for layer in range(LAYERS)
        for flow in flows_of(layer, placements(0)[layer], placements(1)[layer], OFFSETS)
    )
    poll_until(migrator, "failed" if receives else "staged")
    assert migrator.status is not None
    failed, posted = migrator.status.failed, migrator.status.pieces_posted
    migrator.drop(posted)
    poll_until(migrator, "gone")
    assert same(experts, load(placements(0), seat.rank), seat.rank)
    return failed


@pytest.mark.ranks
@pytest.mark.parametrize("max_bytes", [1, 3 * ROW_BYTES, 1 << 30], ids=["row by row", "three rows", "all at once"])
def test_after_a_commit_every_rank_holds_what_the_new_placement_says(ranks: Ranks, max_bytes: int) -> None:
    for good in ranks.run(move_and_commit, max_bytes, plain):
        assert all(good), good


@pytest.mark.ranks
@pytest.mark.parametrize("max_bytes", [1, 1 << 30], ids=["row by row", "all at once"])
def test_an_expert_of_three_tensors_of_different_types_arrives_bit_by_bit(ranks: Ranks, max_bytes: int) -> None:
    for good in ranks.run(move_and_commit, max_bytes, packed):
        assert all(good), good


TYPES = [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64]


@given(st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 5)), max_size=6))
def test_parts_of_any_types_share_a_row_without_gaps_or_overlap(wanted: list[tuple[torch.dtype, int]]) -> None:
    like = [torch.empty(size, dtype=dtype) for dtype, size in wanted]
    row = torch.zeros(sum(part.nbytes for part in like), dtype=torch.uint8)
    views = parts_in(row, like)
    assert [(view.dtype, view.shape) for view in views] == [(part.dtype, part.shape) for part in like]
    for view in views:
        view.view(torch.uint8).add_(1)
    assert (row == 1).all(), "every byte belongs to exactly one part"


@pytest.mark.ranks
def test_a_stage_that_one_rank_never_took_up_is_dropped_and_leaves_no_trace(ranks: Ranks) -> None:
    for unchanged, works_again, most in ranks.run(drop_and_go_on):
        assert unchanged
        assert works_again
        assert most > 0, "the others had begun"


@pytest.mark.ranks
def test_weights_that_change_on_the_way_fail_the_stage_by_name(ranks: Ranks) -> None:
    failures = [failed for failed in ranks.run(corrupt) if failed]
    assert failures
    assert all("came from expert-parallel rank 0 with another checksum" in failed for failed in failures)


rows = st.lists(st.integers(0, E - 1), min_size=OFFSETS[-1] - E, max_size=OFFSETS[-1] - E).flatmap(
    lambda extra: st.permutations([*range(E), *extra])
)


@given(old=rows, new=rows, limit=st.integers(1, 5))
def test_flows_make_the_new_placement_out_of_the_old_within_the_limit(
    old: list[int], new: list[int], limit: int
) -> None:
    flows = flows_of(0, old, new, OFFSETS)
    made = list(old)
    for flow in flows:
        assert old[flow.source_slot] == flow.expert == new[flow.target_slot]
        assert OFFSETS[flow.target] <= flow.target_slot < OFFSETS[flow.target + 1]
        held = old[OFFSETS[flow.target] : OFFSETS[flow.target + 1]]
        assert (flow.source == flow.target) == (flow.expert in held), "only what a rank lacks crosses the wire"
        made[flow.target_slot] = flow.expert
    assert made == new
    pieces = cut_into_pieces(flows, 10, 10 * limit)
    assert sorted((flow for piece in pieces for flow in piece), key=flows.index) == flows
    most = max(loads(flows), default=0)
    assert len(pieces) <= 2 * -(-most // limit), "no more than twice what the busiest rank needs"
    for piece in pieces:
        assert max(loads(piece)) <= limit


def loads(piece: list[Flow]) -> list[int]:
    """Rows each rank sends and receives."""
    ends = [[flow.source for flow in piece], [flow.target for flow in piece]]
    return [end.count(rank) for end in ends for rank in range(4)]

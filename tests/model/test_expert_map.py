"""Which copy of an expert a row takes: by the shares, and by nothing but the row itself, the layer and the rank."""

from __future__ import annotations

import torch

from moe_serve.model.moe.expert_map import ExpertMap

SLOTS = torch.tensor([[0, 4, 7], [1, 1, 1], [2, 5, 5], [3, 6, 6]])
SHARES = torch.tensor([[0.2, 0.5, 1.0], [1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [0.0, 1.0, 1.0]])
ROWS = 40_000


def make_map(salt: int = 1) -> ExpertMap:
    return ExpertMap(SLOTS.clone(), SHARES.clone(), salt=salt)


def some_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (T, 2) and hashes as a server makes them: few requests, many positions."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(0, 4, (ROWS, 2), generator=generator)
    requests = torch.randint(-(1 << 62), 1 << 62, (16,), generator=generator)
    hash_T = requests[torch.arange(ROWS) % 16] + torch.arange(ROWS) // 16
    return ids_TK, hash_T


def test_rows_take_copies_in_proportion_to_their_shares() -> None:
    ids_TK, hash_T = some_rows()
    slots_TK = make_map()(ids_TK, hash_T)
    for expert, expected in ((0, {0: 0.2, 4: 0.3, 7: 0.5}), (1, {1: 1.0}), (2, {2: 0.5, 5: 0.5}), (3, {6: 1.0})):
        chosen = slots_TK[ids_TK == expert]
        found = {slot: (chosen == slot).float().mean().item() for slot in chosen.unique().tolist()}
        assert found.keys() == expected.keys()
        for slot, share in expected.items():
            assert abs(found[slot] - share) < 0.015, (expert, slot)


def test_the_choice_does_not_depend_on_the_batch_around_a_row() -> None:
    ids_TK, hash_T = some_rows()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    expert_map = make_map()
    assert torch.equal(expert_map(ids_TK[order], hash_T[order]), expert_map(ids_TK, hash_T)[order])
    assert torch.equal(expert_map(ids_TK[7:9], hash_T[7:9]), expert_map(ids_TK, hash_T)[7:9])


def test_layers_and_ranks_choose_independently_even_for_a_single_row() -> None:
    one = torch.zeros((1, 1), dtype=torch.int64)
    slots = [int(make_map(salt)(one, torch.tensor([12345]))) for salt in range(300)]
    shares = [slots.count(slot) / 300 for slot in (0, 4, 7)]
    assert all(abs(found - expected) < 0.1 for found, expected in zip(shares, (0.2, 0.3, 0.5), strict=True))


def test_an_update_takes_effect_in_the_same_memory() -> None:
    ids_TK, hash_T = some_rows()
    expert_map = make_map()
    assert expert_map.slots_EC is not None
    address = expert_map.slots_EC.data_ptr()
    expert_map.update(SLOTS.flip(1).contiguous(), torch.ones_like(SHARES))
    assert expert_map.slots_EC.data_ptr() == address
    assert expert_map(ids_TK, hash_T).tolist() == SLOTS[:, 2][ids_TK].tolist()

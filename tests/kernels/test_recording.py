"""Operations written down and run again: on what their memory holds then, and refused where something was missed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from moe_kernels.linear.linear import linear
from moe_kernels.linear.packing import pack
from moe_kernels.norm.norm import add, rms_norm
from moe_kernels.paths import available, this_thread
from moe_kernels.recording import CHUNK_BYTES, Arena, Workspace, apart, next_layer, record
from torch import Tensor

PATH = available()[0]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.fixture
def layers() -> Callable[[Tensor], Tensor]:
    """x + linear(norm(x)) five times over, each layer with a weight of its own."""
    scale, weights = some(32, seed=1), [some(32, 32, seed=2 + layer) for layer in range(5)]
    for weight in weights:
        pack(weight)

    def run(x_TD: Tensor) -> Tensor:
        for weight in weights:
            x_TD = add(PATH, x_TD, linear(PATH, rms_norm(PATH, x_TD, scale, 1e-6), weight))
            next_layer()
        return x_TD

    return run


def test_a_replay_computes_with_what_is_there_now(layers: Callable[[Tensor], Tensor]) -> None:
    workspace, x_TD = Workspace(), some(3, 32, seed=10)
    with record(workspace) as recording:
        out_TD = layers(x_TD)
    assert recording.num_operations == 15
    assert not recording.missed
    assert torch.equal(out_TD, layers(some(3, 32, seed=10))), "while it is recorded it runs"
    before = workspace.num_bytes
    for seed in (11, 12, 10):
        x_TD.copy_(some(3, 32, seed=seed))
        recording.replay()
        assert torch.equal(out_TD, layers(some(3, 32, seed=seed)))
    assert workspace.num_bytes == before


def test_recordings_share_their_workspace(layers: Callable[[Tensor], Tensor]) -> None:
    workspace = Workspace()
    inputs = {rows: some(rows, 32, seed=rows) for rows in (1, 700, 5)}  # the second needs another chunk of memory
    made = {}
    for rows, x_TD in inputs.items():
        with record(workspace) as recording:
            made[rows] = (recording, layers(x_TD))
    for rows in (5, 1, 700, 1, 5):
        recording, out_TD = made[rows]
        recording.replay()
        assert torch.equal(out_TD, layers(inputs[rows]))


@pytest.mark.parametrize(
    "between",
    [
        lambda x_TD: x_TD + 0,
        lambda x_TD: x_TD.mul_(1),
        lambda x_TD: x_TD.t().contiguous(),
        lambda x_TD: x_TD.t().reshape(-1),
        lambda x_TD: x_TD[0, 0].item(),
        lambda x_TD: torch.empty(3),
        lambda x_TD: x_TD.float(),
    ],
    ids=["computes", "in place", "copies", "copies by another name", "looks", "takes memory", "converts"],
)
@torch.inference_mode()
def test_what_a_replay_would_leave_out_is_found(
    layers: Callable[[Tensor], Tensor], between: Callable[[Tensor], object]
) -> None:
    x_TD = some(2, 32)
    with record(Workspace()) as recording:
        between(layers(x_TD))
    assert recording.missed
    with pytest.raises(AssertionError):
        recording.replay()


@torch.inference_mode()
def test_what_stands_apart_is_called_again_with_what_it_is_given(layers: Callable[[Tensor], Tensor]) -> None:
    x_TD, calls = some(3, 32), []

    def work(middle_TD: Tensor, given: float) -> Tensor:
        calls.append(given)
        return layers(middle_TD * given)  # none of whose operations is recorded

    def whole(x_TD: Tensor, given: float) -> Tensor:
        middle_TD = layers(x_TD)
        return layers(apart(lambda given: work(middle_TD, given), given))

    with record(Workspace()) as recording:
        out_TD = whole(x_TD, 2.0)
    assert not recording.missed
    assert recording.num_operations == 30
    for seed, given in ((1, 3.0), (2, 0.5), (1, 2.0)):
        x_TD.copy_(some(3, 32, seed=seed))
        recording.replay(given)
        assert torch.equal(out_TD, whole(some(3, 32, seed=seed), given))
    assert calls == [2.0, 3.0, 3.0, 0.5, 0.5, 2.0, 2.0]
    with pytest.raises(ZeroDivisionError), record(Workspace()):
        apart(lambda given: x_TD / (1 // given), 0)
    assert this_thread.recorder is None


@torch.inference_mode()
def test_views_are_no_work(layers: Callable[[Tensor], Tensor]) -> None:
    x_TD = some(4, 32)
    with record(Workspace()) as recording:
        out_TD = layers(x_TD).view(4, 2, 16)
        out_TD.split((1, 1), dim=1)[0].transpose(0, 1)[:, None].reshape(1, 1, 4, 16)
        out_TD.contiguous().to(torch.bfloat16)
    assert not recording.missed


def test_nothing_is_recorded_once_it_has_ended(layers: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="broken"), record(Workspace()):
        raise RuntimeError("broken")
    assert this_thread.recorder is None
    with record(Workspace()) as recording:
        pass
    layers(some(2, 32))
    assert recording.num_operations == 0


def test_a_first_recording_imports_nothing() -> None:
    """A process makes it in its first decode step, and torch's compiler alone takes seconds to import."""
    script = """
import sys, torch
from moe_kernels.norm.norm import rms_norm
from moe_kernels.recording import Workspace, record

x, scale = torch.ones(3, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
before = set(sys.modules)
with torch.inference_mode(), record(Workspace()) as recording:
    rms_norm(sys.argv[1], x, scale, 1e-6).view(3, 2, 16)
recording.replay()
assert recording.num_operations == 1 and not recording.missed
print(*(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", script, PATH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_arena_gives_nothing_twice_before_it_restarts() -> None:
    arena = Arena()
    sizes = (1, 64, 65, 0, CHUNK_BYTES, 3 * CHUNK_BYTES, 7)
    taken = [arena.take(size) for size in sizes]
    assert [len(part) for part in taken] == list(sizes)
    assert all(part.data_ptr() % 64 == 0 for part in taken)
    for number, part in enumerate(taken):
        part.fill_(number)
    assert all(bool((part == number).all()) for number, part in enumerate(taken))
    addresses, held = [part.data_ptr() for part in taken], arena.num_bytes
    arena.restart()
    assert [arena.take(size).data_ptr() for size in sizes] == addresses
    assert arena.num_bytes == held

"""How much memory a KV cache may take, and what is said when it is too little."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.memory import available_memory
from moe_serve.worker.kv_room import CPU_CAP_BYTES, Room, cpu_room, fitting_blocks


@dataclass(frozen=True)
class Shape:
    block_size: int = 16
    block_bytes: int = 6144


SHAPE = Shape()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path):
    """A root folder that says 8 GiB are available and that there are no control groups."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {2**24} kB\nMemFree: 100 kB\nMemAvailable: {8 * 2**20} kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    return tmp_path


def blocks_in(num_bytes, max_model_len=32, cap=None, **options):
    room = Room(num_bytes, "so they say", cap)
    return fitting_blocks(SHAPE, Config.from_flat(options), max_model_len=max_model_len, room=room)


def test_the_room_is_filled_with_whole_blocks():
    assert blocks_in(10 * SHAPE.block_bytes + 1) == 10


def test_no_more_blocks_than_all_sequences_at_full_length_need():
    assert blocks_in(2**40, max_model_len=33, max_num_seqs=3) == 9


def test_asked_bytes_count_instead_of_the_share():
    assert blocks_in(2**40, kv_cache_memory_bytes=4 * SHAPE.block_bytes, cap=1) == 4


def test_asked_bytes_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes .* is more than .*\(so they say\)"):
        blocks_in(3 * SHAPE.block_bytes, kv_cache_memory_bytes=4 * SHAPE.block_bytes)


def test_the_cap_holds_but_one_sequence_may_exceed_it():
    assert blocks_in(2**40, cap=5 * SHAPE.block_bytes) == 5
    assert blocks_in(2**40, cap=1) == 2


@pytest.mark.parametrize(
    ("options", "source"),
    [({"kv_cache_memory_bytes": 1000}, "kv_cache_memory_bytes is 1,000"), ({}, r"there are 1,000 \(so they say\)")],
)
def test_too_little_for_one_sequence_says_how_much_is_needed_and_what_to_change(options, source):
    with pytest.raises(ConfigError, match=source) as caught:
        blocks_in(1000, max_model_len=33, **options)
    assert f"{3 * SHAPE.block_bytes:,}" in str(caught.value)
    for option in ("--kv-cache-memory-bytes", "--max-model-len", "33"):
        assert option in str(caught.value)


def test_ranks_of_a_machine_share_what_is_available(machine):
    room = cpu_room(Config.from_flat({"gpu_memory_utilization": 0.5}), 4, machine)
    assert (room.num_bytes, room.cap) == (2**30, CPU_CAP_BYTES)
    assert "0.5 of 8,589,934,592 bytes available now, divided by 4" in room.source


def test_what_steps_take_beside_the_cache_is_not_given_to_it(machine):
    for options in ({"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 1}):
        config = Config.from_flat(options)
        room = cpu_room(config, 4, machine, beside=2**28)
        assert room.num_bytes == cpu_room(config, 4, machine).num_bytes - 2**28
        assert "less 268,435,456 for logits and kernels" in room.source


def test_given_bytes_are_held_against_all_that_is_available(machine):
    room = cpu_room(Config.from_flat({"kv_cache_memory_bytes": 1}), 4, machine)
    assert (room.num_bytes, room.cap) == (2**31, None)


def test_a_control_group_above_this_process_limits_it(machine):
    group = machine / "sys/fs/cgroup/a"
    write(group / "memory.max", str(3 * 2**30))
    write(group / "memory.current", str(2 * 2**30))
    write(group / "memory.stat", f"anon 5\ninactive_file {2**29}\n")
    write(group / "b/memory.max", "max\n")
    assert available_memory(machine) == 3 * 2**29


def test_a_version_1_control_group_of_a_container_limits_it(machine):
    write(machine / "proc/self/cgroup", "4:cpu,cpuacct:/\n7:memory:/docker/xyz\n")
    top = machine / "sys/fs/cgroup/memory"
    write(top / "memory.limit_in_bytes", str(2**30))
    write(top / "memory.usage_in_bytes", str(2**28))
    write(top / "memory.stat", "total_inactive_file 0\n")
    assert available_memory(machine) == 3 * 2**28


def test_memory_can_be_read_on_this_machine():
    assert available_memory() > 0

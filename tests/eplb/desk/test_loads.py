"""Recorded loads: every format that is read, and what is said of files that are none."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.desk.loads import Trace, read_trace, write_trace

COUNTS_SLE = np.arange(24).reshape(2, 3, 4)


def test_our_format_comes_back_with_its_metadata(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.safetensors", Trace(COUNTS_SLE, {"model": "m"}))
    trace = read_trace(tmp_path / "t.safetensors")
    assert np.array_equal(trace.count_SLE, COUNTS_SLE)
    assert trace.count_SLE.dtype == np.int64
    assert trace.metadata == {"model": "m"}
    assert trace.load().tolist() == COUNTS_SLE.sum(axis=0).tolist()


def test_arrays_of_numpy_are_read_with_and_without_steps(tmp_path: Path) -> None:
    np.save(tmp_path / "steps.npy", COUNTS_SLE)
    np.save(tmp_path / "sum.npy", COUNTS_SLE[0].astype(np.float32))
    np.savez(tmp_path / "named.npz", other=np.zeros(3), logical_count=COUNTS_SLE)
    np.savez_compressed(tmp_path / "only.npz", anything=COUNTS_SLE[1])
    for name, expected in (("steps.npy", COUNTS_SLE), ("named.npz", COUNTS_SLE)):
        assert np.array_equal(read_trace(tmp_path / name).count_SLE, expected)
    assert np.array_equal(read_trace(tmp_path / "sum.npy").count_SLE, COUNTS_SLE[:1])
    assert np.array_equal(read_trace(tmp_path / "only.npz").count_SLE, COUNTS_SLE[1:])


def test_what_another_recorder_writes_is_read(tmp_path: Path) -> None:
    torch.save({"logical_count": torch.from_numpy(COUNTS_SLE).int(), "rank": 0}, tmp_path / "t.pt")
    assert np.array_equal(read_trace(tmp_path / "t.pt").count_SLE, COUNTS_SLE)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.pt").write_bytes(pickle.dumps({"logical_count": Evil()}, protocol=2))
    torch.save({"logical_count": Evil()}, tmp_path / "u.pt")
    np.save(tmp_path / "t.npy", np.array([Evil()], dtype=object))
    for name in ("t.pt", "u.pt", "t.npy"):
        with pytest.raises(ConfigError, match=name):
            read_trace(tmp_path / name)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz", ".pt"])
@pytest.mark.parametrize("content", [b"", b"rubbish" * 50])
def test_rubbish_is_refused_with_the_name_of_the_file(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"rubbish{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="rubbish"):
        read_trace(path)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (np.zeros((2, 3)), "zero everywhere"),
        (np.full((2, 3), -1), "holds -1"),
        (np.full((2, 3), np.nan), "NaN"),
        (np.ones(3), r"not \[3\]"),
        (np.ones((1, 2, 3, 4)), r"not \[1, 2, 3, 4\]"),
        (np.ones((0, 3)), r"not \[0, 3\]"),
        (np.array([["a"]]), "must hold numbers"),
    ],
)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, counts: np.ndarray, words: str) -> None:
    np.save(tmp_path / "t.npy", counts)
    with pytest.raises(ConfigError, match=words):
        read_trace(tmp_path / "t.npy")


def test_files_without_the_key_say_what_they_hold(tmp_path: Path) -> None:
    save_file({"other": COUNTS_SLE}, tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npz", first=COUNTS_SLE, second=COUNTS_SLE)
    torch.save({"counts": torch.zeros(1)}, tmp_path / "t.pt")
    torch.save(torch.zeros(1), tmp_path / "u.pt")
    for name, words in (("t.safetensors", "other"), ("t.npz", "first, second"), ("t.pt", "counts"), ("u.pt", "Tensor")):
        with pytest.raises(ConfigError, match=words):
            read_trace(tmp_path / name)


def test_absent_files_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_trace(tmp_path / "t.npy")
    with pytest.raises(ConfigError, match=r"known are: \.safetensors, \.npy, \.npz, \.pt"):
        read_trace(tmp_path / "t.csv")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ConfigError, match="is no file"):
        read_trace(tmp_path / "folder.npy")

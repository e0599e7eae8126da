"""Weight files that lie: an index or a header without end, of the wrong form, or beyond its file is one sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from moe_serve.base.errors import CheckpointError
from moe_serve.worker.loading.checkpoint import INDEX, SINGLE, Checkpoint

DEEP = 200_000
HEADERS = {
    "brackets": b"[" * DEEP,
    "braces": b'{"a":' * DEEP,
    "closed brackets": b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "no object": b"[]",
    "negative sizes": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "sizes without end": b'{"a": {"dtype": "F32", "shape": [4000000000, 4000000000, 4], "data_offsets": [0, 4]}}',
    "beyond the file": b'{"a": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}',
    "unknown type": b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
}


def refusal(folder: Path, file: str) -> None:
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")) as caught:
        Checkpoint(folder)
    assert len(str(caught.value)) < 500 + len(str(folder))


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_named(tmp_path: Path, header: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refusal(tmp_path, SINGLE)


@pytest.mark.parametrize("size", [10**18, 2**63, 2**64 - 1, 10**8])
def test_a_header_longer_than_its_file_is_named(tmp_path: Path, size: int) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", size) + b"{}")
    refusal(tmp_path, SINGLE)


@pytest.mark.parametrize(
    "index",
    [
        "[" * DEEP,
        '{"a":' * DEEP,
        '{"weight_map": ' + "[" * DEEP + "]" * DEEP + "}",
        '{"metadata": ' + "[" * DEEP + "]" * DEEP + ', "weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../../etc/passwd"}}',
        json.dumps({"weight_map": {"a": "x" * 100}}),
    ],
    ids=lambda text: text[:20],
)
def test_an_index_that_lies_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    refusal(tmp_path, INDEX)

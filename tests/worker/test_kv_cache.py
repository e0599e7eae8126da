"""What a block of the KV cache holds; and the device and type it is on."""

from __future__ import annotations

import pytest
import torch

from moe_serve.base.errors import ConfigError
from moe_serve.model.context import TokenKV
from moe_serve.worker.device import choose_device, choose_dtype
from moe_serve.worker.kv_cache import KVShape

SHAPE = KVShape((TokenKV(3, 8, 8), TokenKV(3, 8, 8)), block_size=16, dtype=torch.float32)


def test_a_block_holds_keys_and_values_of_all_layers():
    assert SHAPE.block_bytes == 2 * 2 * 3 * 8 * 4 * 16
    kv = SHAPE.allocate(5, torch.device("cpu"))
    assert len(kv) == 2
    assert kv[0].k_NGd.shape == kv[1].v_NGd.shape == (80, 3, 8)
    assert sum(layer.k_NGd.nbytes + layer.v_NGd.nbytes for layer in kv) == 5 * SHAPE.block_bytes


def test_layers_may_keep_different_things_of_a_token():
    shape = KVShape((TokenKV(3, 8, 8), TokenKV(1, 24, 16)), block_size=16, dtype=torch.bfloat16)
    assert shape.block_bytes == (3 * 16 + 1 * 40) * 2 * 16
    kv = shape.allocate(5, torch.device("cpu"))
    assert (kv[1].k_NGd.shape, kv[1].v_NGd.shape) == ((80, 1, 24), (80, 1, 16))
    assert sum(layer.k_NGd.nbytes + layer.v_NGd.nbytes for layer in kv) == 5 * shape.block_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_refused():
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device"):
        choose_device("cuda", 0)


def test_auto_takes_the_checkpoints_type():
    cpu = torch.device("cpu")
    assert choose_dtype("auto", "bfloat16", cpu) == torch.bfloat16
    assert choose_dtype("float32", "bfloat16", cpu) == torch.float32
    with pytest.raises(ConfigError, match="float8"):
        choose_dtype("auto", "float8", cpu)

"""The gated feed-forward of many experts, each on its own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import EXPERTS, empty, run


def experts(path: str, rows_RD: Tensor, counts_e: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """(R, D) bfloat16: down(silu(gate(x)) * up(x)) of each row's expert; the first counts_e[0] rows are the first's.

    `rows_RD` bfloat16, contiguous; `counts_e` (e,) int64, its sum R; `gate_up` (e, 2F, D) after pack_gated() and `down`
    (e, D, F) after pack(), each expert by itself; D and F multiples of 16. Sums in float32; what stands between the two
    products and the result are rounded once each. An expert without rows is not read. A row's bits depend on nothing
    but the row, its expert and the path.
    """
    (num_rows, hidden), width = rows_RD.shape, down.shape[2]
    assert rows_RD.dtype == gate_up.dtype == down.dtype == torch.bfloat16
    assert rows_RD.is_contiguous()
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    assert counts_e.dtype == torch.int64
    assert counts_e.is_contiguous()
    assert counts_e.shape[0] == gate_up.shape[0] == down.shape[0]
    out = empty(num_rows, hidden, dtype=torch.bfloat16)
    if num_rows:
        inner = empty(num_rows, width, dtype=torch.bfloat16)
        given = (rows_RD.data_ptr(), counts_e.data_ptr(), gate_up.data_ptr(), down.data_ptr())
        run(path, EXPERTS, *given, inner.data_ptr(), out.data_ptr(), counts_e.shape[0], hidden, width, 0, 0, 0)
    return out

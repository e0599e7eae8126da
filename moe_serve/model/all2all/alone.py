"""One rank, which holds every expert: no row travels. What each backend comes to in a group of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, ArrivedForm, RankMajor
from moe_serve.parallel.pending import Pending


class Alone:
    """Implements All2All; made by its layout's rank alone, so it is in no table and nobody asks for it."""

    arrives: ClassVar[ArrivedForm] = RankMajor
    applies_weights: ClassVar[Literal["combine", "experts"]] = "experts"
    id_dtype: ClassVar[torch.dtype] = torch.int64
    exact: ClassVar[bool] = True
    padding_rows = 0

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        arrived = RankMajor(x_TD, physical_ids_TK, weights_TK, None)
        return Pending(lambda: arrived)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        return Pending(lambda: outputs)

    def close(self) -> None:
        pass

"""Child of bench.experts: MoE layers' experts of whatever checkout is on the import path. A line of JSON in, one out.

Started by its path, not as a module, so that it runs beside a checkout that does not have it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_serve.model.all2all.rows import add_to_rows, sort_gathered
from moe_serve.model.all2all.shape import ExpertLayout
from moe_serve.model.moe.experts import Experts


class Layers:
    """Experts of several layers, used in turn, so that a layer's weights have left the caches before its next turn."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        self._experts, self._top_k = sizes["experts"], sizes["top_k"]
        dtype, chance = getattr(torch, sizes["dtype"]), torch.Generator().manual_seed(0)
        self._layers = [
            Experts(self._experts, sizes["hidden"], sizes["width"], dtype, torch.device("cpu"))
            for _ in range(sizes["layers"])
        ]
        for layer in self._layers:
            for matrix in (layer.gate_up, layer.down):
                matrix.copy_(torch.randn(matrix.shape, generator=chance) / matrix.shape[-1] ** 0.5)

    def turn(self, rows: int, passes: int, seed: int) -> dict[str, object]:
        """Seconds of each pass, from the router's choice to the weighted sum, and a checksum of what came out."""
        seconds, digest = [], hashlib.sha256()
        for number, batch in enumerate(self._batches(rows, passes, seed)):
            started = time.perf_counter()
            out = self._pass(self._layers[number % len(self._layers)], *batch)
            seconds.append(time.perf_counter() - started)
            digest.update(out.view(torch.uint8).numpy().tobytes())
        return {"seconds": seconds, "digest": digest.hexdigest()}

    def _pass(self, layer: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        layout = ExpertLayout(self._experts, (0, self._experts))
        arrived = sort_gathered((x_TD, ids_TK, weights_TK), [len(x_TD)], layout, 0)
        ticket: Any = arrived.ticket
        return add_to_rows(layer(arrived), ticket.pairs, ticket.weights_AK, ticket.dtype)

    def _batches(self, rows: int, passes: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        chance, gate_up = torch.Generator().manual_seed(seed), self._layers[0].gate_up
        for _ in range(passes):
            x_TD = torch.randn((rows, gate_up.shape[-1]), generator=chance).to(gate_up.dtype)
            scores_TE = torch.randn((rows, self._experts), generator=chance)
            weights_TK, ids_TK = scores_TE.softmax(dim=-1).topk(self._top_k)
            yield x_TD, ids_TK.to(torch.int32), weights_TK


def main() -> None:
    sizes = json.loads(sys.argv[1])
    torch.set_num_threads(sizes["threads"])
    with torch.inference_mode():
        layers = Layers(sizes)
        for line in sys.stdin:
            print(json.dumps(layers.turn(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

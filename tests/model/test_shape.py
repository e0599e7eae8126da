"""A backend that cannot carry what would be asked of it is refused before anything starts, with what would help."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.base.tables import ALL2ALL
from moe_serve.model.all2all.limits import LIMITS, Limits, check_dispatch
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout

SHAPE = DispatchShape(max_rows=4096, num_ranks=4, hidden=2048, top_k=8, dtype="bfloat16")
EQUAL, UNEQUAL, CUT = ExpertLayout(8, (0, 2, 4, 6, 8)), ExpertLayout(10, (0, 3, 6, 8, 10)), ExpertLayout(8, None)


@pytest.mark.parametrize(
    ("limits", "shape", "layout", "names"),
    [
        (Limits(max_rows=128), SHAPE, EQUAL, "--max-num-batched-tokens"),
        (Limits(max_ranks=2), SHAPE, EQUAL, "parallel is 4"),
        (Limits(rank_counts=(2, 8, 16)), SHAPE, EQUAL, "joins 2, 8 or 16 ranks, but data x tensor parallel is 4"),
        (Limits(hidden_sizes=(4096, 7168)), SHAPE, EQUAL, "sizes of 4096 or 7168, but the model's is 2048"),
        (Limits(max_top_k=6), SHAPE, EQUAL, "chooses 8"),
        (Limits(hidden_multiple=512), replace(SHAPE, hidden=2880), EQUAL, "multiple of 512"),
        (Limits(dtypes=("bfloat16",)), replace(SHAPE, dtype="float32"), EQUAL, "--dtype"),
        (Limits(), replace(SHAPE, quantisation="fp8"), EQUAL, "quantised as fp8; .*one that does .*deepep_v2"),
        (
            Limits(quantisations=("fp8",)),
            replace(SHAPE, quantisation="fp8", hidden=2112),
            EQUAL,
            "a multiple of 128, but the model",
        ),
        (Limits(min_ranks=8), SHAPE, EQUAL, "joins at least 8 ranks, but data x tensor parallel is 4"),
        (Limits(top_ks=(1, 2, 6)), SHAPE, EQUAL, "compiled for 1, 2 or 6 experts of a row, but the model chooses 8"),
        (Limits(max_experts=6), SHAPE, EQUAL, "at most 6 physical experts, but there are 8; lower --eplb-config"),
        (Limits(experts_multiple=16), SHAPE, EQUAL, "a multiple of 16, but there are 8; choose --eplb-config"),
        (Limits(), replace(SHAPE, graph=True), EQUAL, "CUDA graph"),
        (Limits(in_flight=1), replace(SHAPE, in_flight=2), EQUAL, "one exchange at a time.*leave out --enable-dbo"),
        (Limits(equal_slots=True), SHAPE, UNEQUAL, "--eplb-config.num-redundant-experts"),
        (Limits(whole_experts=True), SHAPE, CUT, "--enable-expert-parallel"),
    ],
)
def test_each_limit_has_its_sentence(limits: Limits, shape: DispatchShape, layout: ExpertLayout, names: str) -> None:
    with pytest.raises(ConfigError, match=names) as error:
        check_dispatch("torch_a2a", shape, layout, limits)
    assert "--all2all-backend torch_a2a" in str(error.value)


def test_what_a_backend_can_carry_is_not_refused() -> None:
    limits = Limits(
        max_rows=4096,
        max_ranks=4,
        max_top_k=8,
        hidden_multiple=512,
        dtypes=("bfloat16",),
        quantisations=("fp8",),
        graphs=True,
        equal_slots=True,
        whole_experts=True,
    )
    check_dispatch("torch_a2a", replace(SHAPE, quantisation="fp8", graph=True), EQUAL, limits)
    for backend in ALL2ALL:
        own = LIMITS[backend]
        shape = replace(SHAPE, max_rows=min(SHAPE.max_rows, own.max_rows or SHAPE.max_rows))
        for layout in (EQUAL,) if own.whole_experts else (EQUAL, UNEQUAL, CUT):
            check_dispatch(backend, shape, layout)

"""FlashInfer's two-sided kernels: rows go through a queue for each pair of ranks."""

from __future__ import annotations

from typing import Any, ClassVar

from flashinfer import moe_ep

from moe_serve.model.all2all.flashinfer_nvlink import NVLink


class FlashInferTwoSided(NVLink):
    """NVLinkTwoSidedAlltoAll; its memory does not grow with the rows of a rank."""

    name: ClassVar[str] = "flashinfer_nvlink_two_sided"
    config: ClassVar[type[Any]] = moe_ep.NVLinkTwoSidedConfig

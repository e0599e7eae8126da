"""Grouped-query attention of one rank: its query heads, the KV heads they share, and the sum over the TP ranks."""

from __future__ import annotations

from functools import partial

import torch
from moe_kernels.recording import apart
from torch import Tensor, nn

from moe_serve.base.progress import Phase
from moe_serve.model.attention.base import AttentionBackend
from moe_serve.model.context import ForwardContext, LayerKV, TokenKV
from moe_serve.model.layers.linear import Linear, weight
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rotation
from moe_serve.model.partition import Partition
from moe_serve.parallel.collectives import Group


class Attention(nn.Module):
    """q, k and v come out of one product, in this order of heads: query, key, value."""

    def __init__(
        self,
        partition: Partition,
        group: Group,
        backend: AttentionBackend,
        *,
        dtype: torch.dtype,
        device: torch.device,
        path: str | None = None,
    ) -> None:
        super().__init__()
        config = partition.config
        self.partition, self.group, self.backend = partition, group, backend
        self.num_heads, self.num_kv_heads = len(partition.heads), len(partition.kv_heads)
        self.head_dim, self.eps, self.qk_norm = config.head_dim, config.rms_norm_eps, config.qk_norm
        rows = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        columns = self.num_heads * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias, dtype=dtype, device=device, path=path)
        self.o = Linear(columns, config.hidden_size, bias=False, dtype=dtype, device=device, path=path)
        self.o_bias = weight(config.hidden_size, dtype=dtype, device=device) if config.o_bias else None
        if self.qk_norm != "none":
            whole = self.qk_norm == "full"
            shapes = [
                (heads, self.head_dim) if whole else (self.head_dim,) for heads in (self.num_heads, self.num_kv_heads)
            ]
            self.q_norm, self.k_norm = (weight(*shape, dtype=dtype, device=device) for shape in shapes)

    @property
    def token_kv(self) -> TokenKV:
        """What it keeps of a token on this rank."""
        return TokenKV(self.num_kv_heads, self.head_dim, self.head_dim)

    def forward(self, x_TD: Tensor, rotation: Rotation, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_TD).view(-1, heads + 2 * kv_heads, self.head_dim)
        q_THd, k_TGd, v_TGd = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if self.qk_norm == "full":
            normed = apart(partial(self._normed, q_THd, k_TGd), ctx)
            q_THd, k_TGd = torch.split(normed, [heads, kv_heads], dim=1)
        out_THd = self.backend.forward(q_THd, k_TGd, v_TGd, rotation, kv, ctx, self._head_norm())
        out_TD: Tensor = self.o(out_THd.view(-1, heads * self.head_dim))
        if self.group.size == 1 and self.o_bias is None:
            return out_TD
        return apart(partial(self._whole, out_TD), ctx)

    def _whole(self, part_TD: Tensor, ctx: ForwardContext) -> Tensor:
        out_TD = self._sum(part_TD, ctx)
        return out_TD if self.o_bias is None else out_TD + self.o_bias

    def _head_norm(self) -> HeadNorm | None:
        if self.qk_norm != "head":
            return None
        return HeadNorm(self.q_norm, self.k_norm, self.eps)

    def _normed(self, q_THd: Tensor, k_TGd: Tensor, ctx: ForwardContext) -> Tensor:
        """q and k, beside each other as heads, normed over all heads of all TP ranks at once."""
        q_wide, k_wide = q_THd.float(), k_TGd.float()
        sums_2T = self._sums(q_wide, k_wide, ctx)
        config = self.partition.config
        q_mean, k_mean = (
            sums_2T[0] / (config.num_heads * self.head_dim),
            sums_2T[1] / (config.num_kv_heads * self.head_dim),
        )
        q = (q_wide * torch.rsqrt(q_mean + self.eps)[:, None, None]).to(q_THd.dtype) * self.q_norm
        k = (k_wide * torch.rsqrt(k_mean + self.eps)[:, None, None]).to(k_TGd.dtype) * self.k_norm
        return torch.cat((q, k), dim=1)

    def _sums(self, q_wide: Tensor, k_wide: Tensor, ctx: ForwardContext) -> Tensor:
        """Sums of squares of all heads of all TP ranks, (2, T); each KV head counts once however many hold it."""
        own = torch.stack((q_wide.square().sum((1, 2)), k_wide.square().sum((1, 2)) / self.partition.kv_replicas))
        sums_2T = self._sum(own, ctx)
        ctx.progress.enter(Phase.ATTENTION)
        return sums_2T

    def _sum(self, own: Tensor, ctx: ForwardContext) -> Tensor:
        if self.group.size > 1:
            ctx.progress.enter(Phase.TENSOR_PARALLEL)
        return self.group.all_reduce(own)

    def targets(self) -> dict[str, Tensor]:
        """Logical weight -> where it lives."""
        sizes = [count * self.head_dim for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        weights = torch.split(self.qkv.weight, sizes)
        found = {f"{part}.weight": rows for part, rows in zip("qkv", weights, strict=True)}
        found["o.weight"] = self.o.weight
        if self.qkv.bias is not None:
            biases = torch.split(self.qkv.bias, sizes)
            found |= {f"{part}.bias": rows for part, rows in zip("qkv", biases, strict=True)}
        if self.o_bias is not None:
            found["o.bias"] = self.o_bias
        if self.qk_norm != "none":
            found |= {"q_norm.weight": self.q_norm.view(-1), "k_norm.weight": self.k_norm.view(-1)}
        return found

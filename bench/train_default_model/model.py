"""Qwen3-MoE in plain torch for training: tokens sorted by expert, one matrix product per expert on a slice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """The shape of the default model."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    top_k: int = 4
    width: int = 64
    context: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-6


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        out, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, out, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, kv, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, kv, bias=False)
        self.o_proj = nn.Linear(out, sizes.hidden, bias=False)
        self.q_norm = nn.RMSNorm(sizes.head_dim, eps=sizes.eps)
        self.k_norm = nn.RMSNorm(sizes.head_dim, eps=sizes.eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x_BTD.shape
        heads = (rows, length, -1, self.sizes.head_dim)
        q = rotated(self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2), cos, sin)
        k = rotated(self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        groups = self.sizes.heads // self.sizes.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = attended(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


def attended(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """Causal attention; written out for short windows, where that is faster on a CPU than torch's own."""
    length = q_BHTK.shape[2]
    if length > 1024 or q_BHTK.is_cuda:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
    mask = torch.full((length, length), float("-inf")).triu(1)
    scores = torch.baddbmm(
        mask.expand(len(q_BHTK) * q_BHTK.shape[1], -1, -1).to(q_BHTK.dtype),
        q_BHTK.flatten(0, 1),
        k_BHTK.flatten(0, 1).mT,
        alpha=q_BHTK.shape[-1] ** -0.5,
    )
    return (scores.softmax(-1) @ v_BHTK.flatten(0, 1)).view_as(q_BHTK)


def rotated(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x_BHTK.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Experts(nn.Module):
    """Router and experts. `usage` is a running mean of each expert's share, over all domains."""

    usage: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gate = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(sizes.experts, 2, sizes.width, sizes.hidden))
        self.down = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, sizes.width))
        self.register_buffer("usage", torch.full((sizes.experts,), 1 / sizes.experts))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the load-balancing loss, in which the running usage stands for this batch's: so a batch of
        one topic may use few experts, if over many batches all are used."""
        probs_NE = self.gate(x_ND).softmax(-1)
        weights_NK, chosen_NK = probs_NE.topk(self.sizes.top_k, dim=-1)
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        counts = chosen_NK.flatten().bincount(minlength=self.sizes.experts)
        if self.training:
            self.usage.lerp_(counts / counts.sum(), 0.05)
        balance = self.sizes.experts * (self.usage.clone() * probs_NE.mean(0)).sum()
        rows, padded = padded_order(chosen_NK.flatten(), counts)
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        source = rows // self.sizes.top_k
        x = F.pad(x_ND.to(dtype), (0, 0, 0, 1)).index_select(0, source)
        out = grouped_mlp(x, self.gate_up.to(dtype), self.down.to(dtype), padded)
        out = out * F.pad(weights_NK.flatten(), (0, self.sizes.top_k))[rows, None].to(dtype)
        # Summed per token through the inverse order: an addition of rows by index would be slow and, in bf16, rough.
        place = torch.empty(weights_NK.numel() + self.sizes.top_k, dtype=torch.long, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        picked = out.index_select(0, place[: weights_NK.numel()])
        return picked.view(*chosen_NK.shape, -1).float().sum(1), balance


def padded_order(chosen: Tensor, counts: Tensor, multiple: int = 32) -> tuple[Tensor, list[int]]:
    """Indices into `chosen` sorted by expert, each expert's filled up to a multiple with len(chosen), and the sizes.

    Few different sizes: libraries that compile a matrix product per shape then find it in their cache.
    """
    padded = (counts + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    order = chosen.argsort(stable=True)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    rows = torch.full((int(ends[-1]),), len(chosen), dtype=torch.long, device=chosen.device)
    rows[torch.arange(len(order), device=order.device) + shift[chosen[order]]] = order
    return rows, padded.tolist()


def grouped_mlp(x: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """Rows of `x` sorted by expert, `counts` of them for each."""
    parts = []
    per_expert = zip(x.split(counts), gate_up.flatten(1, 2).unbind(), down.unbind(), strict=True)
    for rows, first, second in per_expert:
        gate, up = (rows @ first.T).chunk(2, dim=-1)
        parts.append((F.silu(gate) * up) @ second.T)
    return torch.cat(parts)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(sizes.hidden, eps=sizes.eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden, eps=sizes.eps)
        self.mlp = Experts(sizes)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin)
        out, balance = self.mlp(self.post_attention_layernorm(x_BTD).flatten(0, 1))
        return x_BTD + out.view_as(x_BTD), balance


class Model(nn.Module):
    """Parameter names are the checkpoint's, but for the experts, which are stacked here."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=sizes.eps)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for layer in self.layers:
            with torch.no_grad():
                layer.self_attn.o_proj.weight.mul_(0.2)
                layer.mlp.down.mul_(0.2)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (rows, length, vocab) and the mean load-balancing loss (1 when perfectly even)."""
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device, dtype=torch.float32)
        half = self.sizes.head_dim // 2
        speeds = self.sizes.rope_theta ** (-torch.arange(half, device=tokens_BT.device, dtype=torch.float32) / half)
        angles = places[:, None] * speeds
        cos, sin = angles.cos(), angles.sin()
        x_BTD = self.embed_tokens(tokens_BT)
        balances = []
        for layer in self.layers:
            x_BTD, balance = layer(x_BTD, cos, sin)
            balances.append(balance)
        return F.linear(self.norm(x_BTD), self.embed_tokens.weight), torch.stack(balances).mean()

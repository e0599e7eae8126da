"""Logits -> token ids. Each row by its own request's options and its own random number, whatever else is in the batch.

Order: logit_bias, ban of end tokens, penalties, temperature, min_p, top_k, top_p. A filter keeps or drops tokens by
the value of their logit alone, so tokens that tie stay or go together and no result depends on the order of a sort.
The random number of a row is a hash of (seed, position): there is no generator state to lose in a preemption.
Shape letters: S rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_serve.base.commands import Sampled
from moe_serve.base.errors import EngineError
from moe_serve.base.sampling import SamplingParams
from moe_serve.worker.logprobs import token_logprobs
from moe_serve.worker.penalties import TokenCounts, has_penalties

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIN_TEMPERATURE = 1e-6
CHUNK_ELEMENTS = 1 << 23
FIRST_SORTED = 1024


class SamplingState:
    """What the sampler keeps of one request. `num_generated` tokens were made so far, `length` are known in all."""

    __slots__ = ("_counts", "_params_edit", "length", "num_generated", "params", "request_id", "seed", "stop_ids")

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        *,
        seed: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.seed = seed
        self.stop_ids = stop_ids
        self.length = len(token_ids)
        self.num_generated = len(token_ids) - num_prompt_tokens
        self._params_edit = bool(params.logit_bias) or has_penalties(params)
        self._counts: TokenCounts | None = None
        if has_penalties(params):
            self._counts = TokenCounts(token_ids[:num_prompt_tokens] if params.repetition_penalty != 1 else ())
            self._counts.generated(token_ids[num_prompt_tokens:])

    def append(self, token_ids: Sequence[int]) -> None:
        """Learn generated tokens."""
        self.length += len(token_ids)
        self.num_generated += len(token_ids)
        if self._counts is not None:
            self._counts.generated(token_ids)

    @property
    def counts(self) -> TokenCounts | None:
        return self._counts

    @property
    def bans_stop(self) -> bool:
        return self.num_generated < self.params.min_tokens and bool(self.stop_ids)

    @property
    def edits_logits(self) -> bool:
        """Whether something other than the temperature and the filters changes this row."""
        return self._params_edit or self.bans_stop

    def uniform(self) -> float:
        """The random number in [0, 1) of the next token."""
        return uniform(self.seed, self.length)


def uniform(seed: int, position: int) -> float:
    """53 random bits of (seed, position) as a number in [0, 1)."""
    return (_mix(_mix((seed + GOLDEN) & MASK) + (position + 1) * GOLDEN & MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """The finalizer of splitmix64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def sample(logits_SV: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """One token per row. `logits_SV` float32 is left as it was."""
    best_S, chosen_S = logits_SV.max(dim=-1)
    finite = torch.isfinite(best_S)
    if not bool(finite.all()):
        row = int(torch.nonzero(~finite)[0])
        raise EngineError(
            f"the model gave logits that are not finite for request {states[row].request_id}; "
            "a wider --dtype (bfloat16, float32) may help, if the checkpoint is sound"
        )
    edited_SV = logits_SV
    edited = [row for row, state in enumerate(states) if state.edits_logits]
    if edited:
        edited_SV = logits_SV.clone()
        _edit(edited_SV, states, edited)
        chosen_S = edited_SV.argmax(dim=-1)
    drawn = [row for row, state in enumerate(states) if not state.params.greedy]
    step = max(1, CHUNK_ELEMENTS // logits_SV.shape[1])
    for start in range(0, len(drawn), step):
        rows = drawn[start : start + step]
        part_SV = edited_SV if len(rows) == len(states) else edited_SV[rows]
        chosen_S[rows] = draw(part_SV, [states[row] for row in rows])
    tokens = chosen_S.tolist()
    wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    found = dict(
        zip(
            wanted,
            token_logprobs(
                logits_SV if len(wanted) == len(states) else logits_SV[wanted],
                [tokens[row] for row in wanted],
                [states[row].params.logprobs or 0 for row in wanted],
            ),
            strict=True,
        )
        if wanted
        else ()
    )
    return [Sampled(state.request_id, tokens[row], found.get(row)) for row, state in enumerate(states)]


def _edit(logits_SV: Tensor, states: Sequence[SamplingState], rows: Sequence[int]) -> None:
    """logit_bias, the ban of end tokens and the penalties, in place."""
    biased = [(row, token, bias) for row in rows for token, bias in states[row].params.logit_bias.items()]
    if biased:
        at_row, at_token, biases = zip(*biased, strict=True)
        index = _index(at_row, at_token, logits_SV.device)
        logits_SV[index] += torch.tensor(biases, dtype=torch.float32, device=logits_SV.device)
    banned = [(row, token) for row in rows if states[row].bans_stop for token in states[row].stop_ids]
    if banned:
        at_row, at_token = zip(*banned, strict=True)
        logits_SV[_index(at_row, at_token, logits_SV.device)] = -torch.inf
    penalized = [(row, counts) for row in rows if (counts := states[row].counts) is not None]
    if penalized:
        _penalize(logits_SV, states, penalized)


def _index(at_row: Sequence[int], at_token: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(at_row, device=device), torch.tensor(at_token, device=device)


def _penalize(logits_SV: Tensor, states: Sequence[SamplingState], penalized: Sequence[tuple[int, TokenCounts]]) -> None:
    """Repetition over prompt and answer first, then frequency and presence over the answer."""
    sizes = [len(counts.tokens) for _, counts in penalized]
    rows = np.repeat([row for row, _ in penalized], sizes)
    params = [states[row].params for row, _ in penalized]
    settings = np.array(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params], dtype=np.float64
    ).repeat(sizes, axis=0)
    counts = np.concatenate([counts.counts for _, counts in penalized])
    device = logits_SV.device
    index = (
        torch.from_numpy(rows).to(device),
        torch.from_numpy(np.concatenate([counts.tokens for _, counts in penalized])).to(device),
    )
    repetition = torch.from_numpy(settings[:, 0]).to(device)
    less = torch.from_numpy(settings[:, 1] * counts + settings[:, 2] * (counts > 0)).to(device)
    old = logits_SV[index].to(torch.float64)
    new = torch.where(old > 0, old / repetition, old * repetition) - less
    # A tiny repetition penalty may leave float32; the greatest number still wins every comparison.
    logits_SV[index] = new.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)


def draw(logits_SV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A token per row from its filtered distribution, by the inverse of the summed distribution in vocabulary order."""
    device = logits_SV.device

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

    params = [state.params for state in states]
    best_S1 = logits_SV.amax(dim=-1, keepdim=True)
    heat_S1 = column([max(p.temperature, MIN_TEMPERATURE) for p in params]).to(torch.float32)
    weights_SV = torch.exp((logits_SV - best_S1) / heat_S1)
    if any(p.min_p > 0 for p in params):
        least_S1 = column([p.min_p for p in params]).to(torch.float32)
        weights_SV = torch.where(weights_SV >= least_S1, weights_SV, 0)
    weights_SV = weights_SV.to(torch.float64)
    ks = [p.top_k if 0 < p.top_k < logits_SV.shape[1] else 0 for p in params]
    if any(ks):
        weights_SV = _keep_top_k(logits_SV, weights_SV, ks)
    if any(p.top_p < 1 for p in params):
        weights_SV = _keep_top_p(logits_SV, weights_SV, column([p.top_p for p in params]))
    sums_SV = weights_SV.cumsum(dim=-1)
    total_S1 = sums_SV[:, -1:]
    # Strictly below the total, or the search could run past the last token.
    aim_S1 = torch.minimum(
        column([state.uniform() for state in states]) * total_S1,
        torch.nextafter(total_S1, torch.zeros_like(total_S1)),
    )
    return torch.searchsorted(sums_SV, aim_S1, right=True).squeeze(1)


def _keep_top_k(logits_SV: Tensor, weights_SV: Tensor, ks: Sequence[int]) -> Tensor:
    """Zero the weights of tokens below each row's k-th greatest logit; k = 0 keeps all."""
    greatest_SM = logits_SV.topk(max(ks), dim=-1).values
    place_S1 = torch.tensor([max(k, 1) - 1 for k in ks], device=logits_SV.device).unsqueeze(1)
    limit_S1 = greatest_SM.gather(1, place_S1)
    limited_S1 = torch.tensor([k > 0 for k in ks], device=logits_SV.device).unsqueeze(1)
    return torch.where(limited_S1 & (logits_SV < limit_S1), 0, weights_SV)


def _keep_top_p(logits_SV: Tensor, weights_SV: Tensor, top_p_S1: Tensor) -> Tensor:
    """Zero the weights below the logit at which the greatest weights together reach `top_p` of what is left.

    Sorting a whole vocabulary is slow, and the head nearly always holds enough: the full sort is for the rest.
    """
    need_S1 = top_p_S1 * weights_SV.sum(dim=-1, keepdim=True)
    limit_S1, reached_S = _limit(logits_SV, weights_SV, need_S1, min(FIRST_SORTED, logits_SV.shape[1]))
    limit_S1 = torch.where(top_p_S1 < 1, limit_S1, -torch.inf)
    missed = torch.nonzero(~reached_S & (top_p_S1.squeeze(1) < 1)).squeeze(1)
    if len(missed):
        limit_S1[missed] = _limit(logits_SV[missed], weights_SV[missed], need_S1[missed], logits_SV.shape[1])[0]
    return torch.where(logits_SV < limit_S1, 0, weights_SV)


def _limit(logits_SV: Tensor, weights_SV: Tensor, need_S1: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """The logit at which the `head` greatest reach `need` (the least of them if they do not), and whether they do."""
    greatest = logits_SV.topk(head, dim=-1)
    sums_SM = weights_SV.gather(1, greatest.indices).cumsum(dim=-1)
    place_S1 = torch.searchsorted(sums_SM, need_S1)
    reached_S1 = place_S1 < head
    limit_S1 = greatest.values.gather(1, place_S1.clamp(max=head - 1))
    return torch.where(reached_S1, limit_S1, -torch.inf), reached_S1.squeeze(1)

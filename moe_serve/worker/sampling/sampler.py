"""Logits -> token ids. Each row by its own request's options and its own random number, whatever else is in the batch.

Order: logit_bias, ban of end tokens, penalties, temperature, min_p, top_k, top_p. A filter keeps or drops tokens by
the value of their logit alone, so tokens that tie stay or go together and no result depends on the order of a sort.
The random number of a row is a hash of (seed, position): there is no generator state to lose in a preemption.
Shape letters: S rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_serve.base.commands import Sampled
from moe_serve.base.sampling import SamplingParams
from moe_serve.model.layers.argmax import argmax
from moe_serve.worker.sampling.logprobs import token_logprobs
from moe_serve.worker.sampling.penalties import TokenCounts, has_penalties

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIN_TEMPERATURE = 1e-6
CHUNK_ELEMENTS = 1 << 23
FIRST_SORTED = 1024
LEAST = torch.finfo(torch.float32).min
"""For tokens that are banned. Not -inf: were all others -inf, the row would have no token at all."""
CPU = torch.device("cpu")


class SamplingState:
    """What the sampler keeps of one request. `num_generated` tokens were made so far, `length` are known in all."""

    __slots__ = (
        *("_counts", "_params_edit", "bias", "length", "num_generated", "params", "request_id", "seed", "stop_ids"),
    )

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        *,
        seed: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        stop_ids: Sequence[int] = (),
        device: torch.device = CPU,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.seed = seed
        # Made once: what a request lists is only put together in a step, whatever its length.
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device) if params.min_tokens else None
        self.bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            self.bias = (
                torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device),
                torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device),
            )
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
        return self.num_generated < self.params.min_tokens and self.stop_ids is not None and len(self.stop_ids) > 0

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


def sample(
    logits_SV: Tensor, best_S: Tensor, states: Sequence[SamplingState], path: str | None = None
) -> list[Sampled]:
    """One token per row. `logits_SV` float32 and `best_S`, what argmax() says of them, are left as they were.

    Every row is sound (argmax() says that, too). `path` as argmax() takes it.
    """
    edited_SV, chosen_S = logits_SV, best_S.clone()
    edited = [row for row, state in enumerate(states) if state.edits_logits]
    if edited:
        edited_SV = logits_SV.clone()
        _edit(edited_SV, states, edited)
        greedy = [row for row in edited if states[row].params.greedy]
        if greedy:
            chosen_S[greedy] = argmax(edited_SV if len(greedy) == len(states) else edited_SV[greedy], path)[0]
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
    biased = {row: bias for row in rows if (bias := states[row].bias) is not None}
    if biased:
        index = _index({row: ids for row, (ids, _) in biased.items()})
        logits_SV[index] += torch.cat([values for _, values in biased.values()])
    banned = {row: ids for row in rows if states[row].bans_stop and (ids := states[row].stop_ids) is not None}
    if banned:
        logits_SV[_index(banned)] = LEAST
    penalized = [(row, counts) for row in rows if (counts := states[row].counts) is not None]
    if penalized:
        _penalize(logits_SV, states, penalized)


def _index(tokens_of_row: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Row and token of each entry."""
    tokens = torch.cat(list(tokens_of_row.values()))
    sizes = torch.tensor([len(ids) for ids in tokens_of_row.values()], device=tokens.device)
    rows = torch.tensor(list(tokens_of_row), device=tokens.device)
    return rows.repeat_interleave(sizes, output_size=len(tokens)), tokens


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
    # A repetition penalty may leave float32; the greatest number still wins every comparison, and the least loses it.
    logits_SV[index] = new.clamp(LEAST, -LEAST).to(torch.float32)


def draw(logits_SV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A token per row from its filtered distribution, by the inverse of the summed distribution in vocabulary order."""
    device = logits_SV.device
    params = [state.params for state in states]
    weigh = _weights(logits_SV, params)
    weights_SV = weigh(logits_SV)
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        limit_S1 = _limits(logits_SV, weights_SV, weigh, params, FIRST_SORTED)
        weights_SV = torch.where(logits_SV < limit_S1, 0, weights_SV)
    sums_SV = weights_SV.cumsum(dim=-1, dtype=torch.float64)
    total_S1 = sums_SV[:, -1:]
    # Strictly below the total, or the search could run past the last token.
    aim_S1 = torch.minimum(
        _column([state.uniform() for state in states], torch.float64, device) * total_S1,
        torch.nextafter(total_S1, torch.zeros_like(total_S1)),
    )
    return torch.searchsorted(sums_SV, aim_S1, right=True).squeeze(1)


def _weights(logits_SV: Tensor, params: Sequence[SamplingParams]) -> Callable[[Tensor], Tensor]:
    """A function from logits of these rows (any of them, S first) to probabilities relative to each row's best."""
    device = logits_SV.device
    best_S1 = logits_SV.amax(dim=-1, keepdim=True)
    heat_S1 = _column([max(p.temperature, MIN_TEMPERATURE) for p in params], torch.float32, device)
    filtered = any(p.min_p > 0 for p in params)
    least_S1 = _column([p.min_p for p in params], torch.float32, device) if filtered else None

    def weigh(logits_SM: Tensor) -> Tensor:
        weights_SM = logits_SM.sub(best_S1).div_(heat_S1).exp_()
        return weights_SM if least_S1 is None else torch.where(weights_SM < least_S1, 0, weights_SM)

    return weigh


def _limits(
    logits_SV: Tensor,
    weights_SV: Tensor,
    weigh: Callable[[Tensor], Tensor],
    params: Sequence[SamplingParams],
    head: int,
) -> Tensor:
    """The least logit each row keeps: that of its k-th best token, or the one at which the best reach `top_p`.

    top_p counts what top_k and min_p have left. Sorting a whole vocabulary is slow, and its `head` nearly always holds
    enough: the full sort is for the other rows.
    """
    device, size = logits_SV.device, logits_SV.shape[1]
    ks = [min(p.top_k, size) if p.top_k > 0 else size for p in params]
    far = [row for row, k in enumerate(ks) if head < k < size]
    if far and len(far) < len(params):
        # One request's large top_k must not have everybody's rows sorted.
        near = [row for row in range(len(params)) if row not in set(far)]
        limit_S1 = torch.empty((len(params), 1), dtype=logits_SV.dtype, device=device)
        for rows in (far, near):
            part_SV, theirs = logits_SV[rows], [params[row] for row in rows]
            limit_S1[rows] = _limits(part_SV, weights_SV[rows], _weights(part_SV, theirs), theirs, head)
        return limit_S1
    longest = max((k for k in ks if k < size), default=1)
    top_ps = [p.top_p for p in params]
    if min(top_ps) == 1:
        return _top_k_limit(_greatest(logits_SV, longest), ks, size)
    head = min(max(longest, head), size)
    greatest_SM = _greatest(logits_SV, head)
    k_limit_S1 = _top_k_limit(greatest_SM, ks, size)
    left_SV = weights_SV if min(ks) == size else torch.where(logits_SV < k_limit_S1, 0, weights_SV)
    need_S1 = _column(top_ps, torch.float64, device) * left_SV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    sums_SM = torch.where(greatest_SM < k_limit_S1, 0, weigh(greatest_SM)).cumsum(dim=-1, dtype=torch.float64)
    place_S1 = torch.searchsorted(sums_SM, need_S1)
    wanted_S1 = _column([p < 1 for p in top_ps], torch.bool, device)
    reached_S1 = place_S1 < head
    p_limit_S1 = greatest_SM.gather(1, place_S1.clamp(max=head - 1))
    limit_S1 = torch.where(wanted_S1 & reached_S1, torch.maximum(p_limit_S1, k_limit_S1), k_limit_S1)
    missed = torch.nonzero(wanted_S1 & ~reached_S1)[:, 0].tolist() if head < size else []
    if missed:
        part_SV, theirs = logits_SV[missed], [params[row] for row in missed]
        limit_S1[missed] = _limits(part_SV, weights_SV[missed], _weights(part_SV, theirs), theirs, size)
    return limit_S1


def _top_k_limit(greatest_SM: Tensor, ks: Sequence[int], size: int) -> Tensor:
    """Each row's k-th greatest logit; -inf where k is the whole vocabulary."""
    device, head = greatest_SM.device, greatest_SM.shape[1]
    place_S1 = _column([min(k, head) - 1 for k in ks], torch.int64, device)
    limited_S1 = _column([k < size for k in ks], torch.bool, device)
    return torch.where(limited_S1, greatest_SM.gather(1, place_S1), -torch.inf)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(S, 1)."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


def _greatest(values_SV: Tensor, count: int) -> Tensor:
    """Each row's `count` greatest values, greatest first. On a CPU by numpy: torch would sort their places as well."""
    if values_SV.device.type != "cpu":
        return values_SV.topk(count, dim=-1).values
    values = values_SV.numpy()
    if 2 * count < values.shape[1]:
        values = np.partition(values, -count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, : -count - 1 : -1].copy())

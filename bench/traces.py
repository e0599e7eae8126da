"""Made-up expert loads for the balancer: `python -m bench.traces KIND --out FILE.safetensors`.

Each generator gives popularities [windows, layers, experts] that sum to 1 over the experts; `sample` draws steps.

    zipf        the r-th most popular expert of a layer has popularity ~ 1 / r^alpha; constant over time
    lognormal   popularity ~ exp(sigma x), x an AR(1) process from window to window: slow drift
    khot        `hot` experts of a layer share most of the tokens; constant over time
    topics      a few topics, each with its own log-normal popularities; traffic switches between them
    noise       log-normal popularities, each window off by up to +-3 % at random
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_serve.eplb.desk.loads import Trace, write_trace

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Generator = np.random.Generator


def zipf(generator: Generator, windows: int, layers: int, experts: int, *, alpha: float = 1.0) -> Floats:
    ranks = np.tile(np.arange(1, experts + 1, dtype=np.float64), (layers, 1))
    return _constant(generator.permuted(ranks, axis=1) ** -alpha, windows)


def lognormal(
    generator: Generator, windows: int, layers: int, experts: int, *, sigma: float = 0.8, rho: float = 0.98
) -> Floats:
    state = generator.standard_normal((layers, experts))
    states = []
    for _ in range(windows):
        states.append(state)
        state = rho * state + np.sqrt(1 - rho**2) * generator.standard_normal((layers, experts))
    return _normalised(np.exp(sigma * np.array(states)))


def khot(
    generator: Generator, windows: int, layers: int, experts: int, *, hot: int | None = None, share: float = 0.9
) -> Floats:
    hot = max(1, experts // 8) if hot is None else hot
    row = np.concatenate([np.full(hot, share / hot), np.full(experts - hot, (1 - share) / (experts - hot))])
    return _constant(generator.permuted(np.tile(row, (layers, 1)), axis=1), windows)


def topics(
    generator: Generator,
    windows: int,
    layers: int,
    experts: int,
    *,
    count: int = 3,
    windows_each: int = 4,
    sigma: float = 0.8,
) -> Floats:
    of_topic = np.exp(sigma * generator.standard_normal((count, layers, experts)))
    return _normalised(of_topic[np.arange(windows) // windows_each % count])


def noise(
    generator: Generator, windows: int, layers: int, experts: int, *, sigma: float = 0.8, amount: float = 0.03
) -> Floats:
    base = np.exp(sigma * generator.standard_normal((layers, experts)))
    return _normalised(base * (1 + amount * generator.uniform(-1, 1, (windows, layers, experts))))


GENERATORS: dict[str, Callable[..., Floats]] = {
    "zipf": zipf,
    "lognormal": lognormal,
    "khot": khot,
    "topics": topics,
    "noise": noise,
}


def sample(generator: Generator, popularity: Floats, *, tokens: int, top_k: int = 8) -> Counts:
    """Tokens that chose each expert in a step: `tokens` tokens with `top_k` experts each, for any leading axes."""
    return generator.multinomial(tokens * top_k, popularity).astype(np.int64)


def trace(generator: Generator, popularity_WLE: Floats, *, steps: int, tokens: int, top_k: int = 8) -> Counts:
    """int64 (windows x steps, L, E)."""
    steps_SLE = np.repeat(popularity_WLE, steps, axis=0)
    return np.stack([sample(generator, popularity_LE, tokens=tokens, top_k=top_k) for popularity_LE in steps_SLE])


def _constant(weight_LE: Floats, windows: int) -> Floats:
    return _normalised(np.repeat(weight_LE[None], windows, axis=0))


def _normalised(weights: Floats) -> Floats:
    normalised: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return normalised


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(GENERATORS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="of each window")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384, help="of each step")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    generator = np.random.default_rng(options.seed)
    popularity = GENERATORS[options.kind](generator, options.windows, options.layers, options.experts)
    counts = trace(generator, popularity, steps=options.steps, tokens=options.tokens, top_k=options.top_k)
    facts = {name: str(getattr(options, name)) for name in ("kind", "windows", "steps", "tokens", "top_k", "seed")}
    write_trace(options.out, Trace(counts, facts))
    print(f"wrote {options.out}: {counts.shape[0]} steps, {counts.shape[1]} layers, {counts.shape[2]} experts")


if __name__ == "__main__":
    main()

"""The held-out split: whole documents drawn by seed, and everything much like them kept out of training."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable

Documents = dict[str, str]
PARALLEL = ("prose", "spanish")  # translations of one book: the same chapters are held out of both


def hold_out(corpus: dict[str, Documents], num_bytes: int, seed: int) -> tuple[dict[str, Documents], ...]:
    """(training, held out): at least `num_bytes` of each domain held out; near-copies of those dropped altogether."""
    training, held = {}, {}
    shared: set[str] = set()
    for domain, texts in corpus.items():
        names = sorted(texts)
        random.Random(f"{seed} {'chapters' if domain in PARALLEL else domain}").shuffle(names)
        chosen = (shared & texts.keys()) if domain in PARALLEL else set()
        total = sum(len(texts[name].encode()) for name in chosen)
        for name in names:
            if total >= num_bytes:
                break
            if name not in chosen and len(texts[name].encode()) <= num_bytes // 8:
                chosen.add(name)
                total += len(texts[name].encode())
        if domain in PARALLEL:
            shared |= chosen
        held[domain] = {name: texts[name] for name in sorted(chosen)}
    for domain, texts in corpus.items():
        out = shared if domain in PARALLEL else held[domain].keys()
        rest = {name: text for name, text in texts.items() if name not in out}
        training[domain] = without_copies(rest, held[domain].values())
    return training, held


def without_copies(texts: Documents, held: Iterable[str], share: float = 0.3) -> Documents:
    """Documents of which less than `share` of the long lines also stand in one held-out document."""
    owners: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(held):
        for line in _lines(text):
            owners[line].append(number)
    kept = {}
    for name, text in texts.items():
        lines = _lines(text)
        hits = Counter(number for line in lines for number in owners.get(line, ()))
        if max(hits.values(), default=0) < max(share * len(lines), 5):
            kept[name] = text
    return kept


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}

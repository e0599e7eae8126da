"""Tokenizer and batches: byte-level BPE, one long stream of token ids per domain, windows of one domain each."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB = 4096
WEIGHTS = {"prose": 0.24, "spanish": 0.2, "docs": 0.22, "python": 0.34}
# Of the windows, this share is laid out as conversations: the user gives a beginning, the assistant goes on.
CHAT_SHARE = 0.07
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+ *|\s+(?!\S)|\s+"


def train_tokenizer(corpus: dict[str, dict[str, str]], seed: int, num_bytes: int = 3_000_000) -> Tokenizer:
    """About `num_bytes` of each domain; a line's break and its indent are one piece, which suits code."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = []
    for texts in corpus.values():
        names = sorted(texts)
        random.Random(seed).shuffle(names)
        total = 0
        for name in names:
            if total >= num_bytes:
                break
            sample.append(texts[name])
            total += len(texts[name])
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: dict[str, str]) -> np.ndarray:
    """Documents in the order of their names, each after an end-of-text token; int16."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [encoding.ids for encoding in tokenizer.encode_batch([texts[name] for name in sorted(texts)])]
    return np.concatenate([np.asarray([end, *ids], dtype=np.int16) for ids in pieces])


class Batches:
    """Random windows; the domains of a batch are drawn stratified by WEIGHTS, so every batch has its share of each."""

    def __init__(self, streams: dict[str, np.ndarray], tokenizer: Tokenizer, seed: int) -> None:
        self.streams = streams
        self._random = random.Random(seed)
        self._marks = {mark: tokenizer.token_to_id(mark) for mark in (END_OF_TEXT, TURN_START, TURN_END)}
        self._user = tokenizer.encode("user\n").ids
        self._assistant = tokenizer.encode("assistant\n").ids
        self._break = tokenizer.encode("\n").ids
        self._lines = {tokenizer.token_to_id(token) for token in tokenizer.get_vocab() if token.startswith("Ċ")}

    def state(self) -> object:
        return self._random.getstate()

    def set_state(self, state: object) -> None:
        self._random.setstate(state)  # type: ignore[arg-type]

    def next(self, rows: int, length: int) -> torch.Tensor:
        """(rows, length + 1) token ids."""
        start = self._random.random()
        batch = []
        for row in range(rows):
            domain = self._domain((start + row / rows) % 1)
            chat = self._random.random() < CHAT_SHARE
            batch.append(self._conversation(domain, length + 1) if chat else self._window(domain, length + 1))
        return torch.from_numpy(np.stack(batch).astype(np.int64))

    def _domain(self, point: float) -> str:
        for domain, weight in WEIGHTS.items():
            point -= weight
            if point < 0:
                return domain
        return next(iter(WEIGHTS))

    def _window(self, domain: str, length: int) -> np.ndarray:
        stream = self.streams[domain]
        start = self._random.randrange(len(stream) - length)
        return stream[start : start + length]

    def _conversation(self, domain: str, length: int) -> np.ndarray:
        """Conversations one after the other until the row is full."""
        row: list[int] = []
        while len(row) < length:
            row.append(self._marks[END_OF_TEXT])
            for _ in range(self._random.choice((1, 1, 1, 2))):
                text = self._passage(domain)
                cut = self._random.randint(2, max(3, len(text) // 4))
                row += [self._marks[TURN_START], *self._user, *text[:cut], self._marks[TURN_END], *self._break]
                row += [self._marks[TURN_START], *self._assistant, *text[cut:], self._marks[TURN_END], *self._break]
        return np.asarray(row[:length], dtype=np.int16)

    def _passage(self, domain: str) -> list[int]:
        """30 to 200 tokens of one document that begin and, if that can be, end at a line's break."""
        text = [int(token) for token in self._window(domain, 500)]
        if self._marks[END_OF_TEXT] in text[:300]:
            text = text[text.index(self._marks[END_OF_TEXT]) + 1 :]
        else:
            text = text[next((i + 1 for i, token in enumerate(text[:200]) if token in self._lines), 0) :]
        if self._marks[END_OF_TEXT] in text[8:]:
            text = text[: text.index(self._marks[END_OF_TEXT], 8)]
        text = [token for token in text if token != self._marks[END_OF_TEXT]]
        wanted = self._random.randint(30, 200)
        ends = [i for i, token in enumerate(text) if token in self._lines and i > wanted]
        return text[: ends[0] if ends and ends[0] < 240 else wanted]


def save(tokenizer: Tokenizer, path: Path) -> None:
    tokenizer.save(str(path))

"""The training loop: Muon for matrices, AdamW for the rest, checkpoints that a later call goes on from."""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from bench.train_default_model.model import Model
from bench.train_default_model.muon import Muon
from bench.train_default_model.schedule import TOKENS_PER_BATCH, Schedule, minutes_asked
from bench.train_default_model.tokens import Batches

MUON_RATE, ADAM_RATE, BALANCE = 0.015, 0.003, 0.05
SAVE_EVERY_S, EVAL_EVERY_S, LOG_EVERY_STEPS = 120, 600, 20


class Trainer:
    """Owns model, optimizers, batches and log. `threads` share a batch's parts; on CUDA use one."""

    def __init__(
        self, model: Model, batches: Batches, schedule: Schedule, folder: Path, device: str, threads: int
    ) -> None:
        self.model, self.batches, self.schedule, self.folder = model.to(device), batches, schedule, folder
        self.device, self.threads, self.step = device, threads, 0
        self.log: list[dict[str, object]] = []
        self.params = list(model.parameters())
        named = dict(model.named_parameters())
        matrices = [p for name, p in named.items() if name.endswith(("proj.weight", "gate_up", "down"))]
        rest = [p for p in self.params if all(p is not other for other in matrices)]
        # One optimizer per matrix: threads take them from a queue.
        self.muons = [Muon([p], lr=MUON_RATE, weight_decay=0.02) for p in matrices]
        self.adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self._pool = ThreadPoolExecutor(threads)

    def run(self, held: dict[str, tuple[np.ndarray, int]]) -> None:
        """Train until the schedule's end. `held`: per domain the held-out token ids and their size in bytes."""
        saved = evaluated = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, refresh_per_second=1) as progress:
            task = progress.add_task("starting", total=1.0)
            losses: list[float] = []
            while self.schedule.progress < 1:
                start = time.monotonic()
                losses.append(self.train_step())
                self.schedule.spent_s += time.monotonic() - start
                if self.step % LOG_EVERY_STEPS == 0:
                    self._note(loss=round(float(np.mean(losses)), 4), rate=round(self.schedule.rate(), 4))
                    losses.clear()
                progress.update(task, completed=self.schedule.progress, description=self._status())
                if (minutes := minutes_asked(self.folder / "finish")) is not None:
                    self.schedule.finish_within(minutes * 60)
                if time.monotonic() - evaluated > EVAL_EVERY_S:
                    self._note(held_out=self.evaluate(held, 16))
                    evaluated = time.monotonic()
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self.save()
                    saved = time.monotonic()
        self._note(held_out=self.evaluate(held, 64))
        self.save()

    def train_step(self) -> float:
        """One batch; the mean loss in nats per token."""
        self.model.train()
        length = self.schedule.length(self.step)
        rows = TOKENS_PER_BATCH // length
        tokens = self.batches.next(rows, length)
        parts = tokens.chunk(min(rows, 4) if self.threads > 1 else 1)
        done = list(self._pool.map(self._gradients, parts, [len(part) / rows for part in parts]))
        for parameter, *gradients in zip(self.params, *(gradients for _, gradients in done), strict=True):
            parameter.grad = torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]
        self._optimize()
        self.step += 1
        return math.fsum(loss for loss, _ in done)

    def _gradients(self, tokens: Tensor, share: float) -> tuple[float, tuple[Tensor, ...]]:
        tokens = tokens.to(self.device)
        with self._precision():
            logits, balance = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) * share
        return float(loss.detach()), torch.autograd.grad(loss + BALANCE * share * balance, self.params)

    def _optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        rate = self.schedule.rate()
        for muon in self.muons:
            muon.param_groups[0]["lr"] = MUON_RATE * rate
        self.adam.param_groups[0]["lr"] = ADAM_RATE * rate
        list(self._pool.map(lambda optimizer: optimizer.step(), [*self.muons, self.adam]))

    @torch.no_grad()
    def evaluate(self, held: dict[str, tuple[np.ndarray, int]], windows: int) -> dict[str, float]:
        """Bits per byte of each domain over evenly spaced windows of 512 tokens (less context than serving has)."""
        self.model.eval()
        result = {}
        for domain, (stream, num_bytes) in held.items():
            starts = np.linspace(0, len(stream) - 513, windows).astype(int)
            tokens = torch.from_numpy(np.stack([stream[start : start + 513] for start in starts]).astype(np.int64))
            losses = self._pool.map(self._loss, tokens.split(4))
            result[domain] = round(float(np.mean(list(losses))) / math.log(2) * len(stream) / num_bytes, 4)
        return result

    def _loss(self, tokens: Tensor) -> float:
        with torch.no_grad(), self._precision():
            tokens = tokens.to(self.device)
            logits = self.model(tokens[:, :-1])[0]
            return float(F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()))

    def _precision(self) -> torch.autocast:
        """Matrix products in bfloat16, weights and the rest in float32. No cache: the threads would share it."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, cache_enabled=False)

    def _note(self, **values: object) -> None:
        entry = {"step": self.step, "tokens": self.step * TOKENS_PER_BATCH, "minutes": self.schedule.spent_s / 60}
        self.log.append({**entry, **values})
        if "held_out" in values:
            print(json.dumps(self.log[-1]), flush=True)
        (self.folder / "log.json").write_text("[\n" + ",\n".join(map(json.dumps, self.log)) + "\n]\n")

    def _status(self) -> str:
        last = next((entry["loss"] for entry in reversed(self.log) if "loss" in entry), "-")
        speed = self.step * TOKENS_PER_BATCH / max(self.schedule.spent_s, 1)
        left = (self.schedule.budget_s - self.schedule.spent_s) / 60
        return f"step {self.step} loss {last} {speed:.0f} tokens/s, {left:.0f} min left"

    def save(self) -> None:
        """Write the checkpoint in one move, so that a kill at any time leaves a whole one."""
        state = {
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "muons": [muon.state_dict() for muon in self.muons],
            "schedule": self.schedule.state(),
            "batches": self.batches.state(),
            "step": self.step,
            "log": self.log,
        }
        torch.save(state, self.folder / "checkpoint.part")
        os.replace(self.folder / "checkpoint.part", self.folder / "checkpoint.pt")

    def load(self) -> bool:
        """Go on from the folder's checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        # Our own file; the random state in it is a plain tuple.
        state = torch.load(path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        for muon, saved in zip(self.muons, state["muons"], strict=True):
            muon.load_state_dict(saved)
        self.schedule = Schedule(**state["schedule"])
        self.batches.set_state(state["batches"])
        self.step, self.log = state["step"], state["log"]
        return True

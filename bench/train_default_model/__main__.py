"""Train the default model from nothing: `python -m bench.train_default_model`. Called again, it goes on.

About two hours on two CPU cores (`--minutes`); with `--device cuda` minutes. `echo 10 > FOLDER/finish` ends it early.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the loop's own threads use the cores

import torch
from tokenizers import Tokenizer

from bench.train_default_model import corpus, split, tokens
from bench.train_default_model.export import export, write_held_out
from bench.train_default_model.model import Model, Sizes
from bench.train_default_model.samples import write_samples
from bench.train_default_model.schedule import Schedule
from bench.train_default_model.train import Trainer

HELD_OUT_BYTES = 210_000
SAMPLE_BYTES = 25_000


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    texts = corpus.documents(options.folder / "packages")
    training, held = split.hold_out(texts, HELD_OUT_BYTES, options.seed)
    write_held_out(held, options.folder / "held-out")
    write_samples(training, held, options.folder / "samples", SAMPLE_BYTES, options.seed)
    tokenizer = the_tokenizer(training, options.folder / "tokenizer.json", options.seed)
    streams = {domain: tokens.encode(tokenizer, documents) for domain, documents in training.items()}
    sizes = {domain: sum(len(text.encode()) for text in documents.values()) for domain, documents in training.items()}
    write_facts(options.folder / "facts.json", streams, sizes, training, held)
    model = Model(Sizes())
    threads = 1 if options.device.startswith("cuda") else options.threads
    schedule = Schedule(budget_s=options.minutes * 60)
    trainer = Trainer(
        model, tokens.Batches(streams, tokenizer, options.seed), schedule, options.folder, options.device, threads
    )
    if trainer.load():
        print(f"going on from step {trainer.step}")
    if not options.export:
        trainer.run(
            {
                domain: (tokens.encode(tokenizer, documents), sum(len(text.encode()) for text in documents.values()))
                for domain, documents in held.items()
            }
        )
    export(model, tokenizer, options.out or options.folder / "model")


def the_tokenizer(training: dict[str, dict[str, str]], path: Path, seed: int) -> Tokenizer:
    """Trained once per folder."""
    if not path.exists():
        tokens.train_tokenizer(training, seed).save(str(path))
    return Tokenizer.from_file(str(path))


def write_facts(path: Path, streams: object, sizes: dict[str, int], training: object, held: object) -> None:
    """How much text there was, for the model card."""
    facts = {
        domain: {
            "training_documents": len(training[domain]),  # type: ignore[index]
            "training_bytes": sizes[domain],
            "training_tokens": len(streams[domain]),  # type: ignore[index]
            "held_out_documents": sorted(held[domain]),  # type: ignore[index]
            "held_out_bytes": sum(len(text.encode()) for text in held[domain].values()),  # type: ignore[index]
        }
        for domain in sizes
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path("~/.cache/moe-serve/train").expanduser()
    parser.add_argument("--folder", type=Path, default=cache, help="packages, checkpoint, log (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the finished model goes (default: FOLDER/model)")
    parser.add_argument("--minutes", type=float, default=110, help="time to train (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export", action="store_true", help="only export the checkpoint there is")
    return parser.parse_args()


main()

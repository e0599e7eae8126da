"""lm-eval on made-up tasks: log-likelihoods of choices, and answers. Arguments: address, model, model folder."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

DOCUMENTS = [
    {"question": "In the beginning", "choices": [" was", " of", " it"], "answer": 0},
    {"question": "one two three", "choices": [" four", " five"], "answer": 0},
    {"question": "def main(", "choices": ["x", "arguments"], "answer": 1},
]
CHOICES = """
task: made_up_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ANSWERS = """
task: made_up_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def main(address: str, model: str, folder: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        documents = Path(made) / "documents.jsonl"
        documents.write_text("\n".join(map(json.dumps, DOCUMENTS)))
        for name, task in (("choices", CHOICES), ("answers", ANSWERS)):
            (Path(made) / f"{name}.yaml").write_text(task.replace("FILE", str(documents)))
        tasks = TaskManager(include_path=made, include_defaults=False)
        common = {"model": model, "tokenizer": folder, "num_concurrent": 2, "max_retries": 1, "max_length": 128}
        completions = common | {"base_url": f"{address}/v1/completions", "tokenized_requests": True}
        both = evaluate("local-completions", completions, ["made_up_choices", "made_up_answers"], tasks)
        assert both["made_up_choices"]["acc,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
        chat = common | {"base_url": f"{address}/v1/chat/completions"}
        only = evaluate("local-chat-completions", chat, ["made_up_answers"], tasks, apply_chat_template=True)
        assert not math.isnan(only["made_up_answers"]["exact_match,none"])


def evaluate(kind: str, options: dict[str, object], names: list[str], tasks: TaskManager, **more: object) -> dict:
    found = lm_eval.simple_evaluate(
        kind, model_args=options, tasks=names, task_manager=tasks, bootstrap_iters=0, **more
    )
    assert all(len(found["samples"][name]) == len(DOCUMENTS) for name in names)
    return found["results"]


main(*sys.argv[1:4])

"""`moe-serve eplb record`: every row of every step counted in the file, and clear words for what cannot be recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.cli.eplb_record import read_prompts
from moe_serve.cli.main import main
from moe_serve.eplb.desk.loads import Trace, read_trace
from tests.support.letters import text_of, write_letters
from tests.support.tiny_model import tiny_model

VOCAB, LAYERS, EXPERTS, TOP_K = 131, 2, 10, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model(made, "qwen3_moe", seed=7)
    write_letters(made, VOCAB)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return made


def record(folder: Path, out: Path, *arguments: str) -> Trace:
    assert main(["eplb", "record", str(folder), "--out", str(out), *arguments]) == 0
    return read_trace(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said when the command ends with exit code 2."""
    assert main(["eplb", "record", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_every_row_of_every_step_is_in_the_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [text_of([5, 6, 7]), text_of(list(range(10, 50)))]
    trace = record(folder, tmp_path / "load.safetensors", "--prompts", *prompts, "--max-tokens", "6", "--json")
    counts = trace.count_SLE
    assert counts.dtype == np.int64
    assert counts.shape[1:] == (LAYERS, EXPERTS)
    rows = counts.sum(axis=2)
    assert (rows[:, 0] == rows[:, 1]).all(), "every layer sees the same rows"
    assert rows[0, 0] == 43 * TOP_K, "the first step is both prompts"
    assert rows[1:, 0].tolist() == [2 * TOP_K] * (len(rows) - 1) or rows[-1, 0] == TOP_K, "then a token of each"
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "model": str(folder),
        "architecture": "Qwen3MoeForCausalLM",
        "top_k": TOP_K,
        "prompts": 2,
        "steps": len(counts),
        "tokens": rows[:, 0].sum() // TOP_K,
        "made_by": "moe-serve eplb record",
    }
    assert {name: str(value) for name, value in printed.items()} == trace.metadata


def test_chunks_do_not_change_what_is_counted(folder: Path, tmp_path: Path) -> None:
    prompt = text_of(list(range(3, 80)))
    whole = record(folder, tmp_path / "a.safetensors", "--prompts", prompt, "--max-tokens", "1")
    cut = record(
        folder, tmp_path / "b.safetensors", "--prompts", prompt, "--max-tokens", "1", "--max-num-batched-tokens", "16"
    )
    assert (len(whole.count_SLE), len(cut.count_SLE)) == (1, 5)
    assert (whole.count_SLE.sum(axis=0) == cut.count_SLE.sum(axis=0)).all()


def test_a_file_holds_texts_token_ids_and_conversations(folder: Path, tmp_path: Path) -> None:
    ids = [20, 21, 22]
    lines: list[object] = [
        text_of(ids),
        {"prompt": text_of([30, 31])},
        {"prompt": [40, 41]},
        {"messages": [{"role": "user", "content": text_of([50, 51, 52, 53])}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    trace = record(folder, tmp_path / "load.safetensors", "--prompts", str(file), text_of([60]), "--max-tokens", "1")
    assert trace.metadata["prompts"] == "5"
    assert trace.metadata["tokens"] == str(3 + 2 + 2 + 4 + 1)


@pytest.mark.parametrize("line", ["{", "7", "[]", '{"text": "x"}', '{"prompt": []}', '{"prompt": [true]}', "[[1]]"])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl line 2 (is not JSON|must be a text)"):
        read_prompts([str(file)])


def test_what_cannot_be_recorded_is_said_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(folder), str(tmp_path / "load.safetensors")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    asking = ("--prompts", text_of([5]))
    assert "--prompts" in refused(capsys, model, "--out", out)
    assert "--out" in refused(capsys, model, *asking)
    assert "no prompts" in refused(capsys, model, "--out", out, "--prompts", str(empty))
    assert "cannot be read" in refused(capsys, model, "--out", out, "--prompts", str(tmp_path / "absent.jsonl"))
    assert "must end in .safetensors" in refused(capsys, model, "--out", str(tmp_path / "load.npy"), *asking)
    assert "there is no folder" in refused(capsys, model, "--out", str(tmp_path / "no" / "x.safetensors"), *asking)
    assert "at least 1" in refused(capsys, model, "--out", out, *asking, "--max-tokens", "0")
    too_long = refused(capsys, model, "--out", out, *asking, "--max-tokens", "600")
    assert "prompt 1 has 1 tokens" in too_long
    assert "at most 512" in too_long
    assert "dtype" in refused(capsys, model, "--out", out, *asking, "--dtype", "float8")
    assert "no such model folder" in refused(capsys, "./absent", "--out", out, *asking)
    assert not Path(out).exists()
    unknown = tmp_path / "ids.jsonl"
    unknown.write_text('{"prompt": [9999]}')
    assert "9999" in refused(capsys, model, "--out", out, "--prompts", str(unknown))

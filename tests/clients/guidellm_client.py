"""guidellm (0.8): six made-up requests of each kind, all successful. Arguments: address, model, model folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REQUESTS = 6
NUM_TOKENS = 8


def main(address: str, model: str, folder: str) -> None:
    for kind in ("/v1/completions", "/v1/chat/completions"):
        report = Path(kind.strip("/").replace("/", "-") + ".json").absolute()
        options = {
            "--backend": f"kind=openai_http,target={address},model={model},request_format={kind}",
            "--tokenizer": f"kind=huggingface_auto,model={folder}",
            "--profile": "kind=synchronous",
            "--constraint": f"kind=max_requests,count={REQUESTS}",
            "--data": f"kind=synthetic_text,prompt_tokens=16,output_tokens={NUM_TOKENS}",
            "--output": f"kind=json,path={report}",
        }
        words = [word for pair in options.items() for word in pair]
        subprocess.run([Path(sys.executable).parent / "guidellm", "run", *words, "--disable-progress"], check=True)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
        requests = benchmark["requests"]
        assert (len(requests["successful"]), len(requests["errored"])) == (REQUESTS, 0), requests["errored"][:1]
        for request in requests["successful"]:
            assert request["output_metrics"]["text_tokens"] == NUM_TOKENS, request


main(*sys.argv[1:4])

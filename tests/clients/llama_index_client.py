"""llama-index-llms-openai: chat and completion, whole and streamed. Arguments: address, model (one that OpenAI has)."""

from __future__ import annotations

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAI


def main(address: str, model: str) -> None:
    llm = OpenAI(model=model, api_base=f"{address}/v1", api_key="unused", max_tokens=8, temperature=0, max_retries=0)
    messages = [ChatMessage(role="user", content="Say something.")]
    whole = llm.chat(messages).message.content
    assert isinstance(whole, str)
    assert "".join(part.delta or "" for part in llm.stream_chat(messages)) == whole
    completed = llm.complete("Say something.").text
    assert "".join(part.delta or "" for part in llm.stream_complete("Say something.")) == completed


main(*sys.argv[1:3])

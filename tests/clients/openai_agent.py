"""openai: an agent's second turn, whole and streamed, as the client itself writes it. Arguments: address, model."""

from __future__ import annotations

import sys

import openai

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ASKED = {"role": "user", "content": "What is the weather in Oslo?"}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "fine"}


def main(address: str, model: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    options = {"model": model, "max_tokens": 8, "temperature": 0, "tools": TOOLS, "tool_choice": "auto"}
    first = client.chat.completions.create(messages=[ASKED], parallel_tool_calls=False, **options)
    # What a model that calls a tool answers has these fields, and agents send it back as it came.
    answered = first.choices[0].message.model_dump() | {"content": None, "tool_calls": [CALL]}
    left_out = {"role": "assistant", "tool_calls": [CALL]}
    texts = []
    for spoken in (answered, left_out, {**left_out, "content": ""}):
        made = client.chat.completions.create(messages=[ASKED, spoken, TOLD], **options)
        texts.append(made.choices[0].message.content)
        chunks = client.chat.completions.create(messages=[ASKED, spoken, TOLD], stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == texts[-1]
    assert len(set(texts)) == 1, "no content is an empty one, however it is written"


main(*sys.argv[1:3])

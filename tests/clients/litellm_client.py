"""litellm, as for OpenAI and as for vLLM: whole, streamed, an agent's second turn. Arguments: address, model."""

from __future__ import annotations

import sys

import litellm

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TURNS = [
    {"role": "user", "content": "What is the weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "fine"},
]


def main(address: str, model: str) -> None:
    for provider in ("openai", "hosted_vllm"):
        options = {
            "model": f"{provider}/{model}",
            "api_base": f"{address}/v1",
            "api_key": "unused",
            "max_tokens": 8,
            "temperature": 0,
            "num_retries": 0,
        }
        messages = [{"role": "user", "content": "Say something."}]
        whole = litellm.completion(messages=messages, **options)
        assert whole.usage.completion_tokens > 0
        stream = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == whole.choices[0].message.content
        second = litellm.completion(messages=TURNS, tools=TOOLS, tool_choice="auto", **options)
        assert second.choices[0].finish_reason in ("stop", "length")


main(*sys.argv[1:3])

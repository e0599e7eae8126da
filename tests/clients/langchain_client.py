"""langchain-openai: whole and streamed answers, a batch, and the second turn of an agent. Arguments: address, model."""

from __future__ import annotations

import sys

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"fine in {city}"


def main(address: str, model: str) -> None:
    options = {"base_url": f"{address}/v1", "api_key": "unused", "model": model, "max_tokens": 8, "temperature": 0}
    chat = ChatOpenAI(**options, max_retries=0, stream_usage=True)
    whole = chat.invoke("Say something.")
    assert isinstance(whole.content, str)
    assert whole.usage_metadata["output_tokens"] > 0
    streamed = list(chat.stream("Say something."))
    assert "".join(chunk.content for chunk in streamed) == whole.content
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in streamed) > 0
    assert [each.content for each in chat.batch(["Say something."] * 3)] == [whole.content] * 3
    call = {"name": "weather", "args": {"city": "Oslo"}, "id": "call_1", "type": "tool_call"}
    turns = [
        HumanMessage("What is the weather in Oslo?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("fine", tool_call_id="call_1"),
    ]
    assert isinstance(chat.bind_tools([weather]).invoke(turns).content, str)
    completion = OpenAI(**options, max_retries=0)
    assert "".join(completion.stream("In the beginning")) == completion.invoke("In the beginning")


main(*sys.argv[1:3])

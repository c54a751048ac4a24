"""LangChain's ChatOpenAI and OpenAIEmbeddings against the server whose URL is the first argument."""

from __future__ import annotations

import asyncio
import sys

import httpx
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

URL = sys.argv[1] + "/v1"


def chat(**options: object) -> ChatOpenAI:
    defaults: dict[str, object] = {"temperature": 0, "max_tokens": 24, "max_retries": 0}
    return ChatOpenAI(model="demo", base_url=URL, api_key="none", **{**defaults, **options})  # type: ignore[arg-type]


class Closed(BaseModel):
    """Nothing else may be in it: a small model does not come to an end by itself."""

    model_config = ConfigDict(extra="forbid")


class City(Closed):
    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=99_999_999)


class Weather(BaseModel):
    city: str = Field(max_length=20)
    unit: str = Field(max_length=9)


@tool(args_schema=Weather)
def weather(city: str, unit: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}, 20 {unit}"


MESSAGES = [SystemMessage("You are brief."), HumanMessage("Name a colour.")]


def plain() -> None:
    answer = chat().invoke(MESSAGES)
    assert isinstance(answer, AIMessage) and answer.content, answer
    usage = answer.usage_metadata
    assert usage is not None and usage["input_tokens"] > 5 and 0 < usage["output_tokens"] <= 24, usage
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    chunks = list(chat(stream_usage=True).stream(MESSAGES))
    assert "".join(str(chunk.content) for chunk in chunks) == answer.content
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] == usage["output_tokens"]
    assert [reply.content for reply in chat().batch([MESSAGES, MESSAGES])] == [answer.content] * 2
    assert asyncio.run(chat().ainvoke(MESSAGES)).content == answer.content
    told = chat(logprobs=True, top_logprobs=2).invoke(MESSAGES).response_metadata["logprobs"]["content"]
    assert len(told) == usage["output_tokens"] and len(told[0]["top_logprobs"]) == 2
    assert len(chat(n=2, temperature=1).generate([MESSAGES]).generations[0]) == 2
    assert chat(stop=[str(answer.content)[3:6]]).invoke(MESSAGES).content == str(answer.content)[:3]


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        city = (
            chat(max_tokens=300, seed=1, temperature=1)
            .with_structured_output(City, method=method)
            .invoke("Describe Paris.")
        )
        assert isinstance(city, City), (method, city)
    # Any object may be as long as it likes, and a small model's is: the end is made likely.
    [end] = httpx.post(f"{sys.argv[1]}/tokenize", json={"prompt": "}", "add_special_tokens": False}).json()["tokens"]
    loose = chat(logit_bias={end: 100}).with_structured_output(None, method="json_mode").invoke("Answer with JSON.")
    assert loose == {}, loose


def tools() -> None:
    caller = chat(max_tokens=200).bind_tools([weather], tool_choice="any", strict=True, parallel_tool_calls=False)
    answer = caller.invoke("What is the weather in Paris?")
    [call] = answer.tool_calls
    assert call["name"] == "weather" and {"city", "unit"} <= set(call["args"]), call
    streamed = None
    for chunk in caller.stream("What is the weather in Paris?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None and streamed.tool_calls[0]["args"] == call["args"], streamed
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    reply = chat().bind_tools([weather]).invoke([HumanMessage("The weather?"), answer, result])
    assert reply.response_metadata["finish_reason"], reply


def responses() -> None:
    model = chat(use_responses_api=True)
    answer = model.invoke(MESSAGES)
    assert answer.text and answer.usage_metadata is not None, answer
    assert "".join(chunk.text for chunk in model.stream(MESSAGES)) == answer.text
    [call] = (
        model.bind_tools([weather], tool_choice="any", strict=True, parallel_tool_calls=False)
        .bind(max_tokens=200)
        .invoke("Paris?")
        .tool_calls
    )
    assert call["name"] == "weather"


def embeddings() -> None:
    # Its default divides texts by OpenAI's own tokenizer.
    model = OpenAIEmbeddings(model="demo", base_url=URL, api_key="none", check_embedding_ctx_length=False)  # type: ignore[arg-type]
    first, second = model.embed_documents(["the cat", "a dog"])
    assert len(first) == len(second) and first != second and model.embed_query("the cat") == first


for part in (plain, structured, tools, responses, embeddings):
    part()
    print(part.__name__, "ok", flush=True)

"""langchain-openai, which knows no reasoning, and langchain-deepseek, which reads reasoning_content."""
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_deepseek import ChatDeepSeek
from langchain_openai import ChatOpenAI, OpenAI


@pytest.fixture(scope="module")
def options(server):
    return {"model": "tiny", "api_key": "none", "base_url": server.url + "/v1", "seed": 7, "max_retries": 0}


def test_chat(options, question):
    reply = ChatOpenAI(**options).invoke(question)
    assert "10" in reply.content and reply.response_metadata["finish_reason"] == "stop"
    usage = reply.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_token_details"]["reasoning"] > 0


def test_stream(options, question):
    chat = ChatOpenAI(**options, stream_usage=True)
    chunks = list(chat.stream(question))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == chat.invoke(question).content and whole.usage_metadata["output_tokens"] > 0


def test_batch_and_history(options, questions):
    chat = ChatOpenAI(**options)
    assert len(chat.batch(questions(8))) == 8
    history = [HumanMessage("1+1"), AIMessage("2"), HumanMessage("2+2")]
    assert chat.invoke(history, max_tokens=5).usage_metadata["input_tokens"] > 10


def test_soft_thinking_fields(options, question):
    reply = ChatOpenAI(**options, extra_body={"soft_thinking": {"mode": "off", "budget": 9}}).invoke(question)
    assert reply.usage_metadata["output_token_details"]["reasoning"] == 9


def test_completions(options):
    assert OpenAI(**options, max_tokens=4, temperature=0).invoke("8+4=")


def test_reasoning(options, question):
    options = {**options, "api_base": options["base_url"]}
    del options["base_url"]
    chat = ChatDeepSeek(**options)
    reply = chat.invoke(question)
    assert "8+4=12" in reply.additional_kwargs["reasoning_content"] and "8+4" not in reply.content
    pieces = [chunk.additional_kwargs.get("reasoning_content", "") for chunk in chat.stream(question)]
    assert "".join(pieces) == reply.additional_kwargs["reasoning_content"]

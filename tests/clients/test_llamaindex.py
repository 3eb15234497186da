"""LlamaIndex through OpenAILike: whole and streamed chats and completions, and its asynchronous twin."""
import asyncio

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


@pytest.fixture(scope="module")
def llm(server):
    return OpenAILike(model="tiny", api_base=server.url + "/v1", api_key="none", is_chat_model=True, context_window=1024,
                      max_tokens=150, temperature=0, max_retries=0, additional_kwargs={"seed": 7})


def test_chat(llm, question):
    reply = llm.chat([ChatMessage(role="user", content=question)])
    assert "10" in reply.message.content
    raw = reply.raw.choices[0].message
    assert raw.reasoning_content == raw.reasoning and "8+4=12" in raw.reasoning
    assert reply.additional_kwargs["completion_tokens"] > 10


def test_stream(llm, question):
    whole = llm.chat([ChatMessage(role="user", content=question)]).message.content
    pieces = [piece.delta or "" for piece in llm.stream_chat([ChatMessage(role="user", content=question)])]
    assert "".join(pieces) == whole and len(pieces) > 10


def test_asynchronous(llm, question):
    async def several():
        return await asyncio.gather(*(llm.achat([ChatMessage(role="user", content=question)]) for _ in range(4)))

    assert len({reply.message.content for reply in asyncio.run(several())}) == 1


def test_history_with_a_system_message(llm):
    messages = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content="1+1?"),
                ChatMessage(role="assistant", content="2"), ChatMessage(role="user", content="And 2+2?")]
    assert llm.chat(messages).message.content is not None


def test_completion(server):
    llm = OpenAILike(model="tiny", api_base=server.url + "/v1", api_key="none", is_chat_model=False, max_tokens=8, temperature=0, max_retries=0)
    whole = llm.complete("8+4=").text
    assert whole and "".join(piece.delta or "" for piece in llm.stream_complete("8+4=")) == whole


def test_errors(server):
    llm = OpenAILike(model="other", api_base=server.url + "/v1", api_key="none", is_chat_model=True, max_retries=0)
    with pytest.raises(Exception, match="tiny"):
        llm.chat([ChatMessage(role="user", content="x")])

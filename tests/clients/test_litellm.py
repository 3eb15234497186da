"""LiteLLM: hosted_vllm and openai providers; it sends reasoning_content back in the history."""
import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # nothing is fetched
import litellm  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module", params=["openai", "hosted_vllm"])
def options(server, request):
    return {"model": request.param + "/tiny", "api_base": server.url + "/v1", "api_key": "none", "seed": 7, "num_retries": 0}


def user(text):
    return [{"role": "user", "content": text}]


def test_chat(options, question):
    message = litellm.completion(messages=user(question), **options).choices[0].message
    assert "10" in message.content and "8+4=12" in message.reasoning_content


def test_stream(options, question):
    whole = litellm.completion(messages=user(question), **options)
    chunks = list(litellm.completion(messages=user(question), stream=True, stream_options={"include_usage": True}, **options))
    built = litellm.stream_chunk_builder(chunks, messages=user(question))
    for field in ("content", "reasoning_content"):
        assert getattr(built.choices[0].message, field) == getattr(whole.choices[0].message, field)
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def test_history_with_reasoning(options, question):
    first = litellm.completion(messages=user("1+1"), **options).choices[0].message
    again = litellm.completion(messages=[*user("1+1"), first.model_dump(exclude_none=True), *user(question)], max_tokens=4, **options)
    assert again.usage.prompt_tokens > 20


def test_errors(options, question):
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=user(question), temperature=9, **options)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=user(question * 100), **options)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=user(question), **{**options, "model": options["model"] + "-2"})

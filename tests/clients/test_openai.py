"""R1 with openai-python: what an application written for OpenAI does, typed bodies, streams and errors."""
import asyncio

import openai
import pytest

MODES = ["off", "soft", "gumbel"]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def user(text):
    return [{"role": "user", "content": text}]


def think(mode="soft", **more):
    return {"soft_thinking": {"mode": mode, **more}}


def validate(thing):
    """Strict: the client itself accepts anything."""
    type(thing).model_validate(thing.model_dump(exclude_unset=True), strict=True)
    return thing


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.object == "model" and model.owned_by == "sfumato" and model.created > 0
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/none")


def test_chat(client, question):
    reply = validate(client.chat.completions.create(model="tiny", messages=user(question), seed=7))
    (choice,) = reply.choices
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion" and reply.system_fingerprint
    assert "10" in choice.message.content and choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert choice.message.reasoning_content == choice.message.reasoning and "8+4=12" in choice.message.reasoning
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert choice.sfumato["mode"] == "soft" and choice.sfumato["seed"] == 7


def check_stream(whole, chunks):
    """Deltas joined = the reply in one piece."""
    validate(whole)
    for chunk in chunks:
        validate(chunk)
    assert len({(c.id, c.created, c.model, c.object, c.system_fingerprint) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    deltas = [c.choices[0] for c in chunks[:-1]]
    message = whole.choices[0].message
    assert "".join(d.delta.content or "" for d in deltas) == (message.content or "")
    for field in ("reasoning_content", "reasoning"):
        assert "".join(getattr(d.delta, field, None) or "" for d in deltas) == getattr(message, field)
    assert [r for d in deltas for r in (getattr(d, "sfumato", None) or {}).get("trace", [])] == whole.choices[0].sfumato["trace"]
    for part in ("content", "reasoning"):
        assert [t for d in deltas if d.logprobs for t in getattr(d.logprobs, part) or []] == getattr(whole.choices[0].logprobs, part)
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason and all(c.usage is None for c in chunks[:-1])
    usage, expected = chunks[-1].usage, whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert usage.completion_tokens_details == expected.completion_tokens_details


@pytest.mark.parametrize("mode", MODES)
def test_stream_equals_whole(server, questions, mode):
    """R1: 201 prompts, 67 in each mode, 16 at a time, whole and as a stream with the same seed; every chunk validates."""
    async def one(client, gate, seed, text):
        options = {"model": "tiny", "messages": user(text), "seed": seed, "max_tokens": 60, "logprobs": True, "top_logprobs": 1,
                   "extra_body": think(mode, return_trace=3)}
        async with gate:
            whole = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
            check_stream(whole, [c async for c in stream])

    async def everything():
        gate = asyncio.Semaphore(16)
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(one(client, gate, seed, text) for seed, text in list(enumerate(questions(201)))[MODES.index(mode)::3]))

    asyncio.run(everything())


def test_stream_helper(client, question):
    """The event interface accumulates the chunks by itself."""
    with client.chat.completions.stream(model="tiny", messages=user(question), seed=7) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    whole = client.chat.completions.create(model="tiny", messages=user(question), seed=7)
    assert "".join(pieces) == final.choices[0].message.content == whole.choices[0].message.content


def test_several_choices(client, question):
    options = {"model": "tiny", "messages": user(question), "n": 3, "seed": 5, "extra_body": think("gumbel")}
    whole = client.chat.completions.create(**options)
    assert [c.index for c in whole.choices] == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content or "" for c in whole.choices]
    shared = client.chat.completions.create(model="tiny", messages=user(question), n=3, seed=5, extra_body=think("gumbel", share_thinking=True))
    assert len({c.message.reasoning_content for c in shared.choices}) == 1


def test_stop(client, question):
    reply = client.chat.completions.create(model="tiny", messages=user(question), seed=7, stop=["boxed", "zzz"])
    assert reply.choices[0].finish_reason == "stop" and reply.choices[0].stop_reason == "boxed"
    assert "boxed" not in reply.choices[0].message.content
    kept = client.chat.completions.create(model="tiny", messages=user(question), seed=7, stop="boxed", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content.endswith("boxed")


def test_length(client, question):
    reply = client.chat.completions.create(model="tiny", messages=user(question), max_completion_tokens=5)
    assert reply.choices[0].finish_reason == "length" and reply.choices[0].message.content is None
    assert reply.usage.completion_tokens == 5 == reply.usage.completion_tokens_details.reasoning_tokens


def test_logprobs(client, question):
    reply = client.chat.completions.create(model="tiny", messages=user(question), logprobs=True, top_logprobs=4, temperature=0)
    content = reply.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode().strip().startswith(reply.choices[0].message.content)
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 4
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
        assert token.token == token.top_logprobs[0].token  # temperature 0
    assert reply.choices[0].logprobs.reasoning


def test_completions(client):
    validate(client.completions.create(model="tiny", prompt="8+4=", max_tokens=4, temperature=0, logprobs=2))
    reply = client.completions.create(model="tiny", prompt="8+4=", max_tokens=4, temperature=0, logprobs=2, echo=True)
    (choice,) = reply.choices
    assert reply.id.startswith("cmpl-") and choice.text.startswith("8+4=")
    lp = choice.logprobs
    assert "".join(lp.tokens) == choice.text and lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
    assert lp.text_offset[0] == 0 and len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset)
    two = client.completions.create(model="tiny", prompt=["8+4=", "1+1="], max_tokens=3, n=2, seed=1)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(model="tiny", prompt=["8+4=", "1+1="], max_tokens=3, n=2, seed=1, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [c.text for c in two.choices]


def test_token_prompts(client, server):
    import httpx
    ids = httpx.post(server.url + "/tokenize", json={"prompt": "8+4="}).json()["tokens"]
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=4, temperature=0)
    by_text = client.completions.create(model="tiny", prompt="8+4=", max_tokens=4, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert len(client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=4).choices) == 2


def test_history_takes_either_name(client, question):
    for field in ("reasoning_content", "reasoning"):
        messages = [*user("1+1"), {"role": "assistant", "content": "2", field: "easy"}, *user(question)]
        assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=5).usage.prompt_tokens > 10


def test_errors(client, question):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tiny", messages=user(question), temperature=9)
    assert e.value.param == "temperature" and e.value.type == "invalid_request_error" and "5" in e.value.message and e.value.request_id
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tiny", messages=user(question), max_tokens=1024)
    assert e.value.code == "context_length_exceeded" and "maximum context length is 1024 tokens" in e.value.message
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tiny", messages=user(question), tools=[{"type": "function", "function": {"name": "f"}}])
    assert e.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tiny", messages=user(question), stream=True, extra_body={"soft_thinking": {"depth": 1}})
    assert e.value.param == "soft_thinking.depth"
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-4", messages=user(question))
    assert e.value.code == "model_not_found"


def test_keys(make_server, question, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    with make_server("--api-key-file", str(keys)) as locked:
        for key, welcome in (("first", True), ("second", True), ("third", False), ("firs", False)):
            client = openai.OpenAI(base_url=locked.url + "/v1", api_key=key, max_retries=0)
            if welcome:
                assert client.models.list().data
                continue
            with pytest.raises(openai.AuthenticationError) as e:
                client.chat.completions.create(model="tiny", messages=user(question))
            assert e.value.code == "invalid_api_key"


def test_raw_response(client, question):
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=user(question), max_tokens=3,
                                                           extra_headers={"X-Request-Id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1" and raw.http_response.status_code == 200
    assert raw.parse()._request_id == "mine-1"


def test_deadline(client):
    with pytest.raises(openai.InternalServerError) as e:  # nothing was written yet: 504
        client.chat.completions.create(model="tiny", messages=user("count"), n=8, max_tokens=900,
                                       extra_body={"timeout_s": 0.001, "ignore_eos": True})
    assert e.value.status_code == 504 and e.value.code == "timeout"
    with pytest.raises(openai.APIError) as e:  # later: an error event
        for _ in client.chat.completions.create(model="tiny", messages=user("count"), n=8, max_tokens=900, stream=True,
                                                extra_body={"timeout_s": 0.1, "ignore_eos": True}):
            pass
    assert e.value.code == "timeout"


def test_many_at_once(server, questions):
    """Asynchronous client, 40 streams: none lost, none mixed up."""
    async def one(client, text, seed):
        stream = await client.chat.completions.create(model="tiny", messages=user(text), seed=seed, stream=True, max_tokens=150)
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def everything():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            jobs = list(enumerate(questions(20))) * 2
            return await asyncio.gather(*(one(client, text, seed) for seed, text in jobs))

    texts = asyncio.run(everything())
    assert texts[:20] == texts[20:] and all(texts)

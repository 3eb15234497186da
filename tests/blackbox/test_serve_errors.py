"""R4, R5: every row of the table of errors, and requests that are wrong at random."""
import json
import os
import random
import socket

import pytest
from conftest import chat, launch
from served import SANITIZED, Server, raw_socket


@pytest.fixture(scope="module")
def server():
    with Server("--max-body-bytes", "100k", "--max-num-queued-reqs", "32") as running:
        yield running


def refused(answer, status, kind="invalid_request_error", code=None, param=None):
    got, headers, body = answer
    assert got == status, (got, body)
    assert headers["content-type"] == "application/json" and headers["x-request-id"]
    error = json.loads(body)["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, code), error
    if param is not None:
        assert error["param"] == param, error
    return error


CHAT = "/v1/chat/completions"
BAD = [
    ("temperature", {"temperature": 5.5}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("top_k", {"top_k": 2.5}),
    ("n", {"n": 65}),
    ("n", {"n": "1"}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_completion_tokens", {"max_completion_tokens": -1}),
    ("min_tokens", {"max_tokens": 3, "min_tokens": 4}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"1": 101}}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("continue_final_message", {"add_generation_prompt": True, "continue_final_message": True}),
    ("timeout_s", {"timeout_s": 0}),
    ("timeout_s", {"timeout_s": -1}),
    ("reasoning_effort", {"reasoning_effort": "huge"}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
    ("soft_thinking.bogus", {"soft_thinking": {"bogus": 1}}),
    ("soft_thinking.max_topk", {"soft_thinking": {"max_topk": 65}}),
    ("soft_thinking.cold_stop.entropy", {"soft_thinking": {"cold_stop": {"entropy": 21}}}),
    ("soft_thinking.mode", {"soft_thinking": {"mode": "x"}}),
    ("soft_thinking", {"soft_thinking": 3}),
    ("messages", {"messages": []}),
    ("messages[0].role", {"messages": [{"role": "king", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
]
NOT_OFFERED = [
    {"tools": [{"type": "function"}]},
    {"functions": [{"name": "f"}]},
    {"response_format": {"type": "json_object"}},
    {"best_of": 2},
    {"guided_json": {}},
    {"modalities": ["audio"]},
    {"use_beam_search": True},
]


@pytest.mark.parametrize("param,fields", BAD, ids=lambda v: json.dumps(v)[:40])
def test_R4_out_of_range(server, param, fields):
    body = {**chat("Hi"), **fields}
    refused(server.call("POST", CHAT, body), 400, param=param)


@pytest.mark.parametrize("fields", NOT_OFFERED, ids=lambda v: list(v)[0])
def test_R4_not_offered(server, fields):
    refused(server.call("POST", CHAT, {**chat("Hi"), **fields}), 400, code="unsupported_parameter")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b'{"a":1,"a":2}', b'{"messages":"\xff"}', b'{"m":"\\u0000"}', b'{"m":"\\ud800"}',
     b'{"seed":99999999999999999999}', b'{"temperature":1e999}', b"[" * 3000, b'{"prompt":"x"} x'],
    ids=lambda b: repr(b[:20]),
)
def test_R4_malformed(server, text):
    refused(server.call("POST", CHAT, text), 400)


def test_R4_the_table(server):
    good = chat("Hi", max_tokens=2)
    refused(server.call("POST", CHAT, {**good, "model": "x"}), 404, code="model_not_found", param="model")
    refused(server.call("GET", "/nowhere"), 404)
    refused(server.call("GET", "/v1/models/x"), 404, code="model_not_found")
    answer = server.call("GET", CHAT)
    refused(answer, 405)
    assert answer[1]["allow"] == "POST, OPTIONS"
    assert server.call("DELETE", "/v1/models")[1]["allow"] == "GET, HEAD, OPTIONS"
    refused(server.call("POST", CHAT, good, {"Content-Type": "text/plain"}), 415)
    refused(server.call("POST", "/v1/completions", {"prompt": ["x"] * 65}), 400, param="prompt")  # 32 + 32 fit
    refused(server.call("POST", CHAT, {"prompt": "x"}), 400, param="messages")
    refused(server.call("POST", "/v1/completions", good), 400, param="prompt")
    assert server.call("POST", CHAT, b"x" * 200_000)[0] == 413
    answer = server.call("POST", CHAT, {**good, "max_tokens": 900, "timeout_s": 0.001, "ignore_eos": True})
    refused(answer, 504, "server_error", "timeout")


def test_R4_timeout_after_the_status_line(server):
    events = server.stream("/v1/completions",
                           {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "timeout_s": 0.1, "n": 8})
    assert events[-1]["error"]["code"] == "timeout" and len(events) > 1


def test_R4_request_ids(server):
    assert server.call("GET", "/health", headers={"X-Request-Id": "a.b-C_9"})[1]["x-request-id"] == "a.b-C_9"
    for bad in ("a b", "x" * 129, "ü"):
        made = server.call("GET", "/health", headers={"X-Request-Id": bad.encode("latin-1")})[1]["x-request-id"]
        assert len(made) == 32 and int(made, 16) >= 0
    trace = "0af7651916cd43dd8448eb211c80319c"
    server.call("POST", CHAT, chat("Hi", max_tokens=2),
                {"X-Request-Id": "traced", "traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    server.wait_line("traced")
    record = [r for r in server.records() if r["request_id"] == "traced"][0]
    assert record["trace_id"] == trace and record["status"] == "ok"


def test_R4_bad_http(server):
    cases = {
        b"GET /health HTTP/1.1\r\n\r\n": b" 400 ",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\nContent-Length: 20\r\n\r\n{}": b" 400 ",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n": b" 400 ",
        b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n": b" 501 ",
        b"nonsense\r\n\r\n": b" 400 ",
        b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n": b" 403 ",
    }
    for request, wanted in cases.items():
        with raw_socket(server) as s:
            s.sendall(request)
            first = s.makefile("rb").readline()
            assert wanted in first, (request[:60], first)
    assert server.get("/health") == (200, {"status": "ok"})


def test_R4_head_options(server):
    status, headers, body = server.call("HEAD", "/v1/models")
    assert status == 200 and body == b"" and int(headers["content-length"]) > 100
    assert server.call("OPTIONS", CHAT)[0] == 204
    refused(server.call("OPTIONS", CHAT, headers={"Origin": "https://evil.example"}), 403, code="forbidden")
    refused(server.call("POST", CHAT, chat("Hi"), {"Origin": "https://evil.example"}), 403, code="forbidden")
    own = f"http://127.0.0.1:{server.port}"
    assert server.call("POST", "/tokenize", {"prompt": "x"}, {"Origin": own})[0] == 200


def test_R5_context(server):
    limit = server.get("/v1/models")[1]["data"][0]["max_model_len"]
    before = server.steps()
    error = refused(server.call("POST", "/v1/completions", {"prompt": [7] * (limit + 1), "max_tokens": 1}), 400,
                    code="context_length_exceeded")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (limit + 1, limit)
    error = refused(server.call("POST", "/v1/completions", {"prompt": [7] * 100, "max_tokens": limit}), 400,
                    code="context_length_exceeded")
    assert f"maximum context length is {limit} tokens" in error["message"]
    assert f"you requested {limit + 100} tokens (100 in the messages, {limit} in the completion)" in error["message"]
    refused(server.call("POST", "/v1/completions", {"prompt": [7] * limit, "stream": True}), 400,
            code="context_length_exceeded")
    assert server.steps() == before
    answer = server.chat("Hi", ignore_eos=True, soft_thinking={"mode": "off"})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == limit
    cut = server.complete([7] * (limit + 50), max_tokens=10, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == limit - 10


def test_R4_mutations(server):
    """No crash, no 5xx, flat memory. The long run has SFUMATO_MUTATIONS=100000."""
    chance = random.Random(4)
    seeds = [
        (CHAT, chat("Tom has 3 apples", max_tokens=2, temperature=0.5, logprobs=True, top_logprobs=2, n=2, stop=["x"],
                    logit_bias={"5": 1}, soft_thinking={"mode": "soft", "cold_stop": {"entropy": 0.1, "length": 3}})),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 1, "seed": 5}),
        ("/tokenize", {"prompt": "abc", "add_special_tokens": False}),
        ("/detokenize", {"tokens": [1, 2, 3]}),
        ("/apply-template", chat("x", chat_template_kwargs={"a": 1})),
    ]
    values = [None, True, -1, 0, 1, 65, 1e308, 2**63 - 1, "", "x", "\u0000", [], {}, [[]], [None], {"a": None}, "é" * 50]

    def mutate(value):
        if isinstance(value, dict) and value:
            value = dict(value)
            key = chance.choice(list(value))
            action = chance.random()
            if action < 0.2:
                del value[key]
            elif action < 0.5:
                value[key] = chance.choice(values)
            elif action < 0.6:
                value[chance.choice(["stream", "user", "n", "zzz"])] = chance.choice(values)
            else:
                value[key] = mutate(value[key])
            return value
        if isinstance(value, list) and value and chance.random() < 0.5:
            value = list(value)
            value[chance.randrange(len(value))] = mutate(value[0])
            return value
        return chance.choice(values)

    def cap(body):  # a valid mutant must not run for long
        if isinstance(body, dict) and not isinstance(body.get("max_tokens"), (str, list, dict)):
            if body.get("max_tokens") is None or body["max_tokens"] is True or body["max_tokens"] > 2:
                body["max_completion_tokens"] = 1
        return body

    for i in range(36):  # every page of the KV cache has been touched once
        server.complete([i + 1] * 1000, max_tokens=1)
    connection = server.connect()
    statuses, memory = {}, []
    count = int(os.environ.get("SFUMATO_MUTATIONS", 10000))
    for i in range(count):
        path, body = chance.choice(seeds)
        for _ in range(chance.randint(1, 3)):
            body = mutate(body)
        text = json.dumps(cap(body)).encode()
        if chance.random() < 0.2:
            raw = bytearray(text)
            for _ in range(chance.randint(1, 4)):
                raw[chance.randrange(len(raw))] = chance.randrange(256)
            text = bytes(raw)
        connection.request("POST", path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status < 500, (response.status, text)
        statuses[response.status] = statuses.get(response.status, 0) + 1
        if i % (count // 4) == count // 4 - 1:
            memory.append(server.metrics()["process_resident_memory_bytes"])
    connection.close()
    assert statuses[400] > count // 4 and statuses[200] > count // 20, statuses
    assert SANITIZED or memory[-1] - memory[0] < 10e6, memory
    server.settle()


# --- keys ---


def test_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\n\n  second-key  \n")
    with Server("--api-key-file", keys, "--allowed-origins", "https://a.example", ranks=0,
                env={"SFUMATO_API_KEY": "third"}) as one:
        body = chat("Hi", max_tokens=2)
        for header in (None, "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-ke"):
            answer = one.call("POST", CHAT, body, {"Authorization": header} if header else {})
            refused(answer, 401, code="invalid_api_key")
            assert answer[1]["www-authenticate"] == "Bearer"
        for key in ("first-key", "second-key", "third"):
            assert one.call("POST", CHAT, body, {"Authorization": f"Bearer {key}"})[0] == 200
        for path in ("/health", "/livez", "/metrics", "/", "/openapi.json"):
            assert one.call("GET", path)[0] == 200
        refused(one.call("GET", "/health?deep=1"), 401, code="invalid_api_key")
        assert one.call("GET", "/health?deep=1", headers={"Authorization": "Bearer third"})[0] == 200
        refused(one.call("POST", "/admin/drain", b""), 401, code="invalid_api_key")
        origin = {"Origin": "https://a.example"}
        answer = one.call("OPTIONS", CHAT, headers=origin)
        assert answer[0] == 204 and answer[1]["access-control-allow-origin"] == origin["Origin"]
        assert one.call("GET", "/health", headers=origin)[1]["access-control-allow-origin"] == origin["Origin"]
        refused(one.call("GET", "/health", headers={"Origin": "https://b.example"}), 403, code="forbidden")
        assert one.call("GET", "/health", headers={"Host": "any.example"})[0] == 200  # a key protects
        assert "first-key" not in one.text and "third" not in one.text


def test_R15_bind_rule(tmp_path):
    def only(*args, words):
        result = launch("serve", "--port", "0", *args)
        assert result.status == 2, result.err
        assert any(all(w in m for w in words) for m in result.messages), result.messages

    only("--host", "0.0.0.0", words=("--host 0.0.0.0", "--no-auth"))
    empty = tmp_path / "empty"
    empty.write_text("\n")
    only("--api-key-file", empty, words=("--api-key-file",))
    only("--api-key-file", tmp_path / "none", words=("none",))
    only("--host", "256.0.0.1", words=("--host",))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = launch("serve", "--port", port, ranks=2)
        assert result.status == 2 and any("another --port" in m for m in result.messages), result.err
    with Server("--host", "0.0.0.0", "--no-auth", ranks=0) as one:
        assert one.call("GET", "/health", headers={"Host": "any.example"})[0] == 200
        refused(one.call("POST", "/admin/drain", b""), 403, code="forbidden")

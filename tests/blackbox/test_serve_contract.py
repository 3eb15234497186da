"""What serving.md says a client can see, statement by statement, where no other file holds it."""
import json
import re
import time

import pytest
from conftest import TINY, chat, generate, launch
from served import SANITIZED, Server, joined, raw_socket

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GETS = ["/", "/health", "/livez", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny"]
POSTS = [CHAT, TEXT, "/tokenize", "/detokenize", "/apply-template", "/admin/drain"]
EVERYTHING = ("{{ messages | tojson }}|{{ enable_thinking | default('unset') }}|{{ thinking | default('unset') }}|"
              "{{ reasoning_effort | default('unset') }}|{{ add_generation_prompt }}")


@pytest.fixture(scope="module")
def server():
    with Server("--max-num-queued-reqs", "100", "--request-timeout", "50", "--sse-ping-interval", "0.2", ranks=0) as running:
        yield running


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """A server whose template spells out what it is given."""
    folder = tmp_path_factory.mktemp("speller")
    for file in TINY.iterdir():
        if file.is_file() and file.name != "tokenizer_config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config["chat_template"] = EVERYTHING
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with Server(ranks=0, model=folder) as running:
        yield running


def refused(server, path, body, status=400, param=None, code=None, **headers):
    got, answer_headers, text = server.call("POST", path, body, headers)
    assert got == status, (got, text, body)
    error = json.loads(text)["error"]
    assert error["code"] == code and (param is None or error["param"] == param), (error, body)
    assert answer_headers["x-request-id"]
    return error


# --- §1: routes ---


@pytest.mark.parametrize("path", GETS)
def test_get_answers_head(server, path):
    get, head = server.call("GET", path), server.call("HEAD", path)
    assert get[0] == head[0] == 200 and head[2] == b""
    assert get[1]["content-type"] == head[1]["content-type"]
    if path not in ("/metrics",):
        assert head[1]["content-length"] == str(len(get[2]))
    assert get[1]["x-request-id"] != head[1]["x-request-id"]


@pytest.mark.parametrize("path", GETS + POSTS)
def test_wrong_methods(server, path):
    allow = "POST, OPTIONS" if path in POSTS else "GET, HEAD, OPTIONS"
    for method in ("PUT", "PATCH", "DELETE", "TRACE", *(["GET", "HEAD"] if path in POSTS else ["POST"])):
        status, headers, body = server.call(method, path, b"" if method != "HEAD" else None)
        assert (status, headers["allow"]) == (405, allow), (method, status)
        if method != "HEAD":
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
    status, headers, _ = server.call("OPTIONS", path)
    assert (status, headers["allow"]) == (204, allow) and "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", POSTS)
def test_only_json(server, path):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data", ""):
        status, _, body = server.call("POST", path, b"{}", {"Content-Type": kind})
        assert status == 415 and json.loads(body)["error"]["code"] is None, kind
    if path != "/admin/drain":
        for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
            assert server.call("POST", path, b"{}", {"Content-Type": kind})[0] == 400


def test_unknown_paths(server):
    for path in ("/v1", "/v1/", "/v1/models/", "/v1/chat/completions/", "/V1/models", "//", "/health/", "/.", "//localhost/health", "/%2e%2e/etc/passwd", "/v1/models/tiny%00x"):
        status, _, body = server.call("GET", path)
        assert status == 404 and json.loads(body)["error"]["type"] == "invalid_request_error", path


def test_tokenizer_routes(server):
    status, answer = server.post("/tokenize", {"prompt": "Tom has 3 pens."})
    assert set(answer) == {"count", "max_model_len", "tokens", "token_strs"} and answer["token_strs"] is None
    assert server.post("/tokenize", {"prompt": ""})[1]["count"] == 0
    assert set(server.post("/apply-template", chat("Hi"))[1]) == {"prompt"}
    assert server.post("/apply-template", chat("Hi", add_generation_prompt=False))[1]["prompt"].endswith("Hi")
    resumed = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}], "continue_final_message": True}
    assert server.post("/apply-template", resumed)[1]["prompt"].endswith("Well,")
    for path, body, param in (("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": 3}, "prompt"), ("/apply-template", {"prompt": "x"}, "messages"),
                              ("/tokenize", {"prompt": "x", "messages": []}, "prompt"), ("/detokenize", {}, "tokens"),
                              ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": [10**6]}, "tokens"),
                              ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens")):
        refused(server, path, body, param=param)
    refused(server, "/tokenize", {"prompt": "x", "model": "other"}, 404, "model", "model_not_found")


def test_deep_health_is_one_at_a_time_and_a_step(server):
    before = server.steps()
    assert server.get("/health?deep=1") == (200, {"status": "ok"})
    assert server.steps() > before
    before = server.steps()
    assert server.get("/health?deep=2") == server.get("/health") == (200, {"status": "ok"})
    assert server.steps() == before


# --- §2: request fields ---

FIELDS = ["model", "max_completion_tokens", "max_tokens", "min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
          "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
          "skip_special_tokens", "logprobs", "top_logprobs", "echo", "stream", "stream_options", "truncate_prompt_tokens", "add_generation_prompt",
          "continue_final_message", "chat_template_kwargs", "reasoning_effort", "reasoning", "include_reasoning", "separate_reasoning",
          "stream_reasoning", "thinking_token_budget", "timeout_s", "soft_thinking", "custom_params", "tools", "tool_choice", "functions",
          "response_format", "structured_outputs", "guided_json", "guided_grammar", "best_of", "suffix", "use_beam_search", "prompt_logprobs",
          "prompt_embeds", "audio", "prediction", "modalities", "user", "metadata", "store", "service_tier", "parallel_tool_calls"]
THINK = ["mode", "max_topk", "temperature", "top_p", "top_k", "min_p", "cold_stop", "budget", "answer", "seed", "return_trace", "share_thinking",
         "start", "on_eos", "close_text", "gumbel_temperature", "dirichlet_alpha", "compat"]


def test_null_is_absent(server):
    plain = server.post(CHAT, chat("Hi", seed=1, max_tokens=5))[1]["choices"]
    nulls = {name: None for name in FIELDS if name not in ("seed", "max_tokens", "soft_thinking")}
    body = {**chat("Hi", seed=1, max_tokens=5), **nulls, "soft_thinking": {name: None for name in THINK}}
    assert server.post(CHAT, body)[1]["choices"] == plain
    assert server.post(CHAT, {**body, "soft_thinking": None})[1]["choices"] == plain


def test_neutral_values_pass(server):
    neutral = {"tools": [], "response_format": {"type": "text"}, "best_of": 2, "n": 2, "use_beam_search": False, "modalities": ["text"],
               "suffix": "", "user": "me", "metadata": {"a": 1}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
               "tool_choice": "auto", "functions": [], "logprobs": False, "top_logprobs": 0}
    assert len(server.chat("Hi", max_tokens=1, **neutral)["choices"]) == 2
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert server.chat("Hi", max_tokens=1, tools=tools, tool_choice="none")["choices"]


@pytest.mark.parametrize("fields", [
    {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tools": [{}], "tool_choice": "auto"}, {"functions": [{"name": "f"}]},
    {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema"}}, {"structured_outputs": {"json": {}}},
    {"guided_json": {}}, {"guided_regex": "a"}, {"guided_choice": ["a"]}, {"guided_grammar": "g"}, {"guided_decoding_backend": "x"},
    {"best_of": 3, "n": 2}, {"suffix": "end"}, {"use_beam_search": True}, {"prompt_logprobs": 1}, {"prompt_embeds": "AA"},
    {"audio": {"voice": "x"}}, {"prediction": {"type": "content"}}, {"modalities": ["text", "audio"]}], ids=lambda f: next(iter(f)))
def test_not_offered(server, fields):
    refused(server, CHAT, chat("Hi", **fields), code="unsupported_parameter", param=next(iter(fields)))


@pytest.mark.parametrize("name,bad,good", [
    ("max_tokens", [0, -1, 1.0, "1", True], [1]), ("min_tokens", [-1, 0.5, "0"], [0]), ("n", [0, 65, 1.5, "1"], [64]),
    ("temperature", [-0.1, 5.01, "1", True], [0, 5, 1]), ("top_p", [0, 1.01, -1, "1"], [1, 0.01]), ("top_k", [-2, 1.5, "1", 10**7], [-1, 0, 1]),
    ("min_p", [-0.1, 1, "0"], [0, 0.99]), ("presence_penalty", [-2.1, 2.1], [-2, 2]), ("frequency_penalty", [-2.1, 2.1], [-2, 2]),
    ("repetition_penalty", [0, -1, 2.1], [0.01, 2]), ("seed", [1.5, "7", True], [-(2**63), 2**63 - 1, 0]),
    ("stop", [[""], ["a"] * 17, "", "a" * 257, 3, [3], {}], ["a" * 256, ["a"] * 16, []]),
    ("stop_token_ids", [[-1], [10**6], 3, [1.5], list(range(65))], [[], list(range(64))]),
    ("logit_bias", [{"a": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, [], {"1": None}, {str(i): 1 for i in range(1025)}], [{"1": -100, "2": 100}, {}]),
    ("include_stop_str_in_output", [1, "true"], [True]), ("ignore_eos", [0], [True]), ("skip_special_tokens", ["x"], [False]),
    ("logprobs", ["x", -1, 1, 1.5], [True, False]), ("stream", [1], [False]), ("truncate_prompt_tokens", [0, -2, 1025, 1.5], [-1, 1, 1024]),
    ("add_generation_prompt", [1], [False]), ("continue_final_message", ["x"], []), ("chat_template_kwargs", [[], "x", 1], [{}]),
    ("reasoning_effort", ["x", 1, ""], ["none", "minimal", "low", "medium", "high", "xhigh", "max"]),
    ("include_reasoning", [1], [False]), ("separate_reasoning", [1], [False]), ("stream_reasoning", [1], [False]),
    ("thinking_token_budget", [0, -1, 1.5, 2**31], [1, 2**31 - 1]), ("timeout_s", [0, -1, 51, "1"], [50, 0.5])])
def test_ranges(server, name, bad, good):
    for value in bad:
        error = refused(server, CHAT, chat("Hi", **{"max_tokens": 2, name: value}))
        assert error["param"] == name, (value, error)
        assert name in error["message"], error
    for value in good:
        status, answer = server.post(CHAT, chat("Hi", **{"max_tokens": 2, name: value}))
        assert status == 200, (name, value, answer)


@pytest.mark.parametrize("name,bad,good", [
    ("mode", ["x", 1, ""], ["off", "soft", "gumbel", "dirichlet"]), ("max_topk", [0, 65, 1.5], [1, 64]), ("temperature", [-1, 5.1], [0, 5]),
    ("top_p", [0, 1.1], [1]), ("top_k", [-2, 1.5], [-1, 0, 5]), ("min_p", [-0.1, 1], [0]), ("cold_stop", [True, 3, {"entropy": -1}, {"length": 0},
     {"entropy": 20.1}, {"length": 10**6 + 1}, {"x": 1}], [False, {}, {"entropy": 0}, {"length": 1}, {"entropy": 20, "length": 10**6}]),
    ("budget", [0, 1.5, 2**31], [1]), ("answer", [1, {"x": 1}, {"temperature": 6}, {"top_p": 0}], [{}, {"temperature": 0, "top_k": 1}]),
    ("seed", [1.5, "x"], [-1]), ("return_trace", [0, 65, "x"], [True, False, 1, 64]), ("share_thinking", [1], [True]),
    ("start", ["x"], ["auto", "first_token"]), ("on_eos", ["x"], ["close", "finish", "mask"]), ("close_text", [1], ["So", ""]),
    ("gumbel_temperature", [0, -1, 101], [0.1]), ("dirichlet_alpha", [0, -1], [2]), ("compat", ["x"], ["none", "official-2025-05", "official-2026-01"]),
    ("depth", [1], [])])
def test_think_ranges(server, name, bad, good):
    for value in bad:
        error = refused(server, CHAT, chat("Hi", max_tokens=2, soft_thinking={name: value}))
        assert error["param"].startswith("soft_thinking." + name), error
    for value in good:
        status, answer = server.post(CHAT, chat("Hi", max_tokens=2, soft_thinking={name: value}))
        assert status == 200, (name, value, answer)


IDS = json.loads((TINY / "config.json").read_text())["vocab_size"]  # the tokenizer of models/tiny knows them all
WIDE = [IDS + 1, 4194304, 4194305, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, -2, -(2**63)]
PLACES = {  # param -> the fields that set it
    "top_k": lambda v: {"top_k": v},
    "soft_thinking.top_k": lambda v: {"soft_thinking": {"top_k": v}},
    "soft_thinking.answer.top_k": lambda v: {"soft_thinking": {"answer": {"top_k": v}}},
    "soft_thinking.max_topk": lambda v: {"soft_thinking": {"max_topk": v}},
}


def borders(param):
    """Values that are taken, values that are not, and the range that is said."""
    low, high = (1, 64) if param.endswith("max_topk") else (-1, IDS)
    values = [-1, 0, 1, 64, 65, IDS, *WIDE]
    return [v for v in values if low <= v <= high], [v for v in values if not low <= v <= high], f"{low}..{high}"


@pytest.mark.parametrize("param", PLACES)
def test_widths(server, param):
    """top_k is -1, 0 or 1 to the vocabulary; the error has the field as it was given, its value and its range."""
    fields, (good, bad, said) = PLACES[param], borders(param)
    body = {"prompt": "Tom has", "max_tokens": 6, "seed": 4, "temperature": 1.5, "ignore_eos": True}
    texts = {}
    for value in good:
        status, answer = server.post(TEXT, {**body, **fields(value)})
        assert status == 200, (value, answer)
        texts[value] = answer["choices"][0]["text"]
    for value in bad:
        error = refused(server, TEXT, {**body, **fields(value)}, param=param)
        assert error["message"] == f"{param} is {value}: it must be in {said}"
    refused(server, TEXT, json.dumps({**body, **fields(0)}).replace(": 0}", f": {2**63}}}").encode())  # no number of JSON here
    if not param.endswith("max_topk"):
        assert texts[0] == texts[-1] == texts[IDS]  # all ids
    lines = generate([{**body, **fields(v)} for v in good + bad]).lines
    assert [line.get("error", {}).get("param") for line in lines] == [None] * len(good) + [param] * len(bad)
    alias = {"custom_params": {"after_thinking_top_k": IDS + 1}}
    refused(server, TEXT, {**body, **alias}, param="soft_thinking.answer.top_k")


def test_widths_of_flags(tmp_path):
    """A flag is held to the same range; what the model's files ask for keeps all ids when it is wider than those."""
    for flag in ("--top-k", "--think-top-k"):
        assert launch("generate", "-p", "x", "--max-tokens", "1", flag, str(IDS)).status == 0
        for value in (IDS + 1, 4194304, 4194305, 2**31, 2**63):
            result = launch("generate", "-p", "x", "--max-tokens", "1", flag, str(value))
            assert result.status == 2 and f"{flag} {value}" in result.messages[-1], (value, result.messages)
    for file in TINY.iterdir():
        if file.is_file() and file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    body, texts = {"prompt": "Tom has", "max_tokens": 6, "seed": 4, "temperature": 1.5, "soft_thinking": {"mode": "off"}}, []
    for width in (0, IDS, IDS + 1, 2**31 - 1):
        (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": width}))
        (line,) = generate([body], "--model", str(tmp_path)).lines
        texts.append(line["answer"])
    assert len(set(texts)) == 1 and texts[0]


def test_first_of_two_wins(server):
    assert server.chat("Hi", max_completion_tokens=3, max_tokens=9, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_messages(speller):
    def given(message):
        text = speller.post("/apply-template", {"messages": [message]})[1]["prompt"]
        return json.loads(text.split("|")[0])[0]

    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "reasoning", "text": "so"}, {"type": "text", "text": "b"}]
    assert given({"role": "assistant", "content": parts}) == {"role": "assistant", "content": "a\nb", "reasoning_content": "hm\nso", "thinking": "hm\nso"}
    both = given({"role": "assistant", "content": None, "reasoning_content": "first", "reasoning": "second"})
    assert both["content"] == "" and both["reasoning_content"] == "first"
    assert given({"role": "assistant", "content": "x", "reasoning": "second"})["reasoning_content"] == "second"
    assert given({"role": "tool", "content": "x", "tool_call_id": "7"}) == {"role": "tool", "content": "x", "tool_call_id": "7"}
    assert given({"role": "developer", "content": [{"type": "text", "text": "x"}]})["content"] == "x"
    for wrong in ({"role": "user", "content": None}, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
                  {"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}, {"role": "user", "content": 3}, {"role": "x", "content": "x"},
                  {"content": "x"}, "x", {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": "x", "reasoning": "x"}):
        error = refused(speller, CHAT, {"messages": [wrong]})
        assert error["param"].startswith("messages[0]"), error
    many = [{"role": "user", "content": ""}] * 4096
    assert speller.post("/apply-template", {"messages": many})[0] == 200
    refused(speller, "/apply-template", {"messages": [*many, many[0]]}, param="messages")


def test_as_many_parts_as_a_body_holds(server):
    """Joined in a time that grows with their number, not with its square (that was minutes here)."""
    parts = [{"type": "text", "text": str(i % 10)} for i in range(160_000)]
    status, _, body = server.call("POST", "/apply-template", {"messages": [{"role": "user", "content": parts}]}, timeout=45)
    assert status == 200 and "\n".join(p["text"] for p in parts) in json.loads(body)["prompt"]


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps freed memory")
def test_memory_of_large_bodies_goes_back(server):
    """8 MB of JSON become 600 MB of small values: malloc would keep them."""
    def resident():
        return server.metrics()["process_resident_memory_bytes"]

    before = resident()
    body = b'{"prompt":"a","x":[' + b"{}," * 2_500_000 + b"1]}"
    assert server.call("POST", "/tokenize", body)[0] == 200
    end = time.monotonic() + 15
    while resident() - before > 150e6:
        assert time.monotonic() < end, (before, resident())
        time.sleep(0.2)


def test_template_variables(speller):
    def tail(**fields):
        return speller.post("/apply-template", chat("Hi", **fields))[1]["prompt"].split("|")[1:]

    assert tail() == ["unset", "unset", "unset", "True"]
    assert tail(reasoning_effort="high") == ["unset", "unset", "high", "True"]
    assert tail(reasoning_effort="none") == ["False", "False", "none", "True"]
    assert tail(reasoning={"effort": "low"}) == ["unset", "unset", "low", "True"]
    assert tail(reasoning={"enabled": False}) == ["False", "False", "unset", "True"]
    assert tail(reasoning={"enabled": False}, chat_template_kwargs={"enable_thinking": True}) == ["True", "False", "unset", "True"]
    assert tail(reasoning_effort="low", reasoning={"effort": "high"}) == ["unset", "unset", "low", "True"]
    assert tail(chat_template_kwargs={"enable_thinking": False, "reasoning_effort": "max"}) == ["False", "unset", "max", "True"]
    assert tail(add_generation_prompt=False)[3] == "False"


def test_seed_is_random_and_reported(server):
    seeds = {server.chat("Hi", max_tokens=1)["choices"][0]["sfumato"]["seed"] for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= s < 2**53 for s in seeds)
    (seed,) = {server.chat("Hi", max_tokens=1, seed=s)["choices"][0]["sfumato"]["seed"] for s in (-5, -5)}
    assert seed % 2**64 == -5 % 2**64


def test_bias_and_min_tokens(server):
    ids = server.post("/tokenize", {"prompt": "Tom", "add_special_tokens": False})[1]["tokens"]
    forced = server.complete("x", max_tokens=4, logit_bias={str(ids[0]): 100}, temperature=0, soft_thinking={"mode": "off", "return_trace": True})
    assert {r["id"] for r in forced["choices"][0]["sfumato"]["trace"]} == {ids[0]}
    prompt = server.post("/apply-template", chat("What is 1+1?"))[1]["prompt"]
    free = server.complete(prompt, max_tokens=200, temperature=0, soft_thinking={"mode": "off"})
    count = free["usage"]["completion_tokens"]
    assert free["choices"][0]["finish_reason"] == "stop"
    longer = server.complete(prompt, max_tokens=200, min_tokens=count + 5, temperature=0, soft_thinking={"mode": "off"})
    assert longer["usage"]["completion_tokens"] > count + 4


def test_truncation_keeps_the_last_ids(server):
    ids = server.post("/tokenize", {"prompt": "one two three four five six", "add_special_tokens": False})[1]["tokens"]
    cut = server.complete(ids, truncate_prompt_tokens=3, max_tokens=3, temperature=0)
    assert cut["usage"]["prompt_tokens"] == 3
    assert cut["choices"][0]["text"] == server.complete(ids[-3:], max_tokens=3, temperature=0)["choices"][0]["text"]
    fits = server.complete([5] * 2000, truncate_prompt_tokens=-1, max_tokens=24)
    assert fits["usage"]["prompt_tokens"] == 1000
    refused(server, TEXT, {"prompt": [5] * 2000, "max_tokens": 24}, code="context_length_exceeded")


def test_prompts(server):
    refused(server, TEXT, {"prompt": []}, param="prompt")
    refused(server, TEXT, {"prompt": ""}, param="prompt")
    refused(server, TEXT, {"prompt": ["a", 3]}, param="prompt")
    refused(server, TEXT, {"prompt": [[1], "a", {}]}, param="prompt")
    refused(server, TEXT, {"prompt": [10**6]}, param="prompt")
    refused(server, TEXT, {"prompt": ["a"] * 129}, param="prompt")
    assert len(server.complete(["a", [5, 6]] * 4, max_tokens=1)["choices"]) == 8
    assert len(server.complete(["a"] * 128, max_tokens=1)["choices"]) == 128


def test_unknown_fields_are_said_once(server):
    for _ in range(3):
        server.chat("Hi", max_tokens=1, zebra_colour=1)
    server.wait_line("zebra_colour")
    assert server.text.count("zebra_colour") == 1


# --- §4: replies ---


@pytest.mark.parametrize("keep", [b"", b"Connection: keep-alive\r\n"])
def test_stream_over_http_1_0(server, keep):
    """No chunks there: the stream ends with the connection, whatever the client asked for."""
    body = json.dumps(chat("Hi", stream=True, max_tokens=3)).encode()
    with raw_socket(server) as s:
        s.sendall(b"POST " + CHAT.encode() + b" HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n" + keep +
                  b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while part := s.recv(65536):
            answer += part
    head, events = answer.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.0 200") and b"content-length" not in head.lower() and b"keep-alive" not in head.lower()
    assert events.startswith(b"data: {") and events.endswith(b"data: [DONE]\n\n")


def test_sse_headers_and_shape(server):
    connection = server.connect()
    connection.request("POST", CHAT, json.dumps(chat("Hi", stream=True, max_tokens=3, n=2)), {"Content-Type": "application/json", "X-Request-Id": "abc"})
    response = connection.getresponse()
    headers = {k.lower(): v for k, v in response.getheaders()}
    assert headers["content-type"] == "text/event-stream; charset=utf-8" and headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no" and headers["x-request-id"] == "abc"
    blocks = response.read().decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""] and all(b.startswith("data: {") or b == ": ping" for b in blocks[:-2])
    first = json.loads(next(b for b in blocks if b.startswith("data: "))[6:])
    assert list(first) == ["id", "object", "created", "model", "system_fingerprint", "choices"]
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
    connection.close()


def test_continuous_usage_alone(server):
    events = server.stream(CHAT, chat("Hi", max_tokens=4, ignore_eos=True, stream_options={"continuous_usage_stats": True}))[:-1]
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts) and counts[-1] == 4 and events[-1]["choices"]
    none = server.stream(CHAT, chat("Hi", max_tokens=4))[:-1]
    assert all("usage" not in e for e in none)


def test_pings_before_the_first_event(model_delay={"SFUMATO_FAULT": "delay:0:900"}):
    with Server("--sse-ping-interval", "0.05", ranks=0, env=model_delay) as slow:
        connection = slow.connect()
        connection.request("POST", TEXT, json.dumps({"prompt": "x", "stream": True, "max_tokens": 4, "ignore_eos": True}), {"Content-Type": "application/json"})
        text = connection.getresponse().read().decode()
        connection.close()
    blocks = text.split("\n\n")
    assert ": ping" in blocks and blocks[-2] == "data: [DONE]"
    assert all(json.loads(b[6:]) for b in blocks[:-2] if b != ": ping")


def test_offsets_are_code_points(server):
    prompt = "é🍎 Tom 3 äö"
    (choice,) = server.complete(prompt, max_tokens=6, temperature=0, echo=True, logprobs=1)["choices"]
    lp = choice["logprobs"]
    assert choice["text"].startswith(prompt)
    whole = [(t, o) for t, o in zip(lp["tokens"], lp["text_offset"]) if not t.startswith("bytes:")]
    assert all(choice["text"][o:o + len(t)] == t for t, o in whole) and len(whole) > 4
    pieces = [t for t in lp["tokens"] if t.startswith("bytes:")]
    assert pieces and all(re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", t) for t in pieces)  # é and the apple are several ids of tiny
    assert lp["text_offset"] == sorted(lp["text_offset"])


def test_chat_logprobs_form(server):
    choice = server.chat("What is 1+1?", max_tokens=80, logprobs=True, top_logprobs=2, temperature=0)["choices"][0]
    assert set(choice["logprobs"]) == {"content", "reasoning"}
    entries = choice["logprobs"]["content"] + choice["logprobs"]["reasoning"]
    assert entries
    for e in entries:
        assert set(e) == {"token", "logprob", "bytes", "top_logprobs"} and len(e["top_logprobs"]) == 2
        assert all(set(t) == {"token", "logprob", "bytes"} for t in e["top_logprobs"]) and e["logprob"] <= 0
    none = server.chat("Hi", max_tokens=2, logprobs=True)["choices"][0]["logprobs"]
    assert all(e["top_logprobs"] == [] for e in none["reasoning"])


def test_echo_is_the_text_that_was_sent(server):
    prompt = "<|user|>Tom  has\n<|assistant|>"  # markers included
    for more in ({}, {"truncate_prompt_tokens": None}):
        assert server.complete(prompt, echo=True, max_tokens=0, **more)["choices"][0]["text"] == prompt


def test_echo_alone_runs_no_step(server):
    before = server.steps()
    (choice,) = server.complete("Tom has", echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("Tom has", "length", None)
    assert server.steps() == before
    refused(server, TEXT, {"prompt": "x", "max_tokens": 0}, param="max_tokens")
    refused(server, TEXT, {"prompt": "x", "echo": True, "stream": True}, param="echo")
    refused(server, CHAT, chat("x", echo=True), param="echo")


def test_no_answer_step_no_content(server):
    choice = server.chat("Tom has 3 pens. Tom buys 4 more. How many pens?", max_tokens=3)["choices"][0]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "length" and choice["sfumato"]["thinking_end"] == "length"
    budget = server.chat("Tom has 3 pens. Tom buys 4 more. How many pens?", max_tokens=60, thinking_token_budget=4)["choices"][0]
    assert budget["sfumato"]["thinking_end"] == "budget" and budget["message"]["content"] is not None
    refused(server, CHAT, chat("x", thinking_token_budget=4, soft_thinking={"budget": 5}), param="thinking_token_budget")


def test_trace_records(server):
    answer = server.chat("What is 1+1?", max_tokens=80, soft_thinking={"return_trace": 2})
    trace = answer["choices"][0]["sfumato"]["trace"]
    assert [r["step"] for r in trace] == list(range(len(trace))) and len(trace) == answer["usage"]["completion_tokens"]
    for r in trace:
        soft = "ids" in r
        assert set(r) == {"step", "phase", "id", "text", "entropy", "p"} | ({"ids", "weights"} if soft else set())
        if soft:
            assert r["phase"] == "thinking" and len(r["ids"]) == len(r["weights"]) <= 2 and sum(r["weights"]) < 1.0001
    pieces = [server.post("/detokenize", {"tokens": [r["id"]]})[1]["prompt"] for r in trace[:10]]
    assert pieces == [r["text"] for r in trace[:10]]


# --- §5, §6: broken HTTP, ids ---


def exchange(server, data):
    with raw_socket(server) as s:
        s.sendall(data)
        s.settimeout(10)
        answer = b""
        while chunk := s.recv(65536):
            answer += chunk
            if b"\r\n\r\n" in answer and b"</html>" in answer.lower() or answer.endswith(b"}"):
                break
        return answer


def test_broken_http(server):
    host = b"Host: localhost\r\n"
    assert exchange(server, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert exchange(server, b"GET /health HTTP/1.1\r\n" + host + host + b"\r\n").startswith(b"HTTP/1.1 400")
    body = b"POST /tokenize HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
    assert exchange(server, body + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}").startswith(b"HTTP/1.1 400")
    assert exchange(server, body + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert exchange(server, b"GET /health HTTP/1.1\r\n" + host + b"X: " + b"a" * 70000 + b"\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert exchange(server, b"BREW /health HTTP/1.1\r\n" + host + b"\r\n").startswith(b"HTTP/1.1 501")
    chunked = body + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (b'{"pro', b'mpt":"x"}')) + b"0\r\n\r\n"
    assert exchange(server, chunked).startswith(b"HTTP/1.1 200")
    assert exchange(server, body + b"Content-Length: +2\r\n\r\n{}").startswith(b"HTTP/1.1 400")
    assert b"Transfer-Encoding" in exchange(server, body + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
    assert server.get("/livez")[0] == 200


def test_packed_bodies_are_refused(server):
    for coding, status in (("gzip", 415), ("br", 415), ("identity", 200)):
        got, headers, body = server.call("POST", "/tokenize", {"prompt": "x"}, {"Content-Encoding": coding})
        assert got == status and (status == 200 or (headers["accept-encoding"] == "identity" and b"Content-Encoding" in body))


def test_depth_of_json(server):
    deep = b'{"prompt":"x","max_tokens":1,"metadata":' + b"[" * 2000 + b"]" * 2000 + b"}"
    assert server.call("POST", TEXT, deep)[0] == 200
    deep = b'{"prompt":"x","metadata":' + b"[" * 2100 + b"]" * 2100 + b"}"
    refused(server, TEXT, deep)


def test_ids_on_every_answer(server):
    for method, path, body in (("GET", "/nowhere", None), ("PUT", "/health", b""), ("POST", CHAT, b"{"), ("POST", CHAT, b"x"), ("OPTIONS", CHAT, None),
                               ("GET", "/metrics", None), ("HEAD", "/", None)):
        assert server.call(method, path, body, {"X-Request-Id": "me.1"})[1]["x-request-id"] == "me.1"
    for good in ("a", "A" * 128, "a.b_c-9"):
        assert server.call("GET", "/health", headers={"X-Request-Id": good})[1]["x-request-id"] == good
    for bad in ("", "a" * 129, "a b", "a/b", "a:b"):
        assert re.fullmatch("[0-9a-f]{32}", server.call("GET", "/health", headers={"X-Request-Id": bad})[1]["x-request-id"])


def test_traceparent(server):
    trace = "0af7651916cd43dd8448eb211c80319c"
    for i, (parent, taken) in enumerate([(f"00-{trace}-b7ad6b7169203331-01", trace), (f"ff-{trace}-b7ad6b7169203331-01", None),
                                         (f"00-{trace.upper()}-b7ad6b7169203331-01", None), (f"00-{'0' * 32}-b7ad6b7169203331-01", None), ("x", None)]):
        server.call("POST", CHAT, chat("Hi", max_tokens=1), {"X-Request-Id": f"parent-{i}", "traceparent": parent})
        server.wait_line(f"parent-{i}")
        (record,) = [r for r in server.records() if r["request_id"] == f"parent-{i}"]
        assert record["trace_id"] == taken, parent


def test_cors(server):
    own = f"http://127.0.0.1:{server.port}"
    assert server.call("GET", "/health", headers={"Origin": own})[0] == 200  # the page's own requests
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        for method, path in (("GET", "/health"), ("POST", CHAT), ("OPTIONS", CHAT)):
            status, headers, _ = server.call(method, path, b"{}" if method == "POST" else None, {"Origin": origin})
            assert status == 403 and "access-control-allow-origin" not in headers, (origin, method)
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        assert server.call("GET", "/health", headers={"Host": host})[0] in (400, 403), host
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1", "127.9.9.9:1", "[::1]:8000", "a.localhost"):
        assert server.call("GET", "/health", headers={"Host": host})[0] == 200, host


def test_defaults_that_flags_set():
    """/v1/models tells what a request gets that says nothing, and such a request gets it."""
    flags = {"close_text": "So", "compat": "none", "share_thinking": True, "return_trace": 2, "budget": 4, "max_topk": 3, "mode": "gumbel",
             "start": "first_token", "on_eos": "finish", "temperature": 0.5}
    options = [f"--{'think' if name == 'mode' else 'think-' + name if name in ('start', 'temperature') else name.replace('_', '-')}={value}"
               for name, value in flags.items() if value is not True]
    with Server(*options, "--share-thinking", ranks=0) as server:
        told = server.get("/v1/models")[1]["data"][0]["sfumato"]["defaults"]
        assert {name: told[name] for name in flags} == flags
        choices = server.chat("Tom has 3 apples", n=2, max_tokens=12, ignore_eos=True)["choices"]
        for choice in choices:
            trace = choice["sfumato"]["trace"]
            assert [r["phase"] for r in trace[:4]] == ["thinking"] * 4 and choice["sfumato"]["thinking_end"] == "budget"
            assert choice["message"]["content"].startswith("So") and max(len(r.get("ids", [])) for r in trace) <= 2
        assert choices[0]["message"]["reasoning"] == choices[1]["message"]["reasoning"]


def test_listed_origins():
    """Clients of a browser send headers of their own, as openai-node does."""
    with Server("--allowed-origins", "https://a.example, http://b.example:3000", ranks=0) as server:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
        for origin in ("https://a.example", "http://b.example:3000"):
            status, headers, _ = server.call("OPTIONS", CHAT, headers={"Origin": origin, **asked})
            assert status == 204 and headers["access-control-allow-origin"] == origin
            assert headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"]
            assert "POST" in headers["access-control-allow-methods"] and headers["vary"] == "Origin"
        for origin in ("http://a.example", "http://b.example", "https://a.example.evil"):
            assert server.call("OPTIONS", CHAT, headers={"Origin": origin, **asked})[0] == 403


def test_streams_joined_in_every_form(server):
    """include_stop_str_in_output, separate_reasoning and stream_reasoning: whole and joined texts agree."""
    for i, fields in enumerate(({"stop": ["=", "."], "include_stop_str_in_output": True}, {"separate_reasoning": False}, {"stream_reasoning": False},
                                {"include_reasoning": False}, {"skip_special_tokens": False, "separate_reasoning": False})):
        body = chat("Tom has 3 pens. Tom buys 4 more. How many pens?", seed=i, max_tokens=120, **fields)
        message = server.post(CHAT, body)[1]["choices"][0]["message"]
        events = server.stream(CHAT, body)[:-1]
        assert joined(events) == (message["content"] or ""), fields
        assert joined(events, "reasoning") == message.get("reasoning", ""), fields

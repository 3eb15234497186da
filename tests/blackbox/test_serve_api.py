"""R1, R2, R3 over HTTP: shapes, streams, reasoning fields, and the same bytes as `generate`."""
import json

import pytest
from conftest import SOURCE, TINY, chat, generate, problems
from served import Server, joined

MODES = [{"mode": "off"}, {"mode": "soft"}, {"mode": "gumbel"}]


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def test_R1_whole_reply(server):
    answer = server.chat("What is 2+3?", seed=3, max_tokens=60)
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-") and len(answer["id"]) == 9 + 32
    assert answer["system_fingerprint"].startswith("sfumato-")
    choice = answer["choices"][0]
    assert choice["index"] == 0 and choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None
    assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"] != ""
    assert choice["sfumato"]["mode"] == "soft" and choice["sfumato"]["seed"] == 3
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] <= usage["completion_tokens"]


@pytest.mark.parametrize("block", MODES, ids=lambda b: b["mode"])
def test_R1_stream_is_the_whole_reply(server, block):
    for i, question in enumerate(problems(20)):
        body = chat(question, seed=i, max_tokens=70, soft_thinking={**block, "return_trace": 3}, logprobs=True,
                    top_logprobs=2, stop=["zebra", ".\n"])
        status, whole = server.post("/v1/chat/completions", body)
        assert status == 200, whole
        events = server.stream("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
        assert events[-1] == "[DONE]"
        chunks, choice = events[:-1], whole["choices"][0]
        assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert joined(chunks) == (choice["message"]["content"] or "")
        assert joined(chunks, "reasoning") == choice["message"].get("reasoning", "")
        assert joined(chunks, "reasoning_content") == joined(chunks, "reasoning")
        trace = [r for c in chunks for x in c["choices"] for r in x.get("sfumato", {}).get("trace", [])]
        assert trace == choice["sfumato"]["trace"]
        for part in ("content", "reasoning"):
            records = [r for c in chunks for x in c["choices"] for r in (x["logprobs"] or {}).get(part, [])]
            assert records == choice["logprobs"][part]
        last = chunks[-2]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        assert {k: v for k, v in choice["sfumato"].items() if k != "trace"} == last["sfumato"]
        assert all(c["usage"] is None for c in chunks[:-1])
        assert chunks[-1]["choices"] == []
        for c in (chunks[-1]["usage"], whole["usage"]):
            c.pop("prompt_tokens_details")  # the second of two equal prompts is cached
        assert chunks[-1]["usage"] == whole["usage"]
        thinking = [r for r in trace if r["phase"] == "thinking"]
        assert len(thinking) == whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert len(trace) == whole["usage"]["completion_tokens"]


def test_R1_same_as_generate(server):
    lines = [
        chat(q, seed=i, max_tokens=60, n=1 + i % 2, soft_thinking={"mode": mode, "return_trace": True})
        for i, q in enumerate(problems(12))
        for mode in ("off", "soft", "gumbel", "dirichlet")
    ]
    result = generate(lines, ranks=2)
    assert result.status == 0, result.err
    expected = iter(result.lines)
    for line in lines:
        status, answer = server.post("/v1/chat/completions", line)
        assert status == 200, answer
        for choice in answer["choices"]:
            want = next(expected)
            assert (choice["message"]["content"] or "") == want["answer"]
            assert choice["message"].get("reasoning", "") == want["thinking"]
            assert choice["sfumato"]["trace"] == want["trace"]
            assert [r["id"] for r in choice["sfumato"]["trace"]] == want["ids"]
            assert choice["finish_reason"] == want["finish_reason"]


def test_R1_many_choices(server):
    body = chat("What is 1+1?", n=3, seed=5, max_tokens=40, soft_thinking={"mode": "gumbel"})
    status, whole = server.post("/v1/chat/completions", body)
    assert status == 200 and [c["index"] for c in whole["choices"]] == [0, 1, 2]
    events = server.stream("/v1/chat/completions", body)[:-1]
    roles = [c["index"] for e in events for c in e["choices"] if c["delta"].get("role")]
    assert sorted(roles) == [0, 1, 2]
    for i, choice in enumerate(whole["choices"]):
        assert joined(events, index=i) == (choice["message"]["content"] or "")
        assert joined(events, "reasoning", i) == choice["message"].get("reasoning", "")
    assert "usage" not in events[0]


def test_R1_shared_thinking_is_counted_once(server):
    body = chat("What is 1+1?", n=3, seed=5, max_tokens=60, soft_thinking={"share_thinking": True})
    status, whole = server.post("/v1/chat/completions", body)
    assert status == 200
    assert len({c["message"]["reasoning"] for c in whole["choices"]}) == 1
    alone = server.chat("What is 1+1?", seed=5, max_tokens=60)["usage"]["completion_tokens_details"]
    assert whole["usage"]["completion_tokens_details"] == alone


def test_R1_shared_thinking_that_the_model_opens(server):
    """The prompt has no open marker: the model's own is shared too, an answer step that is counted once."""
    names = ("generation_tokens_total", "answer_tokens_total", 'thinking_tokens_total{kind="soft"}', 'thinking_tokens_total{kind="hard"}')
    mark = server.post("/tokenize", {"prompt": "<think>", "add_special_tokens": False})[1]["tokens"][0]
    body = {"prompt": "Tom has", "n": 3, "seed": 5, "max_tokens": 12, "logit_bias": {str(mark): 100}, "skip_special_tokens": False,
            "soft_thinking": {"share_thinking": True, "return_trace": 1, "budget": 4}}
    opening, thinking = 1, 4
    for more, answer in (({}, 7), ({"stop": ["<think>"]}, 1)):
        before = [server.metric(n) for n in names]
        whole = server.complete(**body, **more)
        server.settle()
        made, answered, *thought = (server.metric(n) - b for n, b in zip(names, before))
        for choice in whole["choices"]:
            phases = [t["phase"] for t in choice["sfumato"]["trace"]]
            assert phases == ["answer"] * opening + ["thinking"] * thinking + ["answer"] * answer
        steps = opening + thinking + 3 * answer
        usage = whole["usage"]
        assert usage["completion_tokens"] == steps == made and sum(thought) == thinking
        assert usage["completion_tokens_details"]["reasoning_tokens"] == thinking and answered == steps - thinking
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = server.stream("/v1/completions", {**body, **more, "stream_options": options})[:-1]
        counts = [e["usage"]["completion_tokens"] for e in events]
        assert counts == sorted(counts) and counts[-1] == steps


def test_R2_marker_ids_never_show(server):
    """Also those that switch nothing: the model writes </think> again and again, in the answer too."""
    open_id, close = (server.post("/tokenize", {"prompt": t, "add_special_tokens": False})[1]["tokens"][0] for t in ("<think>", "</think>"))
    for marker, text in ((close, "</think>"), (open_id, "<think>")):
        body = chat("Hi", max_tokens=12, ignore_eos=True, skip_special_tokens=False, logit_bias={str(marker): 100}, temperature=0,
                    soft_thinking={"budget": 3, "return_trace": 1})
        choice = server.post("/v1/chat/completions", body)[1]["choices"][0]
        ids = [t["id"] for t in choice["sfumato"]["trace"] if t["phase"] == "answer"]
        assert ids.count(marker) > 3  # the case occurs
        assert text not in choice["message"]["content"] + choice["message"]["reasoning"]
        raw = server.post("/v1/chat/completions", {**body, "separate_reasoning": False})[1]["choices"][0]["message"]["content"]
        assert raw.count(text) >= ids.count(marker)


def test_a_forced_stop_id_shows(server):
    """An id of close_text is no stop, so it is text."""
    so = server.post("/tokenize", {"prompt": "So", "add_special_tokens": False})[1]["tokens"]
    body = chat("Hi", max_tokens=30, seed=1, stop_token_ids=so, soft_thinking={"budget": 2, "close_text": "So"})
    choice = server.post("/v1/chat/completions", body)[1]["choices"][0]
    assert choice["message"]["content"].startswith("So")


def test_R1_continuous_usage(server):
    body = chat("Hi", max_tokens=9, stream_options={"include_usage": True, "continuous_usage_stats": True})
    events = server.stream("/v1/chat/completions", body)[:-1]
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts) and counts[-1] == 9 and events[-1]["choices"] == []


def test_R1_completions(server):
    answer = server.complete("Tom has", max_tokens=5, temperature=0)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["usage"]["completion_tokens"] == 5
    ids = server.post("/tokenize", {"prompt": "Tom has"})[1]["tokens"]
    assert server.complete(ids, max_tokens=5, temperature=0)["choices"][0]["text"] == answer["choices"][0]["text"]
    many = server.complete(["Tom has", "Ann"], n=2, max_tokens=5, seed=1)
    assert [c["index"] for c in many["choices"]] == [0, 1, 2, 3]
    assert many["usage"]["completion_tokens"] == 20
    events = server.stream("/v1/completions", {"prompt": "Tom has", "max_tokens": 5, "temperature": 0})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == answer["choices"][0]["text"]
    assert len(server.complete("Tom")["choices"]) == 1  # max_tokens: 16
    assert server.complete("Tom", ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_R1_completions_raw_text(server):
    """Text completions keep markers and newlines."""
    prompt = server.post("/apply-template", chat(problems(1)[0]))[1]["prompt"]
    answer = server.complete(prompt, max_tokens=200, seed=1, soft_thinking={"mode": "soft", "return_trace": True})
    choice = answer["choices"][0]
    assert "</think>" in choice["text"]
    pieces = "".join(r["text"] for r in choice["sfumato"]["trace"])
    assert pieces.startswith(choice["text"])  # all but the end of sequence


def test_R1_echo_and_logprobs(server):
    body = {"prompt": ["Tom has 3", "Ann"], "max_tokens": 4, "temperature": 0, "logprobs": 2}
    plain = server.complete(**{"prompt": body["prompt"], **{k: v for k, v in body.items() if k != "prompt"}})
    echoed = server.complete(**body, echo=True)
    scored = server.complete(**{**body, "max_tokens": 0}, echo=True)
    for prompt, p, e, s in zip(body["prompt"], plain["choices"], echoed["choices"], scored["choices"]):
        assert e["text"] == prompt + p["text"] and s["text"] == prompt
        n = len(s["logprobs"]["tokens"])
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert e["logprobs"][key][:n] == s["logprobs"][key]
            if key != "text_offset":
                assert e["logprobs"][key][n:] == p["logprobs"][key]
        assert s["logprobs"]["token_logprobs"][0] is None and s["logprobs"]["top_logprobs"][0] is None
        assert "".join(s["logprobs"]["tokens"]) == prompt
        for token, lp, top in list(zip(*(e["logprobs"][k] for k in ("tokens", "token_logprobs", "top_logprobs"))))[1:]:
            assert top[token] == pytest.approx(lp) and len(top) in (2, 3)
        for token, at in zip(e["logprobs"]["tokens"], e["logprobs"]["text_offset"]):
            assert e["text"][at : at + len(token)] == token
    # a greedy token is the likeliest one
    assert all(max(t.values()) == l for t, l in zip(plain["choices"][0]["logprobs"]["top_logprobs"],
                                                    plain["choices"][0]["logprobs"]["token_logprobs"]))
    assert scored["usage"]["completion_tokens"] == 0


def test_R1_models(server):
    status, models = server.get("/v1/models")
    assert status == 200 and models["object"] == "list"
    model = models["data"][0]
    assert model["id"] == "tiny" and model["max_model_len"] == 1024 and model["owned_by"] == "sfumato"
    assert model["sfumato"]["modes"][:2] == ["off", "soft"] and model["sfumato"]["think_close"] == "</think>"
    assert server.get("/v1/models/tiny") == (200, model)
    assert server.get("/v1/models/%74iny") == (200, model)
    assert server.get("/v1/models/other")[0] == 404


def test_R1_tokenizer_routes(server):
    text = "Tom has 3 äpples 🍎."
    status, answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200 and answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert server.post("/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": text})
    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    prompt = server.post("/apply-template", messages)[1]["prompt"]
    assert "Hi" in prompt
    both = [server.post("/tokenize", b)[1]["tokens"] for b in (messages, {"prompt": prompt, "add_special_tokens": False})]
    assert both[0] == both[1]


def test_R1_stop(server):
    body = {"prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    free = server.complete(**body)["choices"][0]["text"]
    assert len(free) > 6
    stop = free[3:5]
    cut = server.complete(**body, stop=stop)["choices"][0]
    assert cut["text"] == free[: free.index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    kept = server.complete(**body, stop=[stop, "never"], include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == free[: free.index(stop) + len(stop)]
    events = server.stream("/v1/completions", {**body, "stop": stop})[:-1]
    assert "".join(e["choices"][0]["text"] for e in events) == cut["text"]
    ids = server.complete(**body, logprobs=0)["choices"][0]["logprobs"]["tokens"]
    wanted = server.post("/tokenize", {"prompt": ids[2], "add_special_tokens": False})[1]["tokens"][0]
    by_id = server.complete(**body, stop_token_ids=[wanted])["choices"][0]
    assert by_id["stop_reason"] == wanted


def test_R2_reasoning_options(server):
    q = problems(1)[0]
    base = dict(seed=1, max_tokens=200)
    message = server.chat(q, **base)["choices"][0]["message"]
    hidden = server.chat(q, **base, include_reasoning=False)
    assert "reasoning" not in hidden["choices"][0]["message"]
    assert hidden["choices"][0]["message"]["content"] == message["content"]
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    merged = server.chat(q, **base, separate_reasoning=False)["choices"][0]["message"]
    assert "</think>" in merged["content"] and "reasoning" not in merged
    events = server.stream("/v1/chat/completions", chat(q, **base, stream_reasoning=False))[:-1]
    thoughts = [c["delta"]["reasoning"] for e in events for c in e["choices"] if "reasoning" in c["delta"]]
    assert thoughts == [message["reasoning"]]
    assert joined(events) == message["content"]


def test_R2_history_takes_either_name(server):
    answers = set()
    for name in ("reasoning_content", "reasoning"):
        messages = [
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": "4", name: "2+2=4"},
            {"role": "user", "content": "And 3+3?"},
        ]
        answers.add(server.post("/apply-template", {"messages": messages})[1]["prompt"])
    assert len(answers) == 1


def test_R3_width_one_is_greedy_chain_of_thought(server):
    for i, question in enumerate(problems(25)):
        common = {"cold_stop": False, "answer": {"temperature": 0}, "return_trace": True}
        soft = server.chat(question, seed=i, max_tokens=80, soft_thinking={**common, "mode": "soft", "max_topk": 1})
        off = server.chat(question, seed=i, max_tokens=80, temperature=0, soft_thinking={**common, "mode": "off"})
        ids = [[r["id"] for r in a["choices"][0]["sfumato"]["trace"]] for a in (soft, off)]
        assert ids[0] == ids[1]


def test_reasoning_fields_flag():
    with Server("--reasoning-fields", "reasoning_content", "--served-model-name", "org/name", ranks=0) as one:
        message = one.chat("What is 1+1?", max_tokens=30)["choices"][0]["message"]
        assert "reasoning_content" in message and "reasoning" not in message
        assert one.get("/v1/models/org%2Fname")[0] == 200
        assert one.get("/v1/models/org/name")[0] == 200


def test_several_names():
    """All are served and listed; replies and metrics carry the first."""
    with Server("--served-model-name", "org/first, second", "--served-model-name", "third", ranks=0) as one:
        assert [m["id"] for m in one.get("/v1/models")[1]["data"]] == ["org/first", "second", "third"]
        for name in ("org/first", "second", "third"):
            assert one.chat("Hi", max_tokens=1, model=name)["model"] == "org/first"
            assert one.get("/v1/models/" + name)[1]["id"] == name
        assert one.chat("Hi", max_tokens=1)["model"] == "org/first"
        for name in ("tiny", "org/first,second", "second, third", "", " third"):
            status, answer = one.post("/v1/chat/completions", chat("Hi", model=name))
            assert (status, answer["error"]["code"]) == (404, "model_not_found"), name
        assert 'model_name="org/first"' in one.call("GET", "/metrics")[2].decode()


def test_no_jinja(tmp_path):
    """A template that nothing can render: the message says what to install, prompts still work."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        if file.is_file():
            (model / file.name).symlink_to(file)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content | own }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with Server(ranks=0, model=model, env={"PATH": str(tmp_path)}) as one:
        status, answer = one.post("/v1/chat/completions", chat("Hi"))
        assert status == 400 and answer["error"]["param"] == "messages"
        assert "python3-jinja2" in answer["error"]["message"] and "--chat-template chatml" in answer["error"]["message"]
        assert one.complete("Hi", max_tokens=1)["choices"]


def test_page_and_description(server):
    status, headers, body = server.call("GET", "/")
    assert status == 200 and b"<html" in body
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "sha256-" in policy
    assert b"http://" not in body.replace(b"http://www.w3.org/", b"") and b"https://" not in body
    status, headers, body = server.call("GET", "/openapi.json")
    assert status == 200 and json.loads(body)["openapi"].startswith("3.1")
    assert json.loads(body) == json.loads((SOURCE / "tests/data/openapi.json").read_text())

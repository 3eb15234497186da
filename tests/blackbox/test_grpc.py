"""R14: gRPC against a running server, with stubs that grpc_tools makes from proto/ at test time.

Whatever both protocols can say must give the same result: a gRPC request is compared with the HTTP
request of the same fields and seed, ids and bytes.
"""
import concurrent.futures
import contextlib
import importlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from conftest import BINARY, MPI, SOURCE, TINY, problems
from served import BothServer as Server

grpc = pytest.importorskip("grpc", reason="python3-grpcio is not installed: R14 is not checked")
protoc = pytest.importorskip("grpc_tools.protoc", reason="python3-grpc-tools is not installed: R14 is not checked")
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """A namespace of the generated modules: sfumato, sfumato_grpc, health, health_grpc, vllm_engine, ..."""
    folder = tmp_path_factory.mktemp("stubs")
    files = sorted(str(path) for path in (SOURCE / "proto").glob("*.proto"))
    assert protoc.main(["protoc", f"-I{SOURCE / 'proto'}", f"--python_out={folder}", f"--grpc_python_out={folder}", *files]) == 0
    sys.path.insert(0, str(folder))

    class Stubs:
        pass

    for name in ("sfumato", "health", "vllm_engine"):
        setattr(Stubs, name, importlib.import_module(f"{name}_pb2"))
        setattr(Stubs, f"{name}_grpc", importlib.import_module(f"{name}_pb2_grpc"))
    return Stubs


LIMITS = ("--max-num-seqs", "16", "--max-body-bytes", "65536", "--stream-buffer", "32768")


@pytest.fixture(scope="module")
def server():
    with Server(*LIMITS, ranks=2) as running:
        yield running


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


@pytest.fixture
def inference(stubs, channel):
    return stubs.sfumato_grpc.InferenceStub(channel)


@pytest.fixture
def engine(stubs, channel):
    return stubs.vllm_engine_grpc.VllmEngineStub(channel)


def code_of(call):
    """The status of a call that must fail, and its text."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def question(stubs, text, **fields):
    message = stubs.sfumato.Message(role=b"user", content=text.encode())
    return stubs.sfumato.Request(messages=[message], **fields)


def joined(events):
    """index -> (ids, reasoning, text, finish) of a stream."""
    choices = {}
    for event in events:
        ids, reasoning, text, finish = choices.setdefault(event.index, ([], [], [], []))
        if event.HasField("delta"):
            ids += event.delta.ids
            reasoning.append(event.delta.reasoning)
            text.append(event.delta.text)
        else:
            finish.append(event.finish)
    return {i: (ids, "".join(r), "".join(t), f[0]) for i, (ids, r, t, f) in choices.items() if len(f) == 1}


def metric(server, row):
    with server.open("/metrics") as response:
        return float(re.search(f"^sfumato:{row} (\\S+)$", response.read().decode(), re.M)[1])


def idle(server):
    """True once nothing runs or waits and no page is held."""
    rows = (r"num_requests_running\{[^}]*\}", r"num_requests_waiting\{[^}]*\}", r'kv_pages\{[^}]*state="used"[^}]*\}')
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if all(metric(server, row) == 0 for row in rows):
            return True
        time.sleep(0.1)
    return False


# ---- the same results as HTTP ----


@pytest.mark.parametrize("mode", ["off", "soft", "gumbel"])
def test_chat_is_the_http_chat(server, stubs, inference, mode):
    text = problems(1)[0]
    thinking = {"mode": mode, "return_trace": 3}
    http = {"messages": [{"role": "user", "content": text}], "seed": 11, "max_tokens": 60, "n": 2, "logprobs": True,
            "top_logprobs": 2, "temperature": 0.75, "soft_thinking": thinking}
    status, whole = server.post("/v1/chat/completions", http)
    assert status == 200
    block = stubs.sfumato.SoftThinking(mode=mode.encode(), return_trace=3)
    request = question(stubs, text, seed=11, max_tokens=60, n=2, logprobs=True, top_logprobs=2, temperature=0.75,
                       soft_thinking=block)
    events = list(inference.Chat(request))
    assert sorted(e.index for e in events) == [0, 1]
    request.stream = True
    streamed = joined(inference.Chat(request))
    for event in events:
        choice, finish = whole["choices"][event.index], event.finish
        trace = choice["sfumato"]["trace"]
        assert list(finish.whole.ids) == [r["id"] for r in trace] == streamed[event.index][0]
        assert finish.whole.text == (choice["message"]["content"] or "") == streamed[event.index][2]
        assert finish.whole.reasoning == choice["message"].get("reasoning_content", "") == streamed[event.index][1]
        assert finish.finish_reason == choice["finish_reason"]
        assert finish.info.thinking_end == choice["sfumato"]["thinking_end"]
        assert finish.info.soft_steps == choice["sfumato"]["soft_steps"]
        assert [list(r.ids) for r in finish.whole.trace] == [r.get("ids", []) for r in trace]
        assert ["%.9g" % r.entropy for r in finish.whole.trace] == ["%.9g" % r["entropy"] for r in trace]
        records = choice["logprobs"]["reasoning"] + choice["logprobs"]["content"]
        assert ["%.9g" % r.logprob for r in finish.whole.logprobs] == ["%.9g" % r["logprob"] for r in records]
        assert finish.usage.completion_tokens == len(trace)
    assert sum(e.finish.usage.completion_tokens for e in events) == whole["usage"]["completion_tokens"]


def test_absent_is_not_zero(server, stubs, inference):
    text = problems(1)[0]
    base = {"messages": [{"role": "user", "content": text}], "seed": 5, "max_tokens": 40}
    for fields in ({}, {"temperature": 0.0}, {"top_k": 1}):
        _, http = server.post("/v1/chat/completions", {**base, **fields})
        (event,) = inference.Chat(question(stubs, text, seed=5, max_tokens=40, **fields))
        assert event.finish.whole.text == (http["choices"][0]["message"]["content"] or "")
        assert event.finish.whole.reasoning == http["choices"][0]["message"].get("reasoning_content", "")


def test_prompts_of_text_and_ids(server, stubs, inference):
    _, tokens = server.post("/tokenize", {"prompt": "3 + 4 ="})
    http = {"prompt": ["3 + 4 =", "5 - 1 ="], "seed": 3, "max_tokens": 12, "stop": ["\n"]}
    _, whole = server.post("/v1/completions", http)
    prompts = [stubs.sfumato.Prompt(ids=stubs.sfumato.Ids(ids=tokens["tokens"])), stubs.sfumato.Prompt(text=b"5 - 1 =")]
    events = list(inference.Generate(stubs.sfumato.Request(prompt=prompts, seed=3, max_tokens=12, stop=[b"\n"])))
    assert sorted(e.index for e in events) == [0, 1]
    for event in events:
        assert event.finish.whole.text == whole["choices"][event.index]["text"]
        assert (event.finish.stop_text or None) == whole["choices"][event.index]["stop_reason"]


def test_shared_thinking(server, stubs, inference):
    request = question(stubs, problems(1)[0], n=3, seed=2, max_tokens=60,
                       soft_thinking=stubs.sfumato.SoftThinking(share_thinking=True))
    events = list(inference.Chat(request))
    assert len({e.finish.whole.reasoning for e in events}) == 1 and events[0].finish.whole.reasoning
    http = {"messages": [{"role": "user", "content": problems(1)[0]}], "n": 3, "seed": 2, "max_tokens": 60, "soft_thinking": {"share_thinking": True}}
    for event in events:  # every choice reports the one thinking
        info = server.post("/v1/chat/completions", http)[1]["choices"][event.index]["sfumato"]
        assert event.finish.info.soft_steps == info["soft_steps"] > 0
        assert event.finish.info.mean_entropy == pytest.approx(info["mean_entropy"], rel=1e-8)


def test_tokens(server, stubs, inference):
    for body, request in (
        ({"prompt": "Soft thinking 42"}, stubs.sfumato.TokenizeRequest(prompt=b"Soft thinking 42")),
        ({"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True},
         stubs.sfumato.TokenizeRequest(messages=[stubs.sfumato.Message(role=b"user", content=b"hi")])),
    ):
        _, http = server.post("/tokenize", body)
        mine = inference.Tokenize(request)
        assert list(mine.tokens) == http["tokens"]
        assert (mine.count, mine.max_model_len) == (http["count"], http["max_model_len"])
    assert inference.Detokenize(stubs.sfumato.DetokenizeRequest(tokens=inference.Tokenize(
        stubs.sfumato.TokenizeRequest(prompt="déjà vu 7".encode(), add_special_tokens=False)).tokens)).prompt == "déjà vu 7"
    # "<|assistant|>" (id 2) is 13 bytes of text for one of a message: at most 4 x 65536 of them
    assert inference.Detokenize(stubs.sfumato.DetokenizeRequest(tokens=[2] * 20164)).prompt == "<|assistant|>" * 20164
    code, text = code_of(lambda: inference.Detokenize(stubs.sfumato.DetokenizeRequest(tokens=[2] * 20165)))
    assert code == Code.INVALID_ARGUMENT and "262144" in text
    pieces = inference.Tokenize(stubs.sfumato.TokenizeRequest(prompt=b"12 + 30", return_token_strs=True))
    assert b"".join(pieces.token_strs) == b"12 + 30"


def test_model_and_load(server, stubs, inference):
    _, models = server.get("/v1/models")
    info = inference.ModelInfo(stubs.sfumato.ModelInfoRequest())
    assert info.id == models["data"][0]["id"]
    assert info.max_model_len == models["data"][0]["max_model_len"]
    assert info.think_close == models["data"][0]["sfumato"]["think_close"]
    assert list(info.modes) == models["data"][0]["sfumato"]["modes"]
    told, defaults = info.defaults, models["data"][0]["sfumato"]["defaults"]
    assert told.mode == b"soft" and told.max_topk == 10
    for name in ("mode", "start", "on_eos", "compat", "share_thinking", "return_trace", "max_topk", "top_k"):
        value = getattr(told, name)
        assert (value.decode() if isinstance(value, bytes) else value) == defaults[name], name
    assert not told.HasField("close_text") and defaults["close_text"] is None
    load = inference.Load(stubs.sfumato.LoadRequest())
    assert load.state == "ok" and load.running_max == 16 and load.tokens_max > 0


# ---- refusals ----


def test_refusals(stubs, inference, channel):
    ask = lambda **fields: code_of(lambda: list(inference.Chat(question(stubs, "2+2=", **fields))))  # noqa: E731
    code, text = ask(temperature=7)
    assert code == Code.INVALID_ARGUMENT and "temperature" in text
    code, text = ask(soft_thinking=stubs.sfumato.SoftThinking(max_topk=65))
    assert code == Code.INVALID_ARGUMENT and "max_topk" in text
    assert ask(model=b"another")[0] == Code.NOT_FOUND
    code, text = ask(max_tokens=100000)
    assert code == Code.INVALID_ARGUMENT and "maximum context length is 1024" in text
    code, text = ask(n=65)
    assert code == Code.INVALID_ARGUMENT and text.startswith("n ")
    for bytes_in in (b"\xff\xfe", b"a\0b", b"\xed\xa0\x80"):
        request = stubs.sfumato.Request(prompt=[stubs.sfumato.Prompt(text=bytes_in)])
        assert code_of(lambda: list(inference.Generate(request)))[0] == Code.INVALID_ARGUMENT
    assert code_of(lambda: list(inference.Generate(stubs.sfumato.Request())))[0] == Code.INVALID_ARGUMENT
    garbage = channel.unary_stream("/sfumato.v1.Inference/Chat")
    assert code_of(lambda: list(garbage(b"\xff\xff\xff")))[0] == Code.INVALID_ARGUMENT
    unknown = channel.unary_unary("/sfumato.v1.Inference/Imagine")
    assert code_of(lambda: unknown(b""))[0] == Code.UNIMPLEMENTED


def test_widths(stubs, inference, engine):
    """As in HTTP (test_serve_contract.py): top_k up to the 768 ids of the vocabulary, max_topk up to 64."""
    s, v = stubs.sfumato, stubs.vllm_engine
    thinking = s.SoftThinking
    for width, fine in [(-1, True), (0, True), (1, True), (768, True), (769, False), (4194304, False), (2**31 - 1, False), (-2, False)]:
        for fields in ({"top_k": width}, {"soft_thinking": thinking(top_k=width)}):
            def call(fields=fields):
                return list(inference.Chat(question(stubs, "Hi", max_tokens=1, **fields)))
            if fine:
                assert call()
            else:
                code, text = code_of(call)
                assert code == Code.INVALID_ARGUMENT and f"top_k is {width}: it must be in -1..768" in text
    for width in (0, 65, 2**31, 2**32 - 1):
        code, text = code_of(lambda: list(inference.Chat(question(stubs, "Hi", max_tokens=1, soft_thinking=thinking(max_topk=width)))))
        assert code == Code.INVALID_ARGUMENT and f"soft_thinking.max_topk is {width}: it must be in 1..64" in text
    for width in (0, 1, 768, 769, 4194305, 2**32 - 1):
        request = v.GenerateRequest(text=b"1", sampling_params=v.SamplingParams(max_tokens=1, top_k=width))
        if width <= 768:
            assert list(engine.Generate(request))
        else:
            assert code_of(lambda: list(engine.Generate(request)))[0] == Code.INVALID_ARGUMENT


def test_message_over_the_cap(stubs, inference):
    code, text = code_of(lambda: list(inference.Chat(question(stubs, "x" * 70000))))
    assert code == Code.RESOURCE_EXHAUSTED and "65536" in text
    huge = question(stubs, "x" * 3_000_000)  # still being sent when it is refused
    assert code_of(lambda: list(inference.Chat(huge)))[0] == Code.RESOURCE_EXHAUSTED


def test_compressed_is_refused(server, stubs):
    with grpc.insecure_channel(server.grpc, compression=grpc.Compression.Gzip) as zipped:
        stub = stubs.sfumato_grpc.InferenceStub(zipped)
        assert code_of(lambda: list(stub.Chat(question(stubs, "2 " * 500))))[0] == Code.UNIMPLEMENTED


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_other_protocols_on_the_port(server):
    host, port = server.grpc.split(":")
    url = f"http://{server.grpc}/sfumato.v1.Inference/Load"
    ask = lambda *flags: subprocess.run(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "10", *flags, url],  # noqa: E731
                                        capture_output=True, text=True)
    assert ask("--http2-prior-knowledge", "-d", "{}").stdout == "415"
    assert ask("--http2-prior-knowledge").stdout == "405"
    assert ask("--http1.1").stdout in ("000", "")  # no HTTP/2 preface: closed
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"\0" * 100)
        while raw.recv(4096):
            pass


def test_request_ids(stubs, inference):
    call = inference.Chat(question(stubs, "2+2=", max_tokens=4), metadata=(("x-request-id", "mine-1.a_b"),))
    assert {e.request_id for e in call} == {"mine-1.a_b"}
    assert dict(call.initial_metadata())["x-request-id"] == "mine-1.a_b"
    call = inference.Chat(question(stubs, "2+2=", max_tokens=4), metadata=(("x-request-id", "not valid!"),))
    assert all(re.fullmatch("[0-9a-f]{32}", e.request_id) for e in call)


def test_full_queue(server, stubs, inference):
    held = [inference.Chat(endless(stubs, n=64)) for _ in range(4)]  # 256 of 16 + 256 sequences
    load, end = None, time.monotonic() + 20
    while (not load or load.running + load.waiting < 256) and time.monotonic() < end:
        load = inference.Load(stubs.sfumato.LoadRequest())
    assert code_of(lambda: list(inference.Chat(endless(stubs, n=64))))[0] == Code.RESOURCE_EXHAUSTED
    for call in held:
        call.cancel()
    assert idle(server)


# ---- cancel, deadline, abort ----


def endless(stubs, **fields):
    return question(stubs, "count", ignore_eos=True, stream=True,
                    soft_thinking=stubs.sfumato.SoftThinking(cold_stop=stubs.sfumato.ColdStop(off=True)), **fields)


def test_cancel_frees_the_sequence(server, stubs, inference):
    """R9 over RST_STREAM: in the queue, the prompt, thinking and the answer; streams and whole replies."""
    pick = random.Random(9)

    def run(seed):
        stream = pick.random() < 0.7
        request = endless(stubs, seed=seed, n=pick.randint(1, 4))
        request.stream = stream
        call = inference.Chat(request)
        for _ in range(pick.choice((0, 1, 5, 200)) if stream else 0):
            next(call)
        time.sleep(pick.random() * 0.02)
        call.cancel()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(100)))
    assert idle(server)


def test_deadline(server, stubs, inference):
    code, _ = code_of(lambda: list(inference.Chat(endless(stubs, n=16), timeout=0.15)))
    assert code == Code.DEADLINE_EXCEEDED
    assert idle(server)


def test_server_side_deadline(server, stubs, inference):
    code, text = code_of(lambda: list(inference.Chat(endless(stubs, n=16, timeout_s=0.1))))
    assert code == Code.DEADLINE_EXCEEDED and "time limit" in text
    assert idle(server)


def test_abort(server, stubs, inference):
    call = inference.Chat(endless(stubs, n=16), metadata=(("x-request-id", "to-abort"),))
    next(call)
    assert inference.Abort(stubs.sfumato.AbortRequest(request_id=b"to-abort")).found
    assert code_of(lambda: list(call))[0] == Code.CANCELLED
    assert not inference.Abort(stubs.sfumato.AbortRequest(request_id=b"to-abort")).found
    assert idle(server)


# ---- many streams ----


def test_200_streams_while_one_reader_stalls(server, stubs):
    fixed = (("grpc.http2.bdp_probe", 0),)  # a window of 64 KiB that does not grow with the link
    with grpc.insecure_channel(server.grpc, options=fixed) as channel:
        check_200_streams(server, stubs, stubs.sfumato_grpc.InferenceStub(channel))


def check_200_streams(server, stubs, inference):
    trace = stubs.sfumato.SoftThinking(cold_stop=stubs.sfumato.ColdStop(off=True), return_trace=64, top_k=0, top_p=1.0,
                                       max_topk=64, temperature=2.0)
    stalled = inference.Chat(question(stubs, "count", ignore_eos=True, stream=True, logprobs=True, top_logprobs=20,
                                      n=4, soft_thinking=trace))  # runs from here, and nobody reads it
    text = problems(4)

    def run(i):
        return joined(inference.Chat(question(stubs, text[i % 4], seed=i % 4, max_tokens=16, stream=True)))[0][:3]

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        results = list(pool.map(run, range(200)))
    alone = [run(i) for i in range(4)]
    assert all(results[i] == alone[i % 4] for i in range(200))
    end = time.monotonic() + 60
    while metric(server, r"slow_reader_cancels_total\{[^}]*\}") == 0 and time.monotonic() < end:
        time.sleep(0.1)
    assert code_of(lambda: list(stalled))[0] == Code.RESOURCE_EXHAUSTED  # over --stream-buffer
    assert idle(server)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_reader_that_keeps_up_is_not_slow(stubs, protocol):
    """Each step makes many times --stream-buffer at once, more than a window of HTTP/2 takes: who reads it gets all."""
    fields = {"seed": 1, "n": 24, "max_tokens": 20, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
    thinking = {"return_trace": 64, "top_k": 0, "top_p": 1.0, "max_topk": 64, "temperature": 2.0}
    with Server("--stream-buffer", "4096", "--max-num-seqs", "24") as server:
        if protocol == "grpc":
            trace = stubs.sfumato.SoftThinking(cold_stop=stubs.sfumato.ColdStop(off=True), **thinking)
            with grpc.insecure_channel(server.grpc, options=(("grpc.http2.bdp_probe", 0),)) as channel:
                events = stubs.sfumato_grpc.InferenceStub(channel).Chat(question(stubs, "count", soft_thinking=trace, **fields))
                assert [len(ids) for ids, *_ in joined(events).values()] == [20] * 24
        else:
            body = {"messages": [{"role": "user", "content": "count"}], **fields, "soft_thinking": {"cold_stop": False, **thinking}}
            events = server.stream("/v1/chat/completions", body)
            assert events[-1] == "[DONE]"
            assert sum(len(c["sfumato"].get("trace", [])) for e in events[:-1] for c in e["choices"] if "sfumato" in c) == 24 * 20
        assert server.metrics()["sfumato:slow_reader_cancels_total"] == 0


# ---- vllm.grpc.engine ----


def test_vllm_generate_is_the_http_completion(server, stubs, engine):
    v = stubs.vllm_engine
    prompt = "7 + 8 ="
    _, tokens = server.post("/tokenize", {"prompt": prompt})
    fields = {"temperature": 0.5, "top_k": 20, "max_tokens": 16, "seed": 9}
    _, http = server.post("/v1/completions", {"prompt": prompt, **fields, "top_p": 1, "min_p": 0, "logprobs": 2,
                                              "soft_thinking": {"return_trace": 1}})
    want = [r["id"] for r in http["choices"][0]["sfumato"]["trace"]]
    params = v.SamplingParams(**fields, logprobs=2)
    ids = v.TokenizedInput(original_text=b"not read", input_ids=tokens["tokens"])
    for request in (v.GenerateRequest(tokenized=ids, sampling_params=params),
                    v.GenerateRequest(text=prompt.encode(), sampling_params=params),
                    v.GenerateRequest(tokenized=ids, sampling_params=params, stream=True)):
        *chunks, last = [m for m in engine.Generate(request)]
        assert list(last.complete.output_ids) == want
        assert last.complete.finish_reason == http["choices"][0]["finish_reason"]
        assert last.complete.prompt_tokens == http["usage"]["prompt_tokens"]
        assert last.complete.completion_tokens == len(want)
        lp = last.complete.output_logprobs
        assert list(lp.token_ids) == want and len(lp.top_logprobs[0].values) == 2
        assert ["%.9g" % x for x in lp.token_logprobs] == ["%.9g" % x for x in http["choices"][0]["logprobs"]["token_logprobs"]]
        if request.stream:
            assert [i for m in chunks for i in m.chunk.token_ids] == want
            assert [m.chunk.completion_tokens for m in chunks] == list(range(1, len(want) + 1))
        else:
            assert not chunks


def test_vllm_max_tokens_left_out_is_what_fits(server, stubs, engine):
    v = stubs.vllm_engine
    params = v.SamplingParams(ignore_eos=True, temperature=0)
    (m,) = engine.Generate(v.GenerateRequest(text=b"1", sampling_params=params))
    assert m.complete.finish_reason == "length"
    assert m.complete.prompt_tokens + m.complete.completion_tokens == 1024


def test_vllm_refuses_what_it_lacks(stubs, engine, channel):
    v = stubs.vllm_engine
    raw = channel.unary_stream("/vllm.grpc.engine.VllmEngine/Generate")
    base = v.GenerateRequest(text=b"1", sampling_params=v.SamplingParams(max_tokens=1)).SerializeToString()
    assert list(raw(base))
    for field in (6, 7, 10, 11):  # a message of no bytes
        assert code_of(lambda: list(raw(base + bytes([field << 3 | 2, 0]))))[0] == Code.INVALID_ARGUMENT
    assert code_of(lambda: list(raw(base + b"\x48\x01")))[0] == Code.INVALID_ARGUMENT  # data_parallel_rank 1
    assert list(raw(base + b"\x48\x00"))
    json_schema = b"\x1a\x011\x22\x06\x82\x01\x03{} "  # text "1", sampling_params {16: "{} "}
    code, text = code_of(lambda: list(raw(json_schema)))
    assert code == Code.UNIMPLEMENTED and "structured" in text
    params = v.SamplingParams(prompt_logprobs=1)
    assert code_of(lambda: list(engine.Generate(v.GenerateRequest(text=b"1", sampling_params=params))))[0] == Code.UNIMPLEMENTED
    for name in (b"chat:1", b"a b", b"a\0b", b"x" * 129, "é".encode()):  # Abort could not find it
        code, text = code_of(lambda: list(engine.Generate(v.GenerateRequest(request_id=name, text=b"1"))))
        assert code == Code.INVALID_ARGUMENT and "request_id" in text
    longest = v.GenerateRequest(request_id=b"x" * 128, text=b"1", sampling_params=v.SamplingParams(max_tokens=1))
    assert dict(engine.Generate(longest).initial_metadata())["x-request-id"] == "x" * 128
    for name in ("Embed", "GetTokenizer", "SubscribeKvEvents"):
        assert code_of(lambda: channel.unary_unary(f"/vllm.grpc.engine.VllmEngine/{name}")(b""))[0] == Code.UNIMPLEMENTED


def test_vllm_small_methods(server, stubs, engine):
    v = stubs.vllm_engine
    assert engine.HealthCheck(v.HealthCheckRequest()).healthy
    info = engine.GetModelInfo(v.GetModelInfoRequest())
    assert info.is_generation and info.max_context_length == 1024 and info.served_model_name == "tiny"
    assert engine.GetServerInfo(v.GetServerInfoRequest()).server_type == "vllm-grpc"
    (load,) = engine.GetLoads(v.GetLoadsRequest()).loads
    assert load.max_running_requests == 16 and load.max_total_num_tokens > 0
    params = v.SamplingParams(ignore_eos=True, n=16)
    call = engine.Generate(v.GenerateRequest(request_id=b"router-1", text=b"1", sampling_params=params, stream=True))
    next(call)
    code, text = code_of(lambda: engine.Abort(v.AbortRequest(request_ids=[b"router-1"] + [b"x"] * 4096)))
    assert code == Code.INVALID_ARGUMENT and "4097" in text and "4096" in text
    engine.Abort(v.AbortRequest(request_ids=[b"nobody", b"router-1", b"x" * 500] + [b"x"] * 4093))
    assert code_of(lambda: list(call))[0] == Code.CANCELLED
    assert idle(server)


# ---- access, health, drain: servers of their own ----


def test_calls_are_counted(server, stubs, inference, channel):
    def counted(method, code):
        return server.metric(f'grpc_requests_total{{method="{method}",code="{code}"}}')

    def grown(method, code, action):
        before = counted(method, code)
        action()
        end = time.monotonic() + 10
        while counted(method, code) == before and time.monotonic() < end:
            time.sleep(0.02)
        return counted(method, code) - before

    request = stubs.sfumato.TokenizeRequest
    assert grown("sfumato.v1.Inference/Tokenize", "OK", lambda: inference.Tokenize(request(prompt=b"x"))) == 1
    assert grown("sfumato.v1.Inference/Tokenize", "INVALID_ARGUMENT",
                 lambda: pytest.raises(grpc.RpcError, inference.Tokenize, request())) == 1
    assert grown("other", "UNIMPLEMENTED", lambda: pytest.raises(grpc.RpcError, channel.unary_unary("/no.Such/Thing"), b"")) == 1

    def look_and_leave():
        watch = stubs.health_grpc.HealthStub(channel).Watch(stubs.health.HealthCheckRequest())
        next(watch)
        watch.cancel()

    assert grown("grpc.health.v1.Health/Watch", "CANCELLED", look_and_leave) == 1
    assert grown("grpc.health.v1.Health/Check", "OK",
                 lambda: stubs.health_grpc.HealthStub(channel).Check(stubs.health.HealthCheckRequest())) == 1


def test_keys(stubs):
    with Server("--api-key", "secret") as locked, grpc.insecure_channel(locked.grpc) as channel:
        stub = stubs.sfumato_grpc.InferenceStub(channel)
        load = lambda *pairs: stub.Load(stubs.sfumato.LoadRequest(), metadata=pairs)  # noqa: E731
        assert code_of(load)[0] == Code.UNAUTHENTICATED
        assert code_of(lambda: load(("authorization", "Bearer wrong")))[0] == Code.UNAUTHENTICATED
        assert load(("authorization", "Bearer secret")).state == "ok"
        health = stubs.health_grpc.HealthStub(channel)
        assert health.Check(stubs.health.HealthCheckRequest()).status == stubs.health.HealthCheckResponse.SERVING


def test_host_rule(server, stubs):
    with grpc.insecure_channel(server.grpc, options=(("grpc.default_authority", "evil.example"),)) as channel:
        stub = stubs.sfumato_grpc.InferenceStub(channel)
        assert code_of(lambda: stub.Load(stubs.sfumato.LoadRequest()))[0] == Code.PERMISSION_DENIED


def test_health(stubs, channel):
    health, Reply = stubs.health_grpc.HealthStub(channel), stubs.health.HealthCheckResponse
    for name in ("", "sfumato.v1.Inference", "vllm.grpc.engine.VllmEngine", "grpc.health.v1.Health"):
        assert health.Check(stubs.health.HealthCheckRequest(service=name)).status == Reply.SERVING
    unknown = stubs.health.HealthCheckRequest(service="another")
    assert code_of(lambda: health.Check(unknown))[0] == Code.NOT_FOUND
    code, text = code_of(lambda: health.Check(stubs.health.HealthCheckRequest(service="x" * 5000)))
    assert code == Code.RESOURCE_EXHAUSTED and "4096" in text  # whoever has no key may not hold memory
    watch = health.Watch(unknown)
    assert next(watch).status == Reply.SERVICE_UNKNOWN
    assert watch.is_active()
    watch.cancel()
    assert code_of(lambda: list(health.Watch(stubs.health.HealthCheckRequest(), timeout=0.5)))[0] == Code.DEADLINE_EXCEEDED


def test_refused_while_loading(stubs):
    """Counted and logged, whatever the method that generates."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
    server = Server("--port", ports[0], "--grpc-port", ports[1], wait=False, env={"SFUMATO_FAULT": "load-delay:0:500"})
    try:
        with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
            v = stubs.vllm_engine
            sent = stubs.vllm_engine_grpc.VllmEngineStub(channel).Generate(v.GenerateRequest(request_id=b"early-1", text=b"1"), wait_for_ready=True)
            assert code_of(lambda: list(sent))[0] == Code.UNAVAILABLE
            sent = stubs.sfumato_grpc.InferenceStub(channel).Chat(question(stubs, "1"), metadata=(("x-request-id", "early-2"),))
            assert code_of(lambda: list(sent))[0] == Code.UNAVAILABLE
        server.port = ports[0]
        assert server.metric('admission_rejections_total{reason="loading"}') == 2
        for name in ("early-1", "early-2"):
            server.wait_line(name)
    finally:
        server.kill()


def test_health_from_loading_to_drain(stubs):
    """NOT_SERVING, SERVING, NOT_SERVING; what runs completes, what is new is refused, exit 0."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["mpirun", "-n", "2", str(BINARY), "serve", "--model", str(TINY), "--port", "0", "--grpc-port", str(port),
               "--shutdown-timeout", "200"]  # a slow machine is not what is tested
    process = subprocess.Popen(command, env={**os.environ, **MPI}, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen, done = [], threading.Event()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.initial_reconnect_backoff_ms", 20), ("grpc.min_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 20))) as channel:
            health, Reply = stubs.health_grpc.HealthStub(channel), stubs.health.HealthCheckResponse

            def watch():
                try:
                    for reply in health.Watch(stubs.health.HealthCheckRequest(), wait_for_ready=True):
                        seen.append(reply.status)
                        done.set()
                except grpc.RpcError:
                    pass

            watcher = threading.Thread(target=watch)
            watcher.start()
            end = time.monotonic() + 60
            while Reply.SERVING not in seen and time.monotonic() < end:
                time.sleep(0.02)
            stub = stubs.sfumato_grpc.InferenceStub(channel)
            running = stub.Chat(endless(stubs, n=8))
            next(running)
            process.send_signal(signal.SIGUSR1)
            while seen[-1] != Reply.NOT_SERVING and time.monotonic() < end:
                time.sleep(0.02)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as late:
                refused = code_of(lambda: list(stubs.sfumato_grpc.InferenceStub(late).Chat(endless(stubs))))
            finishes = [e.finish.finish_reason for e in running if e.HasField("finish")]
            assert finishes == ["length"] * 8
            assert process.wait(60) == 0
            watcher.join(30)
            assert refused[0] == Code.UNAVAILABLE
            assert seen in ([Reply.NOT_SERVING, Reply.SERVING, Reply.NOT_SERVING], [Reply.SERVING, Reply.NOT_SERVING])
    finally:
        process.kill()
        process.wait()

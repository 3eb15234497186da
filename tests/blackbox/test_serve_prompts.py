"""Long texts are tokenised beside the event loop: they hold up nobody, and come out as short ones do."""
import json
import subprocess
import time

import pytest
from conftest import TINY
from places import BINARY
from served import Background, BothServer

SENTENCE = "Tom has 3 pens, and Mia buys 41 more; how many are there? "
LONG = SENTENCE * 400  # 23 kB: more than is tokenised on the loop
HUGE = SENTENCE * 120_000  # 7 MB


@pytest.fixture(scope="module")
def server():
    with BothServer("--max-num-queued-reqs", "64", "--max-num-seqs", "16") as running:
        yield running


@pytest.fixture(scope="module")
def ids():
    """Of LONG, by the command."""
    done = subprocess.run([BINARY, "tokenize", "--model", TINY], input=json.dumps({"text": LONG}).encode(), capture_output=True, check=True)
    return json.loads(done.stdout)["ids"]


def test_a_huge_text_holds_up_nobody(server):
    """A probe beside it takes a fraction of its time. The rest of it (reading 7 MB of JSON, writing the ids) is on the loop."""
    for _ in range(3):  # a busy machine may spoil one
        begin = time.monotonic()
        huge = Background(server.call, "POST", "/tokenize", {"prompt": HUGE})
        longest = answered = 0
        while huge.answer is None:
            at = time.monotonic()
            assert server.get("/health") == (200, {"status": "ok"})
            longest = max(longest, time.monotonic() - at)
            answered += 1
            time.sleep(0.005)
        whole = time.monotonic() - begin
        status, _, answer = huge.answer
        assert status == 200 and json.loads(answer)["count"] > 1_000_000
        if longest < whole / 3:
            return
    raise AssertionError((longest, whole, answered))


def test_tokenize(server, ids):
    status, answer = server.post("/tokenize", {"prompt": LONG, "return_token_strs": True})
    assert status == 200 and answer["tokens"] == ids and answer["count"] == len(ids)
    assert "".join(answer["token_strs"]) == LONG
    assert server.post("/detokenize", {"tokens": ids}) == (200, {"prompt": LONG})


def test_too_long_for_the_context(server, ids):
    steps = server.steps()
    for more in ({}, {"stream": True}, {"max_tokens": 5}):
        status, answer = server.post("/v1/completions", {"prompt": LONG, **more})
        error = answer["error"]
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (len(ids), 1024)
        assert f"{len(ids) + more.get('max_tokens', 1)} tokens" in error["message"]
    server.settle()
    assert server.steps() == steps  # R5: no engine step


@pytest.mark.parametrize("more", [{"max_tokens": 12}, {"max_tokens": 3, "logprobs": 2}, {"max_tokens": 0}, {"max_tokens": 0, "logprobs": 1}])
def test_echo_of_a_truncated_text(server, ids, more):
    """The same as the last ids of it, sent as ids."""
    fields = {"echo": True, "seed": 4, "temperature": 0, **more}
    text = server.complete(LONG, truncate_prompt_tokens=100, **fields)
    plain = server.complete(ids[-100:], **fields)
    assert text["choices"] == plain["choices"] and text["usage"]["prompt_tokens"] == 100
    assert text["choices"][0]["text"].startswith(server.post("/detokenize", {"tokens": ids[-100:]})[1]["prompt"])


def test_many_prompts(server):
    """Together long, each on its own short: every choice is the one of its prompt alone."""
    prompts = [f"{i} " + SENTENCE * 12 for i in range(16)]
    fields = {"seed": 2, "max_tokens": 10, "n": 2, "echo": True}
    together = server.complete(prompts, **fields)["choices"]
    alone = [c for p in prompts for c in server.complete(p, **fields)["choices"]]
    assert [c["text"] for c in together] == [c["text"] for c in alone]
    assert [c["index"] for c in together] == list(range(32))


def test_gone_and_late(server):
    """Whoever leaves while the text is tokenised, or has no time for it, leaves nothing behind."""
    before = server.metric('request_success_total{finished_reason="abort"}')
    gone = [server.connect() for _ in range(3)]
    for c, path in zip(gone, ["/v1/completions", "/v1/completions", "/tokenize"]):
        c.request("POST", path, json.dumps({"prompt": HUGE}), {"Content-Type": "application/json"})
    status, answer = server.post("/v1/completions", {"prompt": HUGE, "timeout_s": 0.01})
    assert (status, answer["error"]["code"]) == (504, "timeout")
    for c in gone:
        c.close()
    server.settle()
    assert server.metric('request_success_total{finished_reason="abort"}') >= before
    assert server.complete("x", max_tokens=1)["choices"]


def test_grpc(server, ids):
    grpc = pytest.importorskip("grpc")
    text = LONG.encode()
    field = bytes([0x0A, len(text) & 127 | 128, len(text) >> 7 & 127 | 128, len(text) >> 14])  # prompt = 1
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/sfumato.v1.Inference/Tokenize")
        answer = call(field + text, timeout=30)
        count = answer[1] & 127 | (answer[2] & 127) << 7  # count = 1
        assert answer[0] == 0x08 and count == len(ids)
        generate = channel.unary_stream("/vllm.grpc.engine.VllmEngine/Generate")
        for length, code in ((400, grpc.StatusCode.INVALID_ARGUMENT), (1, None)):
            text = (SENTENCE * length).encode()
            size = bytes([len(text) & 127 | 128, len(text) >> 7 & 127 | 128, len(text) >> 14])
            try:  # GenerateRequest{text = 3}; max_tokens left out: what fits
                assert list(generate(b"\x1a" + size + text, timeout=30)) and code is None
            except grpc.RpcError as error:
                assert error.code() == code and "1024" in error.details()

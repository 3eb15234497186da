"""A chat template is a program of somebody else's. A slow one holds up nobody but those who wait for a template."""
import json
import shutil
import subprocess
import time

import pytest
from conftest import TINY, chat
from served import Background, Server, joined

# {"slow": N}: N rounds of a loop that takes 0.1 to 0.3 s a round; the render is killed after 5 s
SLOW = "{% for i in range(8 * slow | default(0)) %}{% for j in range(90000) %}{% set x = i * j %}{% endfor %}{% endfor %}"
ENDLESS = {"slow": 10000}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow-model")
    for file in TINY.iterdir():
        if file.is_file() and file.name != "tokenizer_config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config["chat_template"] = SLOW + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(model):
    with Server("--served-model-name", "tiny", "--max-num-queued-reqs", "16", ranks=0, model=model) as running:
        assert running.chat("Hi", max_tokens=1)["choices"]
        yield running


def test_others_go_on(server):
    """While a template runs into its time limit: a stream, probes, completions and the scrape are answered."""
    with server.open_stream("/v1/completions", {"prompt": "1, 2,", "max_tokens": 1000, "ignore_eos": True, "seed": 1}) as events:
        next(events)
        begin = time.monotonic()
        stuck = Background(server.post, "/v1/chat/completions", chat("Hi", max_tokens=1, chat_template_kwargs=ENDLESS))
        behind = Background(server.post, "/v1/chat/completions", chat("Hi", max_tokens=2))  # waits its turn
        time.sleep(0.3)
        longest = answered = 0
        while stuck.answer is None and time.monotonic() - begin < 30:
            at = time.monotonic()
            assert server.get("/health") == (200, {"status": "ok"})
            assert server.complete("x", max_tokens=1)["choices"]
            longest = max(longest, time.monotonic() - at)
            answered += 1
            time.sleep(0.05)
        assert answered > 5 and longest < 3, (answered, longest)
        assert sum(1 for _ in events) > 900
    stuck.join(30)
    behind.join(30)
    assert stuck.answer[0] == 400 and "more than 5 seconds" in stuck.answer[1]["error"]["message"]
    assert stuck.answer[1]["error"]["param"] == "messages"
    assert behind.answer[0] == 200, behind.answer
    server.settle()


def test_cancel_and_deadline_while_parked(server):
    before = server.metric('request_success_total{finished_reason="abort"}')
    slow = Background(server.post, "/v1/chat/completions", chat("Hi", max_tokens=1, chat_template_kwargs=ENDLESS))
    time.sleep(0.3)
    gone = [server.connect() for _ in range(4)]  # they leave while they wait for the template before
    for c, path in zip(gone, ["/v1/chat/completions", "/v1/chat/completions", "/tokenize", "/apply-template"]):
        c.request("POST", path, json.dumps(chat("Hi")), {"Content-Type": "application/json"})
    status, answer = server.post("/v1/chat/completions", chat("Hi", timeout_s=0.1))
    assert (status, answer["error"]["code"]) == (504, "timeout")
    for c in gone:
        c.close()
    slow.join(30)
    assert slow.answer[0] == 400
    server.settle()
    assert server.metric('request_success_total{finished_reason="abort"}') - before == 3
    assert server.chat("Hi", max_tokens=1)["choices"]


def test_R9_a_render_ends_with_its_client(server):
    """Whoever leaves while its template runs takes the work along: five of them would hold up others for 25 s."""
    endless = chat("Hi", max_tokens=1, chat_template_kwargs=ENDLESS)
    begin = time.monotonic()
    for path in ["/v1/chat/completions", "/tokenize", "/apply-template", None, "/v1/chat/completions"]:
        if path:
            client = server.connect()
            client.request("POST", path, json.dumps(endless), {"Content-Type": "application/json"})
            time.sleep(0.3)  # it runs: nobody else is there
            crowd = [server.connect() for _ in range(30)]  # these come and go before their turn
            for c in crowd:
                c.request("POST", path, json.dumps(endless), {"Content-Type": "application/json"})
            for c in [client, *crowd]:
                c.close()
        else:
            status, answer = server.post("/v1/chat/completions", {**endless, "timeout_s": 0.3})
            assert (status, answer["error"]["code"]) == (504, "timeout")
        assert server.chat("Hi", max_tokens=1)["choices"]
    assert time.monotonic() - begin < 15
    server.settle()


def test_parked_requests_are_counted(server):
    """The queue is bounded: 32 + 16 sequences, parked ones included; nothing is lost, order is kept."""
    slow = Background(server.post, "/v1/chat/completions", chat("Hi", max_tokens=1, chat_template_kwargs=ENDLESS))
    time.sleep(0.3)
    many = [Background(server.post, "/v1/chat/completions", chat("Hi", max_tokens=1, n=4)) for _ in range(14)]
    for m in [slow, *many]:
        m.join(60)
    statuses = sorted(m.answer[0] for m in many)
    assert slow.answer[0] == 400 and statuses == [200] * 11 + [503] * 3  # 1 + 4 * 11 = 45 of 48
    refused = next(m for m in many if m.answer[0] == 503)
    assert refused.answer[1]["error"]["code"] == "server_overloaded"
    server.settle()


def test_the_queue_of_templates_is_bounded(server):
    """Also for routes that hold no sequence: 48 wait, one of which runs, and no more."""
    slow = Background(server.post, "/tokenize", chat("Hi", chat_template_kwargs=ENDLESS))
    time.sleep(0.3)
    many = [Background(server.call, "POST", path, chat("Hi")) for path in ("/tokenize", "/apply-template") for _ in range(26)]
    for m in [slow, *many]:
        m.join(60)
    assert slow.answer[0] == 400 and sorted(m.answer[0] for m in many) == [200] * 47 + [503] * 5
    for _, headers, body in (m.answer for m in many if m.answer[0] == 503):
        assert json.loads(body)["error"]["code"] == "server_overloaded" and int(headers["retry-after"]) >= 1


def test_replies_are_the_same(server):
    body = chat("Tom has 3 pens. Tom buys 4 more. How many pens does Tom have now?", seed=3, max_tokens=80)
    texts = {json.dumps(server.post("/v1/chat/completions", {**body, "chat_template_kwargs": {"slow": n}})[1]["choices"])
             for n in (0, 1, 2)}
    assert len(texts) == 1
    events = server.stream("/v1/chat/completions", {**body, "chat_template_kwargs": {"slow": 1}})
    assert joined(events) == json.loads(texts.pop())[0]["message"]["content"]


def test_errors_found_after_rendering(server):
    status, answer = server.post("/v1/chat/completions", chat("word " * 2000, stream=True))
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["n_prompt_tokens"] > answer["error"]["n_ctx"] == 1024
    status, answer = server.post("/v1/chat/completions", chat("x", chat_template_kwargs={"slow": "many"}))
    assert status == 400 and answer["error"]["param"] == "messages" and "chat template" in answer["error"]["message"]
    server.settle()


def test_a_drain_waits_for_templates(model):
    with Server("--shutdown-timeout", "20", ranks=0, model=model) as one:
        slow = Background(one.post, "/v1/chat/completions", chat("Hi", max_tokens=2, chat_template_kwargs={"slow": 3}))
        time.sleep(0.1)
        behind = Background(one.post, "/tokenize", chat("Hi", chat_template_kwargs={"slow": 3}))
        time.sleep(0.3)
        assert one.call("POST", "/admin/drain", b"")[0] == 202
        for waiting in (slow, behind):
            waiting.join(30)
            assert waiting.answer[0] == 200
        assert one.wait() == 0


def test_an_abort_does_not(model):
    """Leaving does not wait for a template that runs: the second signal ends it."""
    with Server(ranks=0, model=model) as one:
        stuck = Background(one.post, "/v1/chat/completions", chat("Hi", chat_template_kwargs=ENDLESS))
        texts = [Background(one.post, path, chat("Hi", chat_template_kwargs=ENDLESS)) for path in ("/tokenize", "/apply-template")]
        time.sleep(0.3)
        one.process.send_signal(10)
        one.wait_line("draining")
        begin = time.monotonic()
        one.process.send_signal(10)
        assert one.wait() == 1 and time.monotonic() - begin < 3
        for waiting in [stuck, *texts]:
            waiting.join(5)
            assert waiting.answer[0] == 503 and waiting.answer[1]["error"]["code"] == "shutting_down"


def tokenize_request(kwargs=None):
    """The bytes of sfumato.v1.TokenizeRequest{messages, chat_template_kwargs}."""
    message = b"\x0a\x04user\x12\x02Hi"  # Message{role, content}
    text = json.dumps(kwargs).encode() if kwargs else b""
    return b"\x12" + bytes([len(message)]) + message + (b"\x3a" + bytes([len(text)]) + text if text else b"")


def test_grpc_tokenize(model):
    grpc = pytest.importorskip("grpc")
    with Server("--grpc-port", "0", ranks=0, model=model) as one:
        request = tokenize_request()
        slow = Background(one.post, "/v1/chat/completions", chat("Hi", max_tokens=1, chat_template_kwargs={"slow": 6}))
        with grpc.insecure_channel(one.grpc) as channel:
            call = channel.unary_unary("/sfumato.v1.Inference/Tokenize")
            late, end = None, time.monotonic() + 10
            while late is None and time.monotonic() < end:  # on a busy machine the slow one may come after the first of these
                try:
                    call(request, timeout=0.05)
                except grpc.RpcError as error:
                    late = error.code()
            assert late == grpc.StatusCode.DEADLINE_EXCEEDED
            future = call.future(request)
            future.cancel()
            assert len(call(request, timeout=30)) > 3
            endless = tokenize_request(ENDLESS)
            begin = time.monotonic()
            for _ in range(4):  # RST_STREAM stops a render that runs: each would take 5 s
                future = call.future(endless)
                time.sleep(0.3)
                future.cancel()
                assert len(call(request, timeout=30)) > 3
            assert time.monotonic() - begin < 12
        slow.join(30)
        assert slow.answer[0] == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_server_keeps_the_deadline_of_grpc_tokenize(model):
    """Asked by curl, which does not look at grpc-timeout."""
    with Server("--grpc-port", "0", ranks=0, model=model) as one:
        request = tokenize_request(ENDLESS)
        begin = time.monotonic()
        done = subprocess.run(["curl", "-sS", "-i", "--http2-prior-knowledge", "--max-time", "20", "-H", "content-type: application/grpc",
                               "-H", "te: trailers", "-H", "grpc-timeout: 200m", "--data-binary", "@-",
                               f"http://{one.grpc}/sfumato.v1.Inference/Tokenize"],
                              input=b"\0" + len(request).to_bytes(4, "big") + request, capture_output=True)
        assert b"grpc-status: 4\r\n" in done.stdout, done
        assert time.monotonic() - begin < 4  # the template is killed after 5 s


def test_a_drain_waits_for_grpc_tokenize(model):
    grpc = pytest.importorskip("grpc")
    with Server("--grpc-port", "0", ranks=0, model=model) as one, grpc.insecure_channel(one.grpc) as channel:
        slow = channel.unary_unary("/sfumato.v1.Inference/Tokenize").future(tokenize_request({"slow": 4}))
        time.sleep(0.3)
        one.process.send_signal(10)
        assert len(slow.result(30)) > 3 and one.wait() == 0

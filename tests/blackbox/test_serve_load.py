"""R8, R9, R12: back-pressure, cancels, slow readers, limits of connections, many streams at once."""
import concurrent.futures
import json
import os
import random
import signal
import socket
import struct
import threading
import time

import pytest
from conftest import chat, generate, problems
from served import SANITIZED, Server, joined, raw_socket

LONG = {"prompt": "Tom has", "max_tokens": 1000, "ignore_eos": True, "soft_thinking": {"mode": "off"}}


@pytest.fixture(scope="module")
def server():
    with Server("--max-num-queued-reqs", "300") as running:
        yield running


def request_bytes(path, body, **headers):
    text = json.dumps(body).encode()
    head = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}"
        f"Content-Length: {len(text)}\r\n\r\n"
    ).encode() + text


# --- R8 ---


def test_R8_exactly_the_limit_is_admitted():
    with Server("--max-num-seqs", "4", "--max-num-queued-reqs", "6", "--collective-timeout", "60") as server:
        server.complete("Hi", max_tokens=2)
        memory = server.metrics()["process_resident_memory_bytes"]
        follower = server.ranks()[1]
        os.kill(follower, signal.SIGSTOP)
        try:
            jobs = [{"prompt": ["Hi", "Ho"], "n": 2, "max_tokens": 3}, {"prompt": "Hi", "max_tokens": 3}]
            results, lock = [], threading.Lock()

            def one(body):
                answer = server.call("POST", "/v1/completions", body)
                with lock:
                    results.append((len(body["prompt"]) * body["n"] if "n" in body else 1, answer))

            threads = [threading.Thread(target=one, args=(jobs[i % 2],)) for i in range(50)]
            for t in threads:
                t.start()
            end = time.monotonic() + 20
            while time.monotonic() < end and len(results) < 30:
                time.sleep(0.05)
            time.sleep(0.5)
            refused = [(size, a) for size, a in results if a[0] == 503]
            assert len(refused) == len(results)  # nobody else has an answer yet
            for _, (status, headers, body) in refused:
                assert json.loads(body)["error"]["code"] == "server_overloaded"
                assert int(headers["retry-after"]) >= 1
            m = server.metrics()  # a scrape answers while a rank stands still
            assert m["sfumato:num_requests_running"] + m["sfumato:num_requests_waiting"] == 10
            assert SANITIZED or m["process_resident_memory_bytes"] - memory < 10e6
            assert m['sfumato:admission_rejections_total{reason="queue"}'] == len(refused)
        finally:
            os.kill(follower, signal.SIGCONT)
        for t in threads:
            t.join(60)
        admitted = [(size, a) for size, a in results if a[0] == 200]
        assert sum(size for size, _ in admitted) == 10 and len(results) == 50
        for size, (_, _, body) in admitted:
            assert len(json.loads(body)["choices"]) == size
        server.settle()


def test_R8_status_by_flag_and_queued_tokens():
    slow = {"SFUMATO_FAULT": "delay:0:10"}  # or the first reply ends before the third request comes
    with Server("--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--overload-status", "429", ranks=0, env=slow) as server:
        with server.open_stream("/v1/completions", LONG) as events:
            next(events)
            with raw_socket(server) as s:
                s.sendall(request_bytes("/v1/completions", LONG))
                time.sleep(0.1)
                status, headers, body = server.call("POST", "/v1/completions", LONG)
                assert status == 429 and json.loads(body)["error"]["type"] == "overloaded_error"
                assert int(headers["retry-after"]) >= 1


# --- R9 ---


@pytest.mark.parametrize("stream", [True, False])
def test_R9_two_steps_at_most(server, stream):
    """Nothing runs on for a client that has gone; its pages are free at once."""
    before = server.steps()
    with raw_socket(server) as s:
        s.sendall(request_bytes("/v1/completions", {**LONG, "n": 24, "stream": stream}, X_Request_Id=f"gone-{stream}"))
        while server.steps() < before + 20:
            pass
    server.wait_line(f"gone-{stream}")
    at_end = server.steps()
    server.settle(5)
    assert server.steps() <= at_end + 2
    record = [r for r in server.records() if r["request_id"] == f"gone-{stream}"][0]
    assert record["status"] == "disconnected" and record["finish"] == "abort"
    assert 0 < record["answer_tokens"] < 24 * 900


def close_hard(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


def test_R9_random_cancels(server):
    """No page stays behind. The long run has SFUMATO_CANCELS=10000."""
    chance = random.Random(9)
    rejected = 'admission_rejections_total{reason="queue"}'
    before = server.metric(rejected)
    count = int(os.environ.get("SFUMATO_CANCELS", 1000))
    questions = problems(8)
    open_sockets = []
    for i in range(count):
        body = chat(
            chance.choice(questions) * chance.randint(1, 4), max_tokens=chance.randint(20, 300), n=chance.randint(1, 3),
            seed=i, stream=chance.random() < 0.5, ignore_eos=True,
            soft_thinking={"mode": chance.choice(["off", "soft", "gumbel"]), "share_thinking": chance.random() < 0.3},
        )
        while i % 20 == 0 and server.metric("num_requests_running") + server.metric("num_requests_waiting") > 150:
            time.sleep(0.01)  # so that all are admitted: what is refused cannot be cancelled
        s = raw_socket(server)
        s.sendall(request_bytes("/v1/chat/completions", body))
        open_sockets.append(s)
        while len(open_sockets) > chance.randint(1, 40):
            victim = open_sockets.pop(chance.randrange(len(open_sockets)))
            way = chance.randrange(3)
            if way == 0:
                close_hard(victim)
            elif way == 1:
                victim.shutdown(socket.SHUT_WR)
                victim.close()
            else:
                victim.close()
    for s in open_sockets:
        s.close()
    server.settle(60)
    assert server.metric(rejected) == before
    assert server.complete("Hi", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_R9_half_close_counts_as_gone(server):
    with raw_socket(server) as s:
        s.sendall(request_bytes("/v1/completions", {**LONG, "n": 24}, X_Request_Id="half"))
        s.shutdown(socket.SHUT_WR)
        server.wait_line("half", 10)
    assert [r for r in server.records() if r["request_id"] == "half"][0]["status"] == "disconnected"
    server.settle()


def test_requests_sent_ahead(server):
    """A second request on the wire while the first is answered (pipelining) waits for its turn."""
    with raw_socket(server) as s:
        body = {"prompt": "Tom has", "max_tokens": 100, "ignore_eos": True}
        s.sendall(request_bytes("/v1/completions", body) * 3 + request_bytes("/tokenize", {"prompt": "x" * 5000}))
        lines, found = s.makefile("rb"), []
        while len(found) < 4:
            line = lines.readline()
            assert line
            if line.startswith(b"HTTP/1.1 "):
                found.append(line.split()[1])
            elif line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
            elif line == b"\r\n":
                json.loads(lines.read(length))
    assert found == [b"200"] * 4


def test_slow_reader_is_cut():
    with Server("--stream-buffer", "16k", ranks=0) as server:
        body = {**LONG, "n": 24, "stream": True, "logprobs": 20, "soft_thinking": {"mode": "soft", "return_trace": 64}}
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", server.port))
        s.sendall(request_bytes("/v1/completions", body, X_Request_Id="slow"))
        quick = server.complete("Tom", max_tokens=50, ignore_eos=True)  # not held up by the other
        assert quick["usage"]["completion_tokens"] == 50
        server.wait_line('"slow"', 60)
        assert [r for r in server.records() if r["request_id"] == "slow"][0]["status"] == "slow_reader"
        assert server.metric("slow_reader_cancels_total") == 1
        server.settle()
        s.close()


# --- connections ---


def test_limit_of_connections():
    with Server("--max-connections", "10", ranks=0) as server:
        idle = []
        for _ in range(10):
            s = raw_socket(server)
            s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in s.makefile("rb").readline()
            idle.append(s)
        with raw_socket(server) as s:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = s.makefile("rb").read()  # until it is closed
            assert b" 503 " in answer and b"Connection: close" in answer
        for s in idle[:5]:
            s.close()
        time.sleep(0.1)
        assert server.get("/health")[0] == 200
        assert server.metric('admission_rejections_total{reason="connections"}') == 1
        more = [raw_socket(server) for _ in range(200)]  # idle ones count too; then the listener rests
        time.sleep(0.2)
        for s in more + idle[5:]:
            s.close()
        time.sleep(1.5)
        assert server.get("/health")[0] == 200


def test_pings_while_nothing_comes():
    with Server("--sse-ping-interval", "0.2", "--collective-timeout", "60") as server:
        server.complete("Hi", max_tokens=1)
        follower = server.ranks()[1]
        os.kill(follower, signal.SIGSTOP)
        try:
            with raw_socket(server) as s:
                s.sendall(request_bytes("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "stream": True}))
                lines = s.makefile("rb")
                while b"ping" not in (line := lines.readline()):
                    assert line
                assert line == b": ping\r\n" or line == b": ping\n"
                os.kill(follower, signal.SIGCONT)
                while b"[DONE]" not in (line := lines.readline()):
                    assert line
        finally:
            os.kill(follower, signal.SIGCONT)


# --- many at once ---


def test_R12_many_streams_each_as_alone(server):
    """256 streams at once: none lost, none mixed up, each byte for byte what `generate` gives."""
    count = int(os.environ.get("SFUMATO_STREAMS", 256))
    modes = ("off", "soft", "gumbel")
    questions = problems(64)
    bodies = [
        chat(questions[i % 64], seed=i, max_tokens=40, soft_thinking={"mode": modes[i % 3]}) for i in range(count)
    ]
    result = generate(bodies, ranks=2)
    assert result.status == 0
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        streams = list(pool.map(lambda b: server.stream("/v1/chat/completions", b, timeout=120), bodies))
    for want, events in zip(result.lines, streams):
        assert events[-1] == "[DONE]"
        assert joined(events) == want["answer"] and joined(events, "reasoning") == want["thinking"]
    server.settle()


def test_idle_ranks_sleep(server):
    """At most 2 % of a core on every rank while nothing runs."""
    server.settle()

    def ticks(pid):
        with open(f"/proc/{pid}/stat") as f:
            return sum(map(int, f.read().rsplit(")", 1)[1].split()[11:13]))

    ranks = server.ranks()
    assert len(ranks) == 2
    time.sleep(0.5)
    before = [ticks(p) for p in ranks]
    time.sleep(3)
    used = [(ticks(p) - b) / os.sysconf("SC_CLK_TCK") / 3 for p, b in zip(ranks, before)]
    assert max(used) <= 0.02, used

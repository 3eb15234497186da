"""R12, R15: the same request gives the same bytes whatever runs beside it, however it is cut up, on 1, 2 or 4 ranks."""
import concurrent.futures
import json
import os
import random
import threading

import pytest
from conftest import BUILD, chat, problems
from served import Server, raw_socket

COUNT = int(os.environ.get("SFUMATO_SAME", 200))  # each of them alone; half of them in each way


def request(i):
    """Seeded, or at temperature 0; long prompts and short ones; with all that could show a difference."""
    chance = random.Random(1000 + i)
    questions = problems(40)
    text = " ".join(chance.sample(questions, chance.choice([1, 1, 1, 4])))
    soft = {"mode": chance.choice(["off", "soft", "gumbel", "dirichlet"]), "max_topk": chance.choice([4, 10, 33]), "return_trace": True}
    fields = {"max_tokens": chance.randint(4, 24), "logprobs": True, "top_logprobs": 3}
    if chance.random() < 0.3:
        fields |= {"temperature": 0}
        soft |= {"temperature": 0, "mode": chance.choice(["off", "soft"])}
    else:
        fields |= {"seed": i}
    if chance.random() < 0.3:
        fields |= {"repetition_penalty": 1.3, "presence_penalty": 0.2}
    if chance.random() < 0.2:
        fields |= {"n": 2}
    return chat(text, **fields, soft_thinking=soft)


def ask(server, i):
    """All that must not change: texts, ids, weights, logprobs, ends, counts."""
    status, answer = server.post("/v1/chat/completions", request(i), timeout=120)
    assert status == 200, answer
    for choice in answer["choices"]:
        choice["sfumato"].pop("seed", None)  # of a request without one: chosen by the server
    usage = {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}  # pages found are chance
    return json.dumps([answer["choices"], usage, answer["system_fingerprint"]])


class Noise(threading.Thread):
    """Other people's requests: unseeded, some of them abandoned."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.ended = server, threading.Event()
        self.start()

    def run(self):
        chance = random.Random(0)
        while not self.ended.is_set():
            body = json.dumps(chat("word " * chance.randint(1, 200), max_tokens=chance.randint(1, 60), n=chance.randint(1, 3))).encode()
            with raw_socket(self.server) as s:
                s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                          b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                s.settimeout(chance.choice([0.01, 0.1, 10]))
                try:
                    while s.recv(65536) and not self.ended.is_set():
                        pass
                except TimeoutError:
                    pass


@pytest.fixture(scope="module")
def alone():
    """Each by itself, one after the other."""
    with Server("--prefix-cache", "off", ranks=0) as server:
        return [ask(server, i) for i in range(COUNT)]


SMALL = ("--max-num-seqs", "16", "--max-num-batched-tokens", "16")
WAYS = {
    "chunk 16": (1, (*SMALL, "--prefix-cache", "off"), None),
    "chunk 4096, evicted, 2 ranks": (2, ("--max-num-batched-tokens", "4096", "--kv-memory", "3m"), "preempt:0:5"),
    "chunk 16, cached, evicted, 4 ranks": (4, SMALL, "preempt:0:23"),
    "messages between 2 ranks": (2, ("--comm", "mpi", "--prefix-cache", "off"), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_R12_same_bytes(alone, way):
    ranks, flags, fault = WAYS[way]
    order = random.Random(way).sample(range(COUNT), COUNT // 2)
    with Server(*flags, ranks=ranks, env={"SFUMATO_FAULT": fault} if fault else None) as server:
        noise = Noise(server)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            got = list(pool.map(lambda i: ask(server, i), order))
        noise.ended.set()
        noise.join(20)
        assert not fault or server.metric("num_preemptions_total") > 0
    for i, text in zip(order, got):
        assert text == alone[i], f"request {i}"


def test_R12_R15_fingerprint():
    """Differs where bits may: each dtype and instruction set; the same on 1 and 2 ranks."""
    prints = {}
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        flags = next(line for line in f if line.startswith("flags")).split()
    ways = [("bf16", ()), ("f32", ("--dtype", "f32")), ("scalar", ("--isa", "scalar"))]
    ways += [("avx2", ("--isa", "avx2"))] * ("avx2" in flags) + [("avx512", ("--isa", "avx512"))] * ("avx512bw" in flags)
    for name, more in ways:
        with Server(*more, ranks=0) as server:
            answer = server.chat("Tom has 3 apples.", max_tokens=4, temperature=0)
            prints[name] = answer["system_fingerprint"]
            assert answer["usage"]["completion_tokens"] == 4
    assert len(set(prints.values())) == len(prints) - ("avx512" in prints and "avx512_bf16" not in flags), prints
    with Server(ranks=2) as server:
        assert server.chat("Hi", max_tokens=1)["system_fingerprint"] == prints["bf16"]


EMULATED = BUILD / "tests" / "sfumato_emulated"


@pytest.mark.skipif(not EMULATED.exists(), reason="tests/sfumato_emulated is not built (no g++)")
@pytest.mark.slow
def test_R12_fingerprint_of_a_gpu():
    """Fast sums differ with ranks and with the way between them; --deterministic gives the same on 1 and 2 ranks."""
    ways = {"fast": (1,), "own": (1, "--gemm", "own"), "fast, 2": (2, "--comm", "fused"), "mpi, 2": (2, "--comm", "mpi"),
            "fixed": (1, "--deterministic"), "fixed, 2": (2, "--deterministic", "--comm", "fused")}
    prints = {}
    for name, (ranks, *more) in ways.items():
        wrapper = ["mpirun", "-n", str(ranks), str(EMULATED)]
        small = ("--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--kv-memory", "1M", "--run-steps", "0")
        with Server("--backend", "cuda", *small, *more, wrapper=wrapper, env={"LD_LIBRARY_PATH": str(EMULATED.parent / "stub")}) as server:
            prints[name] = server.complete("Hi", max_tokens=1)["system_fingerprint"]
            assert [n for n in server.metrics() if "build_info" in n and 'backend="cuda"' in n]
    assert prints["fixed"] == prints["fixed, 2"] and len(set(prints.values())) == 5, prints

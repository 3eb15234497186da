"""R11, R7: a rank that is killed, stopped or broken, in every phase; what engine threads allocate; memory that is short."""
import concurrent.futures
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import struct
import threading
import time

import pytest
from conftest import BINARY, TINY, chat, launch, problems
from served import SANITIZED, Server

TIMEOUT = 2  # --collective-timeout
BUSY = float(os.environ.get("SFUMATO_PATIENCE", 0))  # seconds more, for a machine that does other things as well
LONG = {"prompt": "Tom has", "max_tokens": 900, "ignore_eos": True, "stream": True, "soft_thinking": {"mode": "off"}}


class Reader(threading.Thread):
    """A request in the background: all bytes of the answer until the connection closes."""

    def __init__(self, server, body):
        super().__init__(daemon=True)
        text = json.dumps(body).encode()
        self.bytes = b""
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self.socket.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(text) + text
        )
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while piece := self.socket.recv(1 << 16):
                self.bytes += piece
        self.socket.close()

    def events(self):
        return self.bytes.count(b"data: ")

    def error(self):
        """The code of the error the client was told, in a stream or as a response; None: just closed."""
        found = re.findall(rb'"code":"([a-z_]+)"', self.bytes)
        return found[-1].decode() if found and b'{"error":' in self.bytes else None


def wait_for(condition, timeout=30):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def family(server):
    """mpirun's descendants: ranks, and the process that runs templates."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/stat") as f:
                parents[int(entry)] = int(f.read().rsplit(")", 1)[1].split()[1])

    def below(pid):
        while pid in parents and pid != server.process.pid:
            pid = parents[pid]
        return pid == server.process.pid

    return [pid for pid in parents if pid != server.process.pid and below(pid)]


def alive(pid):
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    return False


# How each phase is held, and when it has begun. The request of a phase, if it has one.
def begin_init(victim):
    server = Server("--collective-timeout", TIMEOUT, wait=False, env={"SFUMATO_FAULT": f"init-delay:{victim}:60000"})
    wait_for(lambda: len(server.ranks()) == 2)
    time.sleep(0.3)
    return server, None


def begin_load(victim):
    server = Server("--collective-timeout", TIMEOUT, wait=False, env={"SFUMATO_FAULT": f"load-delay:{victim}:60000"})
    server.wait_line("compute backend")
    time.sleep(0.3)
    return server, None


def begin_prefill(_):
    chunks = ("--max-num-seqs", "4", "--max-num-batched-tokens", "16")
    server = Server("--collective-timeout", TIMEOUT, *chunks, env={"SFUMATO_FAULT": "delay:0:400"})
    reader = Reader(server, {**LONG, "prompt": [7] * 960, "max_tokens": 50})
    wait_for(lambda: server.steps() >= 2)
    assert reader.events() == 0
    return server, reader


def begin_decode(_):
    server = Server("--collective-timeout", TIMEOUT, env={"SFUMATO_FAULT": "delay:0:100"})
    reader = Reader(server, LONG)
    wait_for(lambda: reader.events() > 5)
    return server, reader


def begin_idle(_):
    server = Server("--collective-timeout", TIMEOUT)
    server.complete("Hi", max_tokens=2)
    return server, None


PHASES = {"init": begin_init, "load": begin_load, "prefill": begin_prefill, "decode": begin_decode, "idle": begin_idle}
KILL, STOP, CTRL_C = signal.SIGKILL, signal.SIGSTOP, signal.SIGINT


def lose(phase, victim, sent):
    """Sends the signal to the rank (Ctrl-C: to mpirun, as a terminal does) and sees the whole job go."""
    server, reader = PHASES[phase](victim)
    try:
        ranks, everyone = server.ranks(), family(server)
        assert len(ranks) == 2 and set(ranks) <= set(everyone)
        began = time.monotonic()
        if sent == CTRL_C:
            server.process.send_signal(CTRL_C)
        else:
            os.kill(ranks[victim], sent)
        limit = (TIMEOUT + 5 if sent == STOP else 10) + BUSY
        status = server.wait(limit + 5)
        wait_for(lambda: not any(map(alive, everyone)), 5)
        took = time.monotonic() - began
        assert took <= limit, took
        assert status != 0
        text = server.text
        if sent == KILL:
            assert re.search(rf"process rank {victim} .* on node \S+ exited on signal 9", text)
            if victim == 0 and phase in ("prefill", "decode", "idle"):
                assert re.search(r"rank 0 on \S+ is gone.*rank 1 on \S+: running, at step \d+", text)
        if sent == STOP:
            assert status in (5, 6), status
            host = socket.gethostname()
            assert re.search(rf"rank {victim}\b", text) and host in text
            assert phase == "init" or victim == 0 or "at step" in text
        if reader:
            reader.join(5)
            assert b"[DONE]" not in reader.bytes
            if sent == CTRL_C:
                assert reader.error() == "shutting_down"
            elif victim == 1:
                assert reader.error() == ("engine_dead" if sent == STOP else "shutting_down"), reader.bytes[-300:]
            elif sent == STOP:  # mpirun wakes it to end it: then it can still say so
                assert reader.error() in (None, "shutting_down")
            else:
                assert reader.error() is None
    except AssertionError as e:
        raise AssertionError(f"{phase}, rank {victim}, {sent.name}: {e}\n" + "\n".join(server.lines[-20:])) from e
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_R11_a_lost_rank_takes_the_job_with_it(phase):
    """kill -9 and SIGSTOP of either rank, and Ctrl-C: five jobs at once, since most of it is waiting."""
    cases = [(v, s) for v in (0, 1) for s in (KILL, STOP)] + [(0, CTRL_C)]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for done in [pool.submit(lose, phase, *case) for case in cases]:
            done.result()


@pytest.mark.parametrize("victim", [0, 1])
def test_R11_a_bug_ends_the_job_with_one_message(victim):
    """A broken invariant: clients hear of it, one line says where, the code is 7."""
    with contextlib.ExitStack() as after:
        server = Server(env={"SFUMATO_FAULT": f"step-bug:{victim}:40"})
        after.callback(server.kill)
        reader, everyone = Reader(server, LONG), family(server)
        assert server.wait(10 + BUSY) == 7
        wait_for(lambda: not any(map(alive, everyone)), 5)
        reader.join(5)
        assert reader.events() > 5 and b"[DONE]" not in reader.bytes
        assert reader.error() == ("engine_dead" if victim == 0 else "shutting_down")
        said = [line for line in server.lines if "does not hold" in line]
        assert len(said) == 1 and f"bug on rank {victim}: " in said[0] and "step.c:" in said[0]


@pytest.mark.parametrize("ranks", [2, 0])
def test_R11_a_bug_of_the_net_thread_closes_connections(ranks):
    """Nothing can be told to clients then: they see the end of the connection, at once, and no process stays."""
    grpc = pytest.importorskip("grpc")
    with contextlib.ExitStack() as after:
        server = Server("--grpc-port", "0", ranks=ranks, env={"SFUMATO_FAULT": "net-bug:0:300"})
        after.callback(server.kill)
        everyone = [*family(server), server.process.pid]
        reader, whole = Reader(server, LONG), Reader(server, {**LONG, "stream": False})
        channel = after.enter_context(grpc.insecure_channel(server.grpc))
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        began = time.monotonic()
        assert server.wait(10 + BUSY) == 7
        wait_for(lambda: not any(map(alive, everyone)), 5)
        reader.join(5)
        whole.join(5)
        assert time.monotonic() - began < 10 + BUSY
        assert reader.events() > 5 and reader.error() is None and b"[DONE]" not in reader.bytes
        assert whole.bytes == b""
        with pytest.raises(grpc.RpcError) as lost:
            list(watch)
        assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
        said = [line for line in server.lines if "does not hold" in line]
        assert len(said) == 1 and "bug on rank 0: " in said[0] and "events.c:" in said[0]
        with pytest.raises(OSError):
            server.get("/health")


def test_R11_livez_once_the_watchdog_has_fired():
    """200 until then; 503 from then to the end, and never 200 again. A client that does not read holds the end up."""
    server = Server("--collective-timeout", TIMEOUT, "--stream-buffer", "256M")
    try:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", server.port))
        body = {**LONG, "n": 24, "logprobs": 20, "soft_thinking": {"mode": "soft", "return_trace": 64}}
        text = json.dumps(body).encode()
        stalled.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n" % len(text) + text)
        wait_for(lambda: server.metric("generation_tokens_total") > 4000)
        assert server.get("/livez") == (200, {"status": "ok"})
        os.kill(server.ranks()[1], STOP)
        seen = {"/livez": [], "/health": [], "/v1/completions": []}
        with contextlib.suppress(OSError):
            while True:
                for path in ("/livez", "/health"):
                    seen[path].append(server.get(path))
                if seen["/livez"][-1][0] == 503:
                    seen["/v1/completions"].append(server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}))
                time.sleep(0.01)
        assert server.wait(15 + BUSY) != 0
        dead = (503, {"status": "dead"})
        live = seen["/livez"]
        fired = live.index(dead)
        assert live[:fired] == [(200, {"status": "ok"})] * fired and fired > 10
        assert live[fired:] == [dead] * (len(live) - fired)
        assert seen["/health"][-1] == dead
        assert {(status, answer["error"]["code"]) for status, answer in seen["/v1/completions"]} == {(503, "engine_dead")}
        stalled.close()
    finally:
        server.kill()


def test_R11_a_job_that_was_suspended_goes_on():
    """All ranks stopped for longer than the timeout, in the middle of a wait, and continued: nobody is missing."""
    with Server("--collective-timeout", TIMEOUT, env={"SFUMATO_FAULT": "delay:1:100"}) as server:
        reader, ranks = Reader(server, {**LONG, "max_tokens": 60}), server.ranks()
        wait_for(lambda: reader.events() > 5)
        for sent in (STOP, signal.SIGCONT):
            for pid in ranks:
                os.kill(pid, sent)
            time.sleep(TIMEOUT + 2 if sent == STOP else 0)
        reader.join(30)
        assert b"[DONE]" in reader.bytes, server.lines


def test_preflight_says_what_to_look_at():
    began = time.monotonic()
    server = Server("--collective-timeout", "2", wait=False, env={"SFUMATO_FAULT": "preflight-delay:1:60000"})
    try:
        everyone = family(server)
        assert server.wait(20 + BUSY) == 5
        wait_for(lambda: not any(map(alive, everyone)), 5)
        assert time.monotonic() - began < 12 + BUSY
        said = [line for line in server.lines if "preflight" in line]
        assert len(said) == 1 and all(word in said[0] for word in ("/dev/shm", "--bind-to", "btl_tcp_if_include"))
    finally:
        server.kill()


# --- R7 ---


def mixed(i):
    """A request of many kinds."""
    chance = random.Random(i)
    fields = {
        "seed": i, "max_tokens": chance.randint(1, 60), "n": chance.randint(1, 3), "stream": chance.random() < 0.5,
        "soft_thinking": {
            "mode": chance.choice(["off", "soft", "gumbel", "dirichlet"]), "share_thinking": chance.random() < 0.3,
            "return_trace": chance.random() < 0.3, "max_topk": chance.choice([1, 10, 64]),
        },
    }
    if chance.random() < 0.3:
        fields |= {"logprobs": True, "top_logprobs": 5}
    if chance.random() < 0.3:
        fields |= {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    if chance.random() < 0.3:
        fields |= {"logit_bias": {"5": 1, "7": -2}, "min_tokens": 1}
    if chance.random() < 0.3:
        fields |= {"top_k": -1, "top_p": 1.0}  # the whole row is fetched
    if chance.random() < 0.1:
        fields |= {"timeout_s": 0.02}
    return chat(problems(8)[i % 8], **fields)


def allocations(server):
    """What the line at the drain says, by rank; None in a build that cannot count."""
    found = re.search(r"allocations by engine threads from ready to drain, by rank: ([0-9, ]+)", server.text)
    if "are not counted in this build" in server.text:
        return None
    return [int(n) for n in found[1].split(",")]


@pytest.mark.parametrize("ranks,more", [(2, ()), (2, ("--comm", "mpi")), (1, ("--max-num-batched-tokens", "32"))])
def test_R7_engine_threads_allocate_nothing(ranks, more):
    evicting = {"SFUMATO_FAULT": "preempt:0:30"}
    with Server("--kv-memory", f"{3 - ranks}400k", "--max-num-seqs", "16", *more, ranks=ranks, env=evicting) as server:
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda i: server.call("POST", "/v1/chat/completions", mixed(i)), range(100)))
        server.complete(["a b c", "Tom has"], echo=True, logprobs=2, max_tokens=3, n=2)
        gone = Reader(server, LONG)
        wait_for(lambda: gone.events() > 3)
        gone.socket.shutdown(socket.SHUT_RDWR)
        assert server.metric("num_preemptions_total") > 0
    assert allocations(server) in ([0] * ranks, None)


def test_R7_the_counter_sees_one():
    with Server(env={"SFUMATO_FAULT": "step-alloc:1:3"}) as server:
        server.complete("Tom has", max_tokens=8, ignore_eos=True)
    assert allocations(server) in ([0, 1], None)


def test_R7_too_little_memory():
    """Exit 4 before it is ready, with what is needed, what is free, and a length; which then starts."""
    assert BINARY.exists()
    if SANITIZED:
        pytest.skip("AddressSanitizer takes terabytes of address space")

    def start(kilobytes, length):
        limits = ["/bin/bash", "-c", f'ulimit -v {kilobytes}; exec "$0" "$@"', str(BINARY)]
        server = Server("--max-model-len", length, "--kv-dtype", "f32", "--threads", "1", ranks=0, wrapper=limits, wait=False)
        wait_for(lambda: server.port or not server.reader.is_alive())
        return server

    told, kilobytes = None, 90_000
    while not told and kilobytes < 400_000:
        server = start(kilobytes, 1024)
        assert not server.port, "nothing between refused and ready"
        assert server.wait() == 4, server.lines
        found = re.search(r"a rank needs ([0-9.]+) MB, ([0-9.]+) MB are free: (--max-model-len (\d+) would fit)?", server.text)
        if found and found[3] and int(found[4]) >= 448:
            told = float(found[1]), float(found[2]), int(found[4])
        else:
            kilobytes += max(2_000, int(500 * (float(found[1]) - float(found[2])))) if found else 4_000
    needed, free, length = told
    assert needed > free and length < 1024
    with start(kilobytes, length) as server:
        assert server.port, server.lines
        assert server.complete("Tom has", max_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4


def refused_start(*flags, wrapper):
    """What a server that must end with exit 4, never ready, says."""
    server = Server(*flags, ranks=0, wrapper=wrapper, wait=False)
    try:
        assert server.wait() == 4 and not server.port, server.lines
        return server.text
    finally:
        server.kill()


def test_R7_nearly_all_of_the_address_space():
    """ulimit -v counts the pages once: most of what it leaves can be theirs."""
    if SANITIZED:
        pytest.skip("AddressSanitizer takes terabytes of address space")
    limits = ["/bin/bash", "-c", 'ulimit -v 1000000; exec "$0" "$@"', str(BINARY)]
    said = refused_start("--kv-memory", "950m", "--threads", "1", wrapper=limits)
    needed, free = map(float, re.search(r"a rank needs ([0-9.]+) MB, ([0-9.]+) MB are free", said).groups())
    room = free - (needed - 950)
    assert room > 300
    with Server("--kv-memory", f"{int(0.7 * room)}m", "--threads", "1", ranks=0, wrapper=limits) as server:
        assert server.complete("Tom has", max_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4


def fill(server):
    """Many long sequences at once: every page of the cache is used."""
    bodies = [{"prompt": [5 + i] * 700, "max_tokens": 300, "ignore_eos": True} for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda b: server.call("POST", "/v1/completions", b, timeout=120)[0], bodies))
    assert answers == [200] * 40


def test_R7_pages_are_taken_before_ready():
    """Resident at ready, not when first used; `generate` takes what it uses."""
    if SANITIZED:
        pytest.skip("AddressSanitizer keeps memory of its own")

    def resident(pid):
        with open(f"/proc/{pid}/status") as f:
            return int(re.search(r"RssAnon:\s+(\d+)", f.read())[1]) * 1024

    with Server("--kv-memory", "96m", "--max-num-seqs", "48") as server:
        ranks, m = server.ranks(), server.metrics()
        kv = [m[f'sfumato:memory_bytes{{rank="{r}",kind="kv"}}'] for r in range(2)]
        before = [resident(pid) for pid in ranks]
        assert all(b > k > 48e6 for b, k in zip(before, kv)), (before, kv)
        fill(server)
        after = [resident(pid) for pid in ranks]
        assert all(a - b < 12e6 for a, b in zip(after, before)), (before, after)
    result = launch("generate", "-p", "Tom has", "--max-tokens", "4", "--kv-memory", "400m")
    assert result.status == 0
    said = re.search(r"KV cache ([0-9.]+) MB, .*resident ([0-9.]+) MB", result.err.decode())
    assert float(said[1]) > 390 and float(said[2]) < 100, result.err


@pytest.fixture
def group():
    """A control group with a limit of memory below our own: its folder and the file of the limit."""
    with open("/proc/self/cgroup") as f:
        own = dict(line.rstrip("\n").split(":", 2)[1:] for line in f)
    for base, path, limit in (("/sys/fs/cgroup/memory", own.get("memory"), "memory.limit_in_bytes"),
                              ("/sys/fs/cgroup", own.get(""), "memory.max")):
        folder = f"{base}{path}/sfumato-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            os.mkdir(folder)
            if path and os.path.exists(f"{folder}/{limit}"):
                break
            os.rmdir(folder)
    else:
        pytest.skip("no control group with a limit of memory can be made here")
    yield folder, f"{folder}/{limit}"
    end = time.monotonic() + 10
    while os.path.exists(folder) and time.monotonic() < end:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        time.sleep(0.05)


def test_R7_a_container_too_small(group):
    """The limit of a control group is what is free: refused before ready, or cut to what fits and never killed."""
    if SANITIZED:
        pytest.skip("AddressSanitizer keeps memory of its own")
    folder, limit = group
    with open(limit, "w") as f:
        f.write(str(100 << 20))
    enter = ["/bin/bash", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$0" "$@"', str(BINARY)]
    said = refused_start("--kv-memory", "200m", wrapper=enter)
    needed, free, fits = re.search(
        r"a rank needs ([0-9.]+) MB, ([0-9.]+) MB are free: --kv-memory (\d+) would fit", said).groups()
    assert float(needed) > 200 and 10e6 < int(fits) < 1e6 * float(free) < 105e6
    with Server(ranks=0, wrapper=enter) as server:  # 67 MB of pages would be more than half
        pages = float(re.search(r"KV cache ([0-9.]+) MB", server.text)[1])
        assert 5 < pages < 55, server.lines
        fill(server)


def test_R7_kv_memory_for_too_short_a_context():
    result = launch("serve", "--port", "0", "--kv-memory", "1k")
    assert result.status == 4 and not any("serving" in m for m in result.messages), result.err
    result = launch("serve", "--port", "0", "--kv-memory", "1m", "--max-model-len", "1024")
    words = re.search(r"--kv-memory 1\S* MB holds (\d+) tokens, a sequence may have 1024", result.err.decode())
    assert result.status == 4 and words, result.err
    assert int(words[1]) % 64 == 0 and 64 <= int(words[1]) < 1024


# --- R6 ---


@pytest.fixture
def wide(tmp_path):
    """models/tiny with a feed-forward part 21 times as wide, all zeros: big enough to take some steps to load, and a
    file with a hole, so that it costs no disk."""
    width, raw = 8192, (TINY / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    at = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entry["shape"] = [width if n == 384 else n for n in entry["shape"]]
        size = math.prod(entry["shape"]) * (4 if entry["dtype"] == "F32" else 2)
        entry["data_offsets"] = [at, at + size]
        at += size
    for file in TINY.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": width}))
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    return tmp_path


def test_R6_progress_never_falls(wide):
    """While weights load: probes, a metric that only rises, and a line at least every two seconds."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    small = ("--max-num-batched-tokens", "32", "--max-num-seqs", "4")
    server = Server("--port", port, *small, ranks=0, model=wide, wait=False, env={"SFUMATO_FAULT": "load-delay:0:100"})
    try:
        server.port = port
        seen, began = [], time.monotonic()
        while not any("serving" in line for line in server.lines):
            assert time.monotonic() - began < 60 and server.reader.is_alive(), server.lines
            with contextlib.suppress(OSError):
                status, _, body = server.call("GET", "/health")
                seen.append(server.metric("load_progress_ratio"))
                if status == 503 and seen[-1] < 1:
                    answer = json.loads(body)
                    assert answer["status"] == "loading" and 0 <= answer["progress"] <= seen[-1]
            time.sleep(0.03)
        assert seen == sorted(seen) and seen[-1] <= 1 and len({round(s, 3) for s in seen}) > 4, seen
        assert server.metric("load_progress_ratio") == 1
        loading = [line for line in server.lines if "loading weights" in line]
        assert len(loading) >= 3, server.lines
        assert server.stop() == 0
    finally:
        server.kill()


def test_R6_phases_add_up():
    """All of the wall time to ready is in a phase."""
    with Server() as server:
        named = re.compile(r"^sfumato: [a-zA-Z].*: ([0-9.]+) s$")
        phases = [float(found[1]) for line in server.lines if (found := named.match(line))]
        ready = next(line for line in server.lines if line.startswith("sfumato: ready"))
        total = float(ready.rsplit(", ", 1)[1][:-2])
        assert len(phases) >= 7 and total - 0.05 * total - 0.05 <= sum(phases) <= total + 0.05, server.lines
        assert any("warm-up" in line for line in server.lines)
        assert any("KV cache size:" in line for line in server.lines)
        assert any("Maximum concurrency for" in line for line in server.lines)
        assert server.metric("ranks_alive") == 2

"""sfumato over two hosts, which are network namespaces of this machine: same bytes, stop and drain, and R11: a rank, a
host's daemon or the network between them is lost.

    host a: this thread and its children        host b: processes below one that waits
      mpirun, rank 0 ..    veth pair 10.87.0.0/24     orted, the last ranks

Each has a network, a name, and b also process ids and /dev/shm of its own; mpirun reaches b by a script in place of ssh.
The namespaces have no names: they go with the last process in them, whatever happens to the test.
"""
import concurrent.futures
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest
from conftest import BINARY, SOURCE, TINY, Result, chat, generate, problems
from places import MPI
from served import Server
from test_serve_faults import BUSY, LONG, Reader, alive, family, wait_for

TIMEOUT = 2  # --collective-timeout
A, B = ("sfumato-a", "10.87.0.1"), ("sfumato-b", "10.87.0.2")
KILL, STOP, USR1, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1, signal.SIGTERM
NEWNET, NEWUTS = 0x40000000, 0x04000000
libc = ctypes.CDLL(None, use_errno=True)

AGENT = """#!/bin/sh
# instead of ssh: HOST COMMAND...; as there, nothing of the environment comes along
shift
exec {enter} env -i PATH="$PATH" HOME=/ sh -c "$*"
"""


def check(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def run(*command):
    done = subprocess.run(command, capture_output=True, timeout=20)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


class Hosts:
    def __init__(self, folder):
        self.folder, self.b = folder, None
        self.home = [os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")]

    def __enter__(self):
        check(libc.unshare(NEWNET | NEWUTS), "unshare")
        socket.sethostname(A[0])
        # it ends when this process does, and all of its processes with it
        self.b = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
             f"mount -t tmpfs none /dev/shm && hostname {B[0]} && echo ready && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        if self.b.stdout.readline() != b"ready\n":
            raise OSError(self.b.stderr.read().decode().strip())
        with open(f"/proc/{self.b.pid}/task/{self.b.pid}/children") as f:
            (first,) = f.read().split()
        self.enter = ["nsenter", "-t", first, "-n", "-u", "-m", "-p"]
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        run("ip", "link", "set", "eth1", "netns", first)
        run("ip", "addr", "add", A[1] + "/24", "dev", "eth0")
        for command in ("link set lo up", "link set eth1 name eth0", f"addr add {B[1]}/24 dev eth0", "link set eth0 up"):
            run(*self.enter, "ip", *command.split())
        self.link("up")
        agent = self.folder / "agent"
        agent.write_text(AGENT.format(enter=" ".join(self.enter)))
        agent.chmod(0o755)
        return self

    def __exit__(self, *_):
        if self.b:
            self.b.stdin.close()
            self.b.wait(10)
        for ns in self.home:
            check(libc.setns(ns, 0), "setns")
            os.close(ns)

    def link(self, state):
        run("ip", "link", "set", "eth0", state)
        if state == "up":  # the kernel lets nothing through before it has seen the other end, at times a second later
            for enter in ([], self.enter):
                wait_for(lambda enter=enter: json.loads(run(*enter, "ip", "-j", "link", "show", "eth0"))[0]["operstate"] == "UP")

    def mpirun(self, each, *options):
        """The options of mpirun for so many ranks on each host, once: two jobs at once would not share a folder."""
        hostfile = self.folder / f"hosts{each}"
        hostfile.write_text("".join(f"{address} slots={each}\n" for _, address in (A, B)))
        kept = [f"-x{name}" for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS", "LSAN_OPTIONS") if name in os.environ]
        return [
            "--hostfile", str(hostfile), *(word for one in kept for word in (one[:2], one[2:])), "--bind-to", "none",
            "--mca", "plm_rsh_agent", str(self.folder / "agent"),
            "--mca", "orte_tmpdir_base", tempfile.mkdtemp(dir=self.folder),
            "--mca", "oob_tcp_if_include", "eth0", "--mca", "btl_tcp_if_include", "eth0", *options,
        ]

    def launch(self, each, *args, stdin=b"", env=None, timeout=60):
        command = ["mpirun", "-n", str(2 * each), *self.mpirun(each), str(BINARY), *map(str, args)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SFUMATO_")} | MPI | (env or {})
        return Result(subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=timeout))

    def serve(self, *args, each=1, options=(), **more):
        return Server(*args, wrapper=["mpirun", "-n", str(2 * each), *self.mpirun(each, *options), str(BINARY)], **more)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    missing = [tool for tool in ("ip", "nsenter", "unshare") if not shutil.which(tool)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"two hosts need {' and '.join(missing) if missing else 'root'}")
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.__enter__()
    except OSError as why:
        made.__exit__()
        pytest.skip(f"two hosts cannot be made here: {why}")
    yield made
    made.__exit__()


# --- the same bytes ---


def lines():
    modes = ("off", "soft", "gumbel", "dirichlet")
    return [
        chat(text, max_tokens=60, seed=i, soft_thinking={"mode": modes[i % 4], "return_trace": True})
        for i, text in enumerate(problems(16))
    ]


def test_R12_same_bytes(hosts):
    stdin = b"".join(json.dumps(line).encode() + b"\n" for line in lines())
    alone = generate(lines())
    assert alone.status == 0 and alone.out.count(b"\n") == 16
    for each in (1, 2):
        assert generate(lines(), ranks=2 * each).out == alone.out
        result = hosts.launch(each, "generate", "--input", "-", "--seed", 7, "--model", TINY, stdin=stdin)
        assert result.status == 0, result.err
        assert result.out == alone.out
        assert any("communication mpi" in m for m in result.messages), result.err
        for rank in range(2 * each):
            name = (A, B)[rank // each][0]
            assert any(f"rank {rank} on {name}: slabs" in m for m in result.messages), result.err


# --- the service ---


def cpu_seconds(pid):
    """Of all threads."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat") as f:
            total += int(f.read().split()[0])
    return total * 1e-9


def test_serve_and_drain(hosts):
    question = chat(problems(1)[0], seed=3, max_tokens=60)
    with Server(ranks=1) as server:
        expected = server.post("/v1/chat/completions", question)[1]["choices"]
    with hosts.serve(each=2) as server:
        assert server.post("/v1/chat/completions", question)[1]["choices"] == expected
        ranks = server.ranks()
        assert len(ranks) == 4
        time.sleep(0.5)
        before = [cpu_seconds(pid) for pid in ranks]
        time.sleep(3)
        used = [(cpu_seconds(pid) - was) / 3 for pid, was in zip(ranks, before)]
        reader, everyone = Reader(server, LONG), family(server)
        wait_for(lambda: reader.events() > 5)
    # the server has been drained
    reader.join(5)
    assert b"[DONE]" in reader.bytes and not any(map(alive, everyone))
    assert max(used) < 0.05, used  # 0.02 on a quiet machine


@pytest.mark.parametrize("sent", [USR1, TERM])
def test_sfumato_run(hosts, sent):
    """Options by environment reach the other host; a supervisor's SIGTERM drains."""
    wrapper = [str(SOURCE / "launch" / "sfumato-run"), "-n", "2", *hosts.mpirun(1), "--"]
    env = {"SFUMATO": str(BINARY), "SFUMATO_MAX_TOPK": "3", "SFUMATO_THINK": "gumbel"}
    server = Server(wrapper=wrapper, env=env)
    try:
        reader, everyone = Reader(server, {**LONG, "max_tokens": 300}), family(server)
        assert len(server.ranks()) == 2
        wait_for(lambda: reader.events() > 5)
        server.process.send_signal(sent)
        assert server.wait(20) == 0, server.lines
        reader.join(5)
        assert b"[DONE]" in reader.bytes and not any(map(alive, everyone))
    finally:
        server.kill()


# --- R11 ---


def begin(hosts, phase, each=1, timeout=TIMEOUT):
    slow = {"options": ("-x", "SFUMATO_FAULT"), "env": {"SFUMATO_FAULT": "delay:0:100"}}
    server = hosts.serve("--collective-timeout", timeout, each=each, **slow)
    reader = None
    if phase == "decode":
        reader = Reader(server, LONG)
        wait_for(lambda: reader.events() > 5)
    else:
        server.complete("Hi", max_tokens=2)
        time.sleep(0.5)
    return server, reader


def see_it_go(server, reader, everyone, limit, began):
    """All processes of both hosts are gone in time; the exit status."""
    status = server.wait(limit + 5)
    wait_for(lambda: not any(map(alive, everyone)), 8)
    took = time.monotonic() - began
    assert took <= limit + BUSY, took
    assert status != 0
    if reader:
        reader.join(5)
        assert b"[DONE]" not in reader.bytes
    return status


def lose(hosts, phase, victim, sent):
    server, reader = begin(hosts, phase, timeout=30 if sent == KILL else TIMEOUT)
    try:
        ranks, everyone = server.ranks(), family(server)
        assert len(ranks) == 2
        host = (A, B)[victim][0]
        began = time.monotonic()
        os.kill(ranks[victim], sent)
        status = see_it_go(server, reader, everyone, 10 if sent == KILL else TIMEOUT + 5, began)
        text = server.text
        if sent == KILL:
            assert re.search(rf"process rank {victim} .* on node ({host}|{B[1]}) exited on signal 9", text)
            assert victim == 1 or re.search(rf"rank 0 on {A[0]} is gone.*rank 1 on {B[0]}: running, at step \d+", text)
            assert victim == 0 or not reader or re.search(r"the launcher stops this job at step \d+", text)
        else:
            assert status == 6
            assert re.search(rf"rank {victim} on {host}", text) and "at step" in text
        if reader and victim == 1:
            assert reader.error() == ("engine_dead" if sent == STOP else "shutting_down")
        elif reader:
            assert reader.error() in (None, "shutting_down")
    except AssertionError as e:
        raise AssertionError(f"{phase}, rank {victim}, {sent.name}: {e}\n" + "\n".join(server.lines[-20:])) from e
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["idle", "decode"])
def test_R11_a_lost_rank(hosts, phase):
    """kill -9 and SIGSTOP of a rank of either host: four jobs at once, since most of it is waiting."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(lose, hosts, phase, victim, sent) for victim in (0, 1) for sent in (KILL, STOP)]:
            done.result()


@pytest.mark.slow
def test_R11_a_lost_network(hosts):
    """Neither mpirun nor the daemon of the other host reaches the other; both go, and all ranks."""
    servers = []
    try:
        for phase, each in (("idle", 1), ("decode", 2)):
            servers.append((phase, *begin(hosts, phase, each)))
        everyone = [pid for _, server, _ in servers for pid in family(server)]
        began = time.monotonic()
        hosts.link("down")
        for phase, server, reader in servers:
            see_it_go(server, reader, everyone, TIMEOUT + 5, began)
            lost = rf"rank \d on {B[0]} has not been heard from|for rank \d on {B[0]}, which has not arrived"
            assert re.search(lost, server.text), (phase, server.lines)
            assert "at step" in server.text
            assert not reader or reader.error() == "engine_dead"
    finally:
        for _, server, _ in servers:
            server.kill()
        hosts.link("up")


def test_without_signs_of_life(hosts):
    """Where a firewall drops them it is said, and nobody is missed; a rank that is stopped: the next step finds it."""
    block = ["rule", "{}", "ipproto", "udp", "to", A[1], "blackhole"]
    run(*hosts.enter, "ip", *(word.format("add") for word in block))
    try:
        with hosts.serve("--collective-timeout", TIMEOUT) as server:
            server.wait_line("signs of life between hosts are off")
            assert server.complete("Hi", max_tokens=2)["usage"]["completion_tokens"] == 2
            stopped = server.ranks()[1]
            os.kill(stopped, STOP)
            time.sleep(TIMEOUT + 1)
            os.kill(stopped, signal.SIGCONT)
            server.complete("Hi", max_tokens=2)
    finally:
        run(*hosts.enter, "ip", *(word.format("del") for word in block))

"""Bad input: one clear message, the right exit status, nothing else dies, nothing hangs."""
import json
import os
import pathlib
import select
import struct
import subprocess
import threading
import time

import pytest
from conftest import BINARY, MPI, TINY, Result, chat, generate, launch, problems

GOOD = chat("What is 2+3?", custom_id="good", max_tokens=5)


def only_message(result, status, *words):
    assert result.status == status, (result.status, result.err)
    assert len(result.messages) == 1, result.messages
    for word in words:
        assert word in result.messages[0], result.messages[0]


# --- lines ---

BAD_LINES = [
    ({"prompt": "x", "soft_thinking": {"bogus": 1}}, "soft_thinking.bogus"),
    ({"prompt": "x", "soft_thinking": {"max_topk": 65}}, "soft_thinking.max_topk"),
    ({"prompt": "x", "soft_thinking": {"mode": "loud"}}, "soft_thinking.mode"),
    ({"prompt": "x", "soft_thinking": {"cold_stop": {"entropy": -1}}}, "soft_thinking.cold_stop.entropy"),
    ({"prompt": "x", "soft_thinking": {"answer": {"top_p": 0}}}, "soft_thinking.answer.top_p"),
    ({"prompt": "x", "soft_thinking": {"on_eos": "explode"}}, "soft_thinking.on_eos"),
    ({"prompt": "x", "temperature": 5.5}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 65}, "n"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 2.5}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "logit_bias": {"abc": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
    ({"prompt": "x", "top_logprobs": 3}, "top_logprobs"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, "prompt"),
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "y"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
]


def test_bad_lines_are_answered_in_place_and_the_others_run():
    lines = [dict(line, custom_id=i) for i, (line, _) in enumerate(BAD_LINES)]
    result = generate([GOOD, *lines, GOOD])
    assert result.status == 1
    out = result.lines
    assert "error" not in out[0] and "error" not in out[-1] and out[0]["ids"] == out[-1]["ids"]
    for i, (_, param) in enumerate(BAD_LINES):
        error = out[i + 1]["error"]
        assert out[i + 1]["custom_id"] == i
        assert error["param"] == param and error["type"] == "invalid_request_error", error
        assert param.split(".")[-1].split("[")[0] in error["message"]
    assert len(result.messages) == 1 and f"{len(BAD_LINES)} lines failed" in result.messages[0]


def test_lines_that_are_no_json():
    good = json.dumps(GOOD).encode()
    bad = [b"{", b"[1]", b'{"prompt":"\xff\xfe"}', b'{"prompt":"a","prompt":"b"}', b'{"prompt":"\\u0000"}',
           b'{"prompt":"\\ud800"}', b'{"prompt":"x","seed":18446744073709551616}', b'{"prompt":"x","temperature":1e999}']
    result = generate(b"\n".join([good, *bad, b"", good]))
    assert result.status == 1
    out = result.lines
    assert len(out) == len(bad) + 2 and all("error" in line for line in out[1:-1])
    assert "error" not in out[0] and "error" not in out[-1]


def test_refused_fields_say_so():
    lines = [
        {"prompt": "x", "tools": [{"type": "function"}]},
        {"prompt": "x", "response_format": {"type": "json_object"}},
        {"prompt": "x", "best_of": 3},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "stream": True},
    ]
    for line in generate(lines).lines:
        assert line["error"]["code"] == "unsupported_parameter", line


def test_unknown_field_is_said_once_and_ignored():
    result = generate([{**GOOD, "wibble": 1}, {**GOOD, "wibble": 2}])
    assert result.status == 0
    assert sum("wibble" in m for m in result.messages) == 1


def test_prompt_too_long():
    line = generate([{"prompt": [5] * 1024, "custom_id": 1}]).lines[0]
    assert line["error"]["code"] == "context_length_exceeded"
    assert line["error"]["n_ctx"] == 1024 and line["error"]["n_prompt_tokens"] == 1024
    assert "maximum context length is 1024 tokens" in line["error"]["message"]
    line = generate([{"prompt": [5] * 1000, "max_tokens": 25}]).lines[0]
    assert line["error"]["code"] == "context_length_exceeded"
    assert "error" not in generate([{"prompt": [5] * 1020, "soft_thinking": {"mode": "off"}}]).lines[0]


# --- options ---

@pytest.mark.parametrize(
    "args, words",
    [
        (["generate", "--frobnicate"], ["--frobnicate"]),
        (["generate", "-p", "x", "--max-topk", "65"], ["--max-topk", "65", "1..64"]),
        (["generate", "-p", "x", "--threads", "257"], ["--threads", "1..256"]),
        (["generate", "-p", "x", "--top-p", "0"], ["--top-p", "(0,1]"]),
        (["generate", "-p", "x", "--think", "loud"], ["--think", "dirichlet"]),
        (["generate", "-p", "x", "--kv-dtype", "fp8"], ["--kv-dtype fp8"]),  # not built in, or not for the CPU
        (["generate", "-p", "x", "--comm", "fused"], ["--comm"]),  # not built in, or not without a GPU
        (["generate", "-p", "x", "--dtype", "int8"], ["--dtype int8", "not built into this binary"]),
        (["generate", "-p", "x", "--gpu-memory-utilization", "0.9"], ["not built into this binary"]),
        (["generate", "-p", "x", "--max-model-len", "4096"], ["--max-model-len", "1024"]),
        (["generate", "-p", "x", "--think-close", "two words"], ["--think-close", "one id"]),
        (["generate"], ["-p"]),
        (["generate", "-p", "x", "--return-trace"], ["--output"]),
        (["generate", "--raw", "--input", "-"], ["--raw"]),
        (["bench", "step", "--layers", "2"], ["--dims"]),
        (["generate", "--input", "/nonexistent/file"], ["/nonexistent/file"]),
        (["score"], ["--input"]),
        (["bench", "stairs"], ["step"]),
        (["bench", "comm", "--batch", "4"], ["--batch", "comm"]),
        (["bench", "comm", "--threads", "1"], ["--threads", "comm"]),
        (["bench", "step", "--max-model-len", "64"], ["--max-model-len", "step"]),
        (["bench", "sampler", "--dtype", "f32"], ["--dtype", "sampler"]),
        (["bench", "tokenizer", "--isa", "avx2"], ["--isa", "tokenizer"]),
        (["bench", "load", "--comm", "mpi"], ["--comm", "load"]),
        (["bench", "step", "--rank-of", "8/8"], ["--rank-of", "R/N"]),
        (["bench", "step", "--collective-us", "5"], ["--rank-of"]),
        (["selftest", "--backend", "cpu-scalar", "--isa", "avx2"], ["contradicts"]),
        (["frob"], ["frob", "generate"]),
    ],
)
@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_usage(args, words, ranks):
    quiet = {"SFUMATO_QUIET": "1"}
    only_message(launch(*args, ranks=ranks, model=None if args[0] in ("frob", "selftest") or args[1:2] == ["sampler"] else TINY, env=quiet), 2, *words)


def test_environment_and_config_file(tmp_path):
    config = tmp_path / "options.json"
    config.write_text('{"max_topk": 3, "temperature": 0, "seed": 9}')
    result = generate([chat("2+3?", soft_thinking={"return_trace": True})], "--config", config, "--seed", "8")
    line = result.lines[0]
    assert line["seed"] == 8 and max(len(r.get("ids", [0])) for r in line["trace"]) <= 3
    only_message(generate([GOOD], env={"SFUMATO_MAX_TOPK": "0"}), 2, "SFUMATO_MAX_TOPK", "1..64")
    config.write_text('{"max_topkk": 3}')
    only_message(generate([GOOD], "--config", config), 2, "max_topkk")
    config.write_text('{"max_topk": 3')
    only_message(generate([GOOD], "--config", config), 2, str(config))
    env = {"SFUMATO_MAX_TOPK": "2"}
    line = generate([chat("2+3?", temperature=1, soft_thinking={"return_trace": True})], env=env).lines[0]
    assert max(len(r.get("ids", [0])) for r in line["trace"]) == 2


@pytest.mark.parametrize("name", [b"\xff\xc3", b"\xed\xa0\x80\xc0\xaf\xf5\x80\x80\x80", "naïve 😀\"\\".encode(),
                                  *(b"x" * i + "é".encode() * 600 for i in range(2))],
                         ids=["cut", "forms", "quoted", "long", "long, odd"])
def test_log_lines_are_json(name):
    """Whatever a name holds, and wherever the message is cut."""
    result = launch("inspect", "--log-json", model=os.fsdecode(b"/nonexistent/" + name))
    assert result.status == 3
    said = [json.loads(line)["msg"] for line in result.err.decode().splitlines()][-1]
    shown = name.decode(errors="replace")
    assert shown[:500] in said or len(name) > 200, said


def test_output_must_not_be_the_input(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    only_message(launch("generate", "--quiet", "--input", path, "--output", path), 2, "input file")
    assert path.read_text() == json.dumps(GOOD) + "\n"


def test_impossible_rank_count():
    only_message(generate([GOOD], ranks=9), 2, "9 ranks", "1, 2, 3, 4, 5, 6, 7, 8")


def test_no_memory():
    result = generate([GOOD], "--kv-memory", "1000G")
    only_message(result, 4, "free")
    only_message(generate([GOOD], "--kv-memory", "1000G", ranks=2), 4, "free")


# --- model files ---

def name_of(header, part):
    return next(name for name in header if part in name)


def drop_tensor(header, data):
    del header[name_of(header, "layers.2.mlp.up_proj")]


def wrong_shape(header, data):
    header[name_of(header, "layers.1.self_attn.q_proj")]["shape"] = [128, 384]


def nan_weight(header, data):
    begin = header[name_of(header, "layers.3.mlp.down_proj")]["data_offsets"][0]
    data[begin + 100 : begin + 102] = struct.pack("<H", 0x7FC0)


def outside(header, data):
    t = header[name_of(header, "lm_head")]
    t["data_offsets"] = [len(data), len(data) + t["data_offsets"][1] - t["data_offsets"][0]]


def overlap(header, data):
    a, b = name_of(header, "layers.0.mlp.up_proj"), name_of(header, "layers.0.mlp.gate_proj")
    header[a]["data_offsets"] = header[b]["data_offsets"]


def strange_dtype(header, data):
    header[name_of(header, "layers.0.mlp.up_proj")]["dtype"] = "F7"


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize(
    "edit, words",
    [
        (drop_tensor, ["layers.2.mlp.up_proj"]),
        (wrong_shape, ["layers.1.self_attn.q_proj"]),
        (nan_weight, ["layers.3.mlp.down_proj"]),
        (outside, ["lm_head"]),
        (overlap, ["layers.0.mlp"]),
        (strange_dtype, ["layers.0.mlp.up_proj"]),
    ],
)
def test_damaged_weights(broken, edit, words, ranks):
    begin = time.monotonic()
    only_message(generate([GOOD], ranks=ranks, model=broken(edit)), 3, *words)
    assert time.monotonic() - begin < 30


def test_truncated_weights(broken):
    folder = broken()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    only_message(generate([GOOD], ranks=2, model=folder), 3, "model.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    only_message(generate([GOOD], model=folder), 3, "model.safetensors")
    path.write_bytes(b"")
    only_message(generate([GOOD], model=folder), 3, "model.safetensors")
    path.unlink()
    only_message(generate([GOOD], model=folder), 3)


def test_huge_header(broken):
    folder = broken()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    only_message(generate([GOOD], ranks=2, model=folder), 3, "model.safetensors")


@pytest.mark.parametrize(
    "name, content",
    [
        ("config__json", b"{"),
        ("config__json", b'{"architectures":["Qwen3ForCausalLM"],"hidden_size":-5}'),
        ("config__json", b'{"architectures":["MambaForCausalLM"]}'),
        ("tokenizer__json", b"{}"),
        ("tokenizer__json", b"\x00\x01"),
    ],
)
def test_damaged_small_files(broken, name, content):
    only_message(generate([GOOD], model=broken(**{name: content})), 3)


def test_no_such_model():
    only_message(generate([GOOD], model="/nonexistent", ranks=2), 3, "/nonexistent")


def test_hostile_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    for content in (b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62), b"GGUF" + bytes(60), b"nonsense"):
        path.write_bytes(content)
        only_message(generate([GOOD], model=path), 3, "x.gguf")


# --- ranks ---

def alive(mark):
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if mark in words and state != "Z" and int(entry.name) != os.getpid():
            found.append(entry.name)
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_job(rank):
    seed = str(10**12 + os.getpid() * 10 + rank)
    requests = [chat(q, max_tokens=400, ignore_eos=True) for q in problems(4)]
    begin = time.monotonic()
    result = generate(requests, "--seed", seed, ranks=2, env={"SFUMATO_FAULT": f"step-kill:{rank}:20"})
    assert result.status != 0
    assert time.monotonic() - begin < 20
    deadline = time.monotonic() + 5
    while alive(seed.encode()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(seed.encode())


@pytest.mark.parametrize("odd, status, words", [
    (["env", "SFUMATO_COLLECTIVE_TIMEOUT=0", BINARY, "generate"], 5, ["ranks differ", "options", "rank 1"]),
    (["env", "SFUMATO_MAX_MODEL_LEN=64", BINARY, "generate"], 5, ["ranks differ", "options", "rank 1"]),
    (["env", "SFUMATO_CONFIG=/nonexistent", BINARY, "generate"], 2, ["rank 1", "/nonexistent"]),
    ([BINARY, "generate", "--help"], 5, ["ranks differ", "command"]),
    ([BINARY, "score"], 5, ["ranks differ", "command"]),
])
def test_ranks_that_were_started_differently(odd, status, words):
    """One message, and no rank waits for another: before the first step there is no deadline that would end it."""
    last = ["--model", TINY, "--quiet", "--input", "-"]
    command = ["mpirun", "-n", "1", BINARY, "generate", *last, ":", "-n", "1", *odd, *last]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SFUMATO_")} | MPI
    only_message(Result(subprocess.run(list(map(str, command)), input=b"", capture_output=True, env=environment, timeout=60)),
                 status, *words)


def test_threads_are_counted_over_the_cores_of_all_ranks():
    """Each rank bound to a core of its own is what was asked for."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    for threads, warnings in (1, 0), (64, 1):
        result = launch("generate", "--raw", "-p", "x", "--max-tokens", "1", "--threads", threads, ranks=2,
                        env={"OMPI_MCA_hwloc_base_binding_policy": "hwthread"})
        assert result.status == 0 and result.err.count(b"allowed cores") == warnings, result.err


# --- standard streams ---

def shell(text):
    """A pipeline of $S with what a shell can do to its streams."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SFUMATO_")}
    environment |= {**MPI, "S": str(BINARY), "M": str(TINY)}
    return subprocess.run(["bash", "-c", text], capture_output=True, env=environment, timeout=120)


@pytest.mark.parametrize("command", ["generate --raw -p x --max-tokens 3", "inspect", "bench tokenizer"])
def test_output_that_cannot_be_written_is_no_success(command):
    for sink in (">/dev/full", ">&-"):
        done = shell(f"$S {command} -m $M --quiet {sink}")
        assert done.returncode == 2 and b"cannot be written" in done.stderr, (sink, done)


@pytest.mark.parametrize("command", ["generate --input -", "score --input -", "tokenize"])
def test_closed_input_is_no_empty_input(command):
    done = shell(f"$S {command} -m $M --quiet <&-")
    assert done.returncode == 2 and b"cannot be read" in done.stderr, done


def test_input_is_read_from_where_it_stands(tmp_path):
    (tmp_path / "in").write_text('{"text":"a","custom_id":1}\n{"text":"a","custom_id":2}\n')
    done = shell(f"(read -r; $S tokenize -m $M --quiet) < {tmp_path}/in")
    assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()] == [2]


def test_output_that_is_full_for_now_is_waited_for():
    """Who shares the pipe may have made it not to block."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    lines = b'{"text":"a b c d e f g h"}\n' * 20000
    with subprocess.Popen([str(BINARY), "tokenize", "--quiet", "--model", str(TINY)], stdin=subprocess.PIPE, stdout=writing,
                          stderr=subprocess.PIPE) as asked:
        os.close(writing)
        feed = threading.Thread(target=lambda: (asked.stdin.write(lines), asked.stdin.close()))
        feed.start()
        time.sleep(1)
        with open(reading, "rb") as f:
            assert f.read().count(b"\n") == 20000
        feed.join()
        assert asked.wait(20) == 0, asked.stderr.read()


def test_the_longest_line(tmp_path):
    most = 64 << 20
    with open(tmp_path / "in", "wb") as f:
        f.write(b'{"text":"a"}'.ljust(most) + b"\n" + b'{"text":"b"}'.ljust(most + 1) + b"\n" + b'{"text":"a"}\n')
    done = shell(f"$S tokenize -m $M --quiet --input {tmp_path}/in")
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1 and first == third and str(most) in second["error"]["message"], done


@pytest.mark.parametrize("command, line", [("generate", {"prompt": [1], "max_tokens": 2}), ("score", {"steps": [1, 2]})])
def test_a_reply_does_not_wait_for_the_next_line(command, line):
    """Who writes a line and reads its reply before writing the next is not kept waiting for ever."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SFUMATO_")}
    asked = subprocess.Popen([str(BINARY), command, "--quiet", "--input", "-", "--model", str(TINY)], bufsize=0,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment | MPI)
    try:
        for i in range(3):
            asked.stdin.write(json.dumps({**line, "custom_id": i}).encode() + b"\n")
            assert select.select([asked.stdout], [], [], 20)[0], "no reply"
            assert json.loads(asked.stdout.readline())["custom_id"] == i
        asked.stdin.close()
        assert asked.wait(20) == 0
    finally:
        asked.kill()

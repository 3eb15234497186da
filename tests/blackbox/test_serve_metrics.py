"""R13: every series from the first scrape on, totals that add up, one log line a request."""
import concurrent.futures
import contextlib
import json
import random
import re
import shutil
import socket
import subprocess

import pytest
from conftest import SOURCE, chat, problems
from served import Server

# serving.md §9, written out by hand: name -> type
SERIES = {
    "e2e_request_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram", "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram", "time_to_first_token_seconds": "histogram",
    "time_to_first_answer_token_seconds": "histogram", "inter_token_latency_seconds": "histogram",
    "request_prompt_tokens": "histogram", "request_generation_tokens": "histogram",
    "request_params_max_tokens": "histogram", "request_params_n": "histogram", "iteration_tokens_total": "histogram",
    "prompt_tokens_total": "counter", "generation_tokens_total": "counter", "num_preemptions_total": "counter",
    "prefix_cache_queries_total": "counter", "prefix_cache_hits_total": "counter",
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge",
    "request_success_total": "counter", "admission_rejections_total": "counter",
    "cache_config_info": "gauge", "build_info": "gauge",
    "soft_steps_total": "counter", "answer_tokens_total": "counter", "full_logits_fetch_total": "counter",
    "slow_reader_cancels_total": "counter", "thinking_tokens_total": "counter", "thinking_end_total": "counter",
    "soft_entropy_nats": "histogram", "soft_support_size": "histogram", "thinking_seconds": "histogram",
    "step_seconds": "histogram", "ranks_alive": "gauge", "load_progress_ratio": "gauge",
    "weights_load_seconds": "gauge", "collective_timeouts_total": "counter", "requests_by_phase": "gauge",
    "kv_pages": "gauge", "memory_bytes": "gauge", "http_requests_total": "counter",
    "http_request_duration_seconds": "histogram", "grpc_requests_total": "counter",
}
LABELS = {
    "request_success_total": {"finished_reason": {"stop", "length", "abort", "error"}},
    "admission_rejections_total": {"reason": {"queue", "tokens", "connections", "loading", "draining"}},
    "thinking_tokens_total": {"kind": {"soft", "hard"}},
    "thinking_end_total": {"reason": {"model", "cold_stop", "budget", "eos", "length", "watchdog"}},
    "step_seconds_count": {"stage": {"schedule", "forward", "allreduce", "sample", "broadcast"}},
    "requests_by_phase": {"phase": {"prefill", "soft", "hard_think", "answer"}},
    "kv_pages": {"state": {"free", "cached", "used"}},
    "memory_bytes": {"rank": {"0", "1"}, "kind": {"weights", "kv", "workspace", "free"}},
    "cache_config_info": {"block_size": {"64"}},
}
VLLM = [
    "e2e_request_latency_seconds_count", "request_queue_time_seconds_count", "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_sum", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
    "prompt_tokens_total", "generation_tokens_total", "request_success_total", "num_preemptions_total",
    "prefix_cache_queries_total", "prefix_cache_hits_total", "cache_config_info", "iteration_tokens_total_count",
]


def scrape(server):
    status, headers, body = server.call("GET", "/metrics")
    assert status == 200 and headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return body.decode()


def parse(text):
    """{name: [(labels, value)]} and {name: type}."""
    values, types = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            types[name] = kind
        elif line.startswith("# HELP"):
            continue
        else:
            name, labels, value = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", line).groups()
            pairs = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or ""))
            values.setdefault(name, []).append((pairs, float(value)))
    return values, types


@pytest.fixture(scope="module")
def server():
    with Server("--metrics-compat", "vllm", "--max-num-queued-reqs", "200") as running:
        yield running


def test_R13_first_scrape(server):
    values, types = parse(scrape(server))
    for name, kind in SERIES.items():
        assert types["sfumato:" + name] == kind, name
        found = values["sfumato:" + name + ("_count" if kind == "histogram" else "")]
        assert all(labels["model_name"] == "tiny" for labels, _ in found), name
    for name, wanted in LABELS.items():
        for label, options in wanted.items():
            assert {labels[label] for labels, _ in values["sfumato:" + name]} == options, name
    assert {labels.get("version") for labels, _ in values["sfumato:build_info"]} != {None}
    for name in VLLM:
        assert all(labels["engine"] == "0" for labels, _ in values["vllm:" + name]), name
    for name in ("process_start_time_seconds", "process_resident_memory_bytes"):
        assert values[name][0][1] > 0
    for name, kind in types.items():
        if kind == "histogram":  # cumulative, and the last bucket is the count
            series = {}
            for labels, value in values[name + "_bucket"]:
                key = tuple(sorted((k, v) for k, v in labels.items() if k != "le"))
                series.setdefault(key, []).append((float(labels["le"]), value))
            for buckets in series.values():
                assert buckets == sorted(buckets) and buckets[-1][0] == float("inf")
                assert [v for _, v in buckets] == sorted(v for _, v in buckets)


def test_R13_named_while_loading():
    """A label that changed when the model is there would make other series of all of them."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = Server("--port", port, "--served-model-name", "me,too", ranks=0, wait=False, env={"SFUMATO_FAULT": "load-delay:0:300"})
    try:
        server.port, early = port, ""
        while not early:
            assert server.reader.is_alive(), server.lines
            with contextlib.suppress(OSError):
                early = scrape(server)
        assert server.call("GET", "/health")[0] == 503
        names = {label for line in early.splitlines() for label in re.findall('model_name="([^"]*)"', line)}
        assert names == {"me"} and 'load_progress_ratio{model_name="me"}' in early
    finally:
        server.kill()


@pytest.mark.parametrize("option", [["--metrics-prefix", "9x"], ["--metrics-prefix", "a-b"], ["--served-model-name", ","],
                                    ["--allowed-origins", "example.org"], ["--allowed-origins", "http://a,https://b/"]], ids=" ".join)
def test_wrong_options_end_at_once(option):
    server = Server(*option, ranks=0, wait=False)
    assert server.process.wait(30) == 2
    assert any(option[0] in line for line in server.lines) and not any("weights" in line for line in server.lines)


def test_R13_independent_parser(server):
    families = pytest.importorskip("prometheus_client.parser").text_string_to_metric_families(scrape(server))
    assert len(list(families)) > 50


def test_R13_promtool():
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    with Server("--metrics-prefix", "sfumato_", ranks=0) as one:
        done = subprocess.run(["promtool", "check", "metrics"], input=scrape(one).encode(), capture_output=True)
        assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr
        assert b"sfumato_iteration_tokens_count" in scrape(one).encode()


def test_R13_totals_are_the_sum_of_usage(server):
    """Over 500 requests, eight at a time; running and waiting are what is in flight, also meanwhile."""
    chance = random.Random(13)
    questions = problems(40)
    before, sums = server.metrics(), dict(prompt=0, completion=0, reasoning=0, choices=0)
    bodies = [
        chat(chance.choice(questions), seed=i, n=chance.randint(1, 3), max_tokens=chance.randint(1, 20),
             soft_thinking={"mode": chance.choice(["off", "soft", "gumbel"]), "share_thinking": chance.random() < 0.3},
             stop=chance.choice([None, "the", "\n"]), stream=False)
        for i in range(500)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda body: server.post("/v1/chat/completions", body), bodies)
        now = server.metrics()
        assert now["sfumato:num_requests_running"] + now["sfumato:num_requests_waiting"] <= 3 * 8
        for status, answer in answers:
            assert status == 200, answer
            usage = answer["usage"]
            sums["prompt"] += usage["prompt_tokens"]
            sums["completion"] += usage["completion_tokens"]
            sums["reasoning"] += usage["completion_tokens_details"]["reasoning_tokens"]
            sums["choices"] += len(answer["choices"])
    server.settle()
    after = server.metrics()

    def grown(name):
        return sum(after[k] - before[k] for k in after if k.split("{")[0] == "sfumato:" + name)

    assert grown("prompt_tokens_total") == sums["prompt"]
    assert grown("generation_tokens_total") == sums["completion"]
    assert grown("thinking_tokens_total") == sums["reasoning"]
    assert grown("answer_tokens_total") == sums["completion"] - sums["reasoning"]
    assert grown("request_success_total") == sums["choices"]
    assert grown("e2e_request_latency_seconds_count") == 500
    assert grown("request_params_n_count") == 500
    assert grown("request_generation_tokens_count") == sums["choices"]
    assert after["sfumato:num_requests_running"] + after["sfumato:num_requests_waiting"] == 0
    assert all(after[f'sfumato:requests_by_phase{{phase="{p}"}}'] == 0 for p in ("prefill", "soft", "hard_think", "answer"))
    assert after['sfumato:http_requests_total{handler="chat",method="POST",status="2xx"}'] >= 500


def test_R13_totals_of_echoed_prompts(server):
    """Echoed alone, scored, or scored and continued: a prompt counts once, and its end is no abort."""
    before = server.metrics()
    sums = dict(prompt=0, completion=0, choices=0)
    for i, fields in enumerate(({"max_tokens": 0}, {"max_tokens": 0, "logprobs": 1}, {"max_tokens": 2, "logprobs": 1}, {"max_tokens": 2})):
        answer = server.complete(["Tom has", "a b c d"], echo=True, n=1 + i % 2, **fields)
        sums["prompt"] += answer["usage"]["prompt_tokens"]
        sums["completion"] += answer["usage"]["completion_tokens"]
        sums["choices"] += len(answer["choices"])
    server.settle()
    after = server.metrics()

    def grown(name):
        return sum(after[k] - before[k] for k in after if k.split("{")[0] == "sfumato:" + name)

    assert grown("prompt_tokens_total") == sums["prompt"] > 0
    assert grown("generation_tokens_total") == sums["completion"] > 0
    assert grown("request_success_total") == grown("request_generation_tokens_count") == sums["choices"]
    ended = {reason: after[f'sfumato:request_success_total{{finished_reason="{reason}"}}'] for reason in ("abort", "error")}
    assert ended == {reason: before[f'sfumato:request_success_total{{finished_reason="{reason}"}}'] for reason in ended}


def test_R13_one_line_a_request(server):
    server.call("POST", "/v1/chat/completions", chat("SECRET PROMPT", max_tokens=3), {"X-Request-Id": "line-1"})
    server.wait_line("line-1")
    records = [r for r in server.records() if r["request_id"] == "line-1"]
    assert len(records) == 1
    assert set(records[0]) >= {
        "request_id", "trace_id", "status", "prompt_tokens", "thinking_tokens", "answer_tokens", "cached_tokens",
        "queue_ms", "ttft_ms", "itl_ms", "e2e_ms", "finish", "thinking_end", "mode",
    }
    assert 0 <= records[0]["queue_ms"] <= records[0]["ttft_ms"] <= records[0]["e2e_ms"]
    assert "SECRET" not in server.text


def test_R13_a_line_for_refused_requests_too(server):
    """The same fields; whatever could not be known is null."""
    for name, body, status in (("r-1", chat("x", temperature=9), "invalid"), ("r-2", chat("x " * 3000), "context_length_exceeded"),
                               ("r-3", b"{", "invalid"), ("r-4", chat("x", model="other"), "model_not_found")):
        assert server.call("POST", "/v1/chat/completions", body, {"X-Request-Id": name})[0] in (400, 404)
        server.wait_line(name)
        (record,) = [r for r in server.records() if r["request_id"] == name]
        assert (record["status"], record["finish"]) == (status, "refused") and record["ttft_ms"] is None
        assert record["prompt_tokens"] == record["answer_tokens"] == 0


def test_R13_method_of_the_request(server):
    """The label says what was asked for, not what the path takes."""
    def count(method):
        return server.metric(f'http_requests_total{{handler="chat",method="{method}",status="{2 if method == "OTHER" else 4}xx"}}')

    before = [count(m) for m in ("GET", "POST", "OTHER")]
    for method, status in (("OPTIONS", 204), ("GET", 405), ("POST", 415)):
        assert server.call(method, "/v1/chat/completions", b"", {"Content-Type": "text/plain"})[0] == status
    assert [count(m) - b for m, b in zip(("GET", "POST", "OTHER"), before)] == [1, 1, 1]


def test_R13_json_log():
    with Server("--log-json", ranks=0, wait=False) as one:
        one.wait_line("serving", 30)
        line = next(l for l in one.lines if "serving" in l)
        one.port = int(re.search(r"http://127.0.0.1:(\d+)", line)[1])
        one.complete("x", max_tokens=2)
        one.wait_line('"msg":"request"')
        lines = [json.loads(l) for l in one.lines]
        record = next(l for l in lines if l["msg"] == "request")
        assert record["level"] == "info" and record["rank"] == 0 and record["answer_tokens"] == 2


def test_deep_health(server):
    assert server.get("/health?deep=1") == (200, {"status": "ok"})
    assert server.get("/health?deep=0") == (200, {"status": "ok"})

"""generate: same bytes whatever the ranks, the batch, the chunks; the shape of what it writes."""
import json
import math

import pytest
from conftest import chat, generate, launch, problems

MODES = [
    {},
    {"soft_thinking": {"mode": "off"}},
    {"soft_thinking": {"mode": "gumbel", "return_trace": True}},
    {"soft_thinking": {"mode": "dirichlet", "max_topk": 3}, "n": 2},
    {"soft_thinking": {"mode": "soft", "budget": 20, "close_text": "So"}},
    {"soft_thinking": {"cold_stop": {"entropy": 0.5, "length": 3}, "return_trace": 4}},
    {"temperature": 0, "logprobs": True, "top_logprobs": 3, "max_tokens": 40},
    {"presence_penalty": 0.5, "logit_bias": {"19": -2}, "min_tokens": 5},
]


@pytest.fixture(scope="module")
def mixed():
    """Requests that differ in everything, and what one rank answers."""
    requests = [chat(q, custom_id=i, **MODES[i % len(MODES)]) for i, q in enumerate(problems(16))]
    result = generate(requests)
    assert result.status == 0, result.err
    return requests, result.out


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_ranks_give_the_same_bytes(mixed, ranks):
    requests, expected = mixed
    assert generate(requests, ranks=ranks).out == expected


def test_messages_instead_of_the_window_give_the_same_bytes(mixed):
    requests, expected = mixed
    assert generate(requests, "--comm", "mpi", ranks=2).out == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--max-num-batched-tokens", "16", "--max-num-seqs", "4"],
        ["--max-num-batched-tokens", "512", "--max-num-seqs", "64"],
        ["--prefix-cache", "off"],
        ["--max-num-seqs", "1"],
        ["--threads", "1"],
        ["--kv-memory", "4M"],  # 32 pages: sequences are preempted and rebuilt
    ],
)
def test_options_that_only_schedule_give_the_same_bytes(mixed, options):
    requests, expected = mixed
    assert generate(requests, *options).out == expected


def test_alone_is_as_in_a_batch(mixed):
    requests, expected = mixed
    lines = expected.splitlines(keepends=True)
    for i in (0, 4, 7):
        own = [line for line in lines if json.loads(line)["custom_id"] == i]
        assert generate([requests[i]]).out == b"".join(own)


def test_repeats_on_three_ranks():
    requests = [chat(q) for q in problems(3)]
    assert generate(requests, ranks=3).out == generate(requests, ranks=3).out


def test_line_shape():
    question = problems(1)[0]
    line = generate([chat(question, custom_id="a")]).lines[0]
    assert set(line) == {
        "custom_id", "prompt_tokens", "ids", "thinking", "answer", "finish_reason", "stop_reason", "thinking_end",
        "usage", "mean_entropy", "seed",
    }
    assert line["custom_id"] == "a" and line["seed"] == 7
    usage = line["usage"]
    assert usage["prompt_tokens"] == line["prompt_tokens"]
    assert usage["completion_tokens"] == len(line["ids"])
    assert 0 < usage["soft_steps"] <= usage["reasoning_tokens"] < usage["completion_tokens"]
    assert line["finish_reason"] == "stop" and line["thinking_end"] == "model"
    assert "<think>" not in line["thinking"] + line["answer"] and "</think>" not in line["thinking"] + line["answer"]
    assert not line["thinking"].startswith("\n") and not line["thinking"].endswith("\n")
    assert generate([chat(question)]).lines[0]["custom_id"] is None


def test_trace_shape():
    line = generate([chat(problems(1)[0], soft_thinking={"return_trace": True})]).lines[0]
    trace = line["trace"]
    assert [r["step"] for r in trace] == list(range(len(trace)))
    assert [r["id"] for r in trace] == line["ids"]
    soft = [r for r in trace if "ids" in r]
    assert len(soft) == line["usage"]["soft_steps"]
    assert sum(r["phase"] == "thinking" for r in trace) == line["usage"]["reasoning_tokens"]
    for r in soft:
        assert r["phase"] == "thinking" and r["ids"][0] == r["id"] and len(set(r["ids"])) == len(r["ids"]) <= 10
        assert r["weights"] == sorted(r["weights"], reverse=True)
        assert abs(sum(r["weights"]) - 1) < 1e-5 and min(r["weights"]) > 0
    thinking = [r["entropy"] for r in trace if r["phase"] == "thinking"]
    assert math.isclose(sum(thinking) / len(thinking), line["mean_entropy"], rel_tol=1e-6)


def test_trace_is_cut_not_renormalised():
    full = generate([chat(problems(1)[0], soft_thinking={"return_trace": True})]).lines[0]["trace"]
    cut = generate([chat(problems(1)[0], soft_thinking={"return_trace": 2})]).lines[0]["trace"]
    for a, b in zip(full, cut, strict=True):
        assert b.get("ids") == (a["ids"][:2] if "ids" in a else None)
        assert b.get("weights") == (a["weights"][:2] if "weights" in a else None)


def test_stop_string_ends_the_answer_and_uncounts_what_follows():
    request = chat(problems(1)[0], temperature=0)
    plain = generate([request]).lines[0]
    assert "boxed" in plain["answer"]
    stopped = generate([{**request, "stop": ["boxed"]}]).lines[0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == "boxed"
    assert stopped["answer"] == plain["answer"].split("boxed")[0]
    assert stopped["ids"] == plain["ids"][: len(stopped["ids"])]
    assert stopped["usage"]["completion_tokens"] == len(stopped["ids"]) < len(plain["ids"])
    kept = generate([{**request, "stop": "boxed", "include_stop_str_in_output": True}]).lines[0]
    assert kept["answer"].endswith("boxed")


def test_stop_token_ids_and_ignore_eos():
    request = chat(problems(1)[0], temperature=0, soft_thinking={"mode": "off"})
    plain = generate([request]).lines[0]
    end = plain["ids"][-1]
    stop = plain["ids"][-3]
    stopped = generate([{**request, "stop_token_ids": [stop]}]).lines[0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == stop and stopped["ids"][-1] == stop
    longer = generate([{**request, "ignore_eos": True, "max_tokens": len(plain["ids"]) + 5}]).lines[0]
    assert longer["ids"][: len(plain["ids"])] == plain["ids"] and longer["ids"][len(plain["ids"]) - 1] == end
    assert longer["finish_reason"] == "length" and len(longer["ids"]) == len(plain["ids"]) + 5


def test_length_inside_thinking():
    line = generate([chat(problems(1)[0], max_tokens=10)]).lines[0]
    assert line["finish_reason"] == "length" and line["thinking_end"] == "length" and line["answer"] == ""
    assert line["usage"]["reasoning_tokens"] == 10


def test_budget_and_close_text():
    line = generate([chat(problems(1)[0], soft_thinking={"budget": 12, "return_trace": True, "close_text": "So"})]).lines[0]
    assert line["thinking_end"] == "budget" and line["usage"]["reasoning_tokens"] == 12
    after = [r for r in line["trace"] if r["phase"] == "answer"]
    assert after[0]["p"] is None and line["answer"].lstrip("\n").startswith("So")


def test_choices_have_streams_of_their_own():
    lines = generate([chat(problems(1)[0], n=4, temperature=1.0, soft_thinking={"mode": "off"})]).lines
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert len({json.dumps(line["ids"]) for line in lines}) > 1


def test_a_seed_is_any_64_bits():
    """As in JSON, where a number above 2^63 - 1 is written as the negative one of the same bits."""
    request = chat(problems(1)[0], max_tokens=8, soft_thinking={"mode": "gumbel", "temperature": 2})
    high = generate([request], "--seed", "18446744073709551615")
    assert high.status == 0, high.err
    assert high.out == generate([request], "--seed", "-1").out == generate([{**request, "seed": -1}]).out
    assert generate([request], "--seed", "18446744073709551616").status == 2


def test_the_watchdog_ends_a_circle():
    """One id again and again: with --watchdog-repeats N its Nth time is the end, and the step says </think>."""
    request = chat(problems(1)[0], logit_bias={"100": 100}, max_tokens=40, soft_thinking={"cold_stop": False})
    free, caught = (generate([request], "--watchdog-repeats", n).lines[0] for n in ("0", "5"))
    assert free["thinking_end"] == "length" and free["ids"] == [100] * 40
    assert caught["thinking_end"] == "watchdog" and caught["ids"][:4] == [100] * 4 != caught["ids"][1:5]
    assert caught["usage"]["reasoning_tokens"] == 5
    refused = launch("generate", "--watchdog-repeats", "1", "-p", "x")
    assert refused.status == 2 and b"from 2 to 32" in refused.err


def test_shared_thinking_thinks_once():
    lines = generate([chat(problems(1)[0], n=3, soft_thinking={"mode": "gumbel", "share_thinking": True})]).lines
    assert len({line["thinking"] for line in lines}) == 1 and lines[0]["thinking"]
    alone = generate([chat(problems(1)[0], n=1, soft_thinking={"mode": "gumbel"})]).lines[0]
    assert lines[0]["thinking"] == alone["thinking"]


def test_logprobs():
    line = generate([chat(problems(1)[0], logprobs=True, top_logprobs=2, temperature=0)]).lines[0]
    logprobs = line["logprobs"]
    assert len(logprobs["reasoning"]) == line["usage"]["reasoning_tokens"]
    assert len(logprobs["reasoning"]) + len(logprobs["content"]) == len(line["ids"])
    for record in logprobs["content"]:
        best = record["top_logprobs"][0]
        assert len(record["top_logprobs"]) == 2
        assert best["token"] == record["token"] and best["logprob"] == record["logprob"]  # temperature 0
        assert bytes(record["bytes"]).decode(errors="replace") == record["token"]


def test_soft_of_width_one_is_greedy():
    questions = problems(4)
    soft = [chat(q, temperature=0, soft_thinking={"mode": "soft", "max_topk": 1, "cold_stop": False}) for q in questions]
    hard = [chat(q, temperature=0, soft_thinking={"mode": "off"}) for q in questions]
    assert [x["ids"] for x in generate(soft).lines] == [x["ids"] for x in generate(hard).lines]


@pytest.mark.slow
def test_two_hundred_requests_queue():
    requests = [{"prompt": [1, 4 + i % 700], "max_tokens": 3, "custom_id": i} for i in range(200)]
    lines = generate(requests, "--max-num-seqs", "64", ranks=2).lines
    assert [line["custom_id"] for line in lines] == list(range(200))


@pytest.mark.parametrize("ranks", [0, 2])
def test_prompt_streams_to_standard_output(ranks):
    """In a pipe: the answer alone, no colours, no thinking; the summary on standard error."""
    result = launch("generate", "-p", problems(1)[0], "--seed", "7", "--temperature", "0", ranks=ranks)
    assert result.status == 0
    line = generate([chat(problems(1)[0], temperature=0)]).lines[0]
    assert result.out.decode().replace("\r\n", "\n") == line["answer"].rstrip("\n") + "\n"
    assert any("thinking" in m and "tokens/s" in m for m in result.messages)


def test_raw_prompt():
    result = launch("generate", "--raw", "-p", "So 3+4=", "--seed", "1", "--max-tokens", "8", "--quiet", "--think", "off")
    assert result.status == 0 and result.out


def test_prompt_with_an_output_file_writes_the_line_too(tmp_path):
    path = tmp_path / "out.jsonl"
    result = launch("generate", "-p", problems(1)[0], "--seed", "7", "--return-trace", "--output", path, "--quiet")
    assert result.status == 0 and result.out
    expected = generate([chat(problems(1)[0], soft_thinking={"return_trace": True})])
    assert path.read_bytes() == expected.out

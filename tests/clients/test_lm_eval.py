"""lm-evaluation-harness, offline: local-completions scores choices from token ids (echo, logprobs, max_tokens 1) and
generates; local-chat-completions answers questions. The tasks are made here, so that nothing is fetched."""
import json
import os
import subprocess
import sys

import httpx
import pytest

from places import TINY

CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: %(data)s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CHAT = """
task: problems
dataset_path: json
dataset_kwargs: {data_files: {test: %(data)s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 300, do_sample: false}
filter_list: [{name: boxed, filter: [{function: regex, regex_pattern: 'boxed\\{(\\d+)\\}'}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def run(folder, name, task, lines, kind, arguments, *more):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.yaml").write_text(task % {"data": folder / f"{name}.jsonl"})
    command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments, "--tasks", name, "--include_path", folder,
               "--output_path", folder / name, "--log_samples", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder),
                   "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (samples,) = (folder / name).rglob("samples_*.jsonl")
    (results,) = (folder / name).rglob("results_*.json")
    return json.loads(results.read_text())["results"][name], [json.loads(line) for line in samples.read_text().splitlines()]


def test_local_completions(server, tmp_path):
    sums = [(a, b) for a in range(3, 12, 2) for b in range(2, 9, 3)]
    lines = [{"question": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1), str(a + b + 7)], "label": 0} for a, b in sums]
    arguments = f"model=tiny,base_url={server.url}/v1/completions,tokenizer={TINY},tokenizer_backend=huggingface,num_concurrent=4,max_retries=1"
    results, samples = run(tmp_path, "sums", CHOICE, lines, "local-completions", arguments)
    assert len(samples) == len(lines) and results["acc,none"] >= 0.8, results
    ids = httpx.post(server.url + "/tokenize", json={"prompt": "3+2=5"}).json()["tokens"]
    scored = httpx.post(server.url + "/v1/completions", json={"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}).json()
    (first,) = (s for s in samples if s["doc"]["question"] == "3+2=")
    assert float(first["resps"][0][0][0]) == pytest.approx(scored["choices"][0]["logprobs"]["token_logprobs"][-1], rel=1e-5)


def test_local_chat_completions(server, questions, tmp_path):
    with open(TINY / "problems_dev.jsonl", encoding="utf-8") as f:
        lines = [{k: str(v) for k, v in json.loads(f.readline()).items()} for _ in range(20)]
    arguments = f"model=tiny,base_url={server.url}/v1/chat/completions,num_concurrent=4,max_retries=1"
    results, samples = run(tmp_path, "problems", CHAT, lines, "local-chat-completions", arguments, "--apply_chat_template")
    assert len(samples) == 20 and results["exact_match,boxed"] >= 0.5, results

"""tokenize, score, inspect, bench, help: what they print."""
import json
import math
import re

import pytest
from conftest import BUILD, TINY, chat, generate, launch, problems


def test_help_and_version():
    top = launch("--help", model=None)
    assert top.status == 0 and b"generate" in top.out
    assert launch("--version", model=None).out.startswith(b"sfumato ")
    assert launch("--help", model=None, ranks=2).out == top.out
    for command in ("generate", "score", "tokenize", "inspect", "bench"):
        result = launch(command, "--help", model=None)
        assert result.status == 0 and b"--model" in result.out and not result.messages
    text = launch("generate", "--help", model=None).out
    for flag in (b"--max-topk", b"--cold-stop-entropy", b"--think-open", b"--kv-memory", b"--prefix-cache", b"--compat"):
        assert flag in text
    assert launch("generate", "--help", model=None, ranks=2).out == text  # once, not twice
    assert b" Thinking:" in text and b" Answer:" in text
    tokenize = launch("tokenize", "--help", model=None).out  # no title without options under it
    assert not any(title in tokenize for title in (b" Thinking:", b" Answer:", b" Limits")) and b" Model and machine:" in tokenize


def test_tokenize_round_trip():
    texts = ["Tom has 3 apples.", "naïve café ☕", "", "<think>x</think>"]
    result = launch("tokenize", "--quiet", stdin=[{"text": t, "add_special": False} for t in texts])
    assert result.status == 0
    ids = [line["ids"] for line in result.lines]
    back = launch("tokenize", "--decode", "--quiet", stdin=[{"ids": i} for i in ids])
    assert [line["text"] for line in back.lines] == texts


def test_tokenize_chat():
    line = launch("tokenize", "--chat", "--quiet", stdin=[chat("hi")]).lines[0]
    assert line["text"].endswith("<think>\n") and "hi" in line["text"]
    assert generate([chat("hi", max_tokens=1)]).lines[0]["prompt_tokens"] == len(line["ids"])


def test_tokenize_chat_of_a_config_without_length_limit(broken):
    """transformers writes int(1e30) for no limit: the template beside it counts all the same."""
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config |= {"model_max_length": int(1e30), "chat_template": "{{ messages[0].content }}!"}
    folder = broken(**{"tokenizer_config.json": json.dumps(config).encode()})
    assert launch("tokenize", "--chat", "--quiet", stdin=[chat("hi")], model=folder).lines[0]["text"] == "hi!"


def test_tokenize_bad_lines():
    result = launch("tokenize", "--decode", "--quiet", stdin=[{"ids": [0]}, {"ids": [10**6]}, {"ids": "x"}, {"ids": [0], "skip": True}])
    assert result.status == 1 and ["error" in line for line in result.lines] == [False, True, True, True]
    misspelt = launch("tokenize", "--quiet", stdin=[{"text": "a", "add_specials": False}])
    assert misspelt.status == 1 and misspelt.lines[0]["error"]["param"] == "add_specials"


def scored(requests, *args, **more):
    result = launch("score", "--quiet", "--input", "-", *args, stdin=requests, **more)
    assert result.status == 0, result.err
    return result.lines


@pytest.mark.parametrize("ranks", [0, 2])
def test_score_of_a_trace_gives_the_entropies_of_the_run(ranks):
    """Teacher-forced over the recorded mixtures at T = 1, every H comes back bit for bit."""
    request = chat(problems(1)[0], temperature=1, soft_thinking={"return_trace": True, "temperature": 1})
    line = generate([request]).lines[0]
    prompt = launch("tokenize", "--chat", "--quiet", stdin=[request | {}]).lines[0]["ids"]
    steps = [list(map(list, zip(r["ids"], r["weights"]))) if "ids" in r else r["id"] for r in line["trace"]]
    positions = scored([{"steps": prompt + steps}], "--top", "2", ranks=ranks)[0]["positions"]
    assert len(positions) == len(prompt) + len(steps)
    for record, position in zip(line["trace"], positions[len(prompt) - 1 :]):
        if record["phase"] == "thinking":
            assert record["entropy"] == position["entropy"], record["step"]
    assert positions[-1]["logprob"] is None and all(p["logprob"] <= 0 for p in positions[:-1])
    for p in positions:
        assert len(p["top"]) == 2 and p["top"][0][1] >= p["top"][1][1]


def test_score_numbers_agree_with_one_another():
    ids = [0, 1, 301, 2, 4]
    positions = scored([{"steps": ids}], "--top", "20")[0]["positions"]
    for here, following in zip(positions, ids[1:]):
        for i, logprob in here["top"]:
            if i == following:
                assert logprob == pytest.approx(here["logprob"], abs=1e-6)
    mixed = scored([{"steps": [0, 1, [[301, 0.25], [299, 0.75]]]}])[0]["positions"]
    a = scored([{"steps": [0, 1, 301]}, {"steps": [0, 1, 299]}])
    want = 0.25 * a[0]["positions"][1]["logprob"] + 0.75 * a[1]["positions"][1]["logprob"]
    assert mixed[1]["logprob"] == pytest.approx(want, abs=1e-5)
    assert math.isfinite(mixed[2]["entropy"])


def test_score_refuses():
    bad = [{"steps": []}, {"steps": [[[1, 0.5]]]}, {"steps": [[[1, 0.5], [1, 0.5]]]}, {"steps": [[[1, -1], [2, 2]]]},
           {"steps": [99999]}, {"steps": [1] * 2000}, {"steps": [1], "wibble": 1}, {}]
    result = launch("score", "--quiet", "--input", "-", stdin=bad)
    assert result.status == 1 and all("error" in line for line in result.lines) and len(result.lines) == len(bad)


def test_inspect():
    text = launch("inspect", "--quiet", "--ranks", "3").out.decode()
    assert "Qwen3" in text and "rank counts       1..8" in text
    facts = json.loads(launch("inspect", "--quiet", "--json", "--ranks", "4").out)
    assert len(facts["ranks"]) == 4 and facts["dtype"] == "bf16"
    # 4 layers, 1 of 4 kv heads of 32, keys and values, 2 bytes each
    assert facts["ranks"][0]["kv_bytes_per_token"] == 4 * 1 * 32 * 2 * 2


@pytest.mark.slow
def test_bench_step_smoke():
    result = launch("bench", "step", "--quiet", "--batch", "1,3", "--context", "20", "--rounds", "3", "--json", ranks=2)
    assert result.status == 0, result.err
    facts = json.loads(result.out.decode().splitlines()[-1])
    assert facts["ranks"] == 2 and [b["batch"] for b in facts["batches"]] == [1, 3]
    for b in facts["batches"]:
        assert b["step_ms"]["min"] > 0 and 0 <= b["comm_share"] < 1 and 0 <= b["sampling_share"] < 1
    again = launch("bench", "step", "--quiet", "--batch", "1,3", "--context", "20", "--rounds", "4", "--json")
    assert json.loads(again.out.splitlines()[-1])["decision_hash"] == facts["decision_hash"]  # of a run with other rounds and ranks
    alone = launch("bench", "step", "--quiet", "--batch", "2", "--context", "20", "--rounds", "3", "--layers", "2",
                   "--dims", TINY / "config.json", model=None)
    assert alone.status == 0 and b"floor/step" in alone.out, alone.err


@pytest.mark.slow
def test_bench_step_of_one_rank_among_many(tmp_path):
    """Shares add up to the whole; a collective takes what it is told to; the price of soft thinking is reported."""
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 512,
             "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 512,
             "rms_norm_eps": 1e-5, "rope_theta": 10000, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
             "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(shape))

    def bench(*flags):
        result = launch("bench", "step", "--quiet", "--dims", str(tmp_path / "config.json"), "--batch", "1", "--context", "20",
                        "--rounds", "3", "--json", *flags, model=None)
        assert result.status == 0, result.err
        return json.loads(result.out.splitlines()[-1])

    # q and o 128 x 128, k and v 64 x 128, gate, up and down 512 x 128, two vocabularies, all of bf16
    whole = 2 * (2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 512 * 128) + 2 * 512 * 128)
    assert bench()["weight_bytes"] == whole
    shares = [bench("--rank-of", f"{r}/4") for r in range(4)]
    assert sum(s["weight_bytes"] for s in shares) == whole
    assert shares[3]["rank_of"] == "3/4" and shares[3]["ranks"] == 1
    slow = bench("--rank-of", "2/4", "--collective-us", "2000", "--compare-hard")["batches"][0]
    assert slow["step_ms"]["min"] >= 6 * 2.0  # the concept token, two a layer, the gather
    assert slow["hard_step_ms"]["min"] >= 6 * 2.0 and slow["soft_cost"] > -1


@pytest.mark.slow  # two minutes with sanitizers
def test_selftest_checks_the_verbs_with_all_threads():
    """As many as `generate` computes with: opening a backend leaves its caller one core."""
    threads = re.search(rb", (\d+) threads?,", launch("generate", "--raw", "-p", "x", "--max-tokens", "1").err)[1].decode()
    checks = launch("selftest", "verbs", "--quiet", "--json", model=None).lines[-1]["checks"]
    (speed,) = [c["detail"] for c in checks if c.get("note") == "read, multiply-add"]
    assert speed.endswith(f", {threads} threads"), speed


def test_bench_load_reads_what_is_loaded(broken):
    """The files of the index, each once, and no other that lies there."""
    folder = broken()
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    (folder / "model.safetensors").rename(folder / "only.safetensors")
    (folder / "consolidated.safetensors").write_bytes(bytes(1000))
    names = {name: "only.safetensors" for name in header if name != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    result = launch("bench", "load", "--rounds", "3", "--json", model=folder)
    assert result.status == 0, result.err
    assert json.loads(result.out.decode().splitlines()[-1])["file_bytes"] == len(raw)


def test_bench_others_smoke():
    assert b"candidates" in launch("bench", "sampler", "--quiet", "--rounds", "3", model=None).out
    assert launch("bench", "tokenizer", "--quiet").status == 0
    alone = launch("bench", "comm", "--quiet", model=None)
    assert alone.status == 2 and "two ranks" in alone.messages[0]


def test_default_model_is_found_beside_the_program():
    if not (BUILD.parent / "models" / "tiny").exists():
        pytest.skip("the build folder is not inside the source tree")
    assert launch("inspect", "--quiet", model=None).out.startswith(b"model             ")

"""Checkpoints with fp8 weights: every backend reads them exactly."""
import json

import fp8_model
import pytest
from conftest import launch, problems
from places import TINY
from test_cuda import emulated, needs_emulation


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives (fp8 checkpoint, the same numbers in fp32) of models/tiny."""
    made = {}

    def of(scheme):
        if scheme not in made:
            top = tmp_path_factory.mktemp(scheme)
            made[scheme] = fp8_model.make(TINY, top / "fp8", top / "fp32", scheme)
        return made[scheme]

    return of


def score(model, *args):
    lines = [{"text": text} for text in problems(2)]
    result = launch("score", "--quiet", "--input", "-", "--output", "-", "--top", "5", *args, model=model, stdin=lines)
    assert result.status == 0, result.err
    return result.out


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_the_cpu_computes_with_the_very_numbers(folders, scheme):
    quantised, exact = folders(scheme)
    assert score(quantised, "--dtype", "f32") == score(exact)
    assert score(quantised, "--dtype", "f32") != score(TINY, "--dtype", "f32")


def test_inspect_knows_the_format(folders):
    result = launch("inspect", "--json", model=folders("block")[0])
    facts = json.loads(result.out)
    assert result.status == 0 and "fp8" in json.dumps(facts), facts


def test_the_cpu_has_no_fp8_weights():
    result = launch("generate", "-p", "x", "--quiet", "--dtype", "fp8")
    assert result.status == 2 and "--dtype fp8 is for --backend cuda" in result.messages[-1], result.messages


def test_inspect_counts_fp8_bytes():
    """One slab of models/tiny: tiles of 16 rows and 128 columns, two scales each; the rest as in bf16."""
    result = launch("inspect", "--json", "--slabs", "1", "--dtype", "fp8")
    facts = json.loads(result.out)
    assert result.status == 0 and facts["dtype"] == "fp8"
    tile = 16 * 128 + 8
    layer = tile * (2 * 512 // 16 + 2 * 192 // 16 + 2 * 2 * 384 // 16 + 3 * 192 // 16)  # qkv, o, gate and up, down
    vectors = 4 * (2 * 192 + 2 * 32)
    vocabulary = 2 * 768 * 192 * 2
    assert facts["ranks"][0]["weight_bytes"] == 4 * (layer + vectors) + vocabulary + 4 * 192, facts["ranks"][0]


@needs_emulation
def test_a_gpu_computes_with_the_very_numbers(folders, tmp_path):
    """fp8 weights and bf16 activations against fp32 on the same numbers: what bf16 activations cost, not more."""
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"text": problems(1)[0][:40]}) + "\n")
    quantised, exact = folders("block")
    found = []
    for model, options in ((quantised, ["--backend", "cuda", "--slabs", "1"]), (exact, ["--dtype", "f32"])):
        status, messages, out = emulated("score", "--quiet", "--model", str(model), "--input", str(lines), "--output", "-",
                                         "--top", "3", *options)
        assert status == 0, messages
        found.append(json.loads(out)["positions"])
    errors = [abs(a["logprob"] - b["logprob"]) for a, b in zip(*found) if a["logprob"] is not None]
    assert len(errors) > 5 and sum(errors) / len(errors) < 0.08 and max(errors) < 0.4, errors
    for a, b in zip(*found):
        if b["top"][0][1] - b["top"][1][1] > 0.5:
            assert a["top"][0][0] == b["top"][0][0]


def test_bench_load_measures_loading_beside_reading(folders):
    result = launch("bench", "load", "--rounds", "3", "--json", model=folders("block")[0])
    assert result.status == 0, result.err
    facts = json.loads(result.out.decode().splitlines()[-1])
    assert facts["file_bytes"] == (folders("block")[0] / "model.safetensors").stat().st_size
    for name in ("hot", "cold"):
        for key in ("read_gbs", "fill_gbs", "load_gbs", "load_of_read", "load_of_fill"):
            assert 0 < facts[name][key]["min"] <= facts[name][key]["median"] <= facts[name][key]["max"]


@needs_emulation
def test_ranks_quantise_and_add_to_the_same_bits(tmp_path):
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text":"What is 2+3?"}\n')
    outs = [emulated("score", "--quiet", "--model", str(TINY), "--input", str(lines), "--output", "-", "--top", "3", "--dtype", "fp8",
                     "--backend", "cuda", "--comm", "mpi", "--deterministic", "--max-num-batched-tokens", "32", ranks=ranks)
            for ranks in (1, 2)]
    assert outs[0][0] == 0 and len(outs[0][2]) > 500, outs[0]
    assert outs[0] == outs[1]

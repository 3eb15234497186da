"""--backend cuda and --comm nccl without a GPU.

The product's own program must start without a driver and say what is missing. The emulated program (tests/
emulated.cmake) has the same sources over a stub runtime, kernels on fibres and a stub NCCL that injects errors.
"""
import json
import os
import pathlib
import re
import subprocess

import pytest
from conftest import BUILD, MPI, TINY, launch

EMULATED = pathlib.Path(BUILD) / "tests" / "sfumato_emulated"
STUB = pathlib.Path(BUILD) / "tests" / "stub"
needs_emulation = pytest.mark.skipif(not EMULATED.exists(), reason="tests/sfumato_emulated is not built (no g++)")


def emulated(*args, ranks=0, env=None, timeout=100):
    command = ["mpirun", "-n", str(ranks)] if ranks else []
    command += [str(EMULATED), *args]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SFUMATO_")}
    environment |= {**MPI, "LD_LIBRARY_PATH": str(STUB), **(env or {})}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=timeout)
    messages = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith("sfumato: ")]
    return done.returncode, messages, done.stdout.decode()


def test_a_machine_without_a_gpu_is_told_so():
    if pathlib.Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    result = launch("generate", "-p", "2+3", "--quiet", "--backend", "cuda")
    assert result.status == 2
    assert len(result.messages) == 1, result.messages
    assert "cuda" in result.messages[0] and "cpu" in result.messages[0]


def test_auto_computes_on_the_cpu():
    result = launch("generate", "-p", "2+3", "--backend", "auto", "--max-tokens", "2")
    assert result.status == 0, result.err
    gpu = [line for line in result.messages if "GPU" in line]
    assert len(gpu) <= 1, gpu  # none from a program built without CUDA


def test_the_ladder_runs_to_its_end_without_a_gpu(tmp_path):
    if pathlib.Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    ladder = pathlib.Path(os.environ["SFUMATO_SOURCE_DIR"]) / "tests/gpu/ladder"
    done = subprocess.run([ladder, BUILD, "--report", tmp_path / "report.json"], capture_output=True, timeout=60)
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 2 and b"nothing was checked" in done.stdout, done.stderr
    assert len(report["steps"]) >= 15 and {s["verdict"] for s in report["steps"]} == {"skip"}
    assert "libmpi.so" in " ".join(report["shared_libraries"])
    assert not any("cuda" in name for name in report["shared_libraries"])  # looked for when asked for


@needs_emulation
def test_fp8_kv_halves_the_pages_and_is_for_the_gpu():
    per_token = {}
    for kind in ("bf16", "fp8"):
        status, _, out = emulated("inspect", "--model", str(TINY), "--json", "--kv-dtype", kind)
        facts = json.loads(out)
        assert status == 0 and facts["kv_dtype"] == kind
        per_token[kind] = facts["ranks"][0]["kv_bytes_per_token"]
    assert per_token["bf16"] == 2 * per_token["fp8"]
    status, messages, _ = emulated("generate", "--model", str(TINY), "-p", "x", "--quiet", "--kv-dtype", "fp8")
    assert status == 2 and len(messages) == 1 and "--kv-dtype fp8 is for --backend cuda" in messages[0], messages


@needs_emulation
def test_no_device():
    status, messages, _ = emulated("selftest", "--backend", "cuda", "--quiet", env={"CUDA_STUB": "none"})
    assert status == 2 and len(messages) == 1 and "no GPU can be used here" in messages[0], messages


@needs_emulation
def test_a_cpu_option_is_not_ignored():
    status, messages, _ = emulated("generate", "-p", "x", "--backend", "cuda", "--isa", "avx2", "--quiet",
                                   "--model", str(pathlib.Path(os.environ["SFUMATO_SOURCE_DIR"]) / "models/tiny"))
    assert status == 2 and "--isa" in messages[-1], messages


@needs_emulation
def test_more_rows_than_a_grid_has():
    status, messages, _ = emulated("generate", "--model", str(TINY), "-p", "2+3", "--backend", "cuda", "--quiet",
                                   "--max-num-batched-tokens", "65536")
    assert status == 2 and "--max-num-batched-tokens" in messages[-1] and "65535" in messages[-1], messages


@needs_emulation
def test_nccl_needs_the_cuda_backend():
    status, messages, _ = emulated("selftest", "--comm", "nccl", "--quiet")
    assert status == 2 and "--comm nccl needs the CUDA backend" in messages[-1], messages


@needs_emulation
def test_no_library():
    status, messages, _ = emulated("selftest", "--backend", "cuda", "--comm", "nccl", "--quiet",
                                   env={"LD_LIBRARY_PATH": "/nowhere", "LD_PRELOAD": ""})
    if status != 2:
        pytest.skip("a real libnccl.so.2 is on the default path")
    assert "libnccl.so.2 cannot be loaded" in messages[-1], messages


@needs_emulation
@pytest.mark.parametrize("fault, word", [("no-id", "NCCL cannot start"), ("init:1", "rank 1: NCCL cannot connect")])
def test_nccl_cannot_start(fault, word):
    status, messages, _ = emulated("selftest", "--backend", "cuda", "--comm", "nccl", "--quiet", ranks=2,
                                   env={"NCCL_STUB": fault})
    assert status == 5, (status, messages)
    assert sum(word in line for line in messages) == 1, messages


@needs_emulation
@pytest.mark.parametrize("fault, status, rank, words", [
    ("async:1", 5, 1, "remote process exited"),
    ("call:0", 5, 0, "invalid usage"),
    ("hang:1", 6, 1, "has not answered in time"),
])
def test_nccl_fails_in_a_step(fault, status, rank, words):
    """The whole job ends, with this rank's name, once; nobody waits for ever."""
    got, messages, _ = emulated("selftest", "comm", "--backend", "cuda", "--comm", "nccl", "--quiet",
                                "--collective-timeout", "2", ranks=2, env={"NCCL_STUB": fault})
    assert got == status, (got, messages)
    said = [line for line in messages if words in line]
    assert len(said) == 1 and f"rank {rank} on " in said[0] and "stopping all ranks" in said[0], messages


@needs_emulation
def test_a_device_fault_ends_the_job():
    got, messages, _ = emulated("selftest", "comm", "--backend", "cuda", "--quiet", ranks=2,
                                env={"CUDA_STUB": "fault:9"})
    assert got == 5, (got, messages)
    assert any("device fault on rank" in line for line in messages), messages


@needs_emulation
@pytest.mark.parametrize("more", [(), ("--deterministic",)])
def test_nccl_sums(more):
    got, messages, out = emulated("selftest", "comm", "--backend", "cuda", "--comm", "nccl", "--quiet", *more, ranks=2)
    assert got == 0 and " 0 failed" in out and "communication nccl, window" in out, (messages, out)


# --- which way sums go ---

SMALL = ("selftest", "comm", "--backend", "cuda", "--comm")


@needs_emulation
@pytest.mark.parametrize("how, words", [
    ("fused", "needs the CUDA backend"),
    ("nccl", "needs the CUDA backend"),
])
def test_device_paths_need_the_cuda_backend(how, words):
    status, messages, _ = emulated("selftest", "comm", "--comm", how, "--quiet")
    assert status == 2 and words in messages[-1] and how in messages[-1], messages


@needs_emulation
def test_fused_refuses_gpus_that_do_not_reach_one_another():
    status, messages, _ = emulated(*SMALL, "fused", "--quiet", ranks=2, env={"CUDA_STUB": "no-peer"})
    assert status == 2, (status, messages)
    assert sum("cannot reach the memory" in line and "--comm nccl" in line for line in messages) == 1, messages


@needs_emulation
def test_nccl_refuses_two_ranks_on_a_gpu():
    env = {"CUDA_STUB": "one"}
    status, messages, _ = emulated(*SMALL, "nccl", "--quiet", ranks=2, env=env)
    assert status == 2, (status, messages)
    said = [line for line in messages if "ranks 0 and 1 share a GPU" in line]
    assert len(said) == 1 and "--comm mpi" in said[0], messages
    # a library that can, and a user who says so; "2.28" and 2.30.2 do not
    env |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    assert emulated(*SMALL, "nccl", "--quiet", ranks=2, env=env)[0] == 2
    assert emulated(*SMALL, "nccl", "--quiet", ranks=2, env=env | {"NCCL_STUB": "version-23002"})[0] == 2
    got, messages, out = emulated(*SMALL, "nccl", "--quiet", ranks=2, env=env | {"NCCL_STUB": "version-23003"})
    assert got == 0 and "communication nccl" in out, (messages, out)


@needs_emulation
def test_nccl_without_windows():
    """One rank cannot register its memory: no rank uses a window."""
    got, messages, out = emulated(*SMALL, "nccl", ranks=2, env={"NCCL_STUB": "no-window:1"})
    assert got == 0 and " 0 failed" in out, (messages, out)
    assert any("NCCL 2.28.9, without symmetric windows" in line for line in messages), messages


@needs_emulation
@pytest.mark.parametrize("env, path, why", [
    ({}, "fused", "self-test passed"),
    ({"CUDA_STUB": "no-peer"}, "nccl", "not fused: "),
    ({"CUDA_STUB": "one"}, "staged", "not NCCL: "),
    ({"CUDA_STUB": "no-peer", "NCCL_STUB": "init:1"}, "staged", "NCCL cannot connect"),
])
def test_auto_takes_the_best_that_works(env, path, why):
    got, messages, out = emulated(*SMALL, "auto", ranks=2, env=env)
    assert got == 0 and " 0 failed" in out, (messages, out)
    assert f"communication {path}, window" in out, out
    assert any(why in line for line in messages), messages


@needs_emulation
def test_a_late_rank_ends_a_fused_job():
    """Rank 0's kernel leaves by its patience, and the message names operation and rank."""
    got, messages, _ = emulated(*SMALL, "fused", "--quiet", "--collective-timeout", "5", ranks=2,
                                env={"CUDA_STUB": "late:1"})
    said = [line for line in messages if "which has not arrived" in line]
    assert got == 6 and len(said) == 1, (got, messages)
    assert re.search(r"rank 0 on \S+ waited 5\.0 s at step \d+ in fused all-\S+ \d+ for rank 1 on ", said[0]), said


def test_selftest_of_the_cpu():
    result = launch("selftest", "comm", "--quiet", "--json", ranks=3, model=None)
    assert result.status == 0, result.err
    report = result.lines[-1]
    assert report["failed"] == 0 and report["passed"] >= 4 and report["ranks"] == 3


def test_selftest_knows_its_parts():
    result = launch("selftest", "everything", "--quiet", model=None)
    assert result.status == 2 and "verbs, comm and model" in result.messages[-1]

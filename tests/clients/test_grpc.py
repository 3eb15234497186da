"""R14 with grpcio of PyPI: stubs generated from proto/, and the health stub that grpcio itself ships. The details are
in blackbox/test_grpc.py; here the newest client is what is tested."""
import importlib
import os
import pathlib
import sys

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("sfumato", "vllm_engine"):
        assert protoc.main(["", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}", f"{name}.proto"]) == 0
    sys.path.insert(0, os.fspath(folder))
    return {name: importlib.import_module(name) for name in ("sfumato_pb2", "sfumato_pb2_grpc", "vllm_engine_pb2", "vllm_engine_pb2_grpc")}


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc) as c:
        yield c


def test_health(channel):
    health = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", "sfumato.v1.Inference", "vllm.grpc.engine.VllmEngine"):
        assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status == serving
    with pytest.raises(grpc.RpcError) as e:
        health.Check(health_pb2.HealthCheckRequest(service="none"), timeout=10)
    assert e.value.code() == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
    assert next(watch).status == serving
    watch.cancel()


def test_chat_is_the_http_reply(stubs, channel, server, question):
    pb, inference = stubs["sfumato_pb2"], stubs["sfumato_pb2_grpc"].InferenceStub(channel)
    request = pb.Request(messages=[pb.Message(role=b"user", content=question.encode())], seed=7, stream=True)
    *deltas, last = inference.Chat(request, timeout=60)
    http = httpx.post(server.url + "/v1/chat/completions", timeout=60,
                      json={"messages": [{"role": "user", "content": question}], "seed": 7}).json()
    message = http["choices"][0]["message"]
    assert "".join(e.delta.text for e in deltas) + last.finish.whole.text == message["content"]
    assert "".join(e.delta.reasoning for e in deltas) == message["reasoning"]
    assert last.finish.finish_reason == "stop" and last.finish.usage.completion_tokens == http["usage"]["completion_tokens"]
    assert last.finish.info.thinking_end == http["choices"][0]["sfumato"]["thinking_end"]


def test_vllm_engine_by_ids(stubs, channel, server):
    pb, engine = stubs["vllm_engine_pb2"], stubs["vllm_engine_pb2_grpc"].VllmEngineStub(channel)
    ids = httpx.post(server.url + "/tokenize", json={"prompt": "8+4="}).json()["tokens"]
    request = pb.GenerateRequest(request_id=b"r1", tokenized=pb.TokenizedInput(input_ids=ids),
                                 sampling_params=pb.SamplingParams(temperature=0, max_tokens=4, skip_special_tokens=True))
    *_, last = engine.Generate(request, timeout=60)
    text = httpx.post(server.url + "/detokenize", json={"tokens": list(last.complete.output_ids)}).json()["prompt"]
    http = httpx.post(server.url + "/v1/completions", json={"prompt": ids, "max_tokens": 4, "temperature": 0}).json()
    assert text == http["choices"][0]["text"]
    info = engine.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
    assert info.max_context_length == 1024 and info.is_generation


def test_errors_and_cancel(stubs, channel, question):
    pb, inference = stubs["sfumato_pb2"], stubs["sfumato_pb2_grpc"].InferenceStub(channel)
    message = pb.Message(role=b"user", content=question.encode())
    for request, code in ((pb.Request(messages=[message], temperature=9), grpc.StatusCode.INVALID_ARGUMENT),
                          (pb.Request(messages=[message], model=b"none"), grpc.StatusCode.NOT_FOUND)):
        with pytest.raises(grpc.RpcError) as e:
            list(inference.Chat(request, timeout=60))
        assert e.value.code() == code and e.value.details()
    long = pb.Request(messages=[message], max_tokens=900, ignore_eos=True, n=8, stream=True)
    with pytest.raises(grpc.RpcError) as e:
        list(inference.Chat(long, timeout=0.1))
    assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    call = inference.Chat(long)
    next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError) as e:
        list(call)
    assert e.value.code() == grpc.StatusCode.CANCELLED

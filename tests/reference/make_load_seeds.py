"""Seeds of the fuzz corpora of src/load: tests/data/fuzz/{safetensors,gguf,config}/.

Run by hand (pip install gguf numpy), its output is committed. The GGUF files come from the Python package
gguf, the others from the formats' definitions. Inputs that once crashed a parser are added beside them by hand.
"""
import json
import pathlib
import struct

import gguf
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent / "data" / "fuzz"


def put(corpus, name, data):
    folder = ROOT / corpus
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def safetensors(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def make_safetensors():
    def tensor(dtype, shape, begin, end):
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    good = {"__metadata__": {"format": "pt"}, "a.weight": tensor("F32", [2, 4], 0, 32),
            "b.weight": tensor("F16", [4, 2], 32, 48), "c.weight": tensor("BF16", [8], 48, 64),
            "d": tensor("I64", [1], 64, 72), "e": tensor("F32", [], 72, 76), "f": tensor("F32", [0, 5], 76, 76)}
    data = bytes(range(76))
    put("safetensors", "good", safetensors(good, data))
    put("safetensors", "overlap", safetensors({"a": tensor("F32", [4], 0, 16), "b": tensor("F32", [4], 8, 24)}, data))
    put("safetensors", "past_end", safetensors({"a": tensor("F32", [40], 0, 160)}, data))
    put("safetensors", "huge_shape", safetensors({"a": tensor("F32", [1 << 40, 1 << 40], 0, 0)}, data))
    put("safetensors", "huge_header", struct.pack("<Q", 1 << 62) + b"{}")
    put("safetensors", "deep", safetensors(b'{"a":' + b"[" * 3000, b""))
    put("safetensors", "twice", safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                                            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', data))
    put("safetensors", "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    put("safetensors", "empty", b"")


def llama(writer, types):
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "a", "b", "<|im_end|>"])
    writer.add_token_types([3, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    random = np.random.default_rng(1)
    writer.add_tensor("token_embd.weight", random.standard_normal((4, 256)).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    for name, kind, size in types:
        raw = random.integers(0, 256, (1, size), dtype=np.uint8)
        writer.add_tensor(name, raw, raw_dtype=kind)


def make_gguf():
    kinds = gguf.GGMLQuantizationType
    types = [("blk.0.attn_q.weight", kinds.Q8_0, 34), ("blk.0.attn_k.weight", kinds.Q4_0, 18),
             ("blk.0.attn_v.weight", kinds.Q4_1, 20), ("blk.0.attn_output.weight", kinds.Q5_0, 22),
             ("blk.0.ffn_gate.weight", kinds.Q5_1, 24), ("blk.0.ffn_up.weight", kinds.Q4_K, 144),
             ("blk.0.ffn_down.weight", kinds.Q5_K, 176), ("output.weight", kinds.Q6_K, 210)]
    for arch in ("llama", "qwen2", "qwen3"):
        path = ROOT / "gguf" / f"good_{arch}"
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(str(path), arch)
        if arch != "llama":
            writer.add_key_length(64)
        llama(writer, types if arch == "llama" else types[:2])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    good = (ROOT / "gguf" / "good_llama").read_bytes()
    put("gguf", "cut", good[: len(good) // 2])
    put("gguf", "many_tensors", good[:8] + struct.pack("<Q", 1 << 61) + good[16:])
    put("gguf", "many_keys", good[:16] + struct.pack("<Q", 1 << 61) + good[24:])
    key = b"tokenizer.ggml.tokens"
    at = good.index(key) + len(key) + 8
    put("gguf", "many_tokens", good[:at] + struct.pack("<Q", (1 << 63) + 5) + good[at + 8:])
    put("gguf", "nested_array", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1 << 40))
    put("gguf", "big_endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    put("gguf", "empty", b"")
    # no key_length: heads of 65536 / 4, with as many RoPE divisors
    sizes = {"block_count": 1, "embedding_length": 65536, "feed_forward_length": 64, "attention.head_count": 4,
             "context_length": 128}
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1 + len(sizes)) + text("general.architecture") + struct.pack("<I", 8)
    head += text("llama") + b"".join(text("llama." + k) + struct.pack("<II", 4, v) for k, v in sizes.items())
    head += text("rope_freqs.weight") + struct.pack("<IQIQ", 1, 8192, 0, 0)
    put("gguf", "wide_heads", head + bytes(-len(head) % 32 + 4 * 8192))


def make_config():
    base = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
            "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
            "hidden_act": "silu", "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 32768,
            "max_window_layers": 21, "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645}
    generation = {"eos_token_id": [151645, 151643], "temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True}
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

    def text(value):
        return json.dumps(value, separators=(",", ":")).encode()

    put("config", "qwen2", text(base) + b"\0" + text(generation))
    put("config", "llama3_old", text({**base, "architectures": ["LlamaForCausalLM"], "rope_scaling": llama3}))
    put("config", "llama3_new", text({**base, "architectures": ["LlamaForCausalLM"], "rope_parameters": llama3,
                                      "dtype": "float16", "eos_token_id": [1, 2, 3]}))
    put("config", "mistral_window", text({**base, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}))
    put("config", "qwen3", text({**base, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128,
                                 "attention_bias": False, "layer_types": ["full_attention"] * 24}))
    put("config", "yarn", text({**base, "rope_scaling": {"type": "yarn", "factor": 4.0}}))
    put("config", "negative", text({**base, "num_hidden_layers": -1}))
    put("config", "huge", text({**base, "hidden_size": 10 ** 18}))
    put("config", "no_json", b"<!DOCTYPE html>")
    put("config", "nulls", text({key: None for key in base}))


if __name__ == "__main__":
    make_safetensors()
    make_gguf()
    make_config()

"""Rows of a real GGUF file as Hugging Face would hold them, by the Python package gguf: for tests/b_gguf.c.

Run by hand (pip install gguf numpy; the file comes from launch/get-model smollm2), its output is committed:
    python3 tests/reference/gguf_rows.py models/cache/SmolLM2-135M-Instruct.Q4_1.gguf > tests/data/golden/gguf_smollm2.vec

q and k are brought back to Hugging Face's order of rows by the inverse of the converter's reshape.
    row HF-NAME ROW FIRST-COLUMN FP32-BITS-IN-HEX (eight numbers)
"""
import sys
from importlib.metadata import version

import gguf
import numpy as np

NAMES = [("model.embed_tokens.weight", "token_embd.weight", 0), ("model.norm.weight", "output_norm.weight", 0),
         ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", 0),
         ("model.layers.7.self_attn.q_proj.weight", "blk.7.attn_q.weight", 9),
         ("model.layers.7.self_attn.k_proj.weight", "blk.7.attn_k.weight", 3),
         ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight", 0),
         ("model.layers.29.self_attn.o_proj.weight", "blk.29.attn_output.weight", 0),
         ("model.layers.29.mlp.gate_proj.weight", "blk.29.ffn_gate.weight", 0),
         ("model.layers.29.mlp.up_proj.weight", "blk.29.ffn_up.weight", 0),
         ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight", 0)]


def main():
    tensors = {t.name: t for t in gguf.GGUFReader(sys.argv[1]).tensors}
    print("# made by tests/reference/gguf_rows.py with the Python package gguf", version("gguf"))
    random = np.random.default_rng(1)
    for hf, name, heads in NAMES:
        t = tensors[name]
        w = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        w = np.atleast_2d(w)
        if heads:
            w = w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        for _ in range(8 if w.shape[0] > 1 else 2):
            row, col = random.integers(w.shape[0]), random.integers(w.shape[1] - 7)
            bits = np.ascontiguousarray(w[row, col:col + 8]).view(np.uint32)
            print("row", hf, row, col, " ".join(f"{b:08x}" for b in bits))


if __name__ == "__main__":
    main()

"""Elements of a synthetic model (src/load/synthetic.c), computed a second time with Python integers.

Run by hand; its output is pasted into tests/b_synthetic.c. Also usable as a library to make a toy model's
weights in Python: value(seed, tensor name, row, column, kind, fan_in).
"""
import sys

import numpy as np

M64, M32 = (1 << 64) - 1, (1 << 32) - 1


def mix64(x):
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & M64
    return x ^ x >> 31


def name_key(name, seed):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & M64
    return mix64(h ^ mix64(seed))


def uniform(seed, name, row, col):
    """An odd multiple of 1/2 in (-2^23, 2^23)."""
    key = mix64((name_key(name, seed) + row * 0xD1342543DE82EF95) & M64)
    x = (col * 0x9E3779B9 + (key & M32)) & M32
    x = ((x ^ x >> 16) * 0x7FEB352D) & M32
    x = ((x ^ key >> 32 ^ x >> 15) * 0x846CA68B) & M32
    x ^= x >> 16
    signed = x - (1 << 32) if x >> 31 else x
    return (signed >> 8) + 0.5


def value(seed, name, row, col, offset, scale):
    f = np.float32
    return f(f(uniform(seed, name, row, col)) * f(f(scale) * f(f(1.7320508) / f(8388608.0)))) + f(offset)


if __name__ == "__main__":
    cases = [("model.embed_tokens.weight", 0, 0, 0.0, 1.0), ("model.embed_tokens.weight", 999, 255, 0.0, 1.0),
             ("lm_head.weight", 17, 63, 0.0, 0.125), ("model.layers.0.input_layernorm.weight", 0, 5, 1.0, 0.1),
             ("model.layers.2.mlp.down_proj.weight", 200, 511, 0.0, 1 / np.sqrt(512.0)),
             ("model.layers.1.self_attn.q_proj.weight", 100, 64, 0.0, 1 / np.sqrt(256.0))]
    for name, row, col, offset, scale in cases:
        bits = np.float32(value(7, name, row, col, offset, scale)).view(np.uint32)
        sys.stdout.write(f'{{"{name}", {row}, {col}, 0x{bits:08x}}},\n')

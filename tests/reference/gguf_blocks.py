"""Golden blocks for tests/b_dequant.c: random block bytes and the numbers the Python package gguf makes of them.

Run by hand (pip install gguf numpy), its output is committed:
    python3 tests/reference/gguf_blocks.py > tests/data/golden/gguf_blocks.vec

Every bit of a block is random except the fp16 scales, which are random finite numbers; of each type the
second block has a subnormal scale and the third a negative one. One line a block:
    block TYPE BYTES-IN-HEX FP32-BITS-IN-HEX...
"""
from importlib.metadata import version

import gguf
import numpy as np

# type, bytes of a block, byte offsets of its fp16 fields
TYPES = [("F16", 2, [0]), ("BF16", 2, []), ("Q8_0", 34, [0]), ("Q4_0", 18, [0]), ("Q4_1", 20, [0, 2]),
         ("Q5_0", 22, [0]), ("Q5_1", 24, [0, 2]), ("Q4_K", 144, [0, 2]), ("Q5_K", 176, [0, 2]),
         ("Q6_K", 210, [208])]


def main():
    random = np.random.default_rng(20250101)
    print("# made by tests/reference/gguf_blocks.py with the Python package gguf", version("gguf"))
    for name, size, scales in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        for variant in range(3):
            block = random.integers(0, 256, size, dtype=np.uint8)
            if name == "BF16":
                block[1] &= 0xBF  # finite
            for offset in scales:
                scale = np.float16([random.uniform(0.001, 0.1), 3e-6, -0.02][variant])
                block[offset:offset + 2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
            values = gguf.dequantize(block, kind).astype(np.float32).ravel()
            bits = " ".join(f"{b:08x}" for b in values.view(np.uint32))
            print("block", name, block.tobytes().hex(), bits)


if __name__ == "__main__":
    main()

"""models/tiny with fp8 weights as published checkpoints hold them, and the same numbers in fp32.

Standard library only and nothing of the program: e4m3 is a table of its values, rounding a search in it.
"""
import array
import bisect
import json
import math
import shutil
import struct

BLOCK = 128
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VALUES = [(m / 8 * 2**-6) if e == 0 else (1 + m / 8) * 2 ** (e - 7) for e in range(16) for m in range(8)][:127]
BORDERS = [(a + b) / 2 for a, b in zip(VALUES, VALUES[1:])]


def encode(x):
    """The code of the nearest value, of the even one when two are equally near, of 448 above it."""
    magnitude = abs(x)
    code = bisect.bisect_left(BORDERS, magnitude)
    if code < len(BORDERS) and magnitude == BORDERS[code] and code % 2:
        code += 1
    return code | (0x80 if math.copysign(1, x) < 0 else 0)


def single(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def read(folder):
    raw = (folder / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, entry["shape"], entry["dtype"], raw[8 + n + begin : 8 + n + end]


def write(folder, tensors):
    header, data = {}, b""
    for name, shape, dtype, content in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def quantise(values, rows, cols, scheme):
    """(codes, scales, shape of the scales, fp32 values) of a row-major matrix."""
    high, wide = {"block": (BLOCK, BLOCK), "channel": (1, cols), "tensor": (rows, cols)}[scheme]
    across = -(-cols // wide)
    scales = array.array("f")
    for top in range(0, rows, high):
        for left in range(0, cols, wide):
            largest = max(abs(values[r * cols + c]) for r in range(top, min(top + high, rows))
                          for c in range(left, min(left + wide, cols)))
            scales.append(largest / 448)
    codes, exact = bytearray(), array.array("f")
    for r in range(rows):
        for c in range(cols):
            scale = scales[r // high * across + c // wide]
            code = encode(values[r * cols + c] / scale) if scale else 0
            codes.append(code)
            exact.append(math.copysign(VALUES[code & 127] * scale, -1 if code & 128 else 1))  # rounded once, to fp32
    shape = {"block": [-(-rows // BLOCK), across], "channel": [rows, 1], "tensor": []}[scheme]
    return bytes(codes), scales, shape, exact


def make(source, quantised, exact, scheme):
    """Two folders from a bf16 one: fp8 weights with scales, and their exact products in fp32."""
    fp8, fp32 = [], []
    for name, shape, dtype, content in read(source):
        assert dtype == "BF16"
        values = array.array("f", b"".join(b"\0\0" + content[i : i + 2] for i in range(0, len(content), 2)))
        if any(part in name for part in LINEAR) and name.endswith(".weight"):
            codes, scales, scale_shape, values = quantise(values, *shape, scheme)
            fp8.append((name, shape, "F8_E4M3", codes))
            fp8.append((name + ("_scale_inv" if scheme == "block" else "_scale"), scale_shape, "F32", scales.tobytes()))
        else:
            fp8.append((name, shape, dtype, content))
        fp32.append((name, shape, "F32", values.tobytes()))
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if scheme == "block":
        method["weight_block_size"] = [BLOCK, BLOCK]
    if scheme == "channel":
        method = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    for folder, tensors, config in ((quantised, fp8, {"quantization_config": method}),
                                    (exact, fp32, {"torch_dtype": "float32"})):
        folder.mkdir()
        for file in source.glob("*.json"):
            shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
        write(folder, tensors)
    return quantised, exact

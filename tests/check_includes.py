#!/usr/bin/env python3
"""Who may include whom (nothing points up), and which headers stay behind one file.

Reads the #include lines of src/ and compares them with the table below, the same as in src/README.md.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent / "src"

# folder: the folders it may include besides itself and base
MAY = {
    "base": set(),
    "text": set(),
    "load": set(),
    "kv": set(),
    "think": set(),
    "backend": {"think"},  # decisions on the device: the pure headers
    "comm": {"backend"},
    "model": {"load", "backend", "comm", "kv"},
    "engine": {"model", "load", "backend", "comm", "kv", "think"},
    "serve": {"engine", "text", "load", "think"},
    "cmd": {"serve", "engine", "model", "load", "text", "backend", "comm", "kv", "think"},
    "main.c": {"cmd"},
}
# serve sees the engine through one header only
SERVE_ENGINE = {"engine/request.h"}
# header: the only places that may include it
QUARANTINE = {
    "mpi.h": r"comm/",
    "nccl.h": r"comm/comm_nccl\.c",
    "cuda_runtime_api.h": r"backend/cuda|comm/comm_(fused|gpu)\.c",
    "kernels/kernels.h": r"backend/cuda|comm/comm_fused\.c",
    "cublasLt.h": r"backend/cuda_lt\.c",
    "hwloc.h": r"backend/",
    "argp.h": r"base/params\.c",
    "pcre2.h": r"text/",
    "utf8proc.h": r"text/",
    "immintrin.h": r"backend/",
    "pthread.h": r"backend/|comm/",
    "nghttp2/nghttp2.h": r"serve/h2\.c",
    "openssl/ssl.h": r"serve/tls\.c",
    "protobuf-c/protobuf-c.h": r"serve/grpc_parts\.h",
    "math.h": r".*",
}


def main():
    faults, count = [], 0
    for path in sorted(ROOT.rglob("*")):
        if path.suffix not in (".c", ".h", ".def"):
            continue
        name = str(path.relative_to(ROOT))
        folder = name.split("/")[0]
        count += 1
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if not found:
                continue
            header = found[1]
            place = f"src/{name}:{number}"
            if header in QUARANTINE and not re.match(QUARANTINE[header], name):
                faults.append(f"{place}: {header} belongs into {QUARANTINE[header]} only")
            target = header.split("/")[0]
            if "/" not in header or target not in MAY or target in (folder, "base"):
                continue
            if target not in MAY.get(folder, set()):
                faults.append(f"{place}: {folder} may not include {header}")
            elif folder == "serve" and target == "engine" and header not in SERVE_ENGINE:
                faults.append(f"{place}: serve sees the engine through {', '.join(SERVE_ENGINE)} only")
    for fault in faults:
        print(fault)
    print(f"include directions: {count} files, {len(faults)} faults")
    return 1 if faults or not count else 0


if __name__ == "__main__":
    sys.exit(main())

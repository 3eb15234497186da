#!/usr/bin/env python3
"""Compiles every kernels/*.cu for one architecture, warnings as errors, and reads what ptxas says.

Fails when a file does not compile, when any kernel spills registers, or when a hot kernel (HOT) is
not found at all, which would mean that this check looks at nothing. Prints one line a kernel.
"""
import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

HOT = ["gemv", "product_mma", "gemv_fp8", "product_fp8", "attention", "add_norm", "heads_append", "candidates",
       "one_shot", "two_shot", "gather"]


def kernels_of(text):
    """Yields (name, registers, spill bytes, stack bytes) from ptxas -v."""
    name, spill, stack = None, 0, 0
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found.group(1)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spill = int(found.group(1)), int(found.group(2)) + int(found.group(3))
        elif (found := re.search(r"Used (\d+) registers", line)) and name:
            yield name, int(found.group(1)), spill, stack
            name, spill, stack = None, 0, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--source", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    parser.add_argument("files", nargs="*", help="names without .cu; default: all")
    options = parser.parse_args()
    files = sorted((options.source / "kernels").glob("*.cu"))
    if options.files:
        files = [f for f in files if f.stem in options.files]
    failures, seen = [], set()
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            done = subprocess.run(
                [options.nvcc, "-std=c++17", f"-arch=sm_{options.arch}", "--fmad=false", "-Werror=all-warnings",
                 f"-I{options.source}", f"-I{options.source / 'src'}", "-Xptxas", "-v", "-cubin", str(file),
                 "-o", f"{folder}/{file.stem}.cubin"], capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stdout + done.stderr)
                failures.append(f"{file.name} does not compile")
                continue
            for name, registers, spill, stack in kernels_of(done.stderr):
                print(f"{file.stem:12} {name[:60]:60} {registers:4} registers {stack:5} stack {spill:5} spilled")
                seen.add(name)
                if spill:
                    failures.append(f"{file.name}: {name} spills {spill} bytes")
    if not options.files:
        for hot in HOT:
            if not any(re.search(rf"\d{hot}", name) for name in seen):
                failures.append(f"no kernel named {hot}")
    for failure in failures:
        print("FAILED:", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every CUDA kernel with NVRTC, without a GPU, and shows what each needs.

kernels.py [--nvrtc LIBRARY] [FILE.cu ...]: prelude.cuh and each kernel file, for each architecture.
It fails on a compile error, a warning, or registers spilled to memory beyond what a kernel is allowed.
NVRTC is that of the PyPI package nvidia-cuda-nvrtc (12 or 13) unless a library is named.
"""

import argparse
import ctypes
import re
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "src/backend/cuda/kernels"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
OPTIONS = ["--std=c++17", "--ptxas-options=-v"]

# Bytes a kernel may spill.
SPILLS_ALLOWED = {
    # Capped at 168 registers, so that a multiprocessor holds three blocks: a few addresses are read
    # back once a tile, outside the products.
    "attention_bf16_128": 128,
    # Weighted values and queries alone take 192 of the 255 registers.
    "attention_bf16_256": 32,
}


def find_nvrtc():
    found = []
    for folder in sys.path:
        nvidia = Path(folder) / "nvidia"
        found += nvidia.glob("*/lib/libnvrtc.so.*")
    if not found:
        sys.exit("no libnvrtc below nvidia/ of this Python: pip install nvidia-cuda-nvrtc")
    return max(found, key=lambda path: path.suffix)


class Nvrtc:
    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def check(self, result, what):
        if result != 0:
            sys.exit(f"{what}: {self.library.nvrtcGetErrorString(result).decode()}")

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
        return f"{major.value}.{minor.value}"

    def architectures(self):
        count = ctypes.c_int()
        self.check(self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "architectures")
        known = (ctypes.c_int * count.value)()
        self.check(self.library.nvrtcGetSupportedArchs(known), "architectures")
        return {f"sm_{arch}" for arch in known}

    def compile(self, source, name, arch):
        """Whether it compiles, and the log."""
        program = ctypes.c_void_p()
        created = self.library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
        self.check(created, name)
        options = [option.encode() for option in [f"--gpu-architecture={arch}", *OPTIONS]]
        array = (ctypes.c_char_p * len(options))(*options)
        result = self.library.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        self.check(self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size)), name)
        log = ctypes.create_string_buffer(size.value)
        self.check(self.library.nvrtcGetProgramLog(program, log), name)
        self.check(self.library.nvrtcDestroyProgram(ctypes.byref(program)), name)
        return result == 0, log.value.decode()


KERNEL = re.compile(r"^KERNEL\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)", re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def needs(log):
    """(kernel, registers, static shared bytes, spilled bytes) of each kernel in ptxas' report."""
    rows = []
    name, spilled = None, None
    for line in log.splitlines():
        if match := ENTRY.search(line):
            name, spilled = match[1], 0
        elif match := SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := USED.search(line)) and name is not None:
            shared = SHARED.search(line)
            rows.append((name, int(match[1]), int(shared[1]) if shared else 0, spilled))
            name = None
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nvrtc", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    nvrtc = Nvrtc(arguments.nvrtc or find_nvrtc())
    missing = set(ARCHITECTURES) - nvrtc.architectures()
    if missing:
        sys.exit(f"NVRTC {nvrtc.version()} does not know {', '.join(sorted(missing))}")
    prelude = (KERNELS / "prelude.cuh").read_text()
    files = arguments.files or sorted(KERNELS.glob("*.cu"))
    if not files:
        sys.exit(f"no kernels in {KERNELS}")
    print(f"NVRTC {nvrtc.version()}")
    print(f"{'kernel':<32} {'arch':<7} {'registers':>9} {'shared':>7} {'spilled':>7}")
    failures = []
    for path in files:
        # Messages name the file and its own lines.
        source = f'#line 1 "prelude.cuh"\n{prelude}\n#line 1 "{path.name}"\n{path.read_text()}'
        declared = set(KERNEL.findall(path.read_text()))
        for arch in ARCHITECTURES:
            compiled, log = nvrtc.compile(source, path.name, arch)
            if not compiled or "warning" in log:
                failures.append(f"{path.name} for {arch}:\n{log}")
                continue
            rows = needs(log)
            if not rows:
                failures.append(f"{path.name} for {arch}: no kernel in ptxas' report:\n{log}")
            if lost := declared - {row[0] for row in rows}:
                failures.append(f"{path.name} for {arch}: not compiled: {', '.join(sorted(lost))}")
            for name, registers, shared, spilled in rows:
                print(f"{name:<32} {arch:<7} {registers:>9} {shared:>7} {spilled:>7}")
                if spilled > SPILLS_ALLOWED.get(name, 0):
                    failures.append(f"{name} for {arch} spills {spilled} bytes")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()

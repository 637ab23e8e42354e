#!/bin/sh
# Builds the software CUDA device into OUTDIR: one shared object under every name cudarc looks for.
# Usage: build.sh OUTDIR [--selftest]
# Tests then run with LD_LIBRARY_PATH=OUTDIR. KERNELS names another folder of .cu files.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { echo "usage: $0 OUTDIR [--selftest]" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
kernels=${KERNELS:-$here/../../src/backend/cuda/kernels}
kernels=$(cd "$kernels" && pwd)
prelude=${PRELUDE:-$kernels/prelude.cuh}
CXX=${CXX:-c++}

flags="-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -U_FORTIFY_SOURCE -pthread -I$here"
warnings="-Wall -Wextra -Wno-unused-function -Wno-unused-variable -Wno-unknown-pragmas -Wno-unused-parameter -Werror=return-type"
objects=$out/objects
mkdir -p "$objects"

# The C++ that compiles one .cu file: its text in a namespace of its own, and the table of its kernels.
unit() {
    cat <<UNIT
#define SOFTWARE_GPU
#define SOFTWARE_GPU_SHARED "shared_$1"
#include <cmath>
#include <cstdint>
#include <cstring>
#include "block.h"
#include "kernels.h"
#include "warp.h"
__asm__(".pushsection .rodata\n"
        ".local prelude_begin, prelude_end, text_begin, text_end\n"
        "prelude_begin: .incbin \"$prelude\"\nprelude_end: .byte 0\n"
        "text_begin: .incbin \"$2\"\ntext_end: .byte 0\n"
        ".popsection");
extern "C" const char prelude_begin[], prelude_end[], text_begin[], text_end[];
extern "C" __attribute__((weak)) unsigned char __start_shared_$1[], __stop_shared_$1[];
namespace kernels_$1 { namespace {
#include "device_runtime.h"
#include "$prelude"
#include "$2"
#ifndef SOFTWARE_GPU_LIST
const ::software_gpu::Kernel kernels[] = {
$3    {nullptr, 0, nullptr, nullptr, 0},
};
::software_gpu::KernelFile file = {"$1", prelude_begin, prelude_end, text_begin, text_end,
    {__start_shared_$1, __stop_shared_$1}, kernels, sizeof kernels / sizeof *kernels - 1, nullptr};
__attribute__((constructor)) void add_file() { ::software_gpu::register_file(file); }
#endif
} }
UNIT
}

# One row of that table for each KERNEL that the preprocessed text defines.
rows() {
    tr '\n' ' ' | grep -oE 'SOFTWARE_GPU_KERNEL *(SOFTWARE_GPU_BOUND *\[[^]]*\] *)?[A-Za-z_0-9]+ *\(' |
        sed -E 's/^SOFTWARE_GPU_KERNEL *(SOFTWARE_GPU_BOUND *\[([^]]*)\] *)?([A-Za-z_0-9]+) *\($/    ::software_gpu::Caller<\&\3>::entry("\3", \2),/; s/", \),$/", 0),/' || true
}

compile_kernels() {
    name=$(basename "$1" .cu)
    unit "$name" "$1" "" > "$objects/$name.list.cpp"
    table=$($CXX $flags -DSOFTWARE_GPU_LIST -E -P "$objects/$name.list.cpp" | rows)
    unit "$name" "$1" "$table
" > "$objects/$name.cu.cpp"
    $CXX $flags $warnings -fsanitize=bounds -fno-sanitize-recover=all -c "$objects/$name.cu.cpp" -o "$objects/$name.cu.o"
    rm "$objects/$name.list.cpp"
}

rm -f "$objects"/*.o
for source in "$here"/*.cpp; do
    level=
    case $source in */matrices.cpp | */eigen.cpp | */factor.cpp) level=-O3 ;; esac
    $CXX $flags $warnings $level -c "$source" -o "$objects/$(basename "$source" .cpp).o"
done
for source in "$kernels"/*.cu; do
    [ -e "$source" ] || continue
    compile_kernels "$source"
done

library=$out/libsoftware_gpu.so
$CXX -shared -pthread -Wl,-z,noexecstack -Wl,-z,defs -o "$library.part" "$objects"/*.o
mv "$library.part" "$library"
for name in libcuda.so libcuda.so.1 libcublas.so libcublas.so.13 libcusolver.so libcusolver.so.12 libnvrtc.so libnvrtc.so.13; do
    ln -sf libsoftware_gpu.so "$out/$name"
done

if [ "${2:-}" = --selftest ]; then
    KERNELS=$here/selftest PRELUDE=$prelude "$0" "$out/selftest"
    $CXX -std=c++17 -O1 -g -Wall -Wextra -I"$here/selftest" "$here"/selftest/*.cpp -L"$out/selftest" -lsoftware_gpu \
        -Wl,-rpath,"$out/selftest" -o "$out/selftest/selftest"
    "$out/selftest/selftest" "$prelude" "$here/selftest"
fi

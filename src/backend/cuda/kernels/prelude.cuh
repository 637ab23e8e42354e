// What every kernel file builds on: types, bf16, reductions, tensor-core products. No toolkit header.
//
// Stands before each kernel file when it is compiled. Three things depend on what a kernel runs on, and
// are named here so that the kernels need not know: KERNEL, DYNAMIC_SHARED and mma_bf16. On a GPU they
// are what follows; tests/software_gpu has its own, which run on the CPU.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef long long i64;

#ifndef SOFTWARE_GPU

// A kernel that the host finds by its name.
#define KERNEL extern "C" __global__ void

// The shared memory whose size a launch states, as values of type T. Once in a kernel.
#define DYNAMIC_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    T* const name = reinterpret_cast<T*>(name##_bytes)

// d += a b by one warp: a is 16 x 16 row-major, b is 16 x 8 column-major, d is 16 x 8, each spread over
// the lanes as PTX says of mma.m16n8k16 (bf16 in pairs, the lower index in the lower half).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

static const u32 WARP = 32;
static const u32 ALL_LANES = 0xffffffffu;

// The upper half of an f32.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float widen(bf16 value) {
    return __uint_as_float((u32)value.bits << 16);
}

// To nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 narrow(float value) {
    u32 bits = __float_as_uint(value);
    bf16 out;
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        out.bits = (u16)((bits >> 16) | 0x0040u);
    } else {
        out.bits = (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
    return out;
}

// Operands of products are f32 or bf16; these read and write either.
__device__ __forceinline__ float load(const float* from) { return *from; }
__device__ __forceinline__ float load(const bf16* from) { return widen(*from); }
__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(bf16* to, float value) { *to = narrow(value); }

// The sum over the lanes of a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (u32 step = WARP / 2; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    }
    return value;
}

// The sum over the threads of a block, in every thread; `partial` has 32 places of shared memory. All
// threads of the block call it.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* partial) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 warps = (blockDim.x + WARP - 1) / WARP;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    T sum = lane < warps ? partial[lane] : T(0);
    return warp_sum(sum);
}

// What every kernel file builds on: types, bf16, rounding to stored types, reductions, tensor-core
// products. No toolkit header.
//
// Stands before each kernel file when it is compiled. What depends on the device a kernel runs on is
// named here so that the kernels need not know. On a GPU it is what follows; tests/software_gpu has its
// own KERNEL, DYNAMIC_SHARED and mma_bf16, which run on the CPU, and takes plain C++ for the rest.

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

// Copies 16 bytes to shared memory, or zeros where `from` is not `there` (it is not read then). Both
// addresses are multiples of 16. The copy has happened for this thread after wait_for_copies, and for
// the others after a barrier behind that.
__device__ __forceinline__ void start_copy_16(void* shared, const void* from, bool there) {
    const u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x, relative error below 3e-7; 0 where the result is below 2^-126.
__device__ __forceinline__ float exp2_flush(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// Two values rounded to bf16, to nearest even, the first in the lower half.
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
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

// The type that values and scales are stored in.
enum Stored : u32 { AS_F32, AS_BF16, AS_F16 };

// Value limited to low..high; NaN becomes low.
__device__ __forceinline__ float limited(float value, float low, float high) {
    value = value > low ? value : low;
    return value < high ? value : high;
}

// The integer nearest to a value of magnitude below 2^22, ties to even, never a negative zero.
__device__ __forceinline__ float nearest(float value) {
    // Above 2^23 floats are integers, so the addition rounds.
    return __fsub_rn(__fadd_rn(value, 12582912.0f), 12582912.0f);
}

// To binary16 and back, ties to even, infinite beyond its range.
__device__ __forceinline__ float through_f16(float value) {
    const u32 bits = __float_as_uint(value);
    const u32 sign = bits & 0x80000000u;
    u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return value;
    if (magnitude < 0x38800000u) {
        // Below 2^-14 values are multiples of 2^-24, which is the last place of 0.5.
        const float rounded = __fsub_rn(__fadd_rn(__uint_as_float(magnitude), 0.5f), 0.5f);
        return __uint_as_float(sign | __float_as_uint(rounded));
    }
    magnitude = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & ~0x1fffu;
    if (magnitude >= 0x47800000u) magnitude = 0x7f800000u;
    return __uint_as_float(sign | magnitude);
}

// As a type holds it.
__device__ __forceinline__ float as_stored(float value, u32 stored) {
    if (stored == AS_BF16) return widen(narrow(value));
    if (stored == AS_F16) return through_f16(value);
    return value;
}

// Operands of products are f32 or bf16; these read and write either.
__device__ __forceinline__ float load(const float* from) { return *from; }
__device__ __forceinline__ float load(const bf16* from) { return widen(*from); }
__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(bf16* to, float value) { *to = narrow(value); }

// N values that are read or written at once: an address that is a multiple of their size.
template <u32 N, typename T>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

template <u32 N, typename T>
__device__ __forceinline__ Pack<N, float> load_pack(const T* from) {
    const Pack<N, T> raw = *reinterpret_cast<const Pack<N, T>*>(from);
    Pack<N, float> out;
#pragma unroll
    for (u32 i = 0; i < N; ++i) out.at[i] = load(raw.at + i);
    return out;
}

template <u32 N, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<N, float>& values) {
    Pack<N, T> raw;
#pragma unroll
    for (u32 i = 0; i < N; ++i) store(raw.at + i, values.at[i]);
    *reinterpret_cast<Pack<N, T>*>(to) = raw;
}

// Whether packs of N values can be read or written at multiples of N from here.
template <u32 N, typename T>
__device__ __forceinline__ bool in_packs(const T* from) {
    return (u64)from % (N * sizeof(T)) == 0;
}

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

// The largest value of the threads of a block, in every thread; as block_sum.
__device__ __forceinline__ float block_max(float value, float* partial) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 warps = (blockDim.x + WARP - 1) / WARP;
    value = warp_max(value);
    __syncthreads();
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_max(partial[lane < warps ? lane : 0]);
}

#ifdef SOFTWARE_GPU

// The operations above that need no device, in C++.
inline void start_copy_16(void* shared, const void* from, bool there) {
    typedef Pack<4, u32> Bytes16;
    *static_cast<Bytes16*>(shared) = there ? *static_cast<const Bytes16*>(from) : Bytes16();
}

inline void wait_for_copies() {}

inline float exp2_flush(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

inline u32 narrow_pair(float low, float high) {
    return (u32)narrow(low).bits | (u32)narrow(high).bits << 16;
}

#endif

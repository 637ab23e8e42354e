// CUDA's keywords and builtins for a .cu file that is compiled to run on the CPU, and the three things
// prelude.cuh leaves to the device. Included inside the namespace of one file, after kernels.h, block.h,
// warp.h, <cmath>, <cstdint> and <cstring>.

#ifndef SOFTWARE_GPU
#error "software device only"
#endif

// NVRTC has no headers: what these name, a kernel must spell out.
#undef INFINITY
#undef NAN
#undef HUGE_VAL
#undef HUGE_VALF
#undef NULL
#undef M_PI
#undef assert

// ---- keywords

#define __device__
#define __host__
#define __global__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define __shared__ static __attribute__((section(SOFTWARE_GPU_SHARED)))

#ifdef SOFTWARE_GPU_LIST
#define KERNEL SOFTWARE_GPU_KERNEL
#define __launch_bounds__(threads, ...) SOFTWARE_GPU_BOUND[threads]
#else
#define KERNEL static void
#define __launch_bounds__(...)
#endif

#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::software_gpu::dynamic_shared)

#define threadIdx (::software_gpu::current->index)
#define blockIdx (::software_gpu::block_index)
#define blockDim (::software_gpu::block_size)
#define gridDim (::software_gpu::grid_size)
static const int warpSize = 32;

// ---- vector types

#define SOFTWARE_GPU_VECTORS(T, name, width)                                     \
    struct alignas(sizeof(T) * 2) name##2 { T x, y; };                           \
    struct name##3 { T x, y, z; };                                               \
    struct alignas(width) name##4 { T x, y, z, w; };                             \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; }            \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }    \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SOFTWARE_GPU_VECTORS(signed char, char, 4)
SOFTWARE_GPU_VECTORS(unsigned char, uchar, 4)
SOFTWARE_GPU_VECTORS(short, short, 8)
SOFTWARE_GPU_VECTORS(unsigned short, ushort, 8)
SOFTWARE_GPU_VECTORS(int, int, 16)
SOFTWARE_GPU_VECTORS(unsigned, uint, 16)
SOFTWARE_GPU_VECTORS(long long, longlong, 16)
SOFTWARE_GPU_VECTORS(unsigned long long, ulonglong, 16)
SOFTWARE_GPU_VECTORS(float, float, 16)
SOFTWARE_GPU_VECTORS(double, double, 16)
#undef SOFTWARE_GPU_VECTORS

// ---- the block

#define __syncthreads() ((void)::software_gpu::meet_block("__syncthreads", false))
static inline int __syncthreads_count(int predicate) {
    return static_cast<int>(::software_gpu::meet_block("__syncthreads_count", predicate != 0));
}
static inline int __syncthreads_or(int predicate) { return ::software_gpu::meet_block("__syncthreads_or", predicate != 0) > 0; }
static inline int __syncthreads_and(int predicate) { return ::software_gpu::meet_block("__syncthreads_and", predicate == 0) == 0; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void __trap() { ::software_gpu::stop(::software_gpu::CUDA_ERROR_LAUNCH_FAILED, "__trap"); }

// ---- the warp

static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    ::software_gpu::meet_warp(::software_gpu::Meeting::Sync, "__syncwarp", mask);
}

static inline unsigned software_gpu_vote(const char* called, unsigned mask, bool predicate) {
    ::software_gpu::current->operand[0] = predicate;
    ::software_gpu::meet_warp(::software_gpu::Meeting::Vote, called, mask);
    return ::software_gpu::current->result[0];
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) { return software_gpu_vote("__ballot_sync", mask, predicate != 0); }
static inline int __any_sync(unsigned mask, int predicate) { return software_gpu_vote("__any_sync", mask, predicate != 0) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return software_gpu_vote("__all_sync", mask, predicate == 0) == 0; }

static inline unsigned software_gpu_reduce(const char* called, unsigned mask, unsigned value, unsigned how) {
    ::software_gpu::current->operand[0] = value;
    ::software_gpu::current->operand[1] = how;
    ::software_gpu::meet_warp(::software_gpu::Meeting::Reduce, called, mask);
    return ::software_gpu::current->result[0];
}
#define SOFTWARE_GPU_REDUCE(name, T, how) \
    static inline T name(unsigned mask, T value) { return (T)software_gpu_reduce(#name, mask, (unsigned)value, ::software_gpu::how); }
SOFTWARE_GPU_REDUCE(__reduce_add_sync, unsigned, ADD)
SOFTWARE_GPU_REDUCE(__reduce_add_sync, int, ADD)
SOFTWARE_GPU_REDUCE(__reduce_min_sync, unsigned, MIN)
SOFTWARE_GPU_REDUCE(__reduce_min_sync, int, MIN_SIGNED)
SOFTWARE_GPU_REDUCE(__reduce_max_sync, unsigned, MAX)
SOFTWARE_GPU_REDUCE(__reduce_max_sync, int, MAX_SIGNED)
SOFTWARE_GPU_REDUCE(__reduce_and_sync, unsigned, AND)
SOFTWARE_GPU_REDUCE(__reduce_or_sync, unsigned, OR)
SOFTWARE_GPU_REDUCE(__reduce_xor_sync, unsigned, XOR)
#undef SOFTWARE_GPU_REDUCE

template <typename T>
static inline T software_gpu_shuffle(const char* called, unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    ::software_gpu::Thread& me = *::software_gpu::current;
    memcpy(me.operand, &value, sizeof(T));
    me.source = source;
    ::software_gpu::meet_warp(::software_gpu::Meeting::Shuffle, called, mask);
    T out;
    memcpy(&out, me.result, sizeof(T));
    return out;
}

// The lane that a shuffle in segments of `width` lanes reads: its own where the other is not in reach.
static inline unsigned software_gpu_lane() { return ::software_gpu::current->number % 32; }
static inline unsigned software_gpu_source(int lane, int width) {
    unsigned segment = software_gpu_lane() & ~(unsigned)(width - 1);
    return segment | ((unsigned)lane & (unsigned)(width - 1));
}
static inline unsigned software_gpu_source_up(unsigned delta, int width) {
    unsigned place = software_gpu_lane() & (unsigned)(width - 1);
    return place >= delta ? software_gpu_lane() - delta : software_gpu_lane();
}
static inline unsigned software_gpu_source_down(unsigned delta, int width) {
    unsigned place = software_gpu_lane() & (unsigned)(width - 1);
    return delta < (unsigned)width - place ? software_gpu_lane() + delta : software_gpu_lane();
}
static inline unsigned software_gpu_source_xor(int bits, int width) {
    unsigned last = software_gpu_lane() | (unsigned)(width - 1);
    unsigned source = software_gpu_lane() ^ (unsigned)bits;
    return source <= last ? source : software_gpu_lane();
}

#define SOFTWARE_GPU_SHUFFLES(T)                                                                            \
    static inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {                         \
        return software_gpu_shuffle("__shfl_sync", mask, value, software_gpu_source(lane, width));          \
    }                                                                                                       \
    static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {                \
        return software_gpu_shuffle("__shfl_up_sync", mask, value, software_gpu_source_up(delta, width));   \
    }                                                                                                       \
    static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {              \
        return software_gpu_shuffle("__shfl_down_sync", mask, value, software_gpu_source_down(delta, width)); \
    }                                                                                                       \
    static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {                     \
        return software_gpu_shuffle("__shfl_xor_sync", mask, value, software_gpu_source_xor(bits, width));  \
    }
SOFTWARE_GPU_SHUFFLES(int)
SOFTWARE_GPU_SHUFFLES(unsigned)
SOFTWARE_GPU_SHUFFLES(long)
SOFTWARE_GPU_SHUFFLES(unsigned long)
SOFTWARE_GPU_SHUFFLES(long long)
SOFTWARE_GPU_SHUFFLES(unsigned long long)
SOFTWARE_GPU_SHUFFLES(float)
SOFTWARE_GPU_SHUFFLES(double)
#undef SOFTWARE_GPU_SHUFFLES

static inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    ::software_gpu::Thread& me = *::software_gpu::current;
    memcpy(me.operand, a, sizeof a);
    memcpy(me.operand + 4, b, sizeof b);
    memcpy(me.operand + 6, d, sizeof d);
    ::software_gpu::meet_warp(::software_gpu::Meeting::Product, "mma_bf16", 0xffffffffu);
    memcpy(d, me.result, sizeof d);
}

// ---- atomics: no thread runs beside another, so plain reads and writes are atomic

#define SOFTWARE_GPU_ATOMIC(name, T, next)             \
    static inline T name(T* address, T value) {        \
        T old = *address;                              \
        *address = next;                               \
        return old;                                    \
    }
#define SOFTWARE_GPU_ATOMICS(T)                                            \
    SOFTWARE_GPU_ATOMIC(atomicAdd, T, (T)(old + value))                    \
    SOFTWARE_GPU_ATOMIC(atomicExch, T, value)                              \
    SOFTWARE_GPU_ATOMIC(atomicMin, T, value < old ? value : old)           \
    SOFTWARE_GPU_ATOMIC(atomicMax, T, value > old ? value : old)           \
    SOFTWARE_GPU_ATOMIC(atomicAnd, T, old & value)                         \
    SOFTWARE_GPU_ATOMIC(atomicOr, T, old | value)                          \
    SOFTWARE_GPU_ATOMIC(atomicXor, T, old ^ value)                         \
    static inline T atomicCAS(T* address, T compare, T value) {            \
        T old = *address;                                                  \
        if (old == compare) *address = value;                              \
        return old;                                                        \
    }
SOFTWARE_GPU_ATOMICS(unsigned)
SOFTWARE_GPU_ATOMICS(unsigned long long)
// Signed sums wrap, as they do on a GPU.
static inline int atomicAdd(int* address, int value) { return (int)atomicAdd((unsigned*)address, (unsigned)value); }
static inline int atomicSub(int* address, int value) { return (int)atomicAdd((unsigned*)address, 0u - (unsigned)value); }
static inline unsigned atomicSub(unsigned* address, unsigned value) { return atomicAdd(address, 0u - value); }
SOFTWARE_GPU_ATOMIC(atomicExch, int, value)
SOFTWARE_GPU_ATOMIC(atomicMin, int, value < old ? value : old)
SOFTWARE_GPU_ATOMIC(atomicMax, int, value > old ? value : old)
SOFTWARE_GPU_ATOMIC(atomicMin, long long, value < old ? value : old)
SOFTWARE_GPU_ATOMIC(atomicMax, long long, value > old ? value : old)
SOFTWARE_GPU_ATOMIC(atomicAnd, int, old & value)
SOFTWARE_GPU_ATOMIC(atomicOr, int, old | value)
SOFTWARE_GPU_ATOMIC(atomicXor, int, old ^ value)
static inline int atomicCAS(int* address, int compare, int value) {
    return (int)atomicCAS((unsigned*)address, (unsigned)compare, (unsigned)value);
}
SOFTWARE_GPU_ATOMIC(atomicAdd, float, old + value)
SOFTWARE_GPU_ATOMIC(atomicAdd, double, old + value)
SOFTWARE_GPU_ATOMIC(atomicExch, float, value)
#undef SOFTWARE_GPU_ATOMICS
#undef SOFTWARE_GPU_ATOMIC

// ---- bits

template <typename To, typename From>
static inline To software_gpu_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To out;
    memcpy(&out, &value, sizeof out);
    return out;
}
static inline unsigned __float_as_uint(float value) { return software_gpu_bits<unsigned>(value); }
static inline int __float_as_int(float value) { return software_gpu_bits<int>(value); }
static inline float __uint_as_float(unsigned bits) { return software_gpu_bits<float>(bits); }
static inline float __int_as_float(int bits) { return software_gpu_bits<float>(bits); }
static inline long long __double_as_longlong(double value) { return software_gpu_bits<long long>(value); }
static inline double __longlong_as_double(long long bits) { return software_gpu_bits<double>(bits); }

static inline int __popc(unsigned value) { return __builtin_popcount(value); }
static inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
static inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz((unsigned)value); }
static inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll((unsigned long long)value); }
static inline int __ffs(int value) { return __builtin_ffs(value); }
static inline int __ffsll(long long value) { return __builtin_ffsll(value); }
static inline unsigned __brev(unsigned value) {
    unsigned out = 0;
    for (int bit = 0; bit < 32; bit += 1) out |= (value >> bit & 1u) << (31 - bit);
    return out;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((unsigned long long)high << 32 | low) << (shift & 31)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i += 1) {
        unsigned pick = selector >> (4 * i) & 0xfu;
        unsigned byte = (unsigned)(bytes >> (8 * (pick & 7u))) & 0xffu;
        if ((pick & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
        out |= byte << (8 * i);
    }
    return out;
}

template <typename T>
static inline T __ldg(const T* from) { return *from; }
template <typename T>
static inline T __ldcs(const T* from) { return *from; }
template <typename T>
static inline void __stcs(T* to, T value) { *to = value; }

// ---- arithmetic. The rest, fmaf and expf and the like, is libm's.

#define SOFTWARE_GPU_EXTREMES(A, B, T)                                             \
    static inline T min(A a, B b) { return (T)b < (T)a ? (T)b : (T)a; }            \
    static inline T max(A a, B b) { return (T)a < (T)b ? (T)b : (T)a; }
SOFTWARE_GPU_EXTREMES(int, int, int)
SOFTWARE_GPU_EXTREMES(unsigned, unsigned, unsigned)
SOFTWARE_GPU_EXTREMES(int, unsigned, unsigned)
SOFTWARE_GPU_EXTREMES(unsigned, int, unsigned)
SOFTWARE_GPU_EXTREMES(long, long, long)
SOFTWARE_GPU_EXTREMES(unsigned long, unsigned long, unsigned long)
SOFTWARE_GPU_EXTREMES(long, unsigned long, unsigned long)
SOFTWARE_GPU_EXTREMES(unsigned long, long, unsigned long)
SOFTWARE_GPU_EXTREMES(long long, long long, long long)
SOFTWARE_GPU_EXTREMES(unsigned long long, unsigned long long, unsigned long long)
SOFTWARE_GPU_EXTREMES(long long, unsigned long long, unsigned long long)
SOFTWARE_GPU_EXTREMES(unsigned long long, long long, unsigned long long)
#undef SOFTWARE_GPU_EXTREMES
static inline float min(float a, float b) { return ::fminf(a, b); }
static inline float max(float a, float b) { return ::fmaxf(a, b); }
static inline double min(double a, double b) { return ::fmin(a, b); }
static inline double max(double a, double b) { return ::fmax(a, b); }

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return ::sqrtf(a); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
static inline double __dsqrt_rn(double a) { return ::sqrt(a); }
static inline float rsqrtf(float a) { return 1.0f / ::sqrtf(a); }
static inline double rsqrt(double a) { return 1.0 / ::sqrt(a); }
static inline float __frsqrt_rn(float a) { return (float)(1.0 / ::sqrt((double)a)); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __expf(float a) { return ::expf(a); }
static inline float __exp10f(float a) { return (float)::pow(10.0, (double)a); }
static inline float __logf(float a) { return ::logf(a); }
static inline float __log2f(float a) { return ::log2f(a); }
static inline float __powf(float a, float b) { return ::powf(a, b); }
static inline float __sinf(float a) { return ::sinf(a); }
static inline float __cosf(float a) { return ::cosf(a); }
static inline void __sincosf(float a, float* sine, float* cosine) { *sine = ::sinf(a); *cosine = ::cosf(a); }
static inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }

// Conversions to integers: out-of-range values saturate and NaN is 0 (of 32 bits), as on a GPU.
template <typename To>
static inline To software_gpu_integer(double value, double low, double high, To least, To most) {
    if (value != value) return 0;
    return value <= low ? least : value >= high ? most : (To)value;
}
static inline int __double2int_rz(double a) {
    return software_gpu_integer<int>(::trunc(a), -2147483648.0, 2147483647.0, -2147483647 - 1, 2147483647);
}
static inline unsigned __double2uint_rz(double a) { return software_gpu_integer<unsigned>(::trunc(a), 0.0, 4294967295.0, 0u, 0xffffffffu); }
static inline int __double2int_rn(double a) { return __double2int_rz(::rint(a)); }
static inline int __float2int_rn(float a) { return __double2int_rz(::rint((double)a)); }
static inline int __float2int_rz(float a) { return __double2int_rz((double)a); }
static inline int __float2int_rd(float a) { return __double2int_rz(::floor((double)a)); }
static inline int __float2int_ru(float a) { return __double2int_rz(::ceil((double)a)); }
static inline unsigned __float2uint_rn(float a) { return __double2uint_rz(::rint((double)a)); }
static inline unsigned __float2uint_rz(float a) { return __double2uint_rz((double)a); }
static inline float __int2float_rn(int a) { return (float)a; }
static inline float __uint2float_rn(unsigned a) { return (float)a; }
static inline float __double2float_rn(double a) { return (float)a; }

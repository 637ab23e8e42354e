// Stored types and the 2:4 packing. Equal to cpu/pack.rs, which is the codecs of the formats, bit for bit.
//
//   widen_stored              to[i] = from[i] as f32
//   round_to_half             w[i] and to[i] become w[i] as 16 bits hold it
//   pack_24_{half,single}     two of every four values, and where they stood
//
// No floating-point sums, no shared memory.

// Bits of a value that a 16-bit type (AS_BF16, AS_F16) holds exactly.
__device__ __forceinline__ u16 half_bits(float held, u32 stored) {
    const u32 bits = __float_as_uint(held);
    if (stored == AS_BF16) return (u16)(bits >> 16);
    const u32 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (u16)(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return (u16)(sign | 0x7c00u);
    // Below 2^-14 values are multiples of 2^-24.
    if (magnitude < 0x38800000u) return (u16)(sign | (u32)(__uint_as_float(magnitude) * 16777216.0f));
    return (u16)(sign | ((magnitude - 0x38000000u) >> 13));
}

__device__ __forceinline__ float from_half(u16 bits, u32 stored) {
    if (stored == AS_BF16) return __uint_as_float((u32)bits << 16);
    const u32 sign = (u32)(bits & 0x8000u) << 16;
    const u32 exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)mantissa / 16777216.0f));
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | (mantissa << 13));
    return __uint_as_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// from, to: [count]. 6 bytes a value.
//   launch: a thread a value
KERNEL widen_stored(const u16* from, float* to, u64 count, u32 stored) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from_half(from[i], stored);
}

// w, to: [count]. A finite value that would become infinite stays in w, and is counted in `beyond`, which
// the host sets to 0 first. 10 bytes a value.
//   launch: a thread a value
KERNEL round_to_half(float* w, u16* to, u64 count, u32 stored, u32* beyond) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float value = w[i], held = as_stored(value, stored);
    const u32 infinity = 0x7f800000u;
    if ((__float_as_uint(held) & infinity) == infinity && (__float_as_uint(value) & infinity) != infinity) {
        atomicAdd(beyond, 1u);
        return;
    }
    to[i] = half_bits(held, stored);
    w[i] = held;
}

// The nibble of a group by which of its columns (bit 0 is column 0) hold values, as the format defines it;
// of more than two values that of column 2 and 3, and the caller has counted them.
__device__ __forceinline__ u32 nibble_of(u32 held) {
    return (u32)(0xeeeeedcee98e498eull >> (4u * held)) & 0xfu;
}

// Packs columns 8 i to 8 i + 7 of a row for each byte i of metadata; the last byte of an odd number of groups
// has the padding nibble 0xE on top. Groups of more than two values other than all-zero bits are
// counted in `full`, which the host sets to 0 first.
//   dense: [rows, cols]; values: [rows, cols / 2]; metadata: [rows, ceil(cols / 8)]
template <typename T>
__device__ __forceinline__ void pack_24(
    const T* dense, u64 rows, u64 cols, T* values, u8* metadata, u32* full
) {
    const u64 width = (cols + 7) / 8;
    const u64 byte = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (byte >= width) return;
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
        u32 packed = 0xe0u;
        for (u32 half = 0; half < 2; half++) {
            const u64 group = 2 * byte + half;
            if (4 * group >= cols) break;
            // Rows are whole groups, so groups stand at multiples of their size.
            const Pack<4, T> from = *reinterpret_cast<const Pack<4, T>*>(dense + row * cols + 4 * group);
            const T* const own = from.at;
            u32 held = 0;
#pragma unroll
            for (u32 i = 0; i < 4; i++) held |= (own[i] != 0 ? 1u : 0u) << i;
            if (__popc(held) > 2) atomicAdd(full, 1u);
            const u32 nibble = nibble_of(held);
            const u32 first = nibble & 3u, second = nibble >> 2;
            Pack<2, T> kept;
            kept.at[0] = first == 0u ? own[0] : first == 1u ? own[1] : own[2];
            kept.at[1] = second == 1u ? own[1] : second == 2u ? own[2] : own[3];
            *reinterpret_cast<Pack<2, T>*>(values + row * (cols / 2) + 2 * group) = kept;
            packed = half == 0 ? 0xe0u | nibble : (packed & 0xfu) | (nibble << 4);
        }
        metadata[row * width + byte] = (u8)packed;
    }
}

// 2 bytes a value read, 1.125 written.
//   launch: x ceil(cols / 8 / threads), y any number of blocks
KERNEL pack_24_half(const u16* dense, u64 rows, u64 cols, u16* values, u8* metadata, u32* full) {
    pack_24(dense, rows, cols, values, metadata, full);
}

// 4 bytes a value read, 2.125 written; launch as above.
KERNEL pack_24_single(const float* dense, u64 rows, u64 cols, float* values, u8* metadata, u32* full) {
    pack_24(
        reinterpret_cast<const u32*>(dense), rows, cols, reinterpret_cast<u32*>(values), metadata, full
    );
}

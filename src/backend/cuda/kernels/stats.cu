// Statistics of activations: column norms and rows that are not finite. Equal column_sq_norm and
// count_non_finite_rows of cpu/gram.rs.
//
//   column_sq_norm_{f32,bf16}  partial[s, j] = Σ x[t, j]^2 over the rows t of strip s of 256 rows, f32
//   add_partial_sums           sums[j] += Σ_s partial[s, j], the sum in f64 in the order of the strips
//   count_non_finite_rows_{f32,bf16}  *count += rows of x with a NaN or an infinity
//
// Launch: column_sq_norm: grid (ceil(rows / 256), ceil(cols / T)), block (T), any T up to 1024 (128 is
// good). add_partial_sums: grid (ceil(cols / T)), block (T), T = 32 to have more blocks.
// count_non_finite_rows: grid (ceil(rows / R)), block (32, R), a warp to a row, R = 8. No dynamic shared
// memory.
//
// Memory: reads x once, 4 (2) bytes a value; partial sums are 1/256 of that. FLOPs: 2 a value. Sums do
// not depend on scheduling: no float is added atomically.

static const u32 STRIP = 256;

template <typename T>
__device__ __forceinline__ void square_strip(const T* x, float* partial, u64 rows, u32 cols) {
    const u32 col = blockIdx.y * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    const u64 first = (u64)blockIdx.x * STRIP;
    const u32 count = rows - first < STRIP ? (u32)(rows - first) : STRIP;
    x += first * cols + col;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 row = 0; row < count; ++row) {
        const float value = load(x + (u64)row * cols);
        sum += value * value;
    }
    partial[(u64)blockIdx.x * cols + col] = sum;
}

// x [rows, cols], partial [ceil(rows / 256), cols].
KERNEL column_sq_norm_f32(const float* x, float* partial, u64 rows, u32 cols) {
    square_strip(x, partial, rows, cols);
}

KERNEL column_sq_norm_bf16(const bf16* x, float* partial, u64 rows, u32 cols) {
    square_strip(x, partial, rows, cols);
}

// sums [cols], partial [strips, cols].
KERNEL add_partial_sums(float* sums, const float* partial, u32 strips, u32 cols) {
    const u32 col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    double sum = (double)sums[col];
    for (u32 strip = 0; strip < strips; ++strip) sum += (double)partial[(u64)strip * cols + col];
    sums[col] = (float)sum;
}

// Whether the exponent is all ones.
__device__ __forceinline__ bool not_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
}

template <u32 N, typename T>
__device__ __forceinline__ bool sees_non_finite(const T* row, u32 cols) {
    bool found = false;
    for (u32 col = threadIdx.x * N; col < cols; col += WARP * N) {
        const Pack<N, float> values = load_pack<N>(row + col);
#pragma unroll
        for (u32 i = 0; i < N; ++i) found |= not_finite(values.at[i]);
    }
    return found;
}

template <typename T>
__device__ __forceinline__ void count_rows(const T* x, u32* count, u64 rows, u32 cols) {
    const u64 row = (u64)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;  // A whole warp.
    x += row * cols;
    const bool packs = cols % 4 == 0 && in_packs<4>(x);
    const bool found = packs ? sees_non_finite<4>(x, cols) : sees_non_finite<1>(x, cols);
    if (warp_sum(found ? 1u : 0u) > 0 && threadIdx.x == 0) atomicAdd(count, 1u);
}

// x [rows, cols], count [1]: added to, so the host sets it to 0 first.
KERNEL count_non_finite_rows_f32(const float* x, u32* count, u64 rows, u32 cols) {
    count_rows(x, count, rows, cols);
}

KERNEL count_non_finite_rows_bf16(const bf16* x, u32* count, u64 rows, u32 cols) {
    count_rows(x, count, rows, cols);
}

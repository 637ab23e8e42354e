// Norms of rows: x [rows, cols] f32 -> out [rows, cols] f32 or bf16 (the operand of products).
//
// Equal cpu/norm.rs: sums in f32 over strided lanes, then a tree; mean and root in f32; one rounding.
//
//   rms_norm_{f32,bf16}    out = x / sqrt(mean(x^2) + eps) * gain          gain [cols]
//   layer_norm_{f32,bf16}  out = (x - mean) / sqrt(var + eps) * gain + bias  gain, bias [cols]; the
//                          variance is that of x - mean, summed in a second pass
//
// Launch: block (T, 1) with T threads to a row, a multiple of 32 up to 1024, or block (32, R), R <= 32,
// with a warp to a row; grid (ceil(rows / blockDim.y)). No dynamic shared memory. A good T is cols / 16
// rounded up to a multiple of 32. rows and cols at least 1.
//
// Memory: reads 4 and writes 4 (2) bytes a value; the second and third pass over a row come from the
// first-level cache. FLOPs: 4 a value, layer_norm 7.

// The sum over the threads of a row.
__device__ __forceinline__ float row_sum(float value, float* partial) {
    return blockDim.x == WARP ? warp_sum(value) : block_sum(value, partial);
}

// Σ term(x) over a row, this thread's part.
template <u32 N, typename Term>
__device__ __forceinline__ float part_of_sum(const float* x, u32 cols, Term term) {
    float sum = 0.0f;
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        const Pack<N, float> values = load_pack<N>(x + col);
#pragma unroll
        for (u32 i = 0; i < N; ++i) sum += term(values.at[i]);
    }
    return sum;
}

template <u32 N, typename Out>
__device__ __forceinline__ void rms_norm_row(
    const float* x, const float* gain, Out* out, u32 cols, float eps, float* partial) {
    const float part = part_of_sum<N>(x, cols, [](float x) { return x * x; });
    const float factor = 1.0f / sqrtf(row_sum(part, partial) / (float)cols + eps);
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        Pack<N, float> values = load_pack<N>(x + col);
        const Pack<N, float> gains = load_pack<N>(gain + col);
#pragma unroll
        for (u32 i = 0; i < N; ++i) values.at[i] = values.at[i] * factor * gains.at[i];
        store_pack<N>(out + col, values);
    }
}

template <u32 N, typename Out>
__device__ __forceinline__ void layer_norm_row(
    const float* x, const float* gain, const float* bias, Out* out, u32 cols, float eps, float* partial) {
    const float mean =
        row_sum(part_of_sum<N>(x, cols, [](float x) { return x; }), partial) / (float)cols;
    const float part = part_of_sum<N>(x, cols, [mean](float x) { return (x - mean) * (x - mean); });
    const float factor = 1.0f / sqrtf(row_sum(part, partial) / (float)cols + eps);
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        Pack<N, float> values = load_pack<N>(x + col);
        const Pack<N, float> gains = load_pack<N>(gain + col), biases = load_pack<N>(bias + col);
#pragma unroll
        for (u32 i = 0; i < N; ++i) {
            values.at[i] = (values.at[i] - mean) * factor * gains.at[i] + biases.at[i];
        }
        store_pack<N>(out + col, values);
    }
}

template <typename Out>
__device__ __forceinline__ void rms_norm(
    const float* x, const float* gain, Out* out, u64 rows, u32 cols, float eps) {
    __shared__ float partial[WARP];
    const u64 row = (u64)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;  // A whole warp, and only where a warp has a row to itself.
    x += row * cols;
    out += row * cols;
    if (cols % 4 == 0 && in_packs<4>(x) && in_packs<4>(gain) && in_packs<4>(out)) {
        rms_norm_row<4>(x, gain, out, cols, eps, partial);
    } else {
        rms_norm_row<1>(x, gain, out, cols, eps, partial);
    }
}

template <typename Out>
__device__ __forceinline__ void layer_norm(
    const float* x, const float* gain, const float* bias, Out* out, u64 rows, u32 cols, float eps) {
    __shared__ float partial[WARP];
    const u64 row = (u64)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;  // As in rms_norm.
    x += row * cols;
    out += row * cols;
    const bool vectors = in_packs<4>(gain) && in_packs<4>(bias);
    if (cols % 4 == 0 && in_packs<4>(x) && in_packs<4>(out) && vectors) {
        layer_norm_row<4>(x, gain, bias, out, cols, eps, partial);
    } else {
        layer_norm_row<1>(x, gain, bias, out, cols, eps, partial);
    }
}

// x [rows, cols], gain [cols], out [rows, cols]; eps is added to the mean of squares.
KERNEL rms_norm_f32(const float* x, const float* gain, float* out, u64 rows, u32 cols, float eps) {
    rms_norm(x, gain, out, rows, cols, eps);
}

KERNEL rms_norm_bf16(const float* x, const float* gain, bf16* out, u64 rows, u32 cols, float eps) {
    rms_norm(x, gain, out, rows, cols, eps);
}

// x [rows, cols], gain and bias [cols], out [rows, cols]; eps is added to the variance.
KERNEL layer_norm_f32(
    const float* x, const float* gain, const float* bias, float* out, u64 rows, u32 cols, float eps) {
    layer_norm(x, gain, bias, out, rows, cols, eps);
}

KERNEL layer_norm_bf16(
    const float* x, const float* gain, const float* bias, bf16* out, u64 rows, u32 cols, float eps) {
    layer_norm(x, gain, bias, out, rows, cols, eps);
}

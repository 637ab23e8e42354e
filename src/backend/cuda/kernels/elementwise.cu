// Conversions, biases and row factors. Equal simd::{narrow, widen} of the CPU, the bias of cpu/linear.rs
// and scale_rows of cpu/gram.rs, bit for bit.
//
//   narrow               bf16 of f32, count values
//   widen                f32 of bf16, count values
//   add_bias             out[t, j] += bias[j]
//   broadcast_bias       out[t, j] = bias[j], for a product that adds to what is there
//   scale_rows_{f32,bf16}  x[t, j] *= factors[t], rounded once
//
// Launch: narrow and widen: any grid of any T (ceil(count / 1024) of 256 threads is good): threads
// stride over the values. The others: grid (rows), block (T), any T up to 1024 (cols / 4 rounded up to a
// multiple of 32, at most 256, is good). No dynamic shared memory.
//
// Memory: narrow reads 4 and writes 2 bytes a value, widen the reverse; add_bias and scale_rows read and
// write each value once; broadcast_bias writes 4 bytes a value. FLOPs: at most 1 a value.

template <typename From, typename To>
__device__ __forceinline__ void convert(const From* from, To* to, u64 count) {
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
    const u64 packs = in_packs<4>(from) && in_packs<4>(to) ? count / 4 : 0;
    for (u64 i = thread; i < packs; i += threads) store_pack<4>(to + 4 * i, load_pack<4>(from + 4 * i));
    for (u64 i = 4 * packs + thread; i < count; i += threads) store(to + i, load(from + i));
}

// to[i] = from[i], i < count.
KERNEL narrow_f32(const float* from, bf16* to, u64 count) { convert(from, to, count); }

KERNEL widen_bf16(const bf16* from, float* to, u64 count) { convert(from, to, count); }

// row[j] = change(row[j], j) for a row of cols values, N at a time.
template <u32 N, typename T, typename Change>
__device__ __forceinline__ void change_row(T* row, u32 cols, Change change) {
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        Pack<N, float> values = load_pack<N>(row + col);
#pragma unroll
        for (u32 i = 0; i < N; ++i) values.at[i] = change(values.at[i], col + i);
        store_pack<N>(row + col, values);
    }
}

template <typename T, typename Change>
__device__ __forceinline__ void change_rows(T* x, u32 cols, Change change) {
    T* const row = x + (u64)blockIdx.x * cols;
    if (cols % 4 == 0 && in_packs<4>(row)) {
        change_row<4>(row, cols, change);
    } else {
        change_row<1>(row, cols, change);
    }
}

// out [rows, cols], bias [cols].
KERNEL add_bias(float* out, const float* bias, u32 cols) {
    change_rows(out, cols, [bias](float value, u32 col) { return value + bias[col]; });
}

template <u32 N>
__device__ __forceinline__ void fill_row(float* row, const float* bias, u32 cols) {
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        store_pack<N>(row + col, load_pack<N>(bias + col));
    }
}

// out [rows, cols], bias [cols].
KERNEL broadcast_bias(float* out, const float* bias, u32 cols) {
    float* const row = out + (u64)blockIdx.x * cols;
    if (cols % 4 == 0 && in_packs<4>(row) && in_packs<4>(bias)) {
        fill_row<4>(row, bias, cols);
    } else {
        fill_row<1>(row, bias, cols);
    }
}

// x [rows, cols], factors [rows].
KERNEL scale_rows_f32(float* x, const float* factors, u32 cols) {
    const float factor = factors[blockIdx.x];
    change_rows(x, cols, [factor](float value, u32) { return value * factor; });
}

KERNEL scale_rows_bf16(bf16* x, const float* factors, u32 cols) {
    const float factor = factors[blockIdx.x];
    change_rows(x, cols, [factor](float value, u32) { return value * factor; });
}

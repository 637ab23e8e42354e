// Loss of next-token prediction: ln Σ exp(logits) - logits[target] of each row, f64. Equals cpu/nll.rs.
//
// The maximum is taken in f32; exponentials of the differences are f32, added in fours in f32 and then
// in f64.
//
// Launch: grid (rows), block (T), T a multiple of 32 up to 1024 (256 is good for vocabularies below
// 10^5, 1024 above); no dynamic shared memory.
//
// Memory: reads each logit twice, the second time from the second-level cache; 4 bytes each. FLOPs: one
// exponential and 3 operations a logit.

template <u32 N>
__device__ __forceinline__ float largest(const float* row, u32 vocab) {
    float max = -__int_as_float(0x7f800000);
    for (u32 col = threadIdx.x * N; col < vocab; col += blockDim.x * N) {
        const Pack<N, float> values = load_pack<N>(row + col);
#pragma unroll
        for (u32 i = 0; i < N; ++i) max = fmaxf(max, values.at[i]);
    }
    return max;
}

template <u32 N>
__device__ __forceinline__ double exp_sum(const float* row, u32 vocab, float max) {
    double sum = 0.0;
    for (u32 col = threadIdx.x * N; col < vocab; col += blockDim.x * N) {
        const Pack<N, float> values = load_pack<N>(row + col);
        float part = 0.0f;
#pragma unroll
        for (u32 i = 0; i < N; ++i) part += expf(values.at[i] - max);
        sum += (double)part;
    }
    return sum;
}

template <u32 N>
__device__ __forceinline__ void nll_of_row(
    const float* row, u32 target, double* out, u32 vocab, float* partial_max, double* partial_sum) {
    const float max = block_max(largest<N>(row, vocab), partial_max);
    const double sum = block_sum(exp_sum<N>(row, vocab, max), partial_sum);
    if (threadIdx.x == 0) *out = log(sum) + (double)max - (double)row[target];
}

// logits [rows, vocab] f32; targets [rows], each below vocab (the host has looked); out [rows] f64.
KERNEL token_nll(const float* logits, const u32* targets, double* out, u32 vocab) {
    __shared__ float partial_max[WARP];
    __shared__ double partial_sum[WARP];
    const float* const row = logits + (u64)blockIdx.x * vocab;
    const u32 target = targets[blockIdx.x];
    if (vocab % 4 == 0 && in_packs<4>(row)) {
        nll_of_row<4>(row, target, out + blockIdx.x, vocab, partial_max, partial_sum);
    } else {
        nll_of_row<1>(row, target, out + blockIdx.x, vocab, partial_max, partial_sum);
    }
}

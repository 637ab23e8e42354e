// Activations of the MLP: f32 -> f32 or bf16 (the operand of products). Equal cpu/activation.rs.
//
//   activation_{f32,bf16}  out[i] = act(x[i]), i < count
//   gated_{f32,bf16}       out[t, j] = act(x[t, j]) * x[t, features + j], x [tokens, 2 features] (gates,
//                          then ups), out [tokens, features]
//
// The activation is a number: 0 silu x / (1 + e^-x); 1 relu max(x, 0), NaN stays NaN; 2 gelu
// x Phi(x), exact; 3 gelu_tanh x / (1 + e^(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3).
//
// Launch: activation: grid (any number of blocks of any T; ceil(count / 1024) of 256 threads is good):
// threads stride over the values. gated: grid (tokens), block (T), any T up to 1024 (features / 4
// rounded up to a multiple of 32, at most 256, is good). No dynamic shared memory.
//
// Memory: activation reads 4 and writes 4 (2) bytes a value, gated reads 8 and writes 4 (2). FLOPs: one
// exponential (or error function) and 2 to 8 operations a value.

static const u32 SILU = 0, RELU = 1, GELU = 2, GELU_TANH = 3;

// e^x, finite: the CPU's exponential saturates at the same place.
__device__ __forceinline__ float finite_exp(float x) { return expf(x > 88.0f ? 88.0f : x); }

template <u32 ACTIVATION>
__device__ __forceinline__ float apply(float x) {
    if (ACTIVATION == SILU) return x / (1.0f + finite_exp(-x));
    if (ACTIVATION == RELU) return x < 0.0f ? 0.0f : x;
    if (ACTIVATION == GELU) return 0.5f * x * erfcf(x * -0.707106781f);
    const float z = 1.595769122f * (x + 0.044715f * x * x * x);
    return x / (1.0f + finite_exp(-z));
}

template <u32 ACTIVATION, typename Out>
__device__ __forceinline__ void activate_all(const float* x, Out* out, u64 count) {
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
    const u64 packs = in_packs<4>(x) && in_packs<4>(out) ? count / 4 : 0;
    for (u64 i = thread; i < packs; i += threads) {
        Pack<4, float> values = load_pack<4>(x + 4 * i);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) values.at[j] = apply<ACTIVATION>(values.at[j]);
        store_pack<4>(out + 4 * i, values);
    }
    for (u64 i = 4 * packs + thread; i < count; i += threads) store(out + i, apply<ACTIVATION>(x[i]));
}

template <u32 N, u32 ACTIVATION, typename Out>
__device__ __forceinline__ void gate_row(const float* gate, const float* up, Out* out, u32 features) {
    for (u32 col = threadIdx.x * N; col < features; col += blockDim.x * N) {
        Pack<N, float> values = load_pack<N>(gate + col);
        const Pack<N, float> ups = load_pack<N>(up + col);
#pragma unroll
        for (u32 i = 0; i < N; ++i) values.at[i] = apply<ACTIVATION>(values.at[i]) * ups.at[i];
        store_pack<N>(out + col, values);
    }
}

template <u32 ACTIVATION, typename Out>
__device__ __forceinline__ void gate_token(const float* x, Out* out, u32 features) {
    const float* const gate = x + (u64)blockIdx.x * 2 * features;
    out += (u64)blockIdx.x * features;
    if (features % 4 == 0 && in_packs<4>(gate) && in_packs<4>(out)) {
        gate_row<4, ACTIVATION>(gate, gate + features, out, features);
    } else {
        gate_row<1, ACTIVATION>(gate, gate + features, out, features);
    }
}

template <typename Out>
__device__ __forceinline__ void activation_kernel(const float* x, Out* out, u64 count, u32 activation) {
    if (activation == SILU) activate_all<SILU>(x, out, count);
    if (activation == RELU) activate_all<RELU>(x, out, count);
    if (activation == GELU) activate_all<GELU>(x, out, count);
    if (activation == GELU_TANH) activate_all<GELU_TANH>(x, out, count);
}

template <typename Out>
__device__ __forceinline__ void gated_kernel(const float* x, Out* out, u32 features, u32 activation) {
    if (activation == SILU) gate_token<SILU>(x, out, features);
    if (activation == RELU) gate_token<RELU>(x, out, features);
    if (activation == GELU) gate_token<GELU>(x, out, features);
    if (activation == GELU_TANH) gate_token<GELU_TANH>(x, out, features);
}

// x and out hold count values; f32 x and out may be the same.
KERNEL activation_f32(const float* x, float* out, u64 count, u32 activation) {
    activation_kernel(x, out, count, activation);
}

KERNEL activation_bf16(const float* x, bf16* out, u64 count, u32 activation) {
    activation_kernel(x, out, count, activation);
}

// x [tokens, 2 features], out [tokens, features].
KERNEL gated_f32(const float* x, float* out, u32 features, u32 activation) {
    gated_kernel(x, out, features, activation);
}

KERNEL gated_bf16(const float* x, bf16* out, u32 features, u32 activation) {
    gated_kernel(x, out, features, activation);
}

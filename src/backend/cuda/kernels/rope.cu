// Rotary position embeddings, half-split as in Hugging Face models, on stacked queries, keys, values.
//
// qkv is [tokens, cols] f32 with cols = (heads + 2 kv_heads) * 2 half_dim: the first
// `rotated` = heads + kv_heads heads turn, (a, b) -> (a cos - b sin, b cos + a sin) with a = head[j],
// b = head[j + half_dim]; the values after them do not. Equal cpu/rope.rs.
//
//   rope_f32   turns in place
//   rope_bf16  writes the whole matrix, values too, rounded to bf16, to `out` [tokens, cols]
//
// Launch: grid (tokens), block (T), any T up to 1024 (128 or 256 are good); no dynamic shared memory.
//
// Memory: rope_f32 reads and writes 4 bytes for each query and key; rope_bf16 reads 4 and writes 2 bytes
// a value. The tables come from the second-level cache. FLOPs: 3 a turned value.

// Turns N pairs of one token after another; `from` and `to` are its row.
template <u32 N, typename Out>
__device__ __forceinline__ void rotate_row(
    const float* from, Out* to, const float* cos, const float* sin, u32 rotated, u32 half_dim) {
    const u32 pairs = rotated * half_dim;
    for (u32 pair = threadIdx.x * N; pair < pairs; pair += blockDim.x * N) {
        const u32 j = pair % half_dim, first = 2 * (pair - j) + j;
        const Pack<N, float> a = load_pack<N>(from + first), b = load_pack<N>(from + first + half_dim);
        const Pack<N, float> c = load_pack<N>(cos + j), s = load_pack<N>(sin + j);
        Pack<N, float> turned_a, turned_b;
#pragma unroll
        for (u32 i = 0; i < N; ++i) {
            turned_a.at[i] = a.at[i] * c.at[i] - b.at[i] * s.at[i];
            turned_b.at[i] = b.at[i] * c.at[i] + a.at[i] * s.at[i];
        }
        store_pack<N>(to + first, turned_a);
        store_pack<N>(to + first + half_dim, turned_b);
    }
}

template <u32 N>
__device__ __forceinline__ void narrow_values(const float* from, bf16* to, u32 first, u32 cols) {
    for (u32 col = first + threadIdx.x * N; col < cols; col += blockDim.x * N) {
        store_pack<N>(to + col, load_pack<N>(from + col));
    }
}

// qkv [tokens, cols] is changed; positions [tokens] is the place of each token in its sequence; cos and
// sin [positions, half_dim].
KERNEL rope_f32(
    float* qkv, const u32* positions, const float* cos, const float* sin, u32 cols, u32 rotated, u32 half_dim) {
    float* const row = qkv + (u64)blockIdx.x * cols;
    const u64 angles = (u64)positions[blockIdx.x] * half_dim;
    if (half_dim % 4 == 0 && in_packs<4>(row) && in_packs<4>(cos) && in_packs<4>(sin)) {
        rotate_row<4>(row, row, cos + angles, sin + angles, rotated, half_dim);
    } else {
        rotate_row<1>(row, row, cos + angles, sin + angles, rotated, half_dim);
    }
}

// As rope_f32, from qkv to out [tokens, cols] bf16.
KERNEL rope_bf16(
    const float* qkv, bf16* out, const u32* positions, const float* cos, const float* sin, u32 cols,
    u32 rotated, u32 half_dim) {
    const float* const from = qkv + (u64)blockIdx.x * cols;
    bf16* const to = out + (u64)blockIdx.x * cols;
    const u64 angles = (u64)positions[blockIdx.x] * half_dim;
    const bool rows = in_packs<4>(from) && in_packs<4>(to);
    if (half_dim % 4 == 0 && rows && in_packs<4>(cos) && in_packs<4>(sin)) {
        rotate_row<4>(from, to, cos + angles, sin + angles, rotated, half_dim);
        narrow_values<4>(from, to, 2 * rotated * half_dim, cols);
    } else {
        rotate_row<1>(from, to, cos + angles, sin + angles, rotated, half_dim);
        narrow_values<1>(from, to, 2 * rotated * half_dim, cols);
    }
}

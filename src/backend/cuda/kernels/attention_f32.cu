// Causal softmax attention in f32, without a matrix of scores in memory. Equals attend_f32 of
// cpu/attention.rs but for the order of sums and where the division by the sum happens.
//
// qkv is [tokens, (num_heads + 2 num_kv_heads) head_dim]: queries, keys, values. Keys pass in tiles;
// maximum, sum and weighted values follow online (Milakov and Gimelshein 2018; Dao et al. 2022). Keys
// are copied while values are weighed, and values while scores are computed. Tiles above the diagonal
// are never read.
//
// A kernel per padded head_dim (only that of INSTANCE where it is defined); the host takes the smallest that holds the model's (any from 1 to 256;
// multiples of 4 load fastest). Queries of a tile of the host's list, keys of a tile, dynamic shared bytes:
//
//   attention_f32_16         64     64     31744
//   attention_f32_32         64     64     44032
//   attention_f32_64         64     64     68608
//   attention_f32_80         64     32     51712
//   attention_f32_96         64     32     59904
//   attention_f32_128        64     32     76288
//   attention_f32_192        32     32     79360
//   attention_f32_256        32     16     68864
//
// Launch: grid (number of tiles * num_heads), block (256), the dynamic shared memory above (past 49152
// the host raises the kernel's limit first). A tile is a block of queries of one sequence; the list
// should start with the latest ones, which have the most keys. Block b takes head b % num_heads of tile
// b / num_heads, so that heads with the same keys run side by side.
//
// Memory: reads the queries once, keys and values once for each tile of queries behind them (mostly from
// the second-level cache), writes the result once. FLOPs: 4 head_dim for each head, query and key not
// after it; an exponential for each score.
//
// Of the 16 x 16 threads, thread (x, y) has ROWS queries from y ROWS on, keys x, x + 16, ..., and
// DIMS / 16 columns of the result.

static const u32 THREADS = 256, SIDE = 16;
static const float LOG2_E = 1.44269504f;

__device__ __forceinline__ float negative_infinity() { return -__int_as_float(0x7f800000); }

// The maximum and the sum over the 16 threads of a row.
__device__ __forceinline__ float side_max(float value) {
#pragma unroll
    for (u32 step = SIDE / 2; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    }
    return value;
}

__device__ __forceinline__ float side_sum(float value) {
#pragma unroll
    for (u32 step = SIDE / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// The largest power of two that divides a number.
__device__ constexpr u32 power_of_two_in(u32 number) { return number & (0 - number); }

// Starts to copy COUNT rows of a head, `stride` values apart, to rows of TO values. Rows from `rows` on
// and columns from head_dim on become 0. `packs`: rows are multiples of 4 values at multiples of 16 bytes.
template <u32 DIMS, u32 COUNT, u32 TO>
__device__ __forceinline__ void start_rows(
    float* to, const float* from, u64 stride, u32 rows, u32 head_dim, bool packs) {
    if (packs) {
        const u32 LANES = power_of_two_in(DIMS / 4), STEP = THREADS / LANES;
        const u32 first = threadIdx.x / LANES, dim = threadIdx.x % LANES * 4;
        from += first * stride + dim;
        to += first * TO + dim;
#pragma unroll
        for (u32 row = 0; row < COUNT; row += STEP, from += STEP * stride) {
#pragma unroll
            for (u32 col = 0; col < DIMS; col += LANES * 4) {
                if (first + row >= COUNT) continue;
                start_copy_16(to + row * TO + col, from + col, first + row < rows && dim + col < head_dim);
            }
        }
    } else {
#pragma unroll 1
        for (u32 i = threadIdx.x; i < COUNT * DIMS; i += THREADS) {
            const u32 row = i / DIMS, dim = i % DIMS;
            to[row * TO + dim] = row < rows && dim < head_dim ? from[row * stride + dim] : 0.0f;
        }
    }
}

// scores[i][j] = query(i) · key(j) for the thread's queries and keys, rows of STRIDE values.
template <u32 DIMS, u32 ROWS, u32 COLS, u32 STRIDE>
__device__ __forceinline__ void score(
    float (&scores)[ROWS][COLS], const float* queries, const float* keys, u32 x, u32 y) {
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
#pragma unroll
        for (u32 j = 0; j < COLS; ++j) scores[i][j] = 0.0f;
    }
#pragma unroll 2
    for (u32 dim = 0; dim < DIMS; dim += 4) {
        Pack<4, float> query[ROWS], key[COLS];
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) query[i] = load_pack<4>(queries + (y * ROWS + i) * STRIDE + dim);
#pragma unroll
        for (u32 j = 0; j < COLS; ++j) key[j] = load_pack<4>(keys + (x + j * SIDE) * STRIDE + dim);
#pragma unroll
        for (u32 d = 0; d < 4; ++d) {
#pragma unroll
            for (u32 i = 0; i < ROWS; ++i) {
#pragma unroll
                for (u32 j = 0; j < COLS; ++j) {
                    scores[i][j] = fmaf(query[i].at[d], key[j].at[d], scores[i][j]);
                }
            }
        }
    }
}

// Softmax so far, of one query.
struct Row {
    // The largest score, times the factor.
    float top;
    // Σ 2^(score * factor - top), this thread's part.
    float mass;
};

// Scores of one query become 2^(score * factor - top) with the new top, 0 for the keys from `seen` on;
// what the sums so far are to be multiplied with.
template <u32 COLS>
__device__ __forceinline__ float soften(float (&scores)[COLS], u32 seen, u32 x, float factor, Row& row) {
    float max = negative_infinity();
#pragma unroll
    for (u32 j = 0; j < COLS; ++j) {
        if (x + j * SIDE >= seen) scores[j] = negative_infinity();
        max = fmaxf(max, scores[j]);
    }
    const float top = fmaxf(row.top, side_max(max) * factor);
    const float shrink = exp2_flush(row.top - top);
    float mass = 0.0f;
#pragma unroll
    for (u32 j = 0; j < COLS; ++j) {
        scores[j] = exp2_flush(fmaf(scores[j], factor, -top));
        mass += scores[j];
    }
    row.top = top;
    row.mass = row.mass * shrink + mass;
    return shrink;
}

// Columns of the result that a thread reads and writes at once.
template <u32 DIMS>
struct Columns {
    static const u32 AT_ONCE = DIMS % 64 == 0 ? 4 : DIMS % 32 == 0 ? 2 : 1;
    static const u32 PACKS = DIMS / SIDE / AT_ONCE;
};

// sums[i] += Σ probability(i, key) value(key) for the thread's queries and columns.
template <u32 DIMS, u32 ROWS, u32 KEYS>
__device__ __forceinline__ void weigh(
    float (&sums)[ROWS][DIMS / SIDE], const float* probabilities, const float* values, u32 x, u32 y) {
    const u32 N = Columns<DIMS>::AT_ONCE;
#pragma unroll 1
    for (u32 key = 0; key < KEYS; key += 4) {
        Pack<4, float> weights[ROWS];
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            weights[i] = load_pack<4>(probabilities + (y * ROWS + i) * (KEYS + 4) + key);
        }
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
#pragma unroll
            for (u32 p = 0; p < Columns<DIMS>::PACKS; ++p) {
                const Pack<N, float> value = load_pack<N>(values + (key + k) * DIMS + (p * SIDE + x) * N);
#pragma unroll
                for (u32 i = 0; i < ROWS; ++i) {
#pragma unroll
                    for (u32 j = 0; j < N; ++j) {
                        sums[i][p * N + j] = fmaf(weights[i].at[k], value.at[j], sums[i][p * N + j]);
                    }
                }
            }
        }
    }
}

// One head of one tile: 16 ROWS queries, 16 COLS keys at a time, heads padded to DIMS.
template <u32 DIMS, u32 ROWS, u32 COLS>
__device__ __forceinline__ void attend(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    const u32 QUERIES = SIDE * ROWS, KEYS = SIDE * COLS, STRIDE = DIMS + 4;
    DYNAMIC_SHARED(float, shared);
    float* const tile_queries = shared;
    float* const tile_keys = tile_queries + QUERIES * STRIDE;
    float* const tile_values = tile_keys + KEYS * STRIDE;
    float* const probabilities = tile_values + KEYS * DIMS;
    const u32* const tile = tiles + 3 * (u64)(blockIdx.x / num_heads);
    const u32 sequence = tile[0], query = tile[1], len = tile[2], head = blockIdx.x % num_heads;
    const u64 stride = (u64)(num_heads + 2 * num_kv_heads) * head_dim;
    const float* const rows = qkv + sequence * stride;
    const float* const keys = rows + (num_heads + head / (num_heads / num_kv_heads)) * (u64)head_dim;
    const float* const values = keys + num_kv_heads * (u64)head_dim;
    const bool packs = head_dim % 4 == 0 && in_packs<4>(qkv);
    const u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    const u32 end = query + QUERIES < len ? query + QUERIES : len;
    const float factor = scale * LOG2_E;

    start_rows<DIMS, QUERIES, STRIDE>(
        tile_queries, rows + query * stride + head * (u64)head_dim, stride, end - query, head_dim, packs);
    start_rows<DIMS, KEYS, STRIDE>(tile_keys, keys, stride, end, head_dim, packs);
    float sums[ROWS][DIMS / SIDE] = {};
    Row softmax[ROWS];
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) softmax[i] = Row{negative_infinity(), 0.0f};

    for (u32 key = 0; key < end; key += KEYS) {
        wait_for_copies();
        __syncthreads();  // The keys are there, and nobody reads values or probabilities any more.
        start_rows<DIMS, KEYS, DIMS>(tile_values, values + key * stride, stride, end - key, head_dim, packs);
        float scores[ROWS][COLS];
        score<DIMS, ROWS, COLS, STRIDE>(scores, tile_queries, tile_keys, x, y);
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            const u32 row = y * ROWS + i, position = query + row;
            const u32 seen = position >= key ? position - key + 1 : 0;
            const float shrink = soften<COLS>(scores[i], seen, x, factor, softmax[i]);
#pragma unroll
            for (u32 j = 0; j < DIMS / SIDE; ++j) sums[i][j] *= shrink;
#pragma unroll
            for (u32 j = 0; j < COLS; ++j) probabilities[row * (KEYS + 4) + x + j * SIDE] = scores[i][j];
        }
        wait_for_copies();
        __syncthreads();  // Values and probabilities are there, and nobody reads the keys any more.
        if (end - key > KEYS) {
            const u32 next = key + KEYS;
            start_rows<DIMS, KEYS, STRIDE>(tile_keys, keys + next * stride, stride, end - next, head_dim, packs);
        }
        weigh<DIMS, ROWS, KEYS>(sums, probabilities, tile_values, x, y);
    }

    const u32 N = Columns<DIMS>::AT_ONCE;
    const u64 out_stride = (u64)num_heads * head_dim;
    float* const to = out + (sequence + (u64)query) * out_stride + head * (u64)head_dim;
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
        const u32 row = y * ROWS + i;
        const float part = 1.0f / side_sum(softmax[i].mass);
#pragma unroll
        for (u32 j = 0; j < DIMS / SIDE; ++j) {
            const u32 dim = (j / N * SIDE + x) * N + j % N;
            if (row < end - query && dim < head_dim) to[row * out_stride + dim] = sums[i][j] * part;
        }
    }
}

// qkv [tokens, (num_heads + 2 num_kv_heads) head_dim]; out [tokens, num_heads head_dim]; tiles [count, 3]:
// row of the sequence's first token, position of the tile's first query in the sequence (a multiple of
// the kernel's queries), length of the sequence. num_kv_heads divides num_heads; scale is above 0 and
// multiplies query·key.

#if !defined(INSTANCE) || INSTANCE == 16
KERNEL __launch_bounds__(256, 2) attention_f32_16(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<16, 4, 4>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 32
KERNEL __launch_bounds__(256, 2) attention_f32_32(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<32, 4, 4>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 64
KERNEL __launch_bounds__(256, 2) attention_f32_64(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<64, 4, 4>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 80
KERNEL __launch_bounds__(256, 2) attention_f32_80(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<80, 4, 2>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 96
KERNEL __launch_bounds__(256, 2) attention_f32_96(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<96, 4, 2>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 128
KERNEL __launch_bounds__(256, 2) attention_f32_128(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<128, 4, 2>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 192
KERNEL __launch_bounds__(256, 2) attention_f32_192(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<192, 2, 2>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 256
KERNEL __launch_bounds__(256, 2) attention_f32_256(
    const float* qkv, float* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<256, 2, 1>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

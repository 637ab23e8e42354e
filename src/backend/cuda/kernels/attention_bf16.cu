// Causal softmax attention on tensor cores, without a matrix of scores in memory. Equals attend_bf16 of
// cpu/attention.rs: products of bf16 with f32 sums, softmax in f32, probabilities rounded to bf16 before
// they meet the values (their sum is taken before), one rounding of the result.
//
// qkv is [tokens, (num_heads + 2 num_kv_heads) head_dim]: queries, keys, values. Keys pass in tiles,
// double-buffered in shared memory; maximum, sum and weighted values follow online (Milakov and
// Gimelshein 2018; Dao et al. 2022). Tiles above the diagonal are never read.
//
// A kernel per padded head_dim (only that of INSTANCE where it is defined); the host takes the smallest that holds the model's (any from 1 to 256;
// multiples of 8 load fastest). Queries of a tile of the host's list, keys of a tile, dynamic shared bytes:
//
//   attention_bf16_16        128     64     10240
//   attention_bf16_32        128     64     22528
//   attention_bf16_64        128     64     38912
//   attention_bf16_80         64     64     43008
//   attention_bf16_96         64     64     55296
//   attention_bf16_128        64     64     71680
//   attention_bf16_192        64     32     52224
//   attention_bf16_256        64     32     68608
//
// Launch: grid (number of tiles * num_heads), block (128), the dynamic shared memory above (past 49152
// the host raises the kernel's limit first). A tile is a block of queries of one sequence; the list
// should start with the latest ones, which have the most keys. Block b takes head b % num_heads of tile
// b / num_heads, so that heads with the same keys run side by side.
//
// Memory: reads the queries once, keys and values once for each tile of queries behind them (mostly from
// the second-level cache), writes the result once. FLOPs: 4 head_dim for each head, query and key not
// after it, in the products; an exponential for each score.
//
// Products run in permuted order where it saves loads: inner indices of q·k are paired so that a lane
// reads 8 bytes of a key, columns of the result so that a lane's words hold two of them. A row of keys
// (values) takes a multiple of 8 (4) words whose quotient is odd, so that no two lanes meet in a bank.

static const u32 THREADS = 128;
static const float LOG2_E = 1.44269504f;

__device__ __forceinline__ float negative_infinity() { return -__int_as_float(0x7f800000); }

// What the fragments of a lane cover: row `group` (and + 8) of 16, column pair `quad` of 8.
struct Lane {
    u32 group, quad;
};

// The maximum and the sum over the four lanes of a group.
__device__ __forceinline__ float group_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 1));
    return fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

__device__ __forceinline__ float group_sum(float value) {
    value += __shfl_xor_sync(ALL_LANES, value, 1);
    return value + __shfl_xor_sync(ALL_LANES, value, 2);
}

// The largest power of two that divides a number.
__device__ constexpr u32 power_of_two_in(u32 number) { return number & (0 - number); }

// Starts to copy KEYS rows of a head, `stride` values apart, to rows of TO values. Rows from `rows` on and
// columns from head_dim on become 0. `packs`: rows are multiples of 8 values at multiples of 16 bytes.
template <u32 DIMS, u32 KEYS, u32 TO>
__device__ __forceinline__ void start_rows(
    bf16* to, const bf16* from, u64 stride, u32 rows, u32 head_dim, bool packs) {
    if (packs) {
        const u32 LANES = power_of_two_in(DIMS / 8), STEP = THREADS / LANES;
        const u32 first = threadIdx.x / LANES, dim = threadIdx.x % LANES * 8;
        from += first * stride + dim;
        to += first * TO + dim;
#pragma unroll
        for (u32 row = 0; row < KEYS; row += STEP, from += STEP * stride) {
#pragma unroll
            for (u32 col = 0; col < DIMS; col += LANES * 8) {
                start_copy_16(to + row * TO + col, from + col, first + row < rows && dim + col < head_dim);
            }
        }
    } else {
#pragma unroll 1
        for (u32 i = threadIdx.x; i < KEYS * DIMS; i += THREADS) {
            const u32 row = i / DIMS, dim = i % DIMS;
            to[row * TO + dim].bits = row < rows && dim < head_dim ? from[row * stride + dim].bits : (u16)0;
        }
    }
}

// Four values of a query as two pairs, 0 from head_dim on. `packs`: as in start_rows.
__device__ __forceinline__ Pack<2, u32> query_pairs(const bf16* row, u32 dim, u32 head_dim, bool packs) {
    Pack<2, u32> pairs = {{0, 0}};
    if (packs) {
        if (dim < head_dim) pairs = *reinterpret_cast<const Pack<2, u32>*>(row + dim);
    } else {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            if (dim + j < head_dim) pairs.at[j / 2] |= (u32)row[dim + j].bits << (j % 2 * 16);
        }
    }
    return pairs;
}

// The queries of a warp as operands: rows of `from`, of which `rows` exist.
template <u32 DIMS, u32 ROW_TILES>
__device__ __forceinline__ void load_queries(
    u32 (&queries)[ROW_TILES][DIMS / 16][4], const bf16* from, u64 stride, u32 rows, u32 head_dim, bool packs,
    Lane lane) {
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = m * 16 + half * 8 + lane.group;
#pragma unroll
            for (u32 k = 0; k < DIMS / 16; ++k) {
                Pack<2, u32> pairs = {{0, 0}};
                if (row < rows) {
                    pairs = query_pairs(from + row * stride, k * 16 + lane.quad * 4, head_dim, packs);
                }
                queries[m][k][half] = pairs.at[0];
                queries[m][k][half + 2] = pairs.at[1];
            }
        }
    }
}

// scores = queries keysᵀ.
template <u32 DIMS, u32 ROW_TILES, u32 KEYS, u32 STRIDE>
__device__ __forceinline__ void score(
    float (&scores)[ROW_TILES][KEYS / 8][4], const u32 (&queries)[ROW_TILES][DIMS / 16][4], const bf16* keys,
    Lane lane) {
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
        }
    }
    const bf16* const own = keys + lane.group * STRIDE + lane.quad * 4;
#pragma unroll
    for (u32 k = 0; k < DIMS / 16; ++k) {
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; ++n) {
            const Pack<2, u32> pairs = *reinterpret_cast<const Pack<2, u32>*>(own + n * 8 * STRIDE + k * 16);
#pragma unroll
            for (u32 m = 0; m < ROW_TILES; ++m) mma_bf16(scores[m][n], queries[m][k], pairs.at);
        }
    }
}

// Scores of keys after their query become -inf. `query` and `key` are the positions of the first ones.
template <u32 ROW_TILES, u32 KEYS>
__device__ __forceinline__ void hide_future(
    float (&scores)[ROW_TILES][KEYS / 8][4], u32 query, u32 key, Lane lane) {
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 row = query + m * 16 + i / 2 * 8 + lane.group;
                const u32 col = key + n * 8 + lane.quad * 2 + i % 2;
                if (col > row) scores[m][n][i] = negative_infinity();
            }
        }
    }
}

// Softmax so far, of one row of queries.
struct Row {
    // The largest score, times the factor.
    float top;
    // Σ 2^(score * factor - top), this lane's part.
    float mass;
};

// Scores of one row become 2^(score * factor - top) with the new top; what the sums so far are to be
// multiplied with.
template <u32 KEYS>
__device__ __forceinline__ float soften(float (&scores)[KEYS / 8][4], u32 half, float factor, Row& row) {
    float max = negative_infinity();
#pragma unroll
    for (u32 n = 0; n < KEYS / 8; ++n) max = fmaxf(max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    const float top = fmaxf(row.top, group_max(max) * factor);
    const float shrink = exp2_flush(row.top - top);
    float mass = 0.0f;
#pragma unroll
    for (u32 n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (u32 i = 2 * half; i < 2 * half + 2; ++i) {
            scores[n][i] = exp2_flush(fmaf(scores[n][i], factor, -top));
            mass += scores[n][i];
        }
    }
    row.top = top;
    row.mass = row.mass * shrink + mass;
    return shrink;
}

// sums += probabilities values. Of each 16 columns, sums[m][2 b] has the even ones and sums[m][2 b + 1]
// the odd ones.
template <u32 DIMS, u32 ROW_TILES, u32 KEYS, u32 STRIDE>
__device__ __forceinline__ void weigh(
    float (&sums)[ROW_TILES][DIMS / 8][4], const float (&scores)[ROW_TILES][KEYS / 8][4], const bf16* values,
    Lane lane) {
    const u32 WORDS = STRIDE / 2;
    const u32* const own = reinterpret_cast<const u32*>(values) + lane.quad * 2 * WORDS + lane.group;
#pragma unroll
    for (u32 k = 0; k < KEYS / 16; ++k) {
        u32 probabilities[ROW_TILES][4];
#pragma unroll
        for (u32 m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const float(&two)[4] = scores[m][2 * k + i / 2];
                probabilities[m][i] = narrow_pair(two[i % 2 * 2], two[i % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (u32 b = 0; b < DIMS / 16; ++b) {
            const u32* const at = own + k * 16 * WORDS + b * 8;
            const u32 first = at[0], second = at[WORDS], ninth = at[8 * WORDS], tenth = at[9 * WORDS];
            const u32 even[2] = {__byte_perm(first, second, 0x5410), __byte_perm(ninth, tenth, 0x5410)};
            const u32 odd[2] = {__byte_perm(first, second, 0x7632), __byte_perm(ninth, tenth, 0x7632)};
#pragma unroll
            for (u32 m = 0; m < ROW_TILES; ++m) {
                mma_bf16(sums[m][2 * b], probabilities[m], even);
                mma_bf16(sums[m][2 * b + 1], probabilities[m], odd);
            }
        }
    }
}

// Writes one row of the result, sums * factor.
template <u32 DIMS>
__device__ __forceinline__ void write_row(
    bf16* out, const float (&sums)[DIMS / 8][4], u32 half, float factor, u32 head_dim, bool packs, Lane lane) {
#pragma unroll
    for (u32 b = 0; b < DIMS / 16; ++b) {
        const u32 dim = b * 16 + lane.quad * 4;
        const float values[4] = {
            sums[2 * b][2 * half] * factor, sums[2 * b + 1][2 * half] * factor,
            sums[2 * b][2 * half + 1] * factor, sums[2 * b + 1][2 * half + 1] * factor};
        if (packs) {
            const Pack<2, u32> pairs = {{narrow_pair(values[0], values[1]), narrow_pair(values[2], values[3])}};
            if (dim < head_dim) *reinterpret_cast<Pack<2, u32>*>(out + dim) = pairs;
        } else {
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                if (dim + j < head_dim) out[dim + j] = narrow(values[j]);
            }
        }
    }
}

// One head of one tile: 4 warps with 16 ROW_TILES queries each, KEYS keys at a time, heads padded to DIMS.
template <u32 DIMS, u32 ROW_TILES, u32 KEYS>
__device__ __forceinline__ void attend(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    const u32 KEY_STRIDE = DIMS % 32 == 0 ? DIMS + 16 : DIMS, VALUE_STRIDE = DIMS + 8;
    const u32 STAGE = KEYS * (KEY_STRIDE + VALUE_STRIDE);
    DYNAMIC_SHARED(bf16, shared);
    const u32* const tile = tiles + 3 * (u64)(blockIdx.x / num_heads);
    const u32 sequence = tile[0], first_query = tile[1], len = tile[2], head = blockIdx.x % num_heads;
    const u64 stride = (u64)(num_heads + 2 * num_kv_heads) * head_dim;
    const bf16* const rows = qkv + sequence * stride;
    const bf16* const keys = rows + (num_heads + head / (num_heads / num_kv_heads)) * (u64)head_dim;
    const bf16* const values = keys + num_kv_heads * (u64)head_dim;
    const bool packs = head_dim % 8 == 0 && in_packs<8>(qkv) && in_packs<8>(out);
    const Lane lane = {threadIdx.x % WARP / 4, threadIdx.x % 4};
    const u32 query = first_query + threadIdx.x / WARP * 16 * ROW_TILES;
    const u32 queries_left = query < len ? len - query : 0;
    const u32 past = first_query + 64 * ROW_TILES, end = past < len ? past : len;
    const float factor = scale * LOG2_E;

    const auto start = [&](u32 key, u32 stage) {
        bf16* const to = shared + stage * STAGE;
        start_rows<DIMS, KEYS, KEY_STRIDE>(to, keys + key * stride, stride, end - key, head_dim, packs);
        start_rows<DIMS, KEYS, VALUE_STRIDE>(
            to + KEYS * KEY_STRIDE, values + key * stride, stride, end - key, head_dim, packs);
    };
    start(0, 0);
    u32 queries[ROW_TILES][DIMS / 16][4];
    load_queries<DIMS, ROW_TILES>(
        queries, rows + query * stride + head * (u64)head_dim, stride, queries_left, head_dim, packs, lane);
    float sums[ROW_TILES][DIMS / 8][4] = {};
    Row softmax[ROW_TILES][2];
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; ++m) softmax[m][0] = softmax[m][1] = Row{negative_infinity(), 0.0f};

    for (u32 key = 0, stage = 0; key < end; key += KEYS, stage ^= 1) {
        wait_for_copies();
        __syncthreads();  // This tile is there, and nobody reads the other stage any more.
        if (end - key > KEYS) start(key + KEYS, stage ^ 1);
        if (queries_left == 0 || key >= query + 16 * ROW_TILES) continue;  // Nothing for this warp.
        const bf16* const tile_keys = shared + stage * STAGE;
        float scores[ROW_TILES][KEYS / 8][4];
        score<DIMS, ROW_TILES, KEYS, KEY_STRIDE>(scores, queries, tile_keys, lane);
        if (key + KEYS - 1 > query) hide_future<ROW_TILES, KEYS>(scores, query, key, lane);
#pragma unroll
        for (u32 m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const float shrink = soften<KEYS>(scores[m], half, factor, softmax[m][half]);
#pragma unroll
                for (u32 n = 0; n < DIMS / 8; ++n) {
                    sums[m][n][2 * half] *= shrink;
                    sums[m][n][2 * half + 1] *= shrink;
                }
            }
        }
        weigh<DIMS, ROW_TILES, KEYS, VALUE_STRIDE>(sums, scores, tile_keys + KEYS * KEY_STRIDE, lane);
    }

    const u64 out_stride = (u64)num_heads * head_dim;
    bf16* const to = out + (sequence + (u64)query) * out_stride + head * (u64)head_dim;
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = m * 16 + half * 8 + lane.group;
            const float mass = group_sum(softmax[m][half].mass);
            if (row < queries_left) {
                write_row<DIMS>(to + row * out_stride, sums[m], half, 1.0f / mass, head_dim, packs, lane);
            }
        }
    }
}

// qkv [tokens, (num_heads + 2 num_kv_heads) head_dim]; out [tokens, num_heads head_dim]; tiles [count, 3]:
// row of the sequence's first token, position of the tile's first query in the sequence (a multiple of
// the kernel's queries), length of the sequence. num_kv_heads divides num_heads; scale is above 0 and
// multiplies query·key.

#if !defined(INSTANCE) || INSTANCE == 16
KERNEL __launch_bounds__(128, 3) attention_bf16_16(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<16, 2, 64>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 32
KERNEL __launch_bounds__(128, 3) attention_bf16_32(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<32, 2, 64>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 64
KERNEL __launch_bounds__(128, 2) attention_bf16_64(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<64, 2, 64>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 80
KERNEL __launch_bounds__(128, 3) attention_bf16_80(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<80, 1, 64>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 96
KERNEL __launch_bounds__(128, 3) attention_bf16_96(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<96, 1, 64>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 128
KERNEL __launch_bounds__(128, 3) attention_bf16_128(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<128, 1, 64>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 192
KERNEL __launch_bounds__(128, 2) attention_bf16_192(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<192, 1, 32>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

#if !defined(INSTANCE) || INSTANCE == 256
KERNEL __launch_bounds__(128, 2) attention_bf16_256(
    const bf16* qkv, bf16* out, const u32* tiles, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attend<256, 1, 32>(qkv, out, tiles, num_heads, num_kv_heads, head_dim, scale);
}
#endif

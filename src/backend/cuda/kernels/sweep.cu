// Column blocks of SparseGPT's Algorithm 1, which is GPTQ's too, and rounding to a grid.
//
// Rows are independent once the weights to zero are known, so a warp takes a row: each lane holds every
// 32nd column of it in registers, and the factor's part lies in shared memory. A column's weight goes to
// all lanes, all compute its error, and each moves it onto its own columns to the right.
//
//   bytes   8 rows width of w and err, width² of u for each block of threads
//   FLOP    rows width²
// Equals cpu/sweep.rs and cpu/rounding.rs. Values are rounded operation by operation as a reader decodes
// them, without fused multiply-adds.

// What weights are rounded to: nothing; scale · level − min, with codes level + point; scale · e4m3.
enum Kind : u32 { NOTHING, LEVELS, FLOAT8 };

// The nearest e4m3 code of a value of at most 448.
__device__ __forceinline__ u32 to_float8(float value) {
    const u32 sign = (__float_as_uint(value) >> 24) & 0x80u;
    const u32 magnitude = __float_as_uint(value) & 0x7fffffffu;
    if (magnitude < (121u << 23)) {
        return sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) & 0xfu);
    }
    const u32 rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    const u32 normal = rounded - (120u << 3);
    return sign | (normal < 0x7fu ? normal : 0x7fu);
}

__device__ __forceinline__ float from_float8(u32 code) {
    const u32 sign = (code & 0x80u) << 24, exponent = (code >> 3) & 0xfu, mantissa = code & 7u;
    if ((code & 0x7fu) == 0x7fu) return __uint_as_float(sign | 0x7fc00000u);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)mantissa / 512.0f));
    return __uint_as_float(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

struct Grid {
    u32 kind, stored;
    float low, high;
};

// What one group is rounded with. Without zero points or minima these are 0.
struct Scale {
    float scale, point, min;

    __device__ __forceinline__ Scale(const float* scales, const i8* points, const float* mins, u64 group)
        : scale(scales[group]), point(points ? (float)points[group] : 0.0f), min(mins ? mins[group] : 0.0f) {}
};

// The value a weight is rounded to, and its code.
__device__ __forceinline__ float rounded(Grid grid, float target, Scale group, i8* code) {
    const float scale = group.scale, point = group.point, min = group.min;
    if (grid.kind == FLOAT8) {
        const float value = scale == 0.0f ? 0.0f : __fdiv_rn(target, scale);
        const u32 bits = to_float8(limited(value, -448.0f, 448.0f));
        *code = (i8)bits;
        return as_stored(__fmul_rn(scale, from_float8(bits)), grid.stored);
    }
    const float divisor = scale == 0.0f ? __uint_as_float(0x7f800000u) : scale;
    const float exact = __fdiv_rn(__fadd_rn(target, min), divisor);
    const float inside = limited(exact, __fsub_rn(grid.low, point), __fsub_rn(grid.high, point));
    const float level = nearest(inside);
    *code = (i8)__fadd_rn(level, point);
    return as_stored(__fsub_rn(__fmul_rn(scale, level), min), grid.stored);
}

// Rounds every weight to the nearest value of its group, and writes its code.
//   w, codes: [rows, cols]; scale, point, min: [rows, groups], group_len columns each; no point, no min: 0
//   launch: x ceil(cols / threads), y any number of blocks
KERNEL round_weights(
    float* w, u64 rows, u64 cols, u32 kind, u32 stored, float low, float high, const float* scale,
    const i8* point, const float* min, u64 groups, u32 group_len, i8* codes
) {
    const u64 col = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    const Grid grid = {kind, stored, low, high};
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
        const u64 i = row * cols + col, group = row * groups + col / group_len;
        i8 code = 0;
        w[i] = rounded(grid, w[i], Scale(scale, point, min, group), &code);
        codes[i] = code;
    }
}

// Columns a lane holds.
static const u32 SLOTS = 4;

// Sweeps `width` columns of w, at most 128: zeroes what is marked, or the `zeros` lowest (w / u_jj)² of
// every m columns when it comes to them, rounds the others, and moves each column's error onto the columns
// to its right. err = (w - q) / u_jj.
//   w: [rows, width] with rows w_stride apart; u: [width, width] upper triangular, rows u_stride apart
//   marks: null, or [rows, width] with rows marks_stride apart; err: likewise
//   zeros, m: 0 without groups; m divides width
//   start: the position of the first column in the matrix that is rounded
//   scale, point, min: [rows, groups], of group_len columns of the matrix; no point, no min: 0
//   order: null, or the column of the matrix at each position of the sweep, [cols]; codes: [rows, cols]
//   launch: any number of blocks of whole warps; dynamic shared memory: 4 (width² + 128 warps) bytes
KERNEL __launch_bounds__(512) obs_sweep(
    float* w, u64 rows, u64 w_stride, u32 width, const float* u, u64 u_stride, const u8* marks,
    u64 marks_stride, u32 zeros, u32 m, float* err, u64 err_stride, u64 start, u64 cols, u32 kind, u32 stored,
    float low, float high, const float* scale, const i8* point, const float* min, u64 groups, u32 group_len,
    const u32* order, i8* codes
) {
    DYNAMIC_SHARED(float, tile);
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    u32* const scores = reinterpret_cast<u32*>(tile + width * width) + warp * SLOTS * WARP;
    for (u32 i = threadIdx.x; i < width * width; i += blockDim.x) {
        tile[i] = u[(i / width) * u_stride + i % width];
    }
    __syncthreads();
    const Grid grid = {kind, stored, low, high};
    for (u64 row = (u64)blockIdx.x * warps + warp; row < rows; row += (u64)gridDim.x * warps) {
        float* const own = w + row * w_stride;
        float value[SLOTS], error[SLOTS];
        i8 code[SLOTS];
        // Bit l of zero[k]: whether column 32 k + l becomes zero. The same in all lanes.
        u32 zero[SLOTS];
#pragma unroll
        for (u32 k = 0; k < SLOTS; k++) {
            const u32 col = k * WARP + lane;
            value[k] = col < width ? own[col] : 0.0f;
            error[k] = 0.0f;
            code[k] = 0;
            zero[k] = __ballot_sync(ALL_LANES, marks && col < width && marks[row * marks_stride + col] != 0);
        }
        u32 next = 0;
#pragma unroll
        for (u32 k = 0; k < SLOTS; k++) {
            for (u32 l = 0; l < WARP; l++) {
                const u32 j = k * WARP + l;
                if (j >= width) break;
                if (m > 0 && j == next) {
                    next += m;
#pragma unroll
                    for (u32 s = 0; s < SLOTS; s++) {
                        const u32 col = s * WARP + lane;
                        if (col >= j && col < next) {
                            const float cost = __fdiv_rn(value[s], tile[col * width + col]);
                            scores[col - j] = __float_as_uint(__fmul_rn(cost, cost)) & 0x7fffffffu;
                        }
                    }
                    __syncwarp();
#pragma unroll
                    for (u32 s = 0; s < SLOTS; s++) {
                        const u32 col = s * WARP + lane;
                        bool chosen = false;
                        if (col >= j && col < next) {
                            const u32 at = col - j, score = scores[at];
                            u32 lower = 0;
                            for (u32 i = 0; i < m; i++) {
                                lower += i < at ? scores[i] <= score : scores[i] < score;
                            }
                            chosen = lower < zeros;
                        }
                        zero[s] |= __ballot_sync(ALL_LANES, chosen);
                    }
                    __syncwarp();
                }
                const float x = __shfl_sync(ALL_LANES, value[k], l);
                const bool zeroed = (zero[k] >> l) & 1u;
                float q = zeroed ? 0.0f : x;
                i8 c = 0;
                if (kind != NOTHING) {
                    const u64 column = order ? order[start + j] : start + j;
                    const u64 group = row * groups + column / group_len;
                    q = rounded(grid, q, Scale(scale, point, min, group), &c);
                }
                const float e = __fdiv_rn(x - q, tile[j * width + j]);
                if (lane == l) {
                    value[k] = q;
                    error[k] = e;
                    code[k] = c;
                }
#pragma unroll
                for (u32 s = k; s < SLOTS; s++) {
                    const u32 col = s * WARP + lane;
                    if (col > j && col < width) value[s] -= e * tile[j * width + col];
                }
            }
        }
#pragma unroll
        for (u32 k = 0; k < SLOTS; k++) {
            const u32 col = k * WARP + lane;
            if (col < width) {
                own[col] = value[k];
                err[row * err_stride + col] = error[k];
                if (codes) codes[row * cols + (order ? order[start + col] : start + col)] = code[k];
            }
        }
    }
}

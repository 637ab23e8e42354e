// Scales for the groups of weights that a grid has.
//
// A thread takes a row of a group and goes over its columns in order, once for each candidate of a search.
// The 32 rows of a warp pass through shared memory, which holds 128 columns: a group of so many is read
// once, a wider one once for each candidate.
//
//   bytes   4 rows columns of w a reading; 4 rows groups of scales, and what else is found
//   FLOP    rows columns a candidate: 11 symmetric, 13 with minima, 12 asymmetric; 108 more where the
//           scales have scales (36 without minima)
// Equals cpu/scales.rs and cpu/rounding.rs to the last bit: sums go over columns in order, and nothing is
// fused.

// Rows of a block, a thread for each.
static const u32 ROWS = 32;
// Columns in shared memory.
static const u32 COLUMNS = 128;

struct Tile {
    float values[COLUMNS][ROWS + 1];
    float costs[COLUMNS];
};

// The rows of a block, and which of their columns lie in shared memory.
struct Strip {
    const float* w;
    u64 stride;
    u32 rows;
    // Of an error in each column; null: 1.
    const float* costs;
    Tile* tile;
    u64 first;
    u32 count;
};

// The rows of w that this block has.
__device__ __forceinline__ Strip strip_of(
    const float* w, u64 rows, u64 stride, const float* costs, Tile* tile
) {
    const u64 row = (u64)blockIdx.x * ROWS, left = rows - row;
    return {w + row * stride, stride, left < ROWS ? (u32)left : ROWS, costs, tile, 0, 0};
}

// Brings columns to shared memory. Rows beyond the last are 0.
__device__ __forceinline__ void fetch(Strip& strip, u64 first, u32 count) {
    if (strip.first == first && strip.count == count) return;
    strip.first = first;
    strip.count = count;
    __syncwarp();
    for (u32 i = threadIdx.x; i < count; i += WARP) {
        strip.tile->costs[i] = strip.costs ? strip.costs[first + i] : 1.0f;
#pragma unroll 8
        for (u32 row = 0; row < ROWS; row++) {
            strip.tile->values[i][row] = row < strip.rows ? strip.w[row * strip.stride + first + i] : 0.0f;
        }
    }
    __syncwarp();
}

// Some columns of a strip.
struct Group {
    Strip* strip;
    u64 first, count;

    // Calls visit(value, cost) with each column of this thread's row.
    template <typename Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        for (u64 start = 0; start < count; start += COLUMNS) {
            const u32 here = count - start < COLUMNS ? (u32)(count - start) : COLUMNS;
            fetch(*strip, first + start, here);
            const Tile& tile = *strip->tile;
#pragma unroll 4
            for (u32 i = 0; i < here; i++) visit(tile.values[i][threadIdx.x], tile.costs[i]);
        }
    }

    // The value of the largest magnitude.
    __device__ __forceinline__ float extreme() const {
        float extreme = 0.0f;
        each([&](float x, float) { extreme = fabsf(x) > fabsf(extreme) ? x : extreme; });
        return extreme;
    }

    // Least and greatest value.
    __device__ __forceinline__ void range(float* low, float* high) const {
        float least = __uint_as_float(0x7f800000u), greatest = __uint_as_float(0xff800000u);
        each([&](float x, float) {
            least = x < least ? x : least;
            greatest = x > greatest ? x : greatest;
        });
        *low = least;
        *high = greatest;
    }
};

// The codes that there are, and what a search tries.
struct Search {
    float low, high;
    const float* candidates;
    u32 count;
};

__device__ __forceinline__ float inverse(float value) {
    return value == 0.0f ? 0.0f : __fdiv_rn(1.0f, value);
}

// The weighted squared error of a row rounded to scale · code − min.
__device__ __forceinline__ float error_of(const Group& group, float scale, float min, float low, float high) {
    const float inverted = inverse(scale);
    float error = 0.0f;
    group.each([&](float x, float h) {
        const float q = nearest(limited(__fmul_rn(__fadd_rn(x, min), inverted), low, high));
        const float off = __fsub_rn(__fsub_rn(__fmul_rn(scale, q), min), x);
        error = __fadd_rn(error, __fmul_rn(__fmul_rn(h, off), off));
    });
    return error;
}

// The scale of value ≈ scale · code. A candidate divides `extreme` into so many parts.
__device__ __forceinline__ float symmetric(const Group& group, float extreme, const Search& search) {
    float scale = 0.0f, best = 0.0f;
    for (u32 i = 0; i < search.count; i++) {
        const float inverted = extreme == 0.0f ? 0.0f : __fdiv_rn(search.candidates[i], extreme);
        float xq = 0.0f, qq = 0.0f;
        group.each([&](float x, float h) {
            const float q = nearest(limited(__fmul_rn(x, inverted), search.low, search.high));
            xq = __fadd_rn(xq, __fmul_rn(__fmul_rn(h, x), q));
            qq = __fadd_rn(qq, __fmul_rn(__fmul_rn(h, q), q));
        });
        const float fit = __fdiv_rn(xq, qq), gain = __fmul_rn(xq, fit);
        const bool better = qq > 0.0f && gain > best;
        scale = better ? fit : scale;
        best = better ? gain : best;
    }
    return scale;
}

// Scale and minimum of value ≈ scale · code − min, codes from 0, min >= 0. A candidate divides the range
// above the minimum into so many parts, and starts from the best minimum so far.
__device__ __forceinline__ void affine(
    const Group& group, const Search& search, float* found_scale, float* found_min
) {
    const float top = search.high;
    float low, high;
    group.range(&low, &high);
    float min = low < 0.0f ? -low : 0.0f;
    float scale = __fdiv_rn(__fadd_rn(high, min), top);
    scale = scale > 0.0f ? scale : 0.0f;
    float best = error_of(group, scale, min, 0.0f, top);
    float sum = 0.0f, sum_x = 0.0f, sum_xx = 0.0f;
    group.each([&](float x, float h) {
        sum = __fadd_rn(sum, h);
        sum_x = __fadd_rn(sum_x, __fmul_rn(h, x));
        sum_xx = __fadd_rn(sum_xx, __fmul_rn(__fmul_rn(h, x), x));
    });
    for (u32 i = 0; i < search.count; i++) {
        const float inverted = __fmul_rn(search.candidates[i], inverse(__fadd_rn(high, min)));
        float q_sum = 0.0f, qq = 0.0f, xq = 0.0f;
        group.each([&](float x, float h) {
            const float q = nearest(limited(__fmul_rn(__fadd_rn(x, min), inverted), 0.0f, top));
            const float hq = __fmul_rn(h, q);
            q_sum = __fadd_rn(q_sum, hq);
            qq = __fadd_rn(qq, __fmul_rn(hq, q));
            xq = __fadd_rn(xq, __fmul_rn(__fmul_rn(h, x), q));
        });
        const float determinant = __fsub_rn(__fmul_rn(sum, qq), __fmul_rn(q_sum, q_sum));
        const float free_scale =
            __fdiv_rn(__fsub_rn(__fmul_rn(sum, xq), __fmul_rn(sum_x, q_sum)), determinant);
        const float free_min = __fdiv_rn(__fsub_rn(__fmul_rn(q_sum, xq), __fmul_rn(qq, sum_x)), determinant);
        const bool bounded = free_min < 0.0f;
        const float fit = bounded ? __fdiv_rn(xq, qq) : free_scale, fit_min = bounded ? 0.0f : free_min;
        const float by_scale = __fmul_rn(fit, __fsub_rn(__fmul_rn(fit, qq), __fmul_rn(2.0f, xq)));
        const float of_min = __fadd_rn(__fmul_rn(fit_min, sum), __fmul_rn(2.0f, sum_x));
        const float by_min =
            __fmul_rn(fit_min, __fsub_rn(of_min, __fmul_rn(__fmul_rn(2.0f, fit), q_sum)));
        const float error = __fadd_rn(__fadd_rn(sum_xx, by_scale), by_min);
        const bool better = determinant > 0.0f && fit > 0.0f && error < best;
        scale = better ? fit : scale;
        min = better ? fit_min : min;
        best = better ? error : best;
    }
    *found_scale = scale;
    *found_min = min;
}

// costs[i] = 1 / u[i, i]², what an error in a column costs
//   u: [count, count] with rows stride apart; launch: a thread a column
KERNEL column_costs(const float* u, u64 stride, u64 count, float* costs) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float diagonal = u[i * (stride + 1)];
    costs[i] = __fdiv_rn(1.0f, __fmul_rn(diagonal, diagonal));
}

// The scale of each span whose code `reach` stands for the value of the largest magnitude; for that
// magnitude where it is not `with_sign`.
//   w: [rows, spans · span] with rows stride apart; scale: [rows, spans] with rows groups apart
//   launch: x ceil(rows / 32), y any number of blocks, of 32 threads. Equals int_scales, reaching
KERNEL __launch_bounds__(32) scales_to_reach(
    const float* w, u64 rows, u64 stride, u64 span, u64 spans, float reach, u32 with_sign, u32 stored,
    float* scale, u64 groups
) {
    __shared__ Tile tile;
    Strip strip = strip_of(w, rows, stride, nullptr, &tile);
    for (u64 nth = blockIdx.y; nth < spans; nth += gridDim.y) {
        const float extreme = Group{&strip, nth * span, span}.extreme();
        if (threadIdx.x >= strip.rows) continue;
        const u64 row = (u64)blockIdx.x * ROWS + threadIdx.x;
        const float found = __fdiv_rn(with_sign ? extreme : fabsf(extreme), reach);
        scale[row * groups + nth] = as_stored(found, stored);
    }
}

// The scale of each span with the least error, codes low..high.
//   w: [rows, spans · span] with rows stride apart; costs: null, or [spans · span]
//   candidates: [count]; with_sign: as above; scale: [rows, spans] with rows groups apart
//   launch: x ceil(rows / 32), y any number of blocks, of 32 threads. Equals scales::symmetric
KERNEL __launch_bounds__(32) scales_symmetric(
    const float* w, u64 rows, u64 stride, u64 span, u64 spans, const float* costs, const float* candidates,
    u32 count, float low, float high, u32 with_sign, u32 stored, float* scale, u64 groups
) {
    __shared__ Tile tile;
    Strip strip = strip_of(w, rows, stride, costs, &tile);
    const Search search = {low, high, candidates, count};
    for (u64 nth = blockIdx.y; nth < spans; nth += gridDim.y) {
        const Group group = {&strip, nth * span, span};
        const float extreme = group.extreme();
        const float found = symmetric(group, with_sign ? extreme : fabsf(extreme), search);
        if (threadIdx.x >= strip.rows) continue;
        const u64 row = (u64)blockIdx.x * ROWS + threadIdx.x;
        scale[row * groups + nth] = as_stored(found, stored);
    }
}

// Scale and zero point of each span with the least error of those whose range, which holds zero, is
// `candidates` times that of the weights; codes low..high.
//   w: [rows, spans · span] with rows stride apart; costs: null, or [spans · span]
//   candidates: [count]; scale, point: [rows, spans] with rows groups apart
//   launch: x ceil(rows / 32), y any number of blocks, of 32 threads. Equals int_scales
KERNEL __launch_bounds__(32) scales_asymmetric(
    const float* w, u64 rows, u64 stride, u64 span, u64 spans, const float* costs, const float* candidates,
    u32 count, float low, float high, u32 stored, float* scale, i8* point, u64 groups
) {
    __shared__ Tile tile;
    Strip strip = strip_of(w, rows, stride, costs, &tile);
    for (u64 nth = blockIdx.y; nth < spans; nth += gridDim.y) {
        const Group group = {&strip, nth * span, span};
        float lowest, highest;
        group.range(&lowest, &highest);
        lowest = lowest < 0.0f ? lowest : 0.0f;
        highest = highest > 0.0f ? highest : 0.0f;
        float best = __uint_as_float(0x7f800000u), found = 0.0f, found_point = 0.0f;
        for (u32 i = 0; i < count; i++) {
            const float least = __fmul_rn(lowest, candidates[i]), most = __fmul_rn(highest, candidates[i]);
            const float tried = as_stored(__fdiv_rn(__fsub_rn(most, least), __fsub_rn(high, low)), stored);
            const float divisor = tried == 0.0f ? __uint_as_float(0x7f800000u) : tried;
            const float zero = nearest(limited(__fsub_rn(low, __fdiv_rn(least, divisor)), low, high));
            // With the zero point inside the minimum, codes start at `low`.
            const float error = error_of(group, tried, __fmul_rn(tried, zero), low, high);
            const bool better = error < best;
            best = better ? error : best;
            found = better ? tried : found;
            found_point = better ? zero : found_point;
        }
        if (threadIdx.x >= strip.rows) continue;
        const u64 at = ((u64)blockIdx.x * ROWS + threadIdx.x) * groups + nth;
        scale[at] = found;
        point[at] = (i8)found_point;
    }
}

__device__ __forceinline__ int within(int value, int low, int high) {
    return value < low ? low : value > high ? high : value;
}

// A scale or minimum as an integer under d.
__device__ __forceinline__ int integer(float value, float d, int low, int high) {
    const float whole = d == 0.0f ? 0.0f : nearest(limited(__fdiv_rn(value, d), -256.0f, 256.0f));
    return within((int)whole, low, high);
}

// Scale and minimum of a group of a block, before they are rounded.
__device__ __forceinline__ void search_group(
    const Group& group, const Search& search, bool with_min, float* scale, float* min
) {
    if (with_min) {
        affine(group, search, scale, min);
    } else {
        *scale = symmetric(group, group.extreme(), search);
        *min = 0.0f;
    }
}

// The scales of blocks whose groups have integer scales, least..greatest, and minima, 0..top (none: -1):
// those of the block where `from` is 0, and of its groups from..to for the weights as they are now.
//   w: [rows, blocks · block_len] with rows stride apart, of the block's groups from `from` on
//   costs: null, or as the columns of w; candidates: [count]; codes low..high
//   d, dmin: [rows, blocks] with rows groups / (groups of a block) apart, as binary16 holds them
//   scale, min, levels, min_levels: [rows, groups], of the first block on; min_levels may be null
//   launch: x ceil(rows / 32), y any number of blocks, of 32 threads. Equals block_scales, refine
KERNEL __launch_bounds__(32) scales_of_scales(
    const float* w, u64 rows, u64 stride, u64 block_len, u64 blocks, u64 group_len, u32 from, u32 to,
    const float* costs, const float* candidates, u32 count, float low, float high, float least, float greatest,
    float top, float* d, float* dmin, i8* levels, i8* min_levels, float* scale, float* min, u64 groups
) {
    __shared__ Tile tile;
    Strip strip = strip_of(w, rows, stride, costs, &tile);
    const Search search = {low, high, candidates, count};
    const bool with_min = top >= 0.0f, mine = threadIdx.x < strip.rows;
    const u32 of_block = (u32)(block_len / group_len);
    // Lanes without a row search zeros and write nothing.
    const u64 row = (u64)blockIdx.x * ROWS + (mine ? threadIdx.x : 0);
    for (u64 nth = blockIdx.y; nth < blocks; nth += gridDim.y) {
        const u64 block = row * (groups / of_block) + nth, first = row * groups + nth * of_block;
        if (from == 0) {
            float largest = 0.0f, largest_min = 0.0f;
            for (u32 g = 0; g < of_block; g++) {
                float found, found_min;
                const Group group = {&strip, nth * block_len + g * group_len, group_len};
                search_group(group, search, with_min, &found, &found_min);
                largest = fabsf(found) > fabsf(largest) ? found : largest;
                largest_min = found_min > largest_min ? found_min : largest_min;
                if (mine) scale[first + g] = found;
                if (mine && with_min) min[first + g] = found_min;
            }
            // Signed scales reach one further below zero than above.
            const float found_d = through_f16(__fdiv_rn(largest, least < 0.0f ? least : greatest));
            const float found_dmin = with_min ? through_f16(__fdiv_rn(largest_min, top)) : 0.0f;
            if (mine) {
                d[block] = found_d;
                if (with_min) dmin[block] = found_dmin;
                for (u32 g = 0; g < of_block; g++) {
                    const int level = integer(scale[first + g], found_d, (int)least, (int)greatest);
                    levels[first + g] = (i8)level;
                    scale[first + g] = __fmul_rn(found_d, (float)level);
                    if (!with_min) continue;
                    const int min_level = integer(min[first + g], found_dmin, 0, (int)top);
                    min_levels[first + g] = (i8)min_level;
                    min[first + g] = __fmul_rn(found_dmin, (float)min_level);
                }
            }
        }
        const float own_d = mine ? d[block] : 0.0f, own_dmin = mine && with_min ? dmin[block] : 0.0f;
        for (u32 g = from; g < to; g++) {
            const Group group = {&strip, nth * block_len + (g - from) * group_len, group_len};
            float found, found_min;
            search_group(group, search, with_min, &found, &found_min);
            const int level = integer(found, own_d, (int)least, (int)greatest);
            const int min_level = with_min ? integer(found_min, own_dmin, 0, (int)top) : 0;
            int best_level = level, best_min_level = min_level;
            float best = __uint_as_float(0x7f800000u);
            // Each integer as it is, one less and one more.
            for (u32 i = 0; i < (with_min ? 9u : 3u); i++) {
                const u32 step = with_min ? i / 3 : i, min_step = with_min ? i % 3 : 0;
                const int up = step == 2 ? 1 : -(int)step, min_up = min_step == 2 ? 1 : -(int)min_step;
                const int tried = within(level + up, (int)least, (int)greatest);
                const int tried_min = within(min_level + min_up, 0, with_min ? (int)top : 0);
                const float by = __fmul_rn(own_d, (float)tried), off = __fmul_rn(own_dmin, (float)tried_min);
                const float error = error_of(group, by, off, low, high);
                const bool better = error < best;
                best = better ? error : best;
                best_level = better ? tried : best_level;
                best_min_level = better ? tried_min : best_min_level;
            }
            if (!mine) continue;
            levels[first + g] = (i8)best_level;
            scale[first + g] = __fmul_rn(own_d, (float)best_level);
            if (!with_min) continue;
            min_levels[first + g] = (i8)best_min_level;
            min[first + g] = __fmul_rn(own_dmin, (float)best_min_level);
        }
    }
}

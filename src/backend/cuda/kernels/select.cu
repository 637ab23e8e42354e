// Which scores are the lowest: exact counts, ties to the lower index, no sorting.
//
// A score is a float that is never negative, kept as its bits without the sign, so that scores order
// like unsigned integers and NaN is the highest. Over a whole matrix the threshold is found digit by
// digit, from histograms of 11, 11 and 10 bits; `state` has the digits found so far and how many scores
// are still to be taken below them. Counts are integers, so the order in which threads add does not
// show. Equals cpu/select.rs.
//
//   bytes   a pass over n scores reads 4 n; a selection over a matrix makes three passes, one more to
//           count ties and one that reads 4 n and writes n marks
//   FLOP    one product (and one division, for sweeps) a score

static const u32 BINS = 2048;

__device__ __forceinline__ u32 order_of(float score) {
    return __float_as_uint(score) & 0x7fffffffu;
}

// scores[r, c] = |w[r, c]| scale[c], without `scale` |w|.
//   w, scores: [rows, cols]; scale: [cols] or null
//   launch: x ceil(cols / threads), y any number of blocks
KERNEL scores_scaled(const float* w, const float* scale, u64 rows, u64 cols, u32* scores) {
    const u64 col = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    const float factor = scale ? scale[col] : 1.0f;
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
        scores[row * cols + col] = order_of(__fmul_rn(fabsf(w[row * cols + col]), factor));
    }
}

// scores[r, j] = (w[r, j] / u[j, j])², what zeroing the weight costs.
//   w: [rows, width] with rows w_stride apart; u: [width, width], u_stride; scores: [rows, width]
//   launch: x ceil(width / threads), y any number of blocks
KERNEL scores_sweep(
    const float* w, u64 w_stride, const float* u, u64 u_stride, u64 rows, u64 width, u32* scores
) {
    const u64 j = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= width) return;
    const float diagonal = u[j * (u_stride + 1)];
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
        const float err = __fdiv_rn(w[row * w_stride + j], diagonal);
        scores[row * width + j] = order_of(__fmul_rn(err, err));
    }
}

// Begins the search for the `count` lowest scores.
//   state: [prefix, remaining]; launch: one thread
KERNEL first_state(u64* state, u64 count) {
    state[0] = 0;
    state[1] = count;
}

// Adds to counts[digit] how many scores have that digit, of those that agree with the digits found.
//   scores: [count]; state: [prefix, remaining]; counts: [2048]
//   launch: any number of blocks and threads
KERNEL histogram(const u32* scores, u64 count, const u64* state, u32 shift, u32 bits, u64* counts) {
    __shared__ u32 own[BINS];
    for (u32 bin = threadIdx.x; bin < BINS; bin += blockDim.x) own[bin] = 0;
    __syncthreads();
    const u32 above = shift + bits;
    const u64 prefix = state[0] >> above;
    const u32 mask = (1u << bits) - 1u;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
        const u32 score = scores[i];
        if ((u64)score >> above == prefix) atomicAdd(&own[(score >> shift) & mask], 1u);
    }
    __syncthreads();
    for (u32 bin = threadIdx.x; bin < BINS; bin += blockDim.x) {
        if (own[bin] > 0) atomicAdd(&counts[bin], (u64)own[bin]);
    }
}

// The sum of the values of this thread and of those before it in the block. `scratch` has a place for
// each thread.
__device__ __forceinline__ u64 scan(u64 value, u64* scratch) {
    scratch[threadIdx.x] = value;
    __syncthreads();
    for (u32 step = 1; step < blockDim.x; step *= 2) {
        const u64 before = threadIdx.x >= step ? scratch[threadIdx.x - step] : 0;
        __syncthreads();
        scratch[threadIdx.x] += before;
        __syncthreads();
    }
    return scratch[threadIdx.x];
}

// Finds the digit at which the lowest scores end, adds it to the prefix, takes those below it from the
// remaining ones, and clears the counts.
//   counts: [2048]; state: [prefix, remaining]
//   launch: 1 block of 1024 threads
KERNEL next_digit(u64* counts, u64* state, u32 shift) {
    __shared__ u64 scratch[1024];
    const u64 remaining = state[1];
    const u32 first = 2 * threadIdx.x;
    const u64 one = counts[first], two = counts[first + 1];
    const u64 sum = scan(one + two, scratch);
    const u64 before = sum - one - two;
    // The digit of exactly one thread is it: the first whose sum reaches the remaining count.
    if (before < remaining && remaining <= before + one) {
        state[0] |= (u64)first << shift;
        state[1] = remaining - before;
    } else if (before + one < remaining && remaining <= sum) {
        state[0] |= (u64)(first + 1) << shift;
        state[1] = remaining - before - one;
    }
    counts[first] = 0;
    counts[first + 1] = 0;
}

// ties[r] = how many scores of row r are the threshold.
//   scores: [rows, cols]; ties: [rows]
//   launch: a warp a row, any number of blocks
KERNEL count_ties(const u32* scores, u64 rows, u64 cols, const u64* state, u32* ties) {
    const u32 threshold = (u32)state[0];
    const u32 lane = threadIdx.x % WARP;
    const u64 warps = (u64)gridDim.x * (blockDim.x / WARP);
    for (u64 row = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / WARP; row < rows; row += warps) {
        u32 count = 0;
        for (u64 col = lane; col < cols; col += WARP) count += scores[row * cols + col] == threshold;
        count = warp_sum(count);
        if (lane == 0) ties[row] = count;
    }
}

// ties[r] = how many of them are among the lowest: those of the first rows, until none remain.
//   launch: 1 block of 1024 threads
KERNEL share_ties(u32* ties, u64 rows, const u64* state) {
    __shared__ u64 scratch[1024];
    __shared__ u64 taken;
    const u64 remaining = state[1];
    if (threadIdx.x == 0) taken = 0;
    __syncthreads();
    for (u64 first = 0; first < rows; first += blockDim.x) {
        const u64 row = first + threadIdx.x;
        const u64 own = row < rows ? ties[row] : 0;
        const u64 base = taken;
        const u64 before = base + scan(own, scratch) - own;
        const u64 left = remaining > before ? remaining - before : 0;
        if (row < rows) ties[row] = (u32)(own < left ? own : left);
        __syncthreads();
        if (threadIdx.x == blockDim.x - 1) taken = before + own;
        __syncthreads();
    }
}

// marks[r, c] = 1 for scores below the threshold and the first ties[r] at it, else 0.
//   scores, marks: [rows, cols]; ties: [rows]
//   launch: a warp a row, any number of blocks
KERNEL mark_lowest(const u32* scores, u64 rows, u64 cols, const u64* state, const u32* ties, u8* marks) {
    const u32 threshold = (u32)state[0];
    const u32 lane = threadIdx.x % WARP;
    const u64 warps = (u64)gridDim.x * (blockDim.x / WARP);
    for (u64 row = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / WARP; row < rows; row += warps) {
        u32 seen = 0;
        for (u64 first = 0; first < cols; first += WARP) {
            const u64 col = first + lane;
            const u32 score = col < cols ? scores[row * cols + col] : 0xffffffffu;
            const u32 tied = __ballot_sync(ALL_LANES, score == threshold);
            const u32 rank = seen + __popc(tied & ((1u << lane) - 1u));
            const bool marked = score < threshold || (score == threshold && rank < ties[row]);
            if (col < cols) marks[row * cols + col] = marked ? 1 : 0;
            seen += __popc(tied);
        }
    }
}

// Marks the `zeros` lowest scores of every row.
//   scores, marks: [rows, cols]; 0 < zeros < cols
//   launch: a block of 256 threads a row
KERNEL lowest_of_rows(const u32* scores, u64 cols, u32 zeros, u8* marks) {
    __shared__ u32 counts[BINS];
    __shared__ u64 scratch[256];
    __shared__ u32 found[2];
    const u32* own = scores + (u64)blockIdx.x * cols;
    u8* out = marks + (u64)blockIdx.x * cols;
    u32 prefix = 0, remaining = zeros;
    for (u32 pass = 0; pass < 3; pass++) {
        const u32 bits = pass < 2 ? 11 : 10;
        const u32 shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        const u32 above = shift + bits;
        for (u32 bin = threadIdx.x; bin < BINS; bin += blockDim.x) counts[bin] = 0;
        __syncthreads();
        for (u64 col = threadIdx.x; col < cols; col += blockDim.x) {
            const u32 score = own[col];
            if ((u64)score >> above == (u64)prefix >> above) {
                atomicAdd(&counts[(score >> shift) & ((1u << bits) - 1u)], 1u);
            }
        }
        __syncthreads();
        const u32 first = threadIdx.x * (BINS / 256);
        u32 sum = 0;
        for (u32 i = 0; i < BINS / 256; i++) sum += counts[first + i];
        u32 before = (u32)scan(sum, scratch) - sum;
        for (u32 i = 0; i < BINS / 256; i++) {
            const u32 count = counts[first + i];
            if (before < remaining && remaining <= before + count) {
                found[0] = first + i;
                found[1] = remaining - before;
            }
            before += count;
        }
        __syncthreads();
        prefix |= found[0] << shift;
        remaining = found[1];
        __syncthreads();
    }
    // Ties in order: those of earlier columns, of earlier warps, of earlier lanes.
    const u32 lane = threadIdx.x % WARP;
    u32 seen = 0;
    for (u64 first = 0; first < cols; first += blockDim.x) {
        const u64 col = first + threadIdx.x;
        const u32 score = col < cols ? own[col] : 0xffffffffu;
        const u32 tied = __ballot_sync(ALL_LANES, score == prefix);
        if (lane == 0) scratch[threadIdx.x / WARP] = __popc(tied);
        __syncthreads();
        u32 rank = seen + __popc(tied & ((1u << lane) - 1u));
        u32 all = 0;
        for (u32 warp = 0; warp < blockDim.x / WARP; warp++) {
            const u32 count = (u32)scratch[warp];
            if (warp < threadIdx.x / WARP) rank += count;
            all += count;
        }
        if (col < cols) out[col] = score < prefix || (score == prefix && rank < remaining) ? 1 : 0;
        seen += all;
        __syncthreads();
    }
}

// Marks the `zeros` lowest scores of every group of m consecutive scores; m is small.
//   scores, marks: [count], whole groups
//   launch: a thread a score
KERNEL lowest_of_groups(const u32* scores, u64 count, u32 m, u32 zeros, u8* marks) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const u32 at = (u32)(i % m);
    const u32* group = scores + (i - at);
    const u32 own = group[at];
    u32 lower = 0;
    for (u32 other = 0; other < m; other++) {
        lower += other < at ? group[other] <= own : group[other] < own;
    }
    marks[i] = lower < zeros ? 1 : 0;
}

// marks[r, j] = whether from[r, start + j] is zero.
//   from: [rows, cols]; marks: [rows, width]
//   launch: x ceil(width / threads), y any number of blocks
KERNEL mark_zeros(const float* from, u64 cols, u64 start, u64 rows, u64 width, u8* marks) {
    const u64 j = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= width) return;
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
        marks[row * width + j] = from[row * cols + start + j] == 0.0f ? 1 : 0;
    }
}

// marks[i] = 1
//   marks: [count]; launch: a thread a value
KERNEL mark_all(u8* marks, u64 count) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) marks[i] = 1;
}

// Zeroes the marked values.
//   values, marks: [count]
//   launch: a thread a value
KERNEL zero_marked(float* values, const u8* marks, u64 count) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && marks[i]) values[i] = 0.0f;
}

// What stands around a factorisation: diagonals, orders of columns, triangles turned round, and sums of
// quadratic forms. Each reads and writes its matrices once; n² values, no arithmetic to speak of. Equals
// cpu/solve.rs.

static const u32 TILE = 32;

// out[i] = h[i, i]
//   h: [n, n]; launch: a thread an entry
KERNEL diagonal(const float* h, u64 n, float* out) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = h[i * n + i];
}

// h[index[i], index[i]] = values[i]
//   h: [n, n]; index, values: [count]; launch: a thread an entry
KERNEL set_diagonal(float* h, u64 n, const u32* index, const float* values, u64 count) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) h[index[i] * (n + 1)] = values[i];
}

// w[r, columns[i]] = 0
//   w: [rows, cols]; columns: [count]; launch: x ceil(count / threads), y any number of blocks
KERNEL zero_columns(float* w, u64 rows, u64 cols, const u32* columns, u64 count) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) w[row * cols + columns[i]] = 0.0f;
}

// w[i] = 0 where from[i] = 0
//   w, from: [count]; launch: a thread a value
KERNEL copy_zeros(float* w, const float* from, u64 count) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && from[i] == 0.0f) w[i] = 0.0f;
}

// out[r, i] = w[r, order[i]]
//   w, out: [rows, cols]; order: [cols]; launch: x ceil(cols / threads), y any number of blocks
KERNEL permute_columns(const float* w, u64 rows, u64 cols, const u32* order, float* out) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= cols) return;
    const u64 from = order[i];
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) out[row * cols + i] = w[row * cols + from];
}

// to[r, j] = from[r, j]
//   from: [rows, width] with rows stride apart; to: [rows, width]
//   launch: x ceil(width / threads), y any number of blocks
KERNEL copy_columns(const float* from, u64 stride, u64 rows, u64 width, float* to) {
    const u64 j = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= width) return;
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) to[row * width + j] = from[row * stride + j];
}

// out[i, j] = h[order[i], order[j]] for j <= i, of a symmetric h given by its lower triangle; 0 above.
//   h, out: [n, n]; launch: x ceil(n / threads), y any number of blocks
KERNEL permute_symmetric(const float* h, u64 n, const u32* order, float* out) {
    const u64 j = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= n) return;
    for (u64 i = blockIdx.y; i < n; i += gridDim.y) {
        float value = 0.0f;
        if (j <= i) {
            const u64 a = order[i], b = order[j];
            value = a > b ? h[a * n + b] : h[b * n + a];
        }
        out[i * n + j] = value;
    }
}

// Column j of the lower triangle of J (H + damp I) J, with J the reversal of indices and H given by its
// lower triangle: row n-1-j of that, from its diagonal to the left. Above the diagonal 0.
//   h: [n, n] row-major; out: [n, n] column-major
//   launch: x ceil(n / threads), y any number of blocks
KERNEL reverse_lower(const float* h, u64 n, double damp, double* out) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    for (u64 j = blockIdx.y; j < n; j += gridDim.y) {
        double value = 0.0;
        if (i >= j) value = (double)h[(n - 1 - j) * n + (n - 1 - i)];
        out[j * n + i] = i == j ? value + damp : value;
    }
}

// u = J L J for a lower triangular L; 0 below the diagonal.
//   l: [n, n] column-major; u: [n, n] row-major
//   launch: x and y ceil(n / 32) blocks, y any number, of 256 threads
KERNEL reverse_upper(const double* l, u64 n, float* u) {
    __shared__ float tile[TILE][TILE + 1];
    const u32 x = threadIdx.x % TILE, y = threadIdx.x / TILE, rows = blockDim.x / TILE;
    const u64 j0 = (u64)blockIdx.x * TILE, tiles = (n + TILE - 1) / TILE;
    for (u64 t = blockIdx.y; t < tiles; t += gridDim.y) {
        const u64 i0 = t * TILE;
        // u[i, j] is l's row n-1-i and column n-1-j, whose rows lie side by side.
        for (u32 k = y; k < TILE; k += rows) {
            const u64 i = i0 + x, j = j0 + k;
            if (i < n && j < n) tile[k][x] = j >= i ? (float)l[(n - 1 - j) * n + (n - 1 - i)] : 0.0f;
        }
        __syncthreads();
        for (u32 k = y; k < TILE; k += rows) {
            const u64 i = i0 + k, j = j0 + x;
            if (i < n && j < n) u[i * n + j] = tile[x][k];
        }
        __syncthreads();
    }
}

// out = a - b, or a without b
//   a, b, out: [count]; launch: a thread a value
KERNEL difference(const float* a, const float* b, u64 count, float* out) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = b ? a[i] - b[i] : a[i];
}

// sums[r] = sum over j of d[r, j] (2 t[r, j] - d[r, j] h[j, j]), in f64
//   d, t: [rows, n]; diagonal: [n]; sums: [rows]; launch: a block a row
KERNEL row_forms(const float* d, const float* t, const float* diagonal, u64 n, double* sums) {
    __shared__ double partial[32];
    const u64 first = (u64)blockIdx.x * n;
    double sum = 0.0;
    for (u64 j = threadIdx.x; j < n; j += blockDim.x) {
        const double x = d[first + j];
        sum += x * (2.0 * (double)t[first + j] - x * (double)diagonal[j]);
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

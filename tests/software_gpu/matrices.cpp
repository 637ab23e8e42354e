#include "matrices.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#define WIDEST __attribute__((target_clones("avx2", "default")))
#else
#define WIDEST
#endif

namespace software_gpu {

size_t size_of(Type type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

double read(Type type, const void* at, size_t index) {
    if (type == F64) return static_cast<const double*>(at)[index];
    if (type == F32) return static_cast<const float*>(at)[index];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(at)[index]) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest bf16, ties to even, by way of the nearest f32 as a GPU does it.
static uint16_t to_bf16(double value) {
    float near = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &near, sizeof bits);
    if (near != near) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void write(Type type, void* at, size_t index, double value) {
    if (type == F64) static_cast<double*>(at)[index] = value;
    if (type == F32) static_cast<float*>(at)[index] = static_cast<float>(value);
    if (type == BF16) static_cast<uint16_t*>(at)[index] = to_bf16(value);
}

static const size_t TILE = 32;

// Calls visit(i, j) for all rows and columns, a tile at a time, so that both orders of storage are near.
template <typename Visit>
static void by_tiles(size_t rows, size_t columns, Visit visit) {
    for (size_t i0 = 0; i0 < rows; i0 += TILE) {
        for (size_t j0 = 0; j0 < columns; j0 += TILE) {
            for (size_t i = i0; i < std::min(rows, i0 + TILE); i += 1) {
                for (size_t j = j0; j < std::min(columns, j0 + TILE); j += 1) visit(i, j);
            }
        }
    }
}

Matrix read(const Stored& stored, bool transposed) {
    Matrix out(transposed ? stored.columns : stored.rows, transposed ? stored.rows : stored.columns);
    by_tiles(out.rows, out.columns, [&](size_t i, size_t j) {
        out[i][j] = read(stored.type, stored.at, transposed ? j + i * stored.stride : i + j * stored.stride);
    });
    return out;
}

void write(const Stored& stored, const Matrix& values, bool transposed) {
    void* at = const_cast<void*>(stored.at);
    by_tiles(values.rows, values.columns, [&](size_t i, size_t j) {
        write(stored.type, at, transposed ? j + i * stored.stride : i + j * stored.stride, values[i][j]);
    });
}

Matrix read_triangle(const Stored& stored, bool lower, bool unit, bool transposed) {
    Matrix out(stored.rows, stored.rows);
    by_tiles(stored.rows, stored.rows, [&](size_t i, size_t j) {
        if (lower ? i < j : i > j) return;
        double value = i == j && unit ? 1.0 : read(stored.type, stored.at, i + j * stored.stride);
        (transposed ? out[j][i] : out[i][j]) = value;
    });
    return out;
}

void write_triangle(const Stored& stored, bool lower, const Matrix& values, bool transposed) {
    void* at = const_cast<void*>(stored.at);
    by_tiles(stored.rows, stored.rows, [&](size_t i, size_t j) {
        if (lower ? i < j : i > j) return;
        write(stored.type, at, i + j * stored.stride, transposed ? values[j][i] : values[i][j]);
    });
}

static const size_t DEPTH = 256, ROWS = 4, WIDTH = 8;

// sums += a panel, of 4 x depth and depth x 8.
WIDEST static void tile(size_t depth, const double* const a[ROWS], const double* panel, double* sums) {
    double sum[ROWS][WIDTH] = {};
    for (size_t k = 0; k < depth; k += 1) {
        for (size_t i = 0; i < ROWS; i += 1) {
            for (size_t j = 0; j < WIDTH; j += 1) sum[i][j] += a[i][k] * panel[k * WIDTH + j];
        }
    }
    memcpy(sums, sum, sizeof sum);
}

void multiply_add(size_t m, size_t n, size_t k, double scale, const double* a, size_t a_stride, const double* b, size_t b_stride,
                  double* c, size_t c_stride) {
    double panel[DEPTH * WIDTH], sums[ROWS * WIDTH];
    for (size_t k0 = 0; k0 < k; k0 += DEPTH) {
        size_t depth = std::min(DEPTH, k - k0);
        for (size_t j0 = 0; j0 < n; j0 += WIDTH) {
            size_t width = std::min(WIDTH, n - j0);
            for (size_t i = 0; i < depth; i += 1) {
                for (size_t j = 0; j < WIDTH; j += 1) {
                    panel[i * WIDTH + j] = j < width ? scale * b[(k0 + i) * b_stride + j0 + j] : 0.0;
                }
            }
            for (size_t i0 = 0; i0 < m; i0 += ROWS) {
                const double* rows[ROWS];
                for (size_t i = 0; i < ROWS; i += 1) rows[i] = a + std::min(i0 + i, m - 1) * a_stride + k0;
                tile(depth, rows, panel, sums);
                for (size_t i = 0; i < std::min(ROWS, m - i0); i += 1) {
                    for (size_t j = 0; j < width; j += 1) c[(i0 + i) * c_stride + j0 + j] += sums[i * WIDTH + j];
                }
            }
        }
    }
}

Matrix product(const Matrix& a, const Matrix& b) {
    Matrix out(a.rows, b.columns);
    multiply_add(a.rows, b.columns, a.columns, 1.0, a[0], a.columns, b[0], b.columns, out[0], out.columns);
    return out;
}

}  // namespace software_gpu

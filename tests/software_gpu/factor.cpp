// Triangular systems and Cholesky factors, a block of columns at a time.

#include <algorithm>
#include <cmath>

#include "matrices.h"

namespace software_gpu {

static const size_t BLOCK = 64;

// Solves within rows [first, last), whose other unknowns are already subtracted.
static void solve_block(const Matrix& t, bool lower, size_t first, size_t last, Matrix& b) {
    for (size_t step = first; step < last; step += 1) {
        size_t i = lower ? step : last - 1 - (step - first);
        double* row = b[i];
        for (size_t k = lower ? first : i + 1; k < (lower ? i : last); k += 1) {
            double scale = t[i][k];
            const double* other = b[k];
            for (size_t j = 0; j < b.columns; j += 1) row[j] -= scale * other[j];
        }
        for (size_t j = 0; j < b.columns; j += 1) row[j] /= t[i][i];
    }
}

void solve_triangle(const Matrix& t, bool lower, Matrix& b) {
    size_t n = t.rows, blocks = (n + BLOCK - 1) / BLOCK;
    for (size_t step = 0; step < blocks; step += 1) {
        size_t first = (lower ? step : blocks - 1 - step) * BLOCK;
        size_t last = std::min(n, first + BLOCK);
        solve_block(t, lower, first, last, b);
        size_t rest = lower ? last : 0, count = lower ? n - last : first;
        if (count == 0) continue;
        multiply_add(count, b.columns, last - first, -1.0, t[rest] + first, n, b[first], b.columns, b[rest], b.columns);
    }
}

static double dot(const double* a, const double* b, size_t n) {
    double part[4] = {};
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        for (size_t j = 0; j < 4; j += 1) part[j] += a[i + j] * b[i + j];
    }
    for (; i < n; i += 1) part[0] += a[i] * b[i];
    return (part[0] + part[1]) + (part[2] + part[3]);
}

// The columns [first, last) of the factor; those to the left are already subtracted.
static int factor_columns(Matrix& a, size_t first, size_t last) {
    for (size_t i = first; i < a.rows; i += 1) {
        double* row = a[i] + first;
        for (size_t j = first; j < std::min(i + 1, last); j += 1) {
            double rest = a[i][j] - dot(row, a[j] + first, j - first);
            if (i != j) {
                a[i][j] = rest / a[j][j];
            } else if (rest > 0.0) {
                a[i][i] = std::sqrt(rest);
            } else {
                return static_cast<int>(i) + 1;  // not positive, or NaN
            }
        }
    }
    return 0;
}

int factor(Matrix& a) {
    size_t n = a.rows;
    for (size_t first = 0; first < n; first += BLOCK) {
        size_t last = std::min(n, first + BLOCK), width = last - first;
        if (int minor = factor_columns(a, first, last)) return minor;
        if (last == n) break;
        Matrix across(width, n - last);
        for (size_t i = last; i < n; i += 1) {
            for (size_t j = 0; j < width; j += 1) across[j][i - last] = a[i][first + j];
        }
        for (size_t i = last; i < n; i += BLOCK) {
            size_t rows = std::min(BLOCK, n - i);
            multiply_add(rows, i + rows - last, width, -1.0, a[i] + first, n, across[0], n - last, a[i] + last, n);
        }
    }
    return 0;
}

}  // namespace software_gpu

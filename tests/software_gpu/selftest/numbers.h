// Column-major matrices of pseudo-random numbers.
#pragma once

#include <cmath>

#include "check.h"

struct Columns {
    int rows, columns, stride;
    std::vector<double> values;

    Columns(int rows, int columns, int stride, uint64_t seed) : rows(rows), columns(columns), stride(stride) {
        values.resize(static_cast<size_t>(stride) * (columns - 1) + rows);
        uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
        for (double& value : values) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            value = static_cast<double>(static_cast<int64_t>(state) >> 11) / (1ll << 52);
        }
    }

    double& operator()(int i, int j) { return values[static_cast<size_t>(j) * stride + i]; }
    double operator()(int i, int j) const { return values[static_cast<size_t>(j) * stride + i]; }

    // The triangle strictly above the diagonal, or below it.
    void poison_triangle(bool above) {
        for (int i = 0; i < rows; i += 1) {
            for (int j = 0; j < columns; j += 1) {
                if (i != j && (i < j) == above) (*this)(i, j) = NAN;
            }
        }
    }

    Address upload() const { return ::upload(values); }

    Columns download(Address at) const {
        Columns out = *this;
        out.values = ::download<double>(at, values.size());
        return out;
    }
};

inline bool near(double a, double b) { return std::fabs(a - b) <= 1e-12 * (1.0 + std::fabs(a) + std::fabs(b)) * 10; }

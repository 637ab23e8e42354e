// Dense matrices of doubles, row-major, and what the linear-algebra libraries need of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace software_gpu {

// A number's type in device memory, by its cudaDataType.
enum Type : int { F32 = 0, F64 = 1, BF16 = 14 };

size_t size_of(Type type);

struct Matrix {
    size_t rows, columns;
    std::vector<double> values;

    Matrix(size_t rows, size_t columns) : rows(rows), columns(columns), values(rows * columns) {}
    double* operator[](size_t row) { return values.data() + row * columns; }
    const double* operator[](size_t row) const { return values.data() + row * columns; }
};

// A matrix in device memory, column-major: element (i, j) is at i + j * stride.
struct Stored {
    const void* at;
    Type type;
    size_t rows, columns, stride;
};

double read(Type type, const void* at, size_t index);
void write(Type type, void* at, size_t index, double value);

// The matrix, or its transpose.
Matrix read(const Stored& stored, bool transposed);

// Writes over all of it, with `values` or their transpose.
void write(const Stored& stored, const Matrix& values, bool transposed);

// One triangle of a square matrix, zero elsewhere, or its transpose; the other triangle is not read, nor
// is the diagonal of a unit triangle, which is ones.
Matrix read_triangle(const Stored& stored, bool lower, bool unit, bool transposed);

// Writes over one triangle only.
void write_triangle(const Stored& stored, bool lower, const Matrix& values, bool transposed);

// c += scale a b, of m x k and k x n; strides are the distances of rows.
void multiply_add(size_t m, size_t n, size_t k, double scale, const double* a, size_t a_stride, const double* b, size_t b_stride,
                  double* c, size_t c_stride);

Matrix product(const Matrix& a, const Matrix& b);

// Solves t x = b for x, in place of b.
void solve_triangle(const Matrix& t, bool lower, Matrix& b);

// The Cholesky factor of the symmetric matrix whose lower triangle is given, in its place. Returns 0, or
// the order of the first leading minor that is not positive definite.
int factor(Matrix& a);

// The eigenvalues of a symmetric matrix, ascending, and if `vectors`, its eigenvectors in the rows of a,
// which is overwritten. Returns 0, or how many values did not converge.
int eigen(Matrix& a, std::vector<double>& values, bool vectors);

}  // namespace software_gpu

// Eigenvalues of symmetric matrices: reflections to a tridiagonal matrix, then QR steps with Wilkinson's
// shift (Golub and Van Loan, Matrix Computations, 8.3).

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "matrices.h"

namespace software_gpu {

// The reflection I - beta v v' that takes x to a multiple of its first unit vector, which is returned.
static double reflection(std::vector<double>& v, double& beta) {
    double scale = 0.0, square = 0.0;
    for (double value : v) scale = std::max(scale, std::fabs(value));
    beta = 0.0;
    if (scale == 0.0) return 0.0;
    for (double value : v) square += value / scale * (value / scale);
    double length = scale * std::sqrt(square), first = v[0];
    double image = first > 0.0 ? -length : length;
    v[0] = first - image;
    beta = 1.0 / (length * (length + std::fabs(first)));
    return image;
}

struct Tridiagonal {
    std::vector<double> diagonal, beside;
    std::vector<std::vector<double>> reflections;
    std::vector<double> betas;
};

// Takes the rank-two change of a reflection from rows and columns `from` onward.
static void reflect_both(Matrix& a, size_t from, const std::vector<double>& v, double beta) {
    size_t n = v.size();
    std::vector<double> w(n);
    double along = 0.0;
    for (size_t i = 0; i < n; i += 1) {
        const double* row = a[from + i] + from;
        double part[4] = {};
        for (size_t j = 0; j < n; j += 1) part[j % 4] += row[j] * v[j];
        w[i] = beta * (part[0] + part[1] + part[2] + part[3]);
        along += w[i] * v[i];
    }
    for (size_t i = 0; i < n; i += 1) w[i] -= 0.5 * beta * along * v[i];
    for (size_t i = 0; i < n; i += 1) {
        double* row = a[from + i] + from;
        double v_i = v[i], w_i = w[i];
        for (size_t j = 0; j < n; j += 1) row[j] -= v_i * w[j] + w_i * v[j];
    }
}

static Tridiagonal reduce(Matrix& a) {
    size_t n = a.rows;
    Tridiagonal out;
    for (size_t k = 0; k < n; k += 1) {
        out.diagonal.push_back(a[k][k]);
        if (k + 1 == n) break;
        std::vector<double> v(a[k] + k + 1, a[k] + n);
        double beta = 0.0, image = v[0];
        if (v.size() > 1) {
            image = reflection(v, beta);
            if (beta != 0.0) reflect_both(a, k + 1, v, beta);
        }
        out.beside.push_back(image);
        out.reflections.push_back(std::move(v));
        out.betas.push_back(beta);
    }
    return out;
}

// The product of the reflections, transposed: the rotations make its rows the eigenvectors.
static void gather(Matrix& q, const Tridiagonal& t) {
    size_t n = q.rows;
    std::fill(q.values.begin(), q.values.end(), 0.0);
    for (size_t i = 0; i < n; i += 1) q[i][i] = 1.0;
    for (size_t k = t.reflections.size(); k-- > 0;) {
        const std::vector<double>& v = t.reflections[k];
        double beta = t.betas[k];
        if (beta == 0.0) continue;
        for (size_t i = k + 1; i < n; i += 1) {
            double* row = q[i] + k + 1;
            double along = 0.0;
            for (size_t j = 0; j < v.size(); j += 1) along += row[j] * v[j];
            for (size_t j = 0; j < v.size(); j += 1) row[j] -= beta * along * v[j];
        }
    }
}

static void rotate(double* a, double* b, size_t n, double c, double s) {
    for (size_t i = 0; i < n; i += 1) {
        double above = a[i], below = b[i];
        a[i] = c * above + s * below;
        b[i] = c * below - s * above;
    }
}

// One QR step on rows [low, high] of the tridiagonal matrix.
static void step(std::vector<double>& d, std::vector<double>& e, size_t low, size_t high, Matrix* q) {
    double half = (d[high - 1] - d[high]) / 2.0, last = e[high - 1];
    double shift = d[high] - last / (half + std::copysign(std::hypot(half, last), half)) * last;
    double x = d[low] - shift, z = e[low];
    for (size_t k = low; k < high; k += 1) {
        double length = std::hypot(x, z);
        double c = length == 0.0 ? 1.0 : x / length, s = length == 0.0 ? 0.0 : z / length;
        if (k > low) e[k - 1] = length;
        double first = d[k], second = d[k + 1], off = e[k];
        d[k] = c * c * first + 2.0 * c * s * off + s * s * second;
        d[k + 1] = s * s * first - 2.0 * c * s * off + c * c * second;
        e[k] = c * s * (second - first) + (c * c - s * s) * off;
        if (k + 1 < high) {
            x = e[k];
            z = s * e[k + 1];
            e[k + 1] *= c;
        }
        if (q != nullptr) rotate((*q)[k], (*q)[k + 1], q->columns, c, s);
    }
}

static bool small(const std::vector<double>& d, const std::vector<double>& e, size_t k) {
    return std::fabs(e[k]) <= std::numeric_limits<double>::epsilon() * (std::fabs(d[k]) + std::fabs(d[k + 1]));
}

static int diagonalize(std::vector<double>& d, std::vector<double>& e, Matrix* q) {
    size_t high = d.size() - 1;
    for (size_t steps = 0; high > 0;) {
        double floor = std::numeric_limits<double>::min();
        for (size_t k = 0; k < high; k += 1) {
            if (small(d, e, k) || std::fabs(e[k]) < floor) e[k] = 0.0;
        }
        if (e[high - 1] == 0.0) {
            high -= 1;
            steps = 0;
            continue;
        }
        if (++steps > 60) return static_cast<int>(high);
        size_t low = high;
        while (low > 0 && e[low - 1] != 0.0) low -= 1;
        step(d, e, low, high, q);
    }
    return 0;
}

int eigen(Matrix& a, std::vector<double>& values, bool vectors) {
    size_t n = a.rows;
    bool finite = std::all_of(a.values.begin(), a.values.end(), [](double value) { return std::isfinite(value); });
    values.assign(n, std::numeric_limits<double>::quiet_NaN());
    if (!finite) {
        std::fill(a.values.begin(), a.values.end(), std::numeric_limits<double>::quiet_NaN());
        return static_cast<int>(n);
    }
    Tridiagonal t = reduce(a);
    if (vectors) gather(a, t);
    int left = diagonalize(t.diagonal, t.beside, vectors ? &a : nullptr);
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return t.diagonal[i] < t.diagonal[j]; });
    Matrix sorted(vectors ? n : 0, n);
    for (size_t i = 0; i < n; i += 1) {
        values[i] = t.diagonal[order[i]];
        if (vectors) std::copy(a[order[i]], a[order[i]] + n, sorted[i]);
    }
    if (vectors) a = std::move(sorted);
    return left;
}

}  // namespace software_gpu

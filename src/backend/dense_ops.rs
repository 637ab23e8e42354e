//! Algebra of small matrices in f64: bases, rotations and least squares of a whole model or block.
//!
//! Operands are in host memory, since they are made of sums over many batches and of weights on their
//! way to a file; where the arithmetic happens is the device's business.

use super::{BackendError, Result, Storage};

/// A row-major f64 matrix in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows × cols` values.
    pub data: Vec<f64>,
}

impl Dense {
    /// Zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Ones on the diagonal of a `rows × cols` matrix, zeros elsewhere.
    pub fn identity(rows: usize, cols: usize) -> Self {
        let mut out = Self::zeros(rows, cols);
        (0..rows.min(cols)).for_each(|i| out.data[i * (cols + 1)] = 1.0);
        out
    }

    /// The matrix with these values, row by row.
    ///
    /// # Errors
    /// [`BackendError::Shape`] for another number of values.
    pub fn new(rows: usize, cols: usize, values: &[f32]) -> Result<Self> {
        if values.len() != rows * cols {
            let detail = format!("{} values for [{rows}, {cols}]", values.len());
            return Err(BackendError::Shape { operation: "dense matrix", detail });
        }
        Ok(Self { rows, cols, data: values.iter().map(|&value| f64::from(value)).collect() })
    }

    /// Rows become columns.
    #[must_use]
    pub fn transposed(&self) -> Self {
        let mut out = Self::zeros(self.cols, self.rows);
        for (i, row) in self.data.chunks_exact(self.cols.max(1)).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                out.data[j * self.rows + i] = value;
            }
        }
        out
    }

    /// A square matrix with its lower triangle in the place of the upper one too.
    #[must_use]
    pub fn mirrored(mut self) -> Self {
        let n = self.rows;
        for i in 0..n {
            for j in 0..i {
                self.data[j * n + i] = self.data[i * n + j];
            }
        }
        self
    }

    /// The first `cols` columns.
    #[must_use]
    pub fn first_columns(&self, cols: usize) -> Self {
        let kept = cols.min(self.cols);
        let rows = self.data.chunks_exact(self.cols.max(1));
        let data = rows.flat_map(|row| &row[..kept]).copied().collect();
        Self { rows: self.rows, cols: kept, data }
    }

    /// Multiplies column `j` with `factors[j]`.
    #[must_use]
    pub fn scale_columns(mut self, factors: &[f64]) -> Self {
        for row in self.data.chunks_exact_mut(self.cols.max(1)) {
            row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
        }
        self
    }

    /// Multiplies every value with `factor`.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Self {
        self.data.iter_mut().for_each(|value| *value *= factor);
        self
    }

    /// Adds `other`, which has the same shape.
    pub fn add(&mut self, other: &Self) {
        self.data.iter_mut().zip(&other.data).for_each(|(a, b)| *a += b);
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f64> {
        self.data.iter().step_by(self.cols + 1).copied().collect()
    }

    /// Refuses a matrix that is not square.
    pub(super) fn expect_square(&self, operation: &'static str) -> Result<()> {
        if self.rows == self.cols {
            return Ok(());
        }
        let detail = format!("[{}, {}] is not square", self.rows, self.cols);
        Err(BackendError::Shape { operation, detail })
    }

    /// Refuses `self · other` where the shapes do not fit.
    pub(super) fn expect_product(&self, operation: &'static str, other: &Self) -> Result<()> {
        if self.cols == other.rows {
            return Ok(());
        }
        let detail = format!("[{}, {}] by [{}, {}]", self.rows, self.cols, other.rows, other.cols);
        Err(BackendError::Shape { operation, detail })
    }

    /// Rounded to single precision.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&value| value as f32).collect()
    }
}

/// Eigenvalues and eigenvectors of a symmetric matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigen {
    /// In descending order.
    pub values: Vec<f64>,
    /// `[n, n]`: column `j` is the unit vector of `values[j]`, with the sign that makes its component
    /// of largest magnitude positive (of equal ones, the first).
    pub vectors: Dense,
}

impl Eigen {
    /// From eigenvalues in ascending order and their unit vectors of either sign, one after the other.
    pub(super) fn from_ascending(values: &[f64], vectors: &[f64]) -> Self {
        let n = values.len();
        let mut out = Self { values: Vec::with_capacity(n), vectors: Dense::zeros(n, n) };
        for (j, vector) in vectors.chunks_exact(n.max(1)).rev().enumerate() {
            out.values.push(values[n - 1 - j]);
            let largest = vector
                .iter()
                .fold(0.0, |kept: f64, &v| if v.abs() > kept.abs() { v } else { kept });
            let sign = if largest < 0.0 { -1.0 } else { 1.0 };
            for (i, &value) in vector.iter().enumerate() {
                out.vectors.data[i * n + j] = sign * value;
            }
        }
        out
    }
}

/// Algebra of small matrices in f64.
pub trait DenseOps: Storage {
    /// `a b`.
    ///
    /// # Shapes
    /// `a: [m, k]`, `b: [k, n]` → `[m, n]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn dense_product(&self, a: &Dense, b: &Dense) -> Result<Dense>;

    /// Eigenvalues and eigenvectors of a symmetric matrix, given by its lower triangle.
    ///
    /// # Errors
    /// A matrix that is not square or not finite; device failure.
    fn symmetric_eigen(&self, a: &Dense) -> Result<Eigen>;

    /// `b a⁻¹` for a positive definite `a`, given by its lower triangle.
    ///
    /// # Shapes
    /// `a: [n, n]`, `b: [m, n]` → `[m, n]`.
    ///
    /// # Errors
    /// [`NotPositiveDefinite`](BackendError::NotPositiveDefinite); shapes that do not fit; device
    /// failure.
    fn solve_right(&self, b: &Dense, a: &Dense) -> Result<Dense>;
}

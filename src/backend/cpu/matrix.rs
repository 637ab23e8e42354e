//! Matrices in the CPU's memory.

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;

use super::{Cpu, CpuWeight, Products, buffers, linear, pack, simd};
pub(super) use crate::backend::error::shape_error;
use crate::backend::{BackendError, HostData, HostMatrix, Result, Storage, StoredValues, error};

/// Rows of a strip in element-wise operations.
pub(super) const STRIP: usize = 32;

/// A row-major matrix of f32, or of bf16 where it only feeds products.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuMatrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: HostData,
}

impl CpuMatrix {
    pub(super) fn from_f32(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        debug_assert_eq!(data.len(), rows * cols);
        Self { rows, cols, data: HostData::F32(data) }
    }

    /// The values as f32, widened where they are bf16.
    pub(super) fn widened(&self) -> Cow<'_, [f32]> {
        match &self.data {
            HostData::F32(values) => Cow::Borrowed(values),
            HostData::Bf16(values) => {
                let mut wide = vec![0.0; values.len()];
                widen_rows(values, self.cols, &mut wide);
                Cow::Owned(wide)
            }
        }
    }

    /// The values as bf16, rounded where they are f32.
    pub(super) fn narrowed(&self) -> Cow<'_, [bf16]> {
        match &self.data {
            HostData::Bf16(values) => Cow::Borrowed(values),
            HostData::F32(values) => {
                let mut narrow = vec![bf16::ZERO; values.len()];
                let len = strip_len(STRIP, self.cols);
                let strips = narrow.par_chunks_mut(len).zip(values.par_chunks(len));
                strips.for_each(|(to, from)| simd::narrow(from, to));
                Cow::Owned(narrow)
            }
        }
    }

    /// The f32 values of an operand that is never bf16.
    pub(super) fn f32s(&self, operation: &'static str) -> Result<&[f32]> {
        match &self.data {
            HostData::F32(values) => Ok(values),
            HostData::Bf16(_) => Err(shape_error(operation, "a bf16 operand")),
        }
    }

    /// The f32 values of an operand that is never bf16, to change.
    pub(super) fn f32s_mut(&mut self, operation: &'static str) -> Result<&mut [f32]> {
        match &mut self.data {
            HostData::F32(values) => Ok(values),
            HostData::Bf16(_) => Err(shape_error(operation, "a bf16 operand")),
        }
    }

    /// The values of a range of whole rows as f32; bf16 rows go through `scratch`.
    pub(super) fn rows_f32<'a>(
        &'a self,
        rows: std::ops::Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let range = rows.start * self.cols..rows.end * self.cols;
        match &self.data {
            HostData::F32(values) => &values[range],
            HostData::Bf16(values) => {
                scratch.resize(range.len(), 0.0);
                simd::widen(&values[range], scratch);
                scratch
            }
        }
    }

    pub(super) fn expect_shape(
        &self,
        operation: &'static str,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        error::expect_shape(operation, (self.rows, self.cols), (rows, cols))
    }
}

impl Drop for CpuMatrix {
    fn drop(&mut self) {
        buffers::put_data(std::mem::replace(&mut self.data, HostData::F32(Vec::new())));
    }
}

/// Values per chunk of `rows` rows, never 0.
pub(super) fn strip_len(rows: usize, cols: usize) -> usize {
    (rows * cols).max(1)
}

fn widen_rows(from: &[bf16], cols: usize, to: &mut [f32]) {
    let len = strip_len(STRIP, cols);
    to.par_chunks_mut(len).zip(from.par_chunks(len)).for_each(|(to, from)| simd::widen(from, to));
}

/// Makes a matrix that feeds products: `fill(row, values)` computes each row in f32, which is
/// rounded once where products are bf16.
pub(super) fn product_operand(
    products: Products,
    rows: usize,
    cols: usize,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> CpuMatrix {
    let len = strip_len(STRIP, cols);
    let data = match products {
        Products::F32 => {
            let mut out = buffers::take(rows * cols);
            out.par_chunks_mut(len).enumerate().for_each(|(strip, out)| {
                for (row, out) in out.chunks_exact_mut(cols).enumerate() {
                    fill(strip * STRIP + row, out);
                }
            });
            HostData::F32(out)
        }
        Products::Bf16(_) => {
            let mut out = buffers::take(rows * cols);
            out.par_chunks_mut(len).enumerate().for_each_init(
                || vec![0.0; cols],
                |wide, (strip, out)| {
                    for (row, out) in out.chunks_exact_mut(cols).enumerate() {
                        fill(strip * STRIP + row, wide);
                        simd::narrow(wide, out);
                    }
                },
            );
            HostData::Bf16(out)
        }
    };
    CpuMatrix { rows, cols, data }
}

impl Storage for Cpu {
    type Matrix = CpuMatrix;
    type Weight = CpuWeight;
    type Staged = CpuMatrix;

    fn describe(&self) -> String {
        format!("CPU, {}", self.products)
    }

    fn upload(&self, data: &[f32], rows: usize, cols: usize) -> Result<CpuMatrix> {
        if data.len() != rows * cols {
            let detail = format!("{} values for [{rows}, {cols}]", data.len());
            return Err(BackendError::Shape { operation: "upload", detail });
        }
        Ok(CpuMatrix::from_f32(rows, cols, buffers::copy(data)))
    }

    fn stage(&self, values: StoredValues<'_>, rows: usize, cols: usize) -> Result<CpuMatrix> {
        values.check("stage", rows, cols)?;
        let mut data = buffers::take(rows * cols);
        pack::decode(values, cols, &mut data);
        Ok(CpuMatrix::from_f32(rows, cols, data))
    }

    fn bring(&self, matrix: &HostMatrix) -> Result<CpuMatrix> {
        self.onload(matrix.clone())
    }

    fn receive(&self, staged: &CpuMatrix) -> Result<CpuMatrix> {
        self.duplicate(staged)
    }

    fn download(&self, matrix: &CpuMatrix) -> Result<Vec<f32>> {
        Ok(matrix.widened().into_owned())
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<CpuMatrix> {
        let mut data = buffers::take(rows * cols);
        data.fill(0.0);
        Ok(CpuMatrix::from_f32(rows, cols, data))
    }

    fn duplicate(&self, matrix: &CpuMatrix) -> Result<CpuMatrix> {
        let data = match &matrix.data {
            HostData::F32(values) => HostData::F32(buffers::copy(values)),
            HostData::Bf16(values) => HostData::Bf16(buffers::copy(values)),
        };
        Ok(CpuMatrix { rows: matrix.rows, cols: matrix.cols, data })
    }

    fn shape(&self, matrix: &CpuMatrix) -> (usize, usize) {
        (matrix.rows, matrix.cols)
    }

    fn bytes(matrix: &CpuMatrix) -> u64 {
        let size = match &matrix.data {
            HostData::F32(_) => size_of::<f32>(),
            HostData::Bf16(_) => size_of::<bf16>(),
        };
        (matrix.rows * matrix.cols * size) as u64
    }

    fn offload(&self, mut matrix: CpuMatrix) -> Result<HostMatrix> {
        let data = std::mem::replace(&mut matrix.data, HostData::F32(Vec::new()));
        Ok(HostMatrix { rows: matrix.rows, cols: matrix.cols, data })
    }

    fn onload(&self, matrix: HostMatrix) -> Result<CpuMatrix> {
        let HostMatrix { rows, cols, data } = matrix;
        let len = match &data {
            HostData::F32(values) => values.len(),
            HostData::Bf16(values) => values.len(),
        };
        if len != rows * cols {
            return Err(shape_error("onload", format!("{len} values for [{rows}, {cols}]")));
        }
        Ok(CpuMatrix { rows, cols, data })
    }

    /// Two: while one batch is in a stretch that does not divide among threads, the other goes on.
    fn lanes(&self) -> usize {
        self.pool.current_num_threads().min(2)
    }

    fn at_once<T: Send, R: Send>(
        &self,
        items: Vec<T>,
        work: impl Fn(T) -> R + Send + Sync,
    ) -> Vec<R> {
        items.into_par_iter().with_max_len(1).map(work).collect()
    }

    fn measure_gemm_ceiling(&self) -> Result<f64> {
        self.scope(|| linear::measure_ceiling(self.products))
    }
}

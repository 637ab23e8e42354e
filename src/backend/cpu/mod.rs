//! The reference backend: every operation on the CPU's cores.
//!
//! Two arithmetics share all code but the matrix products: f32 through faer, and bf16 × bf16 with
//! f32 sums through the kernels of this module where the processor has such instructions. The
//! invariant is that a result depends on the inputs and the arithmetic only, never on the number
//! of threads: work is cut into strips whose size follows from the shapes, each strip is computed
//! by one thread in a fixed order, and partial results are combined in strip order.

mod activation;
mod attention;
mod bf16;
mod buffers;
mod dense;
mod gram;
mod linalg;
mod linear;
mod matrix;
mod nll;
mod norm;
mod pack;
mod rope;
mod rounding;
mod scales;
mod select;
mod simd;
mod solve;
mod sweep;

use std::ops::Range;

use rayon::ThreadPool;
use sparsepack_formats::DType;

pub use linear::CpuWeight;
pub use matrix::CpuMatrix;
#[cfg(feature = "cuda")]
pub(super) use pack::too_large;

use super::{
    Activation, AttentionShape, BackendError, BlockOps, Dense, DenseOps, Eigen, Fetch, Grid,
    PackOps, Precision, Result, RopeTables, Rounding, Selection, SequenceLens, SolveOps, StatOps,
    SweepRule, grid::Outline,
};

/// Element type and instructions of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Products {
    /// f32 through faer.
    F32,
    /// bf16 with f32 sums, on these instructions.
    Bf16(bf16::Isa),
}

/// The CPU: a thread pool and the arithmetic of its matrix products.
#[derive(Debug)]
pub struct Cpu {
    pool: ThreadPool,
    products: Products,
}

impl std::fmt::Display for Products {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::F32 => f.write_str("f32 products"),
            Self::Bf16(bf16::Isa::Amx) => f.write_str("bf16 products (AMX)"),
            Self::Bf16(bf16::Isa::Avx512) => f.write_str("bf16 products (AVX512-BF16)"),
        }
    }
}

impl Cpu {
    /// Starts `threads` threads (one per core when `None`) and chooses the arithmetic.
    ///
    /// # Errors
    /// [`BackendError::PrecisionUnavailable`] for [`Precision::Bf16`] on a processor without bf16
    /// products; [`BackendError::Threads`] when the threads cannot be started.
    pub fn new(precision: Precision, threads: Option<usize>) -> Result<Self> {
        let products = match (precision, bf16::Isa::available().next()) {
            (Precision::F32, _) | (Precision::Auto, None) => Products::F32,
            (Precision::Auto | Precision::Bf16, Some(isa)) => Products::Bf16(isa),
            (Precision::Bf16, None) => {
                return Err(BackendError::PrecisionUnavailable {
                    device: "the CPU".to_owned(),
                    wanted: "bf16",
                });
            }
        };
        Self::with_products(products, threads)
    }

    /// One backend for each arithmetic that this processor offers, f32 first: what tests and
    /// benchmarks compare.
    ///
    /// # Errors
    /// [`BackendError::Threads`] when the threads cannot be started.
    pub fn every_arithmetic(threads: Option<usize>) -> Result<Vec<Self>> {
        std::iter::once(Products::F32)
            .chain(bf16::Isa::available().map(Products::Bf16))
            .map(|products| Self::with_products(products, threads))
            .collect()
    }

    fn with_products(products: Products, threads: Option<usize>) -> Result<Self> {
        let threads = threads.unwrap_or(0);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("cpu-{index}"))
            .build()
            .map_err(|source| BackendError::Threads { threads, source })?;
        Ok(Self { pool, products })
    }

    /// Runs `work` inside the thread pool, so that the operations it calls use these threads.
    pub fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}

impl BlockOps for Cpu {
    fn prepare(&self, weights: &[&CpuMatrix]) -> Result<CpuWeight> {
        linear::prepare(self.products, weights)
    }

    fn linear(
        &self,
        x: &CpuMatrix,
        weight: &CpuWeight,
        bias: Option<&CpuMatrix>,
    ) -> Result<CpuMatrix> {
        linear::linear(x, weight, bias)
    }

    fn linear_add(
        &self,
        residual: &mut CpuMatrix,
        x: &CpuMatrix,
        weight: &CpuWeight,
        bias: Option<&CpuMatrix>,
    ) -> Result<()> {
        linear::linear_add(residual, x, weight, bias)
    }

    fn linear_gated(
        &self,
        x: &CpuMatrix,
        weight: &CpuWeight,
        bias: Option<&CpuMatrix>,
        activation: Activation,
    ) -> Result<CpuMatrix> {
        linear::linear_gated(self.products, x, weight, bias, activation)
    }

    fn rms_norm(&self, x: &CpuMatrix, gain: &CpuMatrix, eps: f32) -> Result<CpuMatrix> {
        norm::rms_norm(self.products, x, gain, eps)
    }

    fn layer_norm(
        &self,
        x: &CpuMatrix,
        gain: &CpuMatrix,
        bias: &CpuMatrix,
        eps: f32,
    ) -> Result<CpuMatrix> {
        norm::layer_norm(self.products, x, gain, bias, eps)
    }

    fn rope(
        &self,
        qkv: &mut CpuMatrix,
        shape: &AttentionShape,
        tables: &RopeTables,
        lens: &SequenceLens,
    ) -> Result<()> {
        rope::rope(self.products, qkv, shape, tables, lens)
    }

    fn causal_attention(
        &self,
        qkv: &CpuMatrix,
        shape: &AttentionShape,
        lens: &SequenceLens,
    ) -> Result<CpuMatrix> {
        attention::causal_attention(self.products, qkv, shape, lens)
    }

    fn activation(&self, x: &CpuMatrix, activation: Activation) -> Result<CpuMatrix> {
        Ok(activation::activation(self.products, x, activation))
    }

    fn token_nll(&self, logits: &CpuMatrix, targets: &[u32]) -> Result<Vec<f64>> {
        nll::token_nll(logits, targets)
    }
}

impl StatOps for Cpu {
    fn gram_accumulate(&self, h: &mut CpuMatrix, x: &CpuMatrix) -> Result<()> {
        gram::gram_accumulate(self.products, h, x)
    }

    fn cross_accumulate(&self, c: &mut CpuMatrix, a: &CpuMatrix, b: &CpuMatrix) -> Result<()> {
        gram::cross_accumulate(self.products, c, a, b)
    }

    fn scale_rows(&self, x: &mut CpuMatrix, factors: &[f32]) -> Result<()> {
        gram::scale_rows(x, factors)
    }

    fn column_sq_norm(&self, sums: &mut CpuMatrix, x: &CpuMatrix) -> Result<()> {
        gram::column_sq_norm(sums, x)
    }

    fn count_non_finite_rows(&self, x: &CpuMatrix) -> Result<usize> {
        Ok(gram::count_non_finite_rows(x))
    }
}

impl SolveOps for Cpu {
    type Rounding = Rounding;

    fn rounding(&self, grid: Grid, rows: usize, cols: usize) -> Result<Rounding> {
        Outline::new(grid, rows, cols)?;
        Ok(Rounding::new(grid, rows, cols))
    }

    fn fix_scales(&self, rounding: &mut Rounding) {
        rounding.fix_scales();
    }

    fn set_order(&self, rounding: &mut Rounding, order: &[usize]) -> Result<()> {
        rounding.set_order(order.to_vec())
    }

    fn fetch_rounding(&self, rounding: Rounding) -> Result<Fetch<Rounding>> {
        Ok(Fetch::ready(rounding))
    }

    fn diagonal(&self, h: &CpuMatrix) -> Result<Vec<f32>> {
        solve::diagonal(h)
    }

    fn set_diagonal(&self, h: &mut CpuMatrix, entries: &[(usize, f32)]) -> Result<()> {
        solve::set_diagonal(h, entries)
    }

    fn inverse_factor_upper(&self, h: &CpuMatrix, damp: f64) -> Result<CpuMatrix> {
        solve::inverse_factor_upper(h, damp)
    }

    fn zero_columns(&self, w: &mut CpuMatrix, columns: &[usize]) -> Result<()> {
        solve::zero_columns(w, columns)
    }

    fn copy_zeros(&self, w: &mut CpuMatrix, from: &CpuMatrix) -> Result<()> {
        solve::copy_zeros(w, from)
    }

    fn zero_lowest(
        &self,
        w: &mut CpuMatrix,
        scale: Option<&CpuMatrix>,
        selection: Selection,
    ) -> Result<()> {
        select::zero_lowest(w, scale, selection)
    }

    fn obs_sweep(
        &self,
        w: &mut CpuMatrix,
        u: &CpuMatrix,
        columns: Range<usize>,
        rule: SweepRule<'_, CpuMatrix>,
        rounding: Option<&mut Rounding>,
    ) -> Result<CpuMatrix> {
        sweep::obs_sweep(w, u, columns, rule, rounding)
    }

    fn choose_scales(
        &self,
        w: &CpuMatrix,
        importance: Option<&[f32]>,
        rounding: &mut Rounding,
    ) -> Result<()> {
        rounding::choose_scales(w, importance, rounding)
    }

    fn round(&self, w: &mut CpuMatrix, rounding: &mut Rounding) -> Result<()> {
        rounding::round(w, rounding)
    }

    fn permute_columns(&self, w: &CpuMatrix, order: &[usize]) -> Result<CpuMatrix> {
        solve::permute_columns(w, order)
    }

    fn permute_symmetric(&self, h: &CpuMatrix, order: &[usize]) -> Result<CpuMatrix> {
        solve::permute_symmetric(h, order)
    }

    fn trailing_update(
        &self,
        w: &mut CpuMatrix,
        err: &CpuMatrix,
        u: &CpuMatrix,
        columns: Range<usize>,
    ) -> Result<()> {
        sweep::trailing_update(w, err, u, columns)
    }

    fn quadratic_form(&self, a: &CpuMatrix, b: Option<&CpuMatrix>, h: &CpuMatrix) -> Result<f64> {
        solve::quadratic_form(a, b, h)
    }
}

impl PackOps for Cpu {
    fn store(&self, w: &mut CpuMatrix, dtype: DType) -> Result<Fetch<Vec<u8>>> {
        pack::store(w, dtype)
    }

    fn pack_24(&self, w: &mut CpuMatrix, dtype: DType) -> Result<Option<[Fetch<Vec<u8>>; 2]>> {
        pack::pack_24(w, dtype)
    }
}

impl DenseOps for Cpu {
    fn dense_product(&self, a: &Dense, b: &Dense) -> Result<Dense> {
        dense::product(a, b)
    }

    fn symmetric_eigen(&self, a: &Dense) -> Result<Eigen> {
        dense::symmetric_eigen(a)
    }

    fn solve_right(&self, b: &Dense, a: &Dense) -> Result<Dense> {
        dense::solve_right(b, a)
    }
}

//! NVIDIA GPUs: matrix products through cuBLAS, factorisations through cuSOLVER, and kernels of our own
//! for what these lack, compiled for the device when they are first launched.
//!
//! As on the CPU there are two arithmetics, f32 and bf16 products with f32 sums, and a result depends on
//! the inputs and the arithmetic only: kernels add in a fixed order, without floating-point atomics.
//! Everything is asynchronous on one stream; what reads a result waits for it, and errors of kernels come
//! to light there. Weights come and results go on streams of their own, beside it.
//!
//! What a layer's solver works with is on the device from its weights to its codes and scales
//! (`rounding.rs`), which the host fetches when the layer is done. Besides, it reads the diagonal of the
//! Hessian and the errors of layers.

mod activation;
mod attention;
mod cached;
mod dense;
mod driver;
mod gram;
mod linear;
mod matrix;
mod nll;
mod norm;
mod pack;
mod rope;
mod rounding;
mod scales;
mod select;
mod solve;
mod sweep;

use std::ops::Range;

use cached::Cached;
use driver::Memory;
pub use matrix::{CudaMatrix, CudaWeight};
pub use pack::CudaStaged;
pub use rounding::CudaRounding;
use sparsepack_formats::DType;

use super::{
    Activation, AttentionShape, BackendError, BlockOps, Dense, DenseOps, Eigen, Fetch, Grid,
    PackOps, Precision, Result, RopeTables, Rounding, Selection, SequenceLens, SolveOps, StatOps,
    SweepRule, cpu,
};

/// Element type of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Products {
    /// f32 throughout, never TF32.
    F32,
    /// bf16 with f32 sums, on the tensor cores.
    Bf16,
}

impl std::fmt::Display for Products {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::F32 => f.write_str("f32 products"),
            Self::Bf16 => f.write_str("bf16 products"),
        }
    }
}

/// One NVIDIA GPU.
#[derive(Debug)]
pub struct Cuda {
    gpu: driver::Gpu,
    products: Products,
    /// Streaming multiprocessors.
    processors: usize,
    /// For what stays on the host.
    host: cpu::Cpu,
    /// Cosines and sines of the last rotation.
    rope_tables: Cached<RopeTables, (Memory<f32>, Memory<f32>)>,
    /// Position of each token in its sequence, of the last rotation.
    positions: Cached<SequenceLens, Memory<u32>>,
    /// Blocks of queries of the last attention, for tiles of so many.
    tiles: Cached<(SequenceLens, usize), Memory<u32>>,
}

/// The name of device `index`, if it and NVIDIA's libraries are there.
///
/// # Errors
/// [`BackendError::NoDevice`], [`BackendError::MissingLibrary`].
pub fn probe(index: usize) -> Result<String> {
    driver::probe(index)
}

impl Cuda {
    /// Starts device `index` and chooses the arithmetic.
    ///
    /// # Errors
    /// [`BackendError::NoDevice`] without such a device, [`BackendError::MissingLibrary`] without one of
    /// NVIDIA's libraries, [`BackendError::PrecisionUnavailable`] for [`Precision::Bf16`] on a device
    /// without bf16 products, and failures of the device.
    pub fn new(index: usize, precision: Precision, threads: Option<usize>) -> Result<Self> {
        let gpu = driver::Gpu::start(index)?;
        let products = match (precision, gpu.has_bf16()) {
            (Precision::F32, _) | (Precision::Auto, false) => Products::F32,
            (Precision::Auto | Precision::Bf16, true) => Products::Bf16,
            (Precision::Bf16, false) => {
                return Err(BackendError::PrecisionUnavailable {
                    device: gpu.describe(),
                    wanted: "bf16",
                });
            }
        };
        let host = cpu::Cpu::new(Precision::F32, threads)?;
        let processors = gpu.processors()?;
        Ok(Self {
            gpu,
            products,
            processors,
            host,
            rope_tables: Cached::default(),
            positions: Cached::default(),
            tiles: Cached::default(),
        })
    }

    /// Runs `work` with the host's threads.
    pub fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.host.scope(work)
    }
}

impl BlockOps for Cuda {
    fn prepare(&self, weights: &[&CudaMatrix]) -> Result<CudaWeight> {
        linear::prepare(self, weights)
    }

    fn linear(
        &self,
        x: &CudaMatrix,
        weight: &CudaWeight,
        bias: Option<&CudaMatrix>,
    ) -> Result<CudaMatrix> {
        linear::linear(self, "linear", x, weight, bias)
    }

    fn linear_add(
        &self,
        residual: &mut CudaMatrix,
        x: &CudaMatrix,
        weight: &CudaWeight,
        bias: Option<&CudaMatrix>,
    ) -> Result<()> {
        linear::linear_add(self, residual, x, weight, bias)
    }

    fn linear_gated(
        &self,
        x: &CudaMatrix,
        weight: &CudaWeight,
        bias: Option<&CudaMatrix>,
        activation: Activation,
    ) -> Result<CudaMatrix> {
        linear::linear_gated(self, x, weight, bias, activation)
    }

    fn rms_norm(&self, x: &CudaMatrix, gain: &CudaMatrix, eps: f32) -> Result<CudaMatrix> {
        norm::rms_norm(self, x, gain, eps)
    }

    fn layer_norm(
        &self,
        x: &CudaMatrix,
        gain: &CudaMatrix,
        bias: &CudaMatrix,
        eps: f32,
    ) -> Result<CudaMatrix> {
        norm::layer_norm(self, x, gain, bias, eps)
    }

    fn rope(
        &self,
        qkv: &mut CudaMatrix,
        shape: &AttentionShape,
        tables: &RopeTables,
        lens: &SequenceLens,
    ) -> Result<()> {
        rope::rope(self, qkv, shape, tables, lens)
    }

    fn check_attention(&self, shape: &AttentionShape) -> Result<()> {
        attention::check(self, shape)
    }

    fn causal_attention(
        &self,
        qkv: &CudaMatrix,
        shape: &AttentionShape,
        lens: &SequenceLens,
    ) -> Result<CudaMatrix> {
        attention::causal_attention(self, qkv, shape, lens)
    }

    fn activation(&self, x: &CudaMatrix, activation: Activation) -> Result<CudaMatrix> {
        activation::activation(self, x, activation)
    }

    fn token_nll(&self, logits: &CudaMatrix, targets: &[u32]) -> Result<Vec<f64>> {
        nll::token_nll(self, logits, targets)
    }
}

impl StatOps for Cuda {
    fn gram_accumulate(&self, h: &mut CudaMatrix, x: &CudaMatrix) -> Result<()> {
        gram::gram_accumulate(self, h, x)
    }

    fn cross_accumulate(&self, c: &mut CudaMatrix, a: &CudaMatrix, b: &CudaMatrix) -> Result<()> {
        gram::cross_accumulate(self, c, a, b)
    }

    fn scale_rows(&self, x: &mut CudaMatrix, factors: &[f32]) -> Result<()> {
        gram::scale_rows(self, x, factors)
    }

    fn column_sq_norm(&self, sums: &mut CudaMatrix, x: &CudaMatrix) -> Result<()> {
        gram::column_sq_norm(self, sums, x)
    }

    fn count_non_finite_rows(&self, x: &CudaMatrix) -> Result<usize> {
        gram::count_non_finite_rows(self, x)
    }
}

impl SolveOps for Cuda {
    type Rounding = CudaRounding;

    fn rounding(&self, grid: Grid, rows: usize, cols: usize) -> Result<CudaRounding> {
        rounding::rounding(self, grid, rows, cols)
    }

    fn fix_scales(&self, rounding: &mut CudaRounding) {
        rounding.outline.fixed = true;
    }

    fn set_order(&self, rounding: &mut CudaRounding, order: &[usize]) -> Result<()> {
        rounding::set_order(self, rounding, order)
    }

    fn fetch_rounding(&self, rounding: CudaRounding) -> Result<Fetch<Rounding>> {
        rounding::fetch_rounding(self, rounding)
    }

    fn diagonal(&self, h: &CudaMatrix) -> Result<Vec<f32>> {
        solve::diagonal(self, h)
    }

    fn set_diagonal(&self, h: &mut CudaMatrix, entries: &[(usize, f32)]) -> Result<()> {
        solve::set_diagonal(self, h, entries)
    }

    fn inverse_factor_upper(&self, h: &CudaMatrix, damp: f64) -> Result<CudaMatrix> {
        solve::inverse_factor_upper(self, h, damp)
    }

    fn zero_columns(&self, w: &mut CudaMatrix, columns: &[usize]) -> Result<()> {
        solve::zero_columns(self, w, columns)
    }

    fn copy_zeros(&self, w: &mut CudaMatrix, from: &CudaMatrix) -> Result<()> {
        solve::copy_zeros(self, w, from)
    }

    fn zero_lowest(
        &self,
        w: &mut CudaMatrix,
        scale: Option<&CudaMatrix>,
        selection: Selection,
    ) -> Result<()> {
        select::zero_lowest(self, w, scale, selection)
    }

    fn obs_sweep(
        &self,
        w: &mut CudaMatrix,
        u: &CudaMatrix,
        columns: Range<usize>,
        rule: SweepRule<'_, CudaMatrix>,
        rounding: Option<&mut CudaRounding>,
    ) -> Result<CudaMatrix> {
        sweep::obs_sweep(self, w, u, columns, rule, rounding)
    }

    fn choose_scales(
        &self,
        w: &CudaMatrix,
        importance: Option<&[f32]>,
        rounding: &mut CudaRounding,
    ) -> Result<()> {
        scales::choose_scales(self, w, importance, rounding)
    }

    fn round(&self, w: &mut CudaMatrix, rounding: &mut CudaRounding) -> Result<()> {
        rounding::round(self, w, rounding)
    }

    fn permute_columns(&self, w: &CudaMatrix, order: &[usize]) -> Result<CudaMatrix> {
        solve::permute_columns(self, w, order)
    }

    fn permute_symmetric(&self, h: &CudaMatrix, order: &[usize]) -> Result<CudaMatrix> {
        solve::permute_symmetric(self, h, order)
    }

    fn trailing_update(
        &self,
        w: &mut CudaMatrix,
        err: &CudaMatrix,
        u: &CudaMatrix,
        columns: Range<usize>,
    ) -> Result<()> {
        sweep::trailing_update(self, w, err, u, columns)
    }

    fn quadratic_form(
        &self,
        a: &CudaMatrix,
        b: Option<&CudaMatrix>,
        h: &CudaMatrix,
    ) -> Result<f64> {
        solve::quadratic_form(self, a, b, h)
    }
}

impl PackOps for Cuda {
    fn store(&self, w: &mut CudaMatrix, dtype: DType) -> Result<Fetch<Vec<u8>>> {
        pack::store(self, w, dtype)
    }

    fn pack_24(&self, w: &mut CudaMatrix, dtype: DType) -> Result<Option<[Fetch<Vec<u8>>; 2]>> {
        pack::pack_24(self, w, dtype)
    }
}

impl DenseOps for Cuda {
    fn dense_product(&self, a: &Dense, b: &Dense) -> Result<Dense> {
        dense::product(self, a, b)
    }

    fn symmetric_eigen(&self, a: &Dense) -> Result<Eigen> {
        dense::symmetric_eigen(self, a)
    }

    fn solve_right(&self, b: &Dense, a: &Dense) -> Result<Dense> {
        dense::solve_right(self, b, a)
    }
}

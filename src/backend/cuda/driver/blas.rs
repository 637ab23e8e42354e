//! Matrix products through cuBLAS, of row-major matrices.
//!
//! cuBLAS sees a row-major matrix as its transpose, so each product here is asked of it the other way
//! round: `(A B)ᵀ = Bᵀ Aᵀ`. Products of f32 values are f32 throughout (never TF32); those of bf16
//! values are exact, and their sums f32.

use std::ffi::{c_int, c_void};

use cudarc::{
    cublas::{result, sys},
    driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut},
};
use half::bf16;

use super::{Bytes, Gpu, failure};
use crate::backend::{BackendError, Result};

/// What can be multiplied.
pub(in super::super) trait Element: Bytes {
    /// What sums are made of.
    type Sum: Bytes;
    const TYPE: sys::cudaDataType;
    const SUM_TYPE: sys::cudaDataType;
    const COMPUTE: sys::cublasComputeType_t;
    fn scalar(value: f64) -> Self::Sum;
}

macro_rules! elements {
    ($($ty:ty, $sum:ty, $data:ident, $sum_data:ident, $compute:ident);*) => {
        $(impl Element for $ty {
            type Sum = $sum;
            const TYPE: sys::cudaDataType = sys::cudaDataType::$data;
            const SUM_TYPE: sys::cudaDataType = sys::cudaDataType::$sum_data;
            const COMPUTE: sys::cublasComputeType_t = sys::cublasComputeType_t::$compute;
            fn scalar(value: f64) -> $sum {
                value as $sum
            }
        })*
    };
}

elements! {
    f32, f32, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F;
    bf16, f32, CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F;
    f64, f64, CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F
}

/// A factor of a product: row-major memory whose rows are `stride` values apart.
pub(in super::super) struct Operand<'a, T> {
    /// From the first value on.
    pub(in super::super) values: CudaView<'a, T>,
    pub(in super::super) stride: usize,
    /// Taken as its transpose.
    pub(in super::super) transposed: bool,
}

/// `c = beta · c + alpha · a b` with `c: [m, n]`, `a: [m, k]`, `b: [k, n]` after transposition.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Product {
    pub(in super::super) m: usize,
    pub(in super::super) n: usize,
    pub(in super::super) k: usize,
    pub(in super::super) alpha: f64,
    pub(in super::super) beta: f64,
}

/// Values from the first to the last of `rows` rows of `cols` that are `stride` apart.
fn extent(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

impl Gpu {
    /// The product of two matrices.
    pub(in super::super) fn multiply<T: Element>(
        &self,
        operation: &'static str,
        Product { m, n, k, alpha, beta }: Product,
        a: &Operand<'_, T>,
        b: &Operand<'_, T>,
        c: &mut CudaViewMut<'_, T::Sum>,
        c_stride: usize,
    ) -> Result<()> {
        if m == 0 || n == 0 {
            return Ok(());
        }
        let reach = |operand: &Operand<'_, T>, rows, cols| {
            let (rows, cols) = if operand.transposed { (cols, rows) } else { (rows, cols) };
            operand.stride >= cols && operand.values.len() >= extent(rows, cols, operand.stride)
        };
        if !reach(a, m, k) || !reach(b, k, n) || c_stride < n || c.len() < extent(m, n, c_stride) {
            let detail = format!("a product of [{m}, {k}] and [{k}, {n}] beyond its operands");
            return Err(BackendError::Shape { operation, detail });
        }
        let int = |value| self.int(operation, value);
        let transpose = |transposed| {
            use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
            if transposed { CUBLAS_OP_T } else { CUBLAS_OP_N }
        };
        let (alpha, beta) = (T::scalar(alpha), T::scalar(beta));
        let stream = self.stream.as_ref();
        let ((left, _left), (right, _right)) =
            (b.values.device_ptr(stream), a.values.device_ptr(stream));
        let (out, _out) = c.device_ptr_mut(stream);
        self.context.bind_to_thread().map_err(self.failed(operation))?;
        // SAFETY: the handle is live; sizes and strides lie inside the operands, as checked above;
        // memory is borrowed during the call and used on this stream only; the two scalars are in host
        // memory, where the handle expects them.
        let done = unsafe {
            result::gemm_ex(
                *self.blas.handle(),
                transpose(b.transposed),
                transpose(a.transposed),
                int(n)?,
                int(m)?,
                int(k)?,
                std::ptr::from_ref(&alpha).cast::<c_void>(),
                left as *const c_void,
                T::TYPE,
                int(b.stride)?,
                right as *const c_void,
                T::TYPE,
                int(a.stride)?,
                std::ptr::from_ref(&beta).cast::<c_void>(),
                out as *mut c_void,
                T::SUM_TYPE,
                int(c_stride)?,
                T::COMPUTE,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|error| failure(self.describe(), operation, &error))
    }

    /// Lower triangle of `h += xᵀ x` for `h: [n, n]` and `x: [tokens, n]`, f32.
    pub(in super::super) fn add_gram_f32(
        &self,
        operation: &'static str,
        (tokens, n): (usize, usize),
        x: &CudaView<'_, f32>,
        h: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (cols, count) = (self.int(operation, n)?, self.int(operation, tokens)?);
        if n == 0 || tokens == 0 {
            return Ok(());
        }
        if x.len() < tokens * n || h.len() < n * n {
            let detail = format!("[{tokens}, {n}] beyond its operands");
            return Err(BackendError::Shape { operation, detail });
        }
        let one = 1f32;
        let stream = self.stream.as_ref();
        let (from, _from) = x.device_ptr(stream);
        let (to, _to) = h.device_ptr_mut(stream);
        self.context.bind_to_thread().map_err(self.failed(operation))?;
        // SAFETY: as for products; a row-major lower triangle is a column-major upper one.
        let done = unsafe {
            sys::cublasSsyrk_v2(
                *self.blas.handle(),
                sys::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                sys::cublasOperation_t::CUBLAS_OP_N,
                cols,
                count,
                &raw const one,
                from as *const f32,
                cols,
                &raw const one,
                to as *mut f32,
                cols,
            )
        };
        done.result().map_err(|error| failure(self.describe(), operation, &error))
    }

    /// `t = d L` for the lower triangle `L` of `h: [n, n]`, and `d`, `t: [rows, n]`.
    pub(in super::super) fn times_lower(
        &self,
        operation: &'static str,
        (rows, n): (usize, usize),
        d: &CudaView<'_, f32>,
        h: &CudaView<'_, f32>,
        t: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (cols, count) = (self.int(operation, n)?, self.int(operation, rows)?);
        if n == 0 || rows == 0 {
            return Ok(());
        }
        if d.len() < rows * n || t.len() < rows * n || h.len() < n * n {
            let detail = format!("[{rows}, {n}] beyond its operands");
            return Err(BackendError::Shape { operation, detail });
        }
        let one = 1f32;
        let stream = self.stream.as_ref();
        let ((left, _left), (right, _right)) = (h.device_ptr(stream), d.device_ptr(stream));
        let (to, _to) = t.device_ptr_mut(stream);
        self.context.bind_to_thread().map_err(self.failed(operation))?;
        // SAFETY: as for products; `tᵀ = Lᵀ dᵀ`, and `Lᵀ` is the upper triangle of what cuBLAS sees.
        let done = unsafe {
            sys::cublasStrmm_v2(
                *self.blas.handle(),
                sys::cublasSideMode_t::CUBLAS_SIDE_LEFT,
                sys::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                sys::cublasOperation_t::CUBLAS_OP_N,
                sys::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
                cols,
                count,
                &raw const one,
                left as *const f32,
                cols,
                right as *const f32,
                cols,
                to as *mut f32,
                cols,
            )
        };
        done.result().map_err(|error| failure(self.describe(), operation, &error))
    }

    fn int(&self, operation: &'static str, value: usize) -> Result<c_int> {
        c_int::try_from(value).map_err(|_| BackendError::Shape {
            operation,
            detail: format!("{value} rows or columns are more than {} takes", self.name),
        })
    }
}

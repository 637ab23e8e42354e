//! Factorisations in f64 through cuSOLVER's 64-bit interface, of column-major matrices.

use std::{
    ffi::{c_int, c_void},
    sync::Arc,
};

use cudarc::{
    cusolver::{CusolverError, DnHandle, sys},
    driver::{CudaStream, DevicePtr, DevicePtrMut},
};

use super::{Gpu, Memory, failure};
use crate::backend::{BackendError, Result};

const F64: sys::cudaDataType = sys::cudaDataType::CUDA_R_64F;
const LOWER: sys::cublasFillMode_t = sys::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;

/// A handle of cuSOLVER's and the parameters of its generic calls.
#[derive(Debug)]
pub(super) struct Solver {
    handle: DnHandle,
    params: sys::cusolverDnParams_t,
}

// SAFETY: the library's handles may be used by any thread, and calls through `Gpu` are on one stream.
unsafe impl Send for Solver {}
// SAFETY: as above.
unsafe impl Sync for Solver {}

impl Solver {
    pub(super) fn new(stream: &Arc<CudaStream>) -> std::result::Result<Self, CusolverError> {
        let handle = DnHandle::new(stream.clone())?;
        let mut params = std::ptr::null_mut();
        // SAFETY: the pointer is to a live variable.
        unsafe { sys::cusolverDnCreateParams(&raw mut params).result()? };
        Ok(Self { handle, params })
    }
}

impl Drop for Solver {
    fn drop(&mut self) {
        // SAFETY: created in `new` and destroyed once. A failure leaves nothing to be done.
        let _ = unsafe { sys::cusolverDnDestroyParams(self.params) };
    }
}

/// Bytes of workspace on the device and on the host.
type Workspace = (usize, usize);

impl Gpu {
    /// Replaces the lower triangle of a column-major positive definite `a: [n, n]` by its Cholesky
    /// factor. The error has the first pivot that is not positive.
    pub(in super::super) fn cholesky_lower(
        &self,
        operation: &'static str,
        n: usize,
        a: &mut Memory<f64>,
    ) -> Result<()> {
        let info = self.factorise(operation, n, a, |a, call| {
            let (handle, params) = (self.solver.handle.cu(), self.solver.params);
            let n = n as i64;
            // SAFETY: see `factorise`.
            unsafe {
                match call {
                    Call::Size(space) => sys::cusolverDnXpotrf_bufferSize(
                        handle,
                        params,
                        LOWER,
                        n,
                        F64,
                        a,
                        n,
                        F64,
                        &raw mut space.0,
                        &raw mut space.1,
                    ),
                    Call::Run { device, host, space, info } => sys::cusolverDnXpotrf(
                        handle, params, LOWER, n, F64, a, n, F64, device, space.0, host, space.1,
                        info,
                    ),
                }
            }
        })?;
        self.positive_pivots(operation, info)
    }

    /// Replaces the lower triangle of a column-major `a: [n, n]` by its inverse.
    pub(in super::super) fn invert_lower(
        &self,
        operation: &'static str,
        n: usize,
        a: &mut Memory<f64>,
    ) -> Result<()> {
        let info = self.factorise(operation, n, a, |a, call| {
            let handle = self.solver.handle.cu();
            let diagonal = sys::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT;
            let n = n as i64;
            // SAFETY: see `factorise`.
            unsafe {
                match call {
                    Call::Size(space) => sys::cusolverDnXtrtri_bufferSize(
                        handle,
                        LOWER,
                        diagonal,
                        n,
                        F64,
                        a,
                        n,
                        &raw mut space.0,
                        &raw mut space.1,
                    ),
                    Call::Run { device, host, space, info } => sys::cusolverDnXtrtri(
                        handle, LOWER, diagonal, n, F64, a, n, device, space.0, host, space.1, info,
                    ),
                }
            }
        })?;
        self.positive_pivots(operation, info)
    }

    /// Eigenvalues of a symmetric `a: [n, n]`, ascending, given by the lower triangle of what is seen as
    /// column-major; `a` becomes the eigenvectors, column by column.
    pub(in super::super) fn eigen_lower(
        &self,
        operation: &'static str,
        n: usize,
        a: &mut Memory<f64>,
    ) -> Result<Memory<f64>> {
        let mut values = self.allocate::<f64>(n, operation)?;
        let (to, in_use) = values.device_ptr_mut(&self.stream);
        let to = to as *mut c_void;
        let info = self.factorise(operation, n, a, |a, call| {
            let (handle, params) = (self.solver.handle.cu(), self.solver.params);
            let vectors = sys::cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR;
            let n = n as i64;
            // SAFETY: see `factorise`; there are `n` places for the values.
            unsafe {
                match call {
                    Call::Size(space) => sys::cusolverDnXsyevd_bufferSize(
                        handle,
                        params,
                        vectors,
                        LOWER,
                        n,
                        F64,
                        a,
                        n,
                        F64,
                        to,
                        F64,
                        &raw mut space.0,
                        &raw mut space.1,
                    ),
                    Call::Run { device, host, space, info } => sys::cusolverDnXsyevd(
                        handle, params, vectors, LOWER, n, F64, a, n, F64, to, F64, device,
                        space.0, host, space.1, info,
                    ),
                }
            }
        })?;
        drop(in_use);
        match info {
            0 => Ok(values),
            1.. => Err(BackendError::NoEigenvectors { size: n }),
            _ => Err(self.bad_argument(operation, info)),
        }
    }

    /// Replaces `b: [m, n]`, row-major, by `b a⁻¹`, given the factor of a symmetric `a: [n, n]` that
    /// [`cholesky_lower`](Self::cholesky_lower) left.
    pub(in super::super) fn divide_by_factored(
        &self,
        operation: &'static str,
        (m, n): (usize, usize),
        factor: &mut Memory<f64>,
        b: &mut Memory<f64>,
    ) -> Result<()> {
        if b.len() < m * n {
            let detail = format!("{} values for [{m}, {n}]", b.len());
            return Err(BackendError::Shape { operation, detail });
        }
        if m == 0 || n == 0 {
            return Ok(());
        }
        let (right, _right) = b.device_ptr_mut(&self.stream);
        let right = right as *mut c_void;
        let info = self.factorise(operation, n, factor, |a, call| match call {
            Call::Size(_) => sys::cusolverStatus_t::CUSOLVER_STATUS_SUCCESS,
            // SAFETY: see `factorise`; `b` as column-major has `m` columns of `n` values.
            Call::Run { info, .. } => unsafe {
                let (handle, params) = (self.solver.handle.cu(), self.solver.params);
                let (n, m) = (n as i64, m as i64);
                sys::cusolverDnXpotrs(handle, params, LOWER, n, m, F64, a, n, F64, right, n, info)
            },
        })?;
        if info == 0 { Ok(()) } else { Err(self.bad_argument(operation, info)) }
    }

    /// Asks a routine for its workspace, runs it in place on `a: [n, n]`, and returns its `info`.
    fn factorise(
        &self,
        operation: &'static str,
        n: usize,
        a: &mut Memory<f64>,
        routine: impl Fn(*mut c_void, Call<'_>) -> sys::cusolverStatus_t,
    ) -> Result<c_int> {
        if a.len() < n * n || i64::try_from(n).is_err() {
            let detail = format!("{} values for [{n}, {n}]", a.len());
            return Err(BackendError::Shape { operation, detail });
        }
        if n == 0 {
            return Ok(0);
        }
        let failed = |status: sys::cusolverStatus_t| {
            status.result().map_err(|error| failure(self.describe(), operation, &error))
        };
        self.context.bind_to_thread().map_err(self.failed(operation))?;
        // SAFETY of the calls in `routine`: handle and parameters live as long as this device; `a` has
        // `n × n` values; the workspaces have the sizes that the routine asked for; all are used on this
        // stream only, and `finish` below waits until the routine is done with the host's.
        let mut space: Workspace = (0, 0);
        let mut info = self.upload::<u32>(&[0], operation)?;
        let (a, _a) = a.device_ptr_mut(&self.stream);
        let a = a as *mut c_void;
        failed(routine(a, Call::Size(&mut space)))?;
        let device = self.allocate::<u8>(space.0, operation)?;
        let mut host = vec![0u8; space.1];
        {
            let (device, _device) = device.device_ptr(&self.stream);
            let (info, _info) = info.device_ptr_mut(&self.stream);
            failed(routine(
                a,
                Call::Run {
                    device: device as *mut c_void,
                    host: host.as_mut_ptr().cast(),
                    space,
                    info: info as *mut c_int,
                },
            ))?;
        }
        self.finish(operation)?;
        let info = self.download(&info, 1, operation)?;
        Ok(info.first().copied().unwrap_or(0) as c_int)
    }

    /// What `info` says of a factor: all well, or which pivot is not positive.
    fn positive_pivots(&self, operation: &'static str, info: c_int) -> Result<()> {
        match usize::try_from(info) {
            Ok(0) => Ok(()),
            Ok(minor) => Err(BackendError::NotPositiveDefinite { pivot: minor - 1 }),
            Err(_) => Err(self.bad_argument(operation, info)),
        }
    }

    fn bad_argument(&self, operation: &'static str, info: c_int) -> BackendError {
        let error = format!("cuSOLVER refuses argument {}", -info);
        BackendError::Device { device: self.describe(), operation, error }
    }
}

/// A call of a routine.
enum Call<'a> {
    /// For the size of its workspace.
    Size(&'a mut Workspace),
    /// With its workspaces.
    Run {
        /// Workspace on the device.
        device: *mut c_void,
        /// Workspace on the host.
        host: *mut c_void,
        space: Workspace,
        /// Where the routine says how it went, on the device.
        info: *mut c_int,
    },
}

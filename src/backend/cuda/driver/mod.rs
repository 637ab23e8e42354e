//! NVIDIA's libraries behind functions that check what they are given: the only unsafe code of this
//! backend.
//!
//! One stream does everything but copies beside the arithmetic (`transfers.rs`), in the order of the calls,
//! so memory that is freed is not taken again before what still reads it is done. Matrices are row-major
//! here as everywhere; cuBLAS and cuSOLVER, which are column-major, see their transposes.

mod blas;
mod cache;
mod compile;
mod kernels;
mod memory;
mod present;
mod solver;
mod transfers;

use std::{mem::ManuallyDrop, sync::Arc};

use cudarc::{
    cublas::CudaBlas,
    driver::{CudaContext, CudaStream, DriverError, result, sys},
};

pub(super) use blas::{Element, Operand, Product};
/// A part of device memory.
pub(super) use cudarc::driver::CudaView as View;
pub(super) use kernels::{Arg, Geometry, KernelFile, Named};
pub(super) use memory::{Bytes, Memory};
pub(super) use present::probe;
pub(super) use transfers::Arriving;

use crate::backend::{BackendError, Result};

/// One GPU: its streams, its libraries and the kernels that were compiled for it.
pub(super) struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    transfers: Arc<transfers::Transfers>,
    blas: ManuallyDrop<CudaBlas>,
    solver: ManuallyDrop<solver::Solver>,
    kernels: kernels::Kernels,
    name: String,
    /// Major and minor compute capability.
    arch: (i32, i32),
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.name)
    }
}

impl Gpu {
    /// Starts the device with this index.
    pub(super) fn start(index: usize) -> Result<Self> {
        probe(index)?;
        let device = format!("cuda:{index}");
        let failed = |doing: &'static str| {
            let device = device.clone();
            move |error: DriverError| failure(device, doing, &error)
        };
        let context = CudaContext::new(index).map_err(failed("cannot be started"))?;
        // Where streams meet, `transfers.rs` has events of its own.
        // SAFETY: no slice exists yet, and none is ever used on another stream without an event.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(failed("has no name"))?;
        let arch = context.compute_capability().map_err(failed("has no architecture"))?;
        let stream = context.new_stream().map_err(failed("has no stream"))?;
        let transfers =
            transfers::Transfers::new(&context).map_err(failed("has no streams for copies"))?;
        let transfers = Arc::new(transfers);
        keep_freed_memory(&context).map_err(failed("has no memory pool"))?;
        let blas = CudaBlas::new(stream.clone())
            .map_err(|error| failure(device.clone(), "cuBLAS cannot be started", &error))?;
        let solver = solver::Solver::new(&stream)
            .map_err(|error| failure(device.clone(), "cuSOLVER cannot be started", &error))?;
        let kernels = kernels::Kernels::new(arch);
        let (blas, solver) = (ManuallyDrop::new(blas), ManuallyDrop::new(solver));
        Ok(Self { context, stream, transfers, blas, solver, kernels, name, arch })
    }

    /// Name and architecture.
    pub(super) fn describe(&self) -> String {
        format!("{} (sm_{}{})", self.name, self.arch.0, self.arch.1)
    }

    /// Whether there are products of bf16 values.
    pub(super) fn has_bf16(&self) -> bool {
        self.arch.0 >= 8
    }

    /// Streaming multiprocessors.
    pub(super) fn processors(&self) -> Result<usize> {
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = self.context.attribute(count).map_err(self.failed("processors"))?;
        Ok(usize::try_from(count).unwrap_or(1).max(1))
    }

    /// Waits until all that was begun is done; errors of kernels come to light here.
    pub(super) fn finish(&self, operation: &'static str) -> Result<()> {
        self.stream.synchronize().map_err(self.failed(operation))
    }

    /// The error of an operation on this device.
    fn failed(&self, operation: &'static str) -> impl FnOnce(DriverError) -> BackendError {
        move |error| failure(self.describe(), operation, &error)
    }
}

impl Drop for Gpu {
    /// Gives the libraries' handles back, unless the device was lost: then they cannot be, and cudarc would
    /// panic over it.
    fn drop(&mut self) {
        if self.stream.synchronize().is_ok() {
            // SAFETY: dropped once, here, and not used again.
            unsafe {
                ManuallyDrop::drop(&mut self.blas);
                ManuallyDrop::drop(&mut self.solver);
            }
        }
    }
}

fn failure(device: String, operation: &'static str, error: &dyn std::error::Error) -> BackendError {
    BackendError::Device { device, operation, error: error.to_string() }
}

/// Lets the pool keep what is freed, so that the next matrix of the size costs no call to the system.
fn keep_freed_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    // SAFETY: the device is that of a live context; both pointers are to live values of the types that
    // the call and the attribute have.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()).result()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
    }
}

/// Gives back to the system what the pool keeps.
fn trim(context: &CudaContext) -> std::result::Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut pool = std::ptr::null_mut();
    // SAFETY: as above.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()).result()?;
        sys::cuMemPoolTrimTo(pool, 0).result()
    }
}

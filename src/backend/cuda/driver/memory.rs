//! Device memory, and copies that stay on the device.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{
    CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits, sys::CUresult,
};

use super::{Gpu, failure, trim};
use crate::backend::{BackendError, Result};

/// Values in device memory.
pub(in super::super) type Memory<T> = CudaSlice<T>;

/// What may lie in device memory and has no invalid bits.
pub(in super::super) trait Bytes:
    DeviceRepr + ValidAsZeroBits + Pod + Default
{
}
impl<T: DeviceRepr + ValidAsZeroBits + Pod + Default> Bytes for T {}

impl Gpu {
    /// Memory that nothing has been written to.
    pub(in super::super) fn allocate<T: Bytes>(
        &self,
        len: usize,
        operation: &'static str,
    ) -> Result<Memory<T>> {
        self.allocate_on(&self.stream, len, operation)
    }

    /// The same in the order of another stream.
    pub(super) fn allocate_on<T: Bytes>(
        &self,
        stream: &Arc<CudaStream>,
        len: usize,
        operation: &'static str,
    ) -> Result<Memory<T>> {
        // SAFETY: `T` has no invalid bits, and kernels write before they read.
        let attempt = || unsafe { stream.alloc::<T>(len.max(1)) };
        let out_of_memory = |error: &DriverError| error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        match attempt() {
            Err(error) if out_of_memory(&error) => {
                // What the pool keeps may be in pieces that are too small.
                self.finish(operation)?;
                trim(&self.context).map_err(self.failed(operation))?;
                attempt().map_err(|error| match error.0 {
                    CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                        self.out_of_memory(operation, len * size_of::<T>())
                    }
                    _ => failure(self.describe(), operation, &error),
                })
            }
            other => other.map_err(self.failed(operation)),
        }
    }

    fn out_of_memory(&self, operation: &'static str, wanted: usize) -> BackendError {
        let (free, total) = self.context.mem_get_info().unwrap_or((0, 0));
        BackendError::OutOfMemory { device: self.describe(), operation, wanted, free, total }
    }

    /// Bytes that nothing uses; what is freed but kept counts as free.
    pub(in super::super) fn free_memory(&self) -> Result<u64> {
        const OPERATION: &str = "free memory";
        self.finish(OPERATION)?;
        trim(&self.context).map_err(self.failed(OPERATION))?;
        let (free, _) = self.context.mem_get_info().map_err(self.failed(OPERATION))?;
        Ok(free as u64)
    }

    /// Zeros.
    pub(in super::super) fn zeros<T: Bytes>(
        &self,
        len: usize,
        operation: &'static str,
    ) -> Result<Memory<T>> {
        let mut memory = self.allocate(len, operation)?;
        self.stream.memset_zeros(&mut memory).map_err(self.failed(operation))?;
        Ok(memory)
    }

    /// A copy on the device.
    pub(in super::super) fn duplicate<T: Bytes>(
        &self,
        from: &Memory<T>,
        operation: &'static str,
    ) -> Result<Memory<T>> {
        let mut to = self.allocate(from.len(), operation)?;
        self.stream.memcpy_dtod(from, &mut to).map_err(self.failed(operation))?;
        Ok(to)
    }

    /// Copies `from` to the place `at` of `to`.
    pub(in super::super) fn copy_into<T: Bytes>(
        &self,
        to: &mut Memory<T>,
        at: usize,
        from: &Memory<T>,
        len: usize,
        operation: &'static str,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mut to = to.slice_mut(at..at + len);
        self.stream.memcpy_dtod(&from.slice(..len), &mut to).map_err(self.failed(operation))
    }
}

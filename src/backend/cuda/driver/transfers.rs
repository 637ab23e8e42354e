//! Large copies between host and device: through a few buffers of pinned memory, and on streams of their
//! own where they run beside the arithmetic.
//!
//! From pageable memory a copy reaches a fraction of the link's rate and holds up the thread that asked for
//! it. Here it is cut into pieces; while one is on the link, the next is moved to or from a pinned
//! buffer, by as many threads as the caller's pool has.
//!
//! All device memory belongs to the stream of the arithmetic: it is allocated and freed in that order.
//! Invariant: a copy on another stream waits for an event behind the allocation or the kernel that it
//! needs, and the arithmetic, which includes freeing, waits for an event behind the copy.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DevicePtr, DevicePtrMut, DriverError, PinnedHostSlice,
    result, sys::CUdeviceptr,
};
use rayon::prelude::*;

use super::{Gpu, Memory, failure, memory::Bytes};
use crate::backend::{Fetch, Result};

/// Bytes of a piece.
const PIECE: usize = 8 << 20;
/// Pieces at a time, of all threads together. A thread holds two at most, and few copy at a time: the one
/// that computes, the one that reads ahead, the one that writes behind.
const PIECES: usize = 8;
/// Copies of fewer bytes are left to the driver.
const LEAST: usize = 256 << 10;
/// Bytes that a thread moves between pageable and pinned memory at a time.
const STRIP: usize = 512 << 10;

/// A pinned buffer.
struct Pinned {
    memory: PinnedHostSlice<u8>,
    /// Behind the last copy from or to it.
    copied: CudaEvent,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // After an error a copy may be under way. If waiting fails too, so does every call.
        let _ = self.copied.synchronize();
    }
}

/// Pinned buffers that no thread holds, those used longest ago first, and how many there are in all.
#[derive(Default)]
struct Buffers {
    idle: VecDeque<Pinned>,
    made: usize,
}

/// Streams and pinned memory of copies.
pub(super) struct Transfers {
    context: Arc<CudaContext>,
    up: Arc<CudaStream>,
    down: Arc<CudaStream>,
    buffers: Mutex<Buffers>,
    returned: Condvar,
}

/// Values on their way to the device.
#[derive(Debug)]
pub(in super::super) struct Arriving<T> {
    memory: Memory<T>,
    copied: CudaEvent,
}

impl<T> Drop for Arriving<T> {
    fn drop(&mut self) {
        // The memory is freed in the order of its own stream, which must not be before the copy.
        let _ = self.memory.stream().wait(&self.copied);
    }
}

impl Transfers {
    pub(super) fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        Ok(Self {
            context: context.clone(),
            up: context.new_stream()?,
            down: context.new_stream()?,
            buffers: Mutex::default(),
            returned: Condvar::new(),
        })
    }

    /// Copies `bytes` to `to` in the order of `stream`. The bytes may change when this returns.
    fn copy_in(
        &self,
        stream: &CudaStream,
        bytes: &[u8],
        to: CUdeviceptr,
    ) -> std::result::Result<(), DriverError> {
        self.context.bind_to_thread()?;
        for (piece, bytes) in bytes.chunks(PIECE).enumerate() {
            let mut pinned = self.take()?;
            let staged = &mut pinned.memory.as_mut_slice()?[..bytes.len()];
            move_bytes(bytes, staged);
            // SAFETY: the caller gives device memory of `bytes.len()` bytes at `to`; the pinned bytes are
            // neither written nor freed before `copied`.
            unsafe {
                result::memcpy_htod_async(to + (piece * PIECE) as u64, staged, stream.cu_stream())?;
            }
            pinned.copied.record(stream)?;
            self.put(pinned);
        }
        Ok(())
    }

    /// Copies from `from`, in the order of `stream`, and waits until `bytes` are there.
    fn copy_out(
        &self,
        stream: &CudaStream,
        from: CUdeviceptr,
        bytes: &mut [u8],
    ) -> std::result::Result<(), DriverError> {
        self.context.bind_to_thread()?;
        let mut under_way: Option<(Pinned, &mut [u8])> = None;
        for (piece, bytes) in bytes.chunks_mut(PIECE).enumerate() {
            let mut pinned = self.take()?;
            let staged = &mut pinned.memory.as_mut_slice()?[..bytes.len()];
            // SAFETY: the caller gives device memory of `bytes.len()` bytes at `from`; the pinned bytes are
            // neither read nor freed before `copied`.
            unsafe {
                result::memcpy_dtoh_async(
                    staged,
                    from + (piece * PIECE) as u64,
                    stream.cu_stream(),
                )?;
            }
            pinned.copied.record(stream)?;
            if let Some((pinned, bytes)) = under_way.replace((pinned, bytes)) {
                self.unload(pinned, bytes)?;
            }
        }
        under_way.map_or(Ok(()), |(pinned, bytes)| self.unload(pinned, bytes))
    }

    /// Waits for a piece and moves it to where it belongs.
    fn unload(&self, pinned: Pinned, bytes: &mut [u8]) -> std::result::Result<(), DriverError> {
        pinned.copied.synchronize()?;
        move_bytes(&pinned.memory.as_slice()?[..bytes.len()], bytes);
        self.put(pinned);
        Ok(())
    }

    /// A buffer whose last copy is done.
    fn take(&self) -> std::result::Result<Pinned, DriverError> {
        let mut buffers = self.lock();
        loop {
            let ready = buffers.idle.front().map(|pinned| pinned.copied.is_complete());
            if buffers.made < PIECES && ready != Some(true) {
                buffers.made += 1;
                drop(buffers);
                return self.make();
            }
            if let Some(pinned) = buffers.idle.pop_front() {
                drop(buffers);
                pinned.copied.synchronize()?;
                return Ok(pinned);
            }
            buffers = self.returned.wait(buffers).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn make(&self) -> std::result::Result<Pinned, DriverError> {
        // SAFETY: the bytes are set below, before anything reads them. No flags: ordinary cached memory,
        // which the host reads as well.
        let mut memory = unsafe { self.context.alloc_pinned_with_flags::<u8>(PIECE, 0)? };
        // SAFETY: the allocation has `PIECE` bytes, and nothing refers to them yet.
        unsafe { memory.as_mut_ptr()?.write_bytes(0, PIECE) };
        Ok(Pinned { memory, copied: self.context.new_event(None)? })
    }

    fn put(&self, pinned: Pinned) {
        self.lock().idle.push_back(pinned);
        self.returned.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies by the threads of the pool that this thread belongs to, if it does.
fn move_bytes(from: &[u8], to: &mut [u8]) {
    if rayon::current_thread_index().is_none() || from.len() <= STRIP {
        return to.copy_from_slice(from);
    }
    let strips = to.par_chunks_mut(STRIP).zip(from.par_chunks(STRIP));
    strips.for_each(|(to, from)| to.copy_from_slice(from));
}

impl Gpu {
    /// Copies values to the device.
    pub(in super::super) fn upload<T: Bytes>(
        &self,
        values: &[T],
        operation: &'static str,
    ) -> Result<Memory<T>> {
        let mut memory = self.allocate(values.len(), operation)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let copied = if bytes.is_empty() {
            Ok(())
        } else if bytes.len() < LEAST {
            self.stream.memcpy_htod(values, &mut memory)
        } else {
            let (to, _) = memory.device_ptr_mut(&self.stream);
            self.transfers.copy_in(&self.stream, bytes, to)
        };
        copied.map_err(self.failed(operation))?;
        Ok(memory)
    }

    /// Copies the first `len` values from the device, after all that was begun.
    pub(in super::super) fn download<T: Bytes>(
        &self,
        memory: &Memory<T>,
        len: usize,
        operation: &'static str,
    ) -> Result<Vec<T>> {
        let mut values = vec![T::default(); len];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        let copied = if bytes.len() < LEAST {
            let view = memory.slice(..len);
            match len {
                0 => Ok(()),
                _ => self.stream.memcpy_dtoh(&view, &mut values),
            }
        } else {
            let (from, _) = memory.device_ptr(&self.stream);
            self.transfers.copy_out(&self.stream, from, bytes)
        };
        copied.map_err(self.failed(operation))?;
        self.finish(operation)?;
        Ok(values)
    }

    /// Begins to copy values to the device beside the arithmetic. The bytes, whole values, may change
    /// when this returns.
    pub(in super::super) fn send<T: Bytes>(
        &self,
        bytes: &[u8],
        operation: &'static str,
    ) -> Result<Arriving<T>> {
        let memory = self.allocate::<T>(bytes.len() / size_of::<T>(), operation)?;
        let copied = self.context.new_event(None).map_err(self.failed(operation))?;
        let mut arriving = Arriving { memory, copied };
        self.send_to(&mut arriving, bytes).map_err(self.failed(operation))?;
        Ok(arriving)
    }

    fn send_to<T>(
        &self,
        Arriving { memory, copied }: &mut Arriving<T>,
        bytes: &[u8],
    ) -> std::result::Result<(), DriverError> {
        let up = &self.transfers.up;
        // What the memory was before may still be in use.
        let allocated = self.stream.record_event(None)?;
        up.wait(&allocated)?;
        let (to, _) = memory.device_ptr_mut(&self.stream);
        let sent = self.transfers.copy_in(up, bytes, to);
        copied.record(up)?;
        sent
    }

    /// Values that were sent, for the arithmetic to read; it waits for them.
    pub(in super::super) fn arrived<'a, T>(
        &self,
        arriving: &'a Arriving<T>,
        operation: &'static str,
    ) -> Result<&'a Memory<T>> {
        self.stream.wait(&arriving.copied).map_err(self.failed(operation))?;
        Ok(&arriving.memory)
    }

    /// The first `len` values, as they are once all is done that was begun before, to be brought beside what
    /// is begun later. On the host they are of type `H`, perhaps bytes.
    pub(in super::super) fn fetch<T: Bytes, H: Bytes + Send + Sync>(
        &self,
        memory: Memory<T>,
        len: usize,
        operation: &'static str,
    ) -> Result<Fetch<Vec<H>>> {
        let written = self.stream.record_event(None).map_err(self.failed(operation))?;
        let (transfers, device) = (self.transfers.clone(), self.describe());
        Ok(Fetch::new(move || {
            let mut values = vec![H::default(); len * size_of::<T>() / size_of::<H>()];
            let bytes = bytemuck::cast_slice_mut(&mut values);
            let (from, _) = memory.device_ptr(memory.stream());
            let waited = transfers.down.wait(&written);
            let fetched = waited.and_then(|()| transfers.copy_out(&transfers.down, from, bytes));
            fetched.map_err(|error| failure(device, operation, &error))?;
            Ok(values)
        }))
    }
}

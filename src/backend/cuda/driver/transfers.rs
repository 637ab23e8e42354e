//! Large copies between host and device: through a few buffers of pinned memory, and on streams of their
//! own where they run beside the arithmetic.
//!
//! From pageable memory a copy reaches a fraction of the link's rate and holds up the thread that asked for
//! it. Here it is cut into pieces; while one is on the link, the next is moved to or from a pinned
//! buffer, by as many threads as the caller's pool has.
//!
//! All device memory is used and freed in the order of the arithmetic's stream. Only what is sent is
//! allocated in the order of the copies up. Invariant: a copy down waits for an event behind the kernel that
//! it needs, and the arithmetic, which includes freeing, waits for an event behind a copy up.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DevicePtr, DevicePtrMut, DriverError, PinnedHostSlice,
    result,
    sys::{CUdeviceptr, CUevent_flags},
};
use rayon::prelude::*;

use super::{Gpu, Memory, failure, memory::Bytes};
use crate::backend::{Fetch, Result};

/// Bytes of a piece.
const PIECE: usize = 8 << 20;
/// Pieces at a time, of all threads together: the one that computes, the one that reads ahead, the one that
/// writes behind.
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
    given_back: Condvar,
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

/// Memory that any thread may drop.
struct Held<T> {
    memory: Memory<T>,
    context: Arc<CudaContext>,
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        // cudarc frees on the thread as it is.
        let _ = self.context.bind_to_thread();
    }
}

impl Transfers {
    pub(super) fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        Ok(Self {
            context: context.clone(),
            up: context.new_stream()?,
            down: context.new_stream()?,
            buffers: Mutex::default(),
            given_back: Condvar::new(),
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
            let mut lent = self.take()?;
            let staged = lent.bytes(bytes.len())?;
            move_bytes(bytes, staged);
            // SAFETY: the caller gives device memory of `bytes.len()` bytes at `to`; the pinned bytes are
            // neither written nor freed before `copied`.
            unsafe {
                result::memcpy_htod_async(to + (piece * PIECE) as u64, staged, stream.cu_stream())?;
            }
            lent.give_back(stream)?;
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
        let mut under_way: Option<(Lent<'_>, &mut [u8])> = None;
        for (piece, bytes) in bytes.chunks_mut(PIECE).enumerate() {
            let mut lent = if let Some(lent) = self.take_idle()? {
                lent
            } else {
                // Who holds a buffer does not wait for another.
                if let Some((lent, bytes)) = under_way.take() {
                    lent.unload(bytes)?;
                }
                self.take()?
            };
            let staged = lent.bytes(bytes.len())?;
            // SAFETY: the caller gives device memory of `bytes.len()` bytes at `from`; the pinned bytes are
            // neither read nor freed before `copied`.
            unsafe {
                result::memcpy_dtoh_async(
                    staged,
                    from + (piece * PIECE) as u64,
                    stream.cu_stream(),
                )?;
            }
            lent.record(stream)?;
            if let Some((lent, bytes)) = under_way.replace((lent, bytes)) {
                lent.unload(bytes)?;
            }
        }
        under_way.map_or(Ok(()), |(lent, bytes)| lent.unload(bytes))
    }

    /// A buffer whose last copy is done.
    fn take(&self) -> std::result::Result<Lent<'_>, DriverError> {
        loop {
            if let Some(lent) = self.take_idle()? {
                return Ok(lent);
            }
            let full = |buffers: &mut Buffers| buffers.idle.is_empty() && buffers.made >= PIECES;
            drop(self.given_back.wait_while(self.lock(), full));
        }
    }

    /// As [`take`](Self::take), but none if other threads hold them all.
    fn take_idle(&self) -> std::result::Result<Option<Lent<'_>>, DriverError> {
        let mut buffers = self.lock();
        let ready = buffers.idle.front().is_some_and(|pinned| pinned.copied.is_complete());
        let mut lent = Lent { transfers: self, pinned: None };
        if buffers.made < PIECES && !ready {
            buffers.made += 1;
            drop(buffers);
            lent.pinned = Some(self.make()?);
            return Ok(Some(lent));
        }
        lent.pinned = buffers.idle.pop_front();
        drop(buffers);
        let Some(pinned) = &lent.pinned else {
            // Nothing was lent.
            std::mem::forget(lent);
            return Ok(None);
        };
        pinned.copied.synchronize()?;
        Ok(Some(lent))
    }

    fn make(&self) -> std::result::Result<Pinned, DriverError> {
        // Threads that wait long for a copy sleep.
        let copied = self.context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?;
        // SAFETY: the bytes are set below, before anything reads them. No flags: ordinary cached memory,
        // which the host reads as well.
        let mut memory = unsafe { self.context.alloc_pinned_with_flags::<u8>(PIECE, 0)? };
        // SAFETY: the allocation has `PIECE` bytes, and nothing refers to them yet.
        unsafe { memory.as_mut_ptr()?.write_bytes(0, PIECE) };
        Ok(Pinned { memory, copied })
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer that a thread holds. One that is not given back, because of an error, makes room for another.
struct Lent<'a> {
    transfers: &'a Transfers,
    pinned: Option<Pinned>,
}

impl Lent<'_> {
    /// The first bytes of the buffer.
    fn bytes(&mut self, len: usize) -> std::result::Result<&mut [u8], DriverError> {
        match &mut self.pinned {
            Some(pinned) => Ok(&mut pinned.memory.as_mut_slice()?[..len]),
            None => Ok(&mut []),
        }
    }

    /// A copy was begun on `stream`.
    fn record(&self, stream: &CudaStream) -> std::result::Result<(), DriverError> {
        self.pinned.as_ref().map_or(Ok(()), |pinned| pinned.copied.record(stream))
    }

    /// Gives the buffer back while a copy on `stream` may be under way.
    fn give_back(mut self, stream: &CudaStream) -> std::result::Result<(), DriverError> {
        self.record(stream)?;
        self.transfers.lock().idle.extend(self.pinned.take());
        self.transfers.given_back.notify_one();
        std::mem::forget(self);
        Ok(())
    }

    /// Waits for the copy, moves its bytes to where they belong, and gives the buffer back.
    fn unload(mut self, bytes: &mut [u8]) -> std::result::Result<(), DriverError> {
        if let Some(pinned) = &self.pinned {
            pinned.copied.synchronize()?;
            move_bytes(&pinned.memory.as_slice()?[..bytes.len()], bytes);
        }
        self.transfers.lock().idle.extend(self.pinned.take());
        self.transfers.given_back.notify_one();
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        drop(self.pinned.take());
        self.transfers.lock().made -= 1;
        self.transfers.given_back.notify_one();
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
        let up = &self.transfers.up;
        let copied = self.context.new_event(None).map_err(self.failed(operation))?;
        // Allocated in the order of the copies, or they would wait for the arithmetic begun before.
        let mut memory = self.allocate_on::<T>(up, bytes.len() / size_of::<T>(), operation)?;
        let (to, _) = memory.device_ptr_mut(up);
        let sent = self.transfers.copy_in(up, bytes, to);
        let recorded = copied.record(up);
        let len = memory.len();
        // SAFETY: the allocation of so many values, which is given up here. From now on it is used and freed
        // in the order of the arithmetic, behind `copied`.
        let memory = unsafe { self.stream.upgrade_device_ptr(memory.leak(), len) };
        let arriving = Arriving { memory, copied };
        sent.and(recorded).map_err(self.failed(operation))?;
        Ok(arriving)
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
        let held = Held { memory, context: self.context.clone() };
        Ok(Fetch::new(move || {
            let mut values = vec![H::default(); len * size_of::<T>() / size_of::<H>()];
            let bytes = bytemuck::cast_slice_mut(&mut values);
            let (from, _) = held.memory.device_ptr(held.memory.stream());
            let waited = transfers.down.wait(&written);
            let fetched = waited.and_then(|()| transfers.copy_out(&transfers.down, from, bytes));
            fetched.map_err(|error| failure(device, operation, &error))?;
            Ok(values)
        }))
    }
}

//! Memory of dropped matrices, kept for the next ones of the same size.
//!
//! A pass makes and drops matrices of the same few sizes for every batch. Fresh memory comes from
//! the system zeroed and page by page, which costs about as much as the product written into it.
//! The invariant: a buffer's contents are whatever its last owner left, so who takes one writes
//! all of it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use half::bf16;

use super::bf16::Line;
use crate::backend::HostData;

/// Smaller buffers are left to the allocator, which keeps such memory itself.
const SMALLEST_BYTES: usize = 128 << 10;
/// What is kept of one element type at most; the rest goes back to the system.
const MOST_BYTES: usize = 64 << 20;

/// Kept buffers of one element type, by length.
#[derive(Debug)]
pub(super) struct Shelf<T> {
    buffers: Option<HashMap<usize, Vec<Vec<T>>>>,
    bytes: usize,
}

impl<T: Copy> Shelf<T> {
    const EMPTY: Self = Self { buffers: None, bytes: 0 };

    fn take(&mut self, len: usize) -> Option<Vec<T>> {
        let buffer = self.buffers.as_mut()?.get_mut(&len)?.pop()?;
        self.bytes -= size_of_val(&*buffer);
        Some(buffer)
    }

    fn put(&mut self, buffer: Vec<T>) {
        let bytes = size_of_val(&*buffer);
        if bytes >= SMALLEST_BYTES && self.bytes + bytes <= MOST_BYTES {
            self.bytes += bytes;
            let buffers = self.buffers.get_or_insert_default();
            buffers.entry(buffer.len()).or_default().push(buffer);
        }
    }
}

/// Element types that buffers are kept of.
pub(super) trait Element: Copy + Send + 'static {
    /// What a new buffer is filled with.
    const ZERO: Self;

    /// The process's kept buffers.
    fn shelf() -> &'static Mutex<Shelf<Self>>;
}

macro_rules! element {
    ($type:ty, $zero:expr) => {
        impl Element for $type {
            const ZERO: Self = $zero;

            fn shelf() -> &'static Mutex<Shelf<Self>> {
                static SHELF: Mutex<Shelf<$type>> = Mutex::new(Shelf::EMPTY);
                &SHELF
            }
        }
    };
}

element!(f32, 0.0);
element!(f64, 0.0);
element!(bf16, Self::ZERO);
element!(Line, Self::ZERO);

/// A buffer of `len` elements with any contents.
pub(super) fn take<T: Element>(len: usize) -> Vec<T> {
    let kept = T::shelf().lock().unwrap_or_else(PoisonError::into_inner).take(len);
    kept.unwrap_or_else(|| vec![T::ZERO; len])
}

/// A copy of `values`.
pub(super) fn copy<T: Element>(values: &[T]) -> Vec<T> {
    let mut buffer = take(values.len());
    buffer.copy_from_slice(values);
    buffer
}

/// Keeps a buffer that is no longer needed.
pub(super) fn put<T: Element>(buffer: Vec<T>) {
    T::shelf().lock().unwrap_or_else(PoisonError::into_inner).put(buffer);
}

/// Keeps the buffer of a matrix.
pub(super) fn put_data(data: HostData) {
    match data {
        HostData::F32(values) => put(values),
        HostData::Bf16(values) => put(values),
    }
}

/// Scratch memory that is kept when it goes out of scope.
#[derive(Debug)]
pub(super) struct Scratch<T: Element>(Vec<T>);

impl<T: Element> Scratch<T> {
    /// `len` elements with any contents.
    pub(super) fn take(len: usize) -> Self {
        Self(take(len))
    }
}

impl<T: Element> std::ops::Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Element> std::ops::DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Element> Drop for Scratch<T> {
    fn drop(&mut self) {
        put(std::mem::take(&mut self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::{MOST_BYTES, SMALLEST_BYTES, Shelf};

    #[test]
    fn a_buffer_comes_back_for_the_same_length_only() {
        let mut shelf = Shelf::<f32>::EMPTY;
        let len = SMALLEST_BYTES / 4;
        shelf.put(vec![1.0; len]);
        shelf.put(vec![2.0; len - 1]);
        assert_eq!(shelf.take(len + 1), None);
        assert_eq!(shelf.take(len - 1), None, "small buffers are not kept");
        assert_eq!(shelf.take(len), Some(vec![1.0; len]));
        assert_eq!(shelf.take(len), None);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut shelf = Shelf::<u8>::EMPTY;
        for _ in 0..5 {
            shelf.put(vec![0; MOST_BYTES / 4]);
        }
        assert_eq!(shelf.bytes, MOST_BYTES);
    }
}

//! From weights on the device to stored bytes.

use std::fmt;

use sparsepack_formats::DType;

use super::{Result, Storage};

/// Bytes on their way to the host. What they are made of is held until they are there, or this is
/// dropped.
pub struct Fetch(Box<dyn FnOnce() -> Result<Vec<u8>> + Send>);

impl Fetch {
    /// Bytes that `wait` waits for.
    #[cfg(feature = "cuda")]
    pub(super) fn new(wait: impl FnOnce() -> Result<Vec<u8>> + Send + 'static) -> Self {
        Self(Box::new(wait))
    }

    /// Bytes that are there.
    pub(super) fn ready(bytes: Vec<u8>) -> Self {
        Self(Box::new(|| Ok(bytes)))
    }

    /// The bytes, once they are there. May be called on another thread than the device's.
    ///
    /// # Errors
    /// Device failure.
    pub fn wait(self) -> Result<Vec<u8>> {
        (self.0)()
    }
}

impl fmt::Debug for Fetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fetch")
    }
}

/// Rounding to stored types, and packing.
pub trait PackOps: Storage {
    /// Rounds the values of `w` (f32) to what `dtype` holds, to nearest, ties to even, and begins to
    /// bring their little-endian bytes to the host.
    ///
    /// # Errors
    /// [`TooLarge`](super::BackendError::TooLarge), which leaves `w` unspecified; a `dtype` that is not of
    /// weights; device failure.
    fn store(&self, w: &mut Self::Matrix, dtype: DType) -> Result<Fetch>;

    /// As [`store`](Self::store), but brings the two components of
    /// [`Encoding::Sparse24`](sparsepack_formats::Encoding::Sparse24): values and metadata. `None` where a
    /// group of four columns has more than two values other than `+0.0`; `w` is rounded then too.
    ///
    /// # Errors
    /// As [`store`](Self::store); columns that are not whole groups.
    fn pack_24(&self, w: &mut Self::Matrix, dtype: DType) -> Result<Option<[Fetch; 2]>>;
}

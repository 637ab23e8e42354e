//! From weights on the device to stored bytes.

use sparsepack_formats::DType;

use super::{Fetch, Result, Storage};

/// Rounding to stored types, and packing.
pub trait PackOps: Storage {
    /// Rounds the values of `w` (f32) to what `dtype` holds, to nearest, ties to even. Returns
    /// their little-endian bytes.
    ///
    /// # Errors
    /// [`TooLarge`](super::BackendError::TooLarge), which leaves `w` unspecified; a `dtype` that is not of
    /// weights; device failure.
    fn store(&self, w: &mut Self::Matrix, dtype: DType) -> Result<Fetch<Vec<u8>>>;

    /// As [`store`](Self::store), but with the two components of
    /// [`Encoding::Sparse24`](sparsepack_formats::Encoding::Sparse24): values and metadata. `None` where a
    /// group of four columns has more than two values other than `+0.0`; `w` is rounded then too.
    ///
    /// # Errors
    /// As [`store`](Self::store); columns that are not whole groups.
    fn pack_24(&self, w: &mut Self::Matrix, dtype: DType) -> Result<Option<[Fetch<Vec<u8>>; 2]>>;
}

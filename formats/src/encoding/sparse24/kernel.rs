//! Which instructions pack and unpack rows.

#[cfg(target_arch = "x86_64")]
use super::simd;
use super::{super::mask, portable};
use crate::DType;

/// A way to pack and unpack rows. All give the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Integer arithmetic, on every processor.
    Portable,
    /// AVX2: byte shuffles whose control comes from a table.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with VBMI2: compression and expansion by mask.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// Those that this processor has, slowest first.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(simd::has_avx2().then_some(Self::Avx2));
            found.extend(simd::has_avx512().then_some(Self::Avx512));
        }
        found
    }

    /// The fastest that this processor has.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if simd::has_avx512() {
                return Self::Avx512;
            }
            if simd::has_avx2() {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Packs one row, or several rows of an even number of groups each, which are one longer row.
    ///
    /// False when a group of four has more than two values; `values` and `metadata` then hold
    /// nothing of use. Also false when `dtype` is not a float weight type, I8 or U8, or the slices do
    /// not have the lengths that belong together: `4 g` elements, `2 g` elements and `g / 2` bytes rounded up.
    pub fn pack(self, dtype: DType, dense: &[u8], values: &mut [u8], metadata: &mut [u8]) -> bool {
        let size = dtype.size_bytes();
        if !fit(dtype, dense.len(), values.len(), metadata.len()) {
            return false;
        }
        let (done, legal) = match self {
            Self::Portable => (0, true),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => simd::pack_avx2(size, dense, values, metadata),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => simd::pack_avx512(size, dense, values, metadata),
        };
        let group_bytes = 4 * size;
        legal
            & portable::pack(
                size,
                &dense[done * group_bytes..],
                &mut values[done * group_bytes / 2..],
                &mut metadata[done / 2..],
            )
    }

    /// The inverse of [`pack`](Self::pack).
    ///
    /// False when a nibble is not legal or the unused one is not [`PAD`](super::PAD); `out` then
    /// holds nothing of use. Also false for another type or other lengths, as in `pack`.
    pub fn unpack(self, dtype: DType, values: &[u8], metadata: &[u8], out: &mut [u8]) -> bool {
        let size = dtype.size_bytes();
        if !fit(dtype, out.len(), values.len(), metadata.len()) {
            return false;
        }
        let (done, legal) = match self {
            Self::Portable => (0, true),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => simd::unpack_avx2(size, values, metadata, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => simd::unpack_avx512(size, values, metadata, out),
        };
        let group_bytes = 4 * size;
        legal
            & portable::unpack(
                size,
                &values[done * group_bytes / 2..],
                &metadata[done / 2..],
                &mut out[done * group_bytes..],
            )
    }
}

fn fit(dtype: DType, dense: usize, values: usize, metadata: usize) -> bool {
    let group_bytes = 4 * dtype.size_bytes();
    let groups = dense / group_bytes;
    mask::holds(dtype)
        && groups * group_bytes == dense
        && values == dense / 2
        && metadata == groups.div_ceil(2)
}

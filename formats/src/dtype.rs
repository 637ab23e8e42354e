//! Element types: the plain ones of safetensors and the quantized blocks of ggml.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Element type of a dense tensor, spelled as in a safetensors header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DType {
    /// Boolean, one byte.
    #[serde(rename = "BOOL")]
    Bool,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// 8-bit float with 4 exponent and 3 mantissa bits, no infinity ("e4m3fn").
    #[serde(rename = "F8_E4M3")]
    F8E4m3,
    /// 16-bit signed integer.
    I16,
    /// 16-bit unsigned integer.
    U16,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    #[serde(rename = "BF16")]
    Bf16,
    /// 32-bit signed integer.
    I32,
    /// 32-bit unsigned integer.
    U32,
    /// IEEE binary32.
    F32,
    /// 64-bit signed integer.
    I64,
    /// 64-bit unsigned integer.
    U64,
    /// IEEE binary64.
    F64,
}

impl DType {
    /// Every element type this crate can name.
    pub const ALL: [Self; 14] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::F8E4m3,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::Bf16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::I64,
        Self::U64,
        Self::F64,
    ];

    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4m3 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E4m3 => "F8_E4M3",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::I64 => "I64",
            Self::U64 => "U64",
            Self::F64 => "F64",
        }
    }

    /// The type that a safetensors header names, if this crate knows it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Whether values of this type are weights that can be decoded to f32.
    pub const fn is_float_weight(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4m3)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Element type of a GGUF tensor, spelled as in ggml.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(non_camel_case_types, reason = "ggml's own spelling")]
#[allow(missing_docs, reason = "the names are ggml's and their geometry is in the table below")]
#[non_exhaustive]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    MXFP4,
}

impl GgmlType {
    /// `(type, name, id in the file, elements a block, bytes a block)`: ggml's `ggml_type` enum and
    /// `type_traits` table.
    const TABLE: [(Self, &'static str, u32, usize, usize); 14] = [
        (Self::F32, "F32", 0, 1, 4),
        (Self::F16, "F16", 1, 1, 2),
        (Self::Q4_0, "Q4_0", 2, 32, 18),
        (Self::Q4_1, "Q4_1", 3, 32, 20),
        (Self::Q5_0, "Q5_0", 6, 32, 22),
        (Self::Q5_1, "Q5_1", 7, 32, 24),
        (Self::Q8_0, "Q8_0", 8, 32, 34),
        (Self::Q2_K, "Q2_K", 10, 256, 84),
        (Self::Q3_K, "Q3_K", 11, 256, 110),
        (Self::Q4_K, "Q4_K", 12, 256, 144),
        (Self::Q5_K, "Q5_K", 13, 256, 176),
        (Self::Q6_K, "Q6_K", 14, 256, 210),
        (Self::BF16, "BF16", 30, 1, 2),
        (Self::MXFP4, "MXFP4", 39, 32, 17),
    ];

    fn row(self) -> &'static (Self, &'static str, u32, usize, usize) {
        // The table lists every variant, so the search cannot miss; the first row is never taken.
        Self::TABLE.iter().find(|row| row.0 == self).unwrap_or(&Self::TABLE[0])
    }

    /// Every type this crate reads.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::TABLE.iter().map(|row| row.0)
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The number that stands for the type in a GGUF file.
    pub fn id(self) -> u32 {
        self.row().2
    }

    /// The type with this number, if this crate reads it.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::all().find(|ty| ty.id() == id)
    }

    /// Elements in one quant block; a row is a whole number of blocks.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes of one quant block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Whether every exact zero that is encoded decodes to a zero, so that a sparse matrix stays
    /// sparse. (It may become a negative zero, where a scale is negative.) Types with a minimum
    /// have no zero on their grid.
    pub fn keeps_zeros(self) -> bool {
        match self {
            Self::Q4_1 | Self::Q5_1 | Self::Q2_K | Self::Q4_K | Self::Q5_K => false,
            Self::F32
            | Self::F16
            | Self::BF16
            | Self::Q8_0
            | Self::Q5_0
            | Self::Q4_0
            | Self::Q6_K
            | Self::Q3_K
            | Self::MXFP4 => true,
        }
    }

    /// The type for a matrix of `cols` columns that should have this type: itself if a row is a
    /// whole number of its blocks, else a type of 32-element blocks that is no smaller, else F16.
    /// These are the choices of `llama-quantize`.
    #[must_use]
    pub fn fallback(self, cols: usize) -> Self {
        let fits = |ty: Self| cols.is_multiple_of(ty.block_len());
        let smaller_blocks = match self {
            Self::Q2_K | Self::Q3_K => Self::Q4_0,
            Self::Q4_K => Self::Q5_0,
            Self::Q5_K => Self::Q5_1,
            Self::Q6_K => Self::Q8_0,
            _ => self,
        };
        [self, smaller_blocks].into_iter().find(|ty| fits(*ty)).unwrap_or(Self::F16)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ggml_table_lists_each_type_once_and_round_trips_ids() {
        let ids: std::collections::BTreeSet<u32> = GgmlType::all().map(GgmlType::id).collect();
        assert_eq!(ids.len(), GgmlType::all().count());
        for ty in GgmlType::all() {
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
        }
        assert_eq!(GgmlType::from_id(4), None, "Q4_2 was removed from ggml");
    }

    #[test]
    fn a_row_of_broken_blocks_falls_back_to_smaller_blocks_and_then_to_f16() {
        use GgmlType as T;
        for (ty, expected) in [
            (T::Q2_K, T::Q4_0),
            (T::Q3_K, T::Q4_0),
            (T::Q4_K, T::Q5_0),
            (T::Q5_K, T::Q5_1),
            (T::Q6_K, T::Q8_0),
            (T::Q4_0, T::Q4_0),
        ] {
            assert_eq!(ty.fallback(512), ty);
            assert_eq!(ty.fallback(96), expected, "{ty}");
            assert_eq!(ty.fallback(100), T::F16, "{ty}");
        }
        assert_eq!(T::F32.fallback(7), T::F32);
    }

    #[test]
    fn dtype_names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
            assert_eq!(serde_json::to_string(&dtype).unwrap(), format!("\"{dtype}\""));
        }
        assert_eq!(DType::from_name("F4"), None);
    }
}

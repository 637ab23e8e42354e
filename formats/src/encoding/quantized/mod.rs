//! Quantized matrices: small codes, scales that runs of columns share, and zero points.
//!
//! For a matrix of `R` rows and `C` columns in groups of `g` columns (`C` a multiple of `g`; without
//! groups a whole row is one) the value at row `r`, column `c` is, with `k = c / g`,
//!
//! ```text
//! value[r, c] = scale[r, k] · (code[r, c] - zero_point[r, k])
//! ```
//!
//! computed in f32 and rounded to the element type of the scales, ties to even. Codes of `b` bits are
//! numbers from -2^(b-1) to 2^(b-1) - 1, and zero points too; a symmetric grid has zero points of 0. This
//! is what compressed-tensors 0.20 computes (`_dequantize`): differences are at most 255 and exact in
//! every type, so the product is the only rounding. How the numbers lie is said in `int.rs` (sparsepack's
//! own) and `ct.rs` (those of compressed-tensors).
//!
//! The invariant: codes, scales and zero points come back as they were given; nothing is rounded on the
//! way in. A scale is finite and not negative, it is 0 only where every code is its zero point, and
//! every value is finite.

mod bits;
mod ct;
mod grid;
mod int;

use std::{fmt, ops::Range};

use serde::{Deserialize, Serialize};

pub(super) use self::grid::Sink;
use super::{Component, Encoding};
use crate::{DType, FormatError, Result};

/// Integers that stand for the values of a matrix: `scale · (code - zero_point)`, rounded to the type
/// of the scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IntGrid {
    /// Bits of a code, 2 to 8: codes are -2^(bits-1) to 2^(bits-1) - 1.
    pub bits: u8,
    /// Columns that share a scale and a zero point; without, a whole row does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u32>,
    /// Whether all zero points are 0 and none are stored.
    pub symmetric: bool,
    /// Element type of the scales and of the decoded values: F16, BF16 or F32.
    #[serde(rename = "dtype")]
    pub scale: DType,
}

impl IntGrid {
    /// Scales (and zero points) of a row of `cols` columns.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] when the columns are not a multiple of the group.
    pub fn groups(self, name: &str, cols: usize) -> Result<usize> {
        groups(name, self.group_size, cols)
    }
}

impl fmt::Display for IntGrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "int{}", self.bits)?;
        if let Some(size) = self.group_size {
            write!(f, " g{size}")?;
        }
        if !self.symmetric {
            f.write_str(" asymmetric")?;
        }
        write!(f, " {}", self.scale)
    }
}

/// Which codes of a matrix are stored. A code that is not stored is its zero point, a value of 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kept", rename_all = "kebab-case")]
pub enum Kept {
    /// Every one.
    All,
    /// Two of every four columns, found as in [`sparse24`](super::sparse24).
    Sparse24,
    /// `n` of every `m` columns, `m` up to 16 and not 2:4, found as in [`nm`](super::nm).
    Nm {
        /// Kept columns of a group.
        n: u8,
        /// Columns of a group.
        m: u8,
    },
    /// Those with a bit.
    Bitmask {
        /// Room for codes; a matrix may have fewer that are not their zero points, not more.
        #[serde(rename = "room")]
        kept: u64,
    },
}

/// Rows of a matrix as codes on a grid: the input of
/// [`Encoder::quantized_rows`](super::Encoder::quantized_rows).
#[derive(Debug, Clone, Copy)]
pub struct QuantizedRows<'a> {
    /// `[rows, columns]`, row-major. For 8-bit floats, the bits of the `F8_E4M3` value.
    pub codes: &'a [i8],
    /// `[rows, groups]`. Each is a value of the type the scales are stored in.
    pub scales: &'a [f32],
    /// `[rows, groups]`; empty for a symmetric grid and for floats.
    pub zero_points: &'a [i8],
}

/// How the numbers of a quantized encoding lie.
#[derive(Debug, Clone, Copy)]
pub(super) enum Layout {
    Int(IntGrid, Kept),
    Ct(ct::Format),
}

impl Layout {
    /// That of tensor `name`.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] for an encoding that is not quantized.
    pub(super) fn of(name: &str, encoding: Encoding) -> Result<Self> {
        Ok(match encoding {
            Encoding::Int { grid, kept } => Self::Int(grid, kept),
            Encoding::CtPackQuantized { grid } => Self::Ct(ct::Format::Pack(grid)),
            Encoding::CtIntQuantized { grid } => Self::Ct(ct::Format::Int(grid)),
            Encoding::CtFloatQuantized { scale } => Self::Ct(ct::Format::Float(scale)),
            _ => {
                let what = format!("the encoding {encoding} holds values, not codes on a grid");
                return Err(grid::refuse(name, what));
            }
        })
    }

    /// The stored components of a tensor.
    pub(super) fn components(self, name: &str, shape: &[usize]) -> Result<Vec<Component>> {
        match self {
            Self::Int(grid, kept) => int::components(name, grid, kept, shape),
            Self::Ct(format) => ct::components(name, format, shape),
        }
    }

    /// The components' bytes of rows of which the first is row `first_row`, and their number.
    pub(super) fn encode(
        self,
        name: &str,
        shape: &[usize],
        state: &mut State,
        first_row: usize,
        given: &QuantizedRows<'_>,
    ) -> Result<(usize, Vec<Vec<u8>>)> {
        match self {
            Self::Int(grid, kept) => {
                let codec = int::Codec::new(name, grid, kept, shape)?;
                codec.encode(&mut state.int, first_row, given)
            }
            Self::Ct(format) => {
                let codec = ct::Codec::new(name, format, shape)?;
                codec.encode(&mut state.zero_points, first_row, given)
            }
        }
    }

    /// What follows the last row.
    pub(super) fn finish(self, name: &str, shape: &[usize], state: &State) -> Result<Vec<Vec<u8>>> {
        Ok(match self {
            Self::Int(grid, kept) => int::Codec::new(name, grid, kept, shape)?.finish(state.int),
            Self::Ct(format) => ct::Codec::new(name, format, shape)?.finish(&state.zero_points),
        })
    }

    /// Decodes rows `rows`; `parts` are whole and of the right lengths.
    pub(super) fn decode(
        self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        parts: &[&[u8]],
        sink: Sink<'_>,
    ) -> Result<()> {
        match self {
            Self::Int(grid, kept) => {
                int::Codec::new(name, grid, kept, shape)?.decode(rows, parts, sink)
            }
            Self::Ct(format) => ct::Codec::new(name, format, shape)?.decode(rows, parts, sink),
        }
    }
}

/// What rows encoded so far leave behind.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    int: int::State,
    /// Words of packed zero points.
    zero_points: Vec<u32>,
}

fn groups(name: &str, group_size: Option<u32>, cols: usize) -> Result<usize> {
    let Some(size) = group_size else { return Ok(1) };
    match cols.checked_div(size as usize) {
        Some(groups) if groups * size as usize == cols => Ok(groups),
        _ => Err(FormatError::Encoding {
            name: name.to_owned(),
            what: format!("groups of {size} columns do not divide {cols} columns"),
        }),
    }
}

#[cfg(test)]
mod refusals;
#[cfg(test)]
mod tests;

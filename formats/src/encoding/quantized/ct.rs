//! Quantized weights of modules as compressed-tensors writes them (checked against release 0.20.0).
//!
//! For the weight of a module, `R` rows and `C` columns on a grid of `b` bits with `G` groups in a row,
//! components stand in the place of `MODULE.weight`:
//!
//! ```text
//! pack-quantized
//!   MODULE.weight_packed      I32 [R, ceil(C·b/32)]   code + 2^(b-1), bits c·b to c·b + b - 1 of the row
//!   MODULE.weight_scale       F16, BF16 or F32 [R, G]
//!   MODULE.weight_zero_point  I32 [ceil(R·b/32), G]   unless symmetric: column k is a stream as above,
//!                                                     of the zero points of group k, row by row
//!   MODULE.weight_shape       I64 [2]                 R, C
//! int-quantized
//!   MODULE.weight             I8 [R, C]
//!   MODULE.weight_scale       F16, BF16 or F32 [R, G]
//!   MODULE.weight_zero_point  I8 [R, G]               unless symmetric
//! float-quantized
//!   MODULE.weight             F8_E4M3 [R, C]
//!   MODULE.weight_scale       F16, BF16 or F32 [R, 1]
//! ```
//!
//! Bit `k` of a stream is bit `k % 32` (0 is the least significant) of word `k / 32`; unused bits are 0.
//! Release 0.17 introduced that order for widths other than 4 and 8, which older ones do not read.

use std::ops::Range;

use super::{
    IntGrid, QuantizedRows, bits,
    grid::{Grid, Row, Sink, refuse},
};
use crate::{
    DType, Result,
    encoding::{
        Component, MatrixShape,
        ct_sparse24::{check_shape, component, component_name, shape_bytes},
    },
};

/// The three formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::encoding) enum Format {
    /// Any integers, packed in words.
    Pack(IntGrid),
    /// 8-bit integers.
    Int(IntGrid),
    /// 8-bit floats with a scale of this type for each row.
    Float(DType),
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Pack(_) => "pack-quantized",
            Self::Int(_) => "int-quantized",
            Self::Float(_) => "float-quantized",
        }
    }

    /// The grid of a weight.
    fn grid<'a>(self, name: &'a str, shape: &[usize]) -> Result<Grid<'a>> {
        let format = self.name();
        if !name.ends_with(".weight") {
            let what = format!("{format} replaces the `.weight` of a module; the name has none");
            return Err(refuse(name, what));
        }
        if let Self::Int(IntGrid { bits, .. }) = self
            && bits != 8
        {
            return Err(refuse(name, format!("{format} codes of {bits} bits; expected 8")));
        }
        let grid = match self {
            Self::Pack(grid) | Self::Int(grid) => Grid::int(name, grid, shape)?,
            Self::Float(scale) => Grid::f8(name, scale, shape)?,
        };
        Ok(grid)
    }
}

/// The stored components of a weight.
pub(in crate::encoding) fn components(
    name: &str,
    format: Format,
    shape: &[usize],
) -> Result<Vec<Component>> {
    let grid = format.grid(name, shape)?;
    let (MatrixShape { rows, cols }, groups) = (grid.matrix, grid.groups);
    let scale = component(".weight_scale", grid.scale, vec![rows, groups]);
    let mut parts = match format {
        Format::Pack(IntGrid { bits, .. }) => {
            let words = bits::words(cols, bits);
            vec![component(".weight_packed", DType::I32, vec![rows, words]), scale]
        }
        Format::Int(_) => vec![component(".weight", DType::I8, vec![rows, cols]), scale],
        Format::Float(_) => vec![component(".weight", DType::F8E4m3, vec![rows, cols]), scale],
    };
    if grid.has_zero_points() {
        parts.push(match format {
            Format::Pack(IntGrid { bits, .. }) => {
                let words = bits::words(rows, bits);
                component(".weight_zero_point", DType::I32, vec![words, groups])
            }
            _ => component(".weight_zero_point", DType::I8, vec![rows, groups]),
        });
    }
    if matches!(format, Format::Pack(_)) {
        parts.push(component(".weight_shape", DType::I64, vec![2]));
    }
    Ok(parts)
}

/// Encodes and decodes one tensor that [`components`] accepts.
pub(super) struct Codec<'a> {
    grid: Grid<'a>,
    format: Format,
}

impl<'a> Codec<'a> {
    pub(super) fn new(name: &'a str, format: Format, shape: &[usize]) -> Result<Self> {
        Ok(Self { grid: format.grid(name, shape)?, format })
    }

    /// The components' bytes of rows of which the first is row `first_row`, and their number. Packed
    /// zero points are collected in `words` and come [last](Self::finish).
    ///
    /// # Errors
    /// [`FormatError::Encoding`](crate::FormatError::Encoding) naming what is not on the grid.
    pub(super) fn encode(
        &self,
        words: &mut Vec<u32>,
        first_row: usize,
        given: &QuantizedRows<'_>,
    ) -> Result<(usize, Vec<Vec<u8>>)> {
        let rows = self.grid.check(first_row, given)?;
        let (mut codes, mut scales) = (vec![], vec![]);
        for row in 0..rows {
            let Row { codes: row_codes, scales: row_scales, .. } = self.grid.row(given, row);
            match self.format {
                Format::Pack(IntGrid { bits, .. }) => {
                    let end = codes.len() + 4 * bits::words(row_codes.len(), bits);
                    let stored: Vec<u8> =
                        row_codes.iter().map(|code| offset(*code, bits)).collect();
                    bits::pack(&stored, bits, &mut codes);
                    codes.resize(end, 0);
                }
                _ => codes.extend(row_codes.iter().map(|code| code.cast_unsigned())),
            }
            self.grid.scale_bytes(first_row + row, &row_scales, &mut scales)?;
        }
        let mut parts = vec![codes, scales];
        if self.grid.has_zero_points() {
            parts.push(match self.format {
                Format::Pack(IntGrid { bits, .. }) => {
                    self.collect(words, first_row, given.zero_points, bits);
                    vec![]
                }
                _ => given.zero_points.iter().map(|point| point.cast_unsigned()).collect(),
            });
        }
        if matches!(self.format, Format::Pack(_)) {
            parts.push(vec![]);
        }
        Ok((rows, parts))
    }

    /// Puts the zero points of rows into their places.
    fn collect(&self, words: &mut Vec<u32>, first_row: usize, points: &[i8], bits: u8) {
        let groups = self.grid.groups;
        words.resize(bits::words(self.grid.matrix.rows, bits) * groups, 0);
        for (row, points) in points.chunks_exact(groups).enumerate() {
            let at = (first_row + row) * usize::from(bits);
            for (group, point) in points.iter().enumerate() {
                let window = u64::from(offset(*point, bits)) << (at % 32);
                words[at / 32 * groups + group] |= window as u32;
                if window >> 32 != 0 {
                    words[(at / 32 + 1) * groups + group] |= (window >> 32) as u32;
                }
            }
        }
    }

    /// What follows the last row: packed zero points and the shape.
    pub(super) fn finish(&self, words: &[u32]) -> Vec<Vec<u8>> {
        let Format::Pack(_) = self.format else { return vec![] };
        let mut parts = vec![vec![], vec![]];
        if self.grid.has_zero_points() {
            parts.push(words.iter().flat_map(|word| word.to_le_bytes()).collect());
        }
        parts.push(shape_bytes(self.grid.matrix));
        parts
    }

    /// Decodes rows `rows`; `parts` are whole and of the right lengths.
    ///
    /// # Errors
    /// [`FormatError::Encoding`](crate::FormatError::Encoding) naming a shape, scale or unused bits that
    /// are not legal, or a value that is not finite.
    pub(super) fn decode(&self, rows: Range<usize>, parts: &[&[u8]], sink: Sink<'_>) -> Result<()> {
        let [codes, scales, rest @ ..] = parts else { return Ok(()) };
        let name = self.grid.name;
        let cols = self.grid.matrix.cols;
        let points = if self.grid.has_zero_points() { rest.first().copied() } else { None };
        if let (Format::Pack(IntGrid { bits, .. }), Some(shape)) = (self.format, rest.last()) {
            check_shape(name, ".weight_shape", self.grid.matrix, shape)?;
            if let Some(points) = points {
                self.check_points(points, bits)?;
            }
        }
        let scale_name = component_name(name, ".weight_scale");
        self.grid.decode(rows, sink, |at, row| {
            if let Format::Pack(IntGrid { bits, .. }) = self.format {
                self.unpack_codes(codes, bits, at, row)?;
                if let Some(points) = points {
                    self.unpack_points(points, bits, at, row);
                }
            } else {
                copy(&codes[at * cols..], &mut row.codes);
                if let Some(points) = points {
                    copy(&points[at * self.grid.groups..], &mut row.zero_points);
                }
            }
            self.grid.read_scales(&scale_name, at, scales, &mut row.scales)
        })
    }

    fn unpack_codes(&self, all: &[u8], bits: u8, at: usize, row: &mut Row) -> Result<()> {
        let cols = row.codes.len();
        let stride = 4 * bits::words(cols, bits);
        let packed = &all[at * stride..][..stride];
        if !bits::is_padded(packed, cols, bits) {
            let name = component_name(self.grid.name, ".weight_packed");
            return Err(refuse(&name, format!("row {at}: an unused bit is not 0")));
        }
        let mut codes = vec![0; cols];
        bits::unpack(packed, 0, bits, &mut codes);
        for (out, code) in row.codes.iter_mut().zip(codes) {
            *out = signed(code, bits);
        }
        Ok(())
    }

    fn unpack_points(&self, words: &[u8], bits: u8, at: usize, row: &mut Row) {
        let (words, _) = words.as_chunks::<4>();
        let (groups, first) = (self.grid.groups, at * usize::from(bits));
        let word = |index: usize, group: usize| {
            words
                .get(index * groups + group)
                .map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)))
        };
        for (group, point) in row.zero_points.iter_mut().enumerate() {
            let window = word(first / 32, group) | word(first / 32 + 1, group) << 32;
            *point = signed((window >> (first % 32)) as u8 & (u8::MAX >> (8 - bits)), bits);
        }
    }

    /// Bits behind the last row's zero points are 0.
    fn check_points(&self, words: &[u8], bits: u8) -> Result<()> {
        let (groups, used) = (self.grid.groups, self.grid.matrix.rows * usize::from(bits) % 32);
        let (words, _) = words.as_chunks::<4>();
        let last = &words[words.len() - groups.min(words.len())..];
        let set = |bytes: &[u8; 4]| used != 0 && u32::from_le_bytes(*bytes) >> used != 0;
        match last.iter().position(set) {
            None => Ok(()),
            Some(group) => {
                let name = component_name(self.grid.name, ".weight_zero_point");
                Err(refuse(&name, format!("group {group}: an unused bit is not 0")))
            }
        }
    }
}

/// A code as it is stored: counted from the lowest.
fn offset(code: i8, bits: u8) -> u8 {
    code.cast_unsigned().wrapping_add(1 << (bits - 1)) & (u8::MAX >> (8 - bits))
}

/// The inverse of [`offset`].
fn signed(stored: u8, bits: u8) -> i8 {
    stored.wrapping_sub(1 << (bits - 1)).cast_signed()
}

fn copy(bytes: &[u8], out: &mut [i8]) {
    for (out, byte) in out.iter_mut().zip(bytes) {
        *out = byte.cast_signed();
    }
}

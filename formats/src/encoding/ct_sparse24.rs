//! 2:4 sparse matrices as compressed-tensors 0.9 to 0.14.0.1 wrote them: `sparse-24-bitmask`.
//!
//! For the weight of a module, `R` rows and `C` columns (`C` a multiple of four), three components
//! stand in the place of `MODULE.weight`:
//!
//! ```text
//! MODULE.compressed  dtype  [R, C/2]        two kept values per group of four, ascending column
//! MODULE.bitmask     U8     [R, ceil(C/8)]  bit c % 8 of byte c / 8: column c is kept
//! MODULE.shape       I64    [2, 1]          R, C
//! ```
//!
//! Each group has exactly two bits. A group with fewer values keeps zeros too, at the columns that the
//! writer's `topk` chose on a CPU: none or column 2 or 3: 2 and 3; column 0: 0 and 2; column 1: 1
//! and 3 (not the rule of [`sparse24`](super::sparse24)). Unused bits of a row's last byte are 0.
//!
//! The invariant: decoding gives back the bits that were encoded. Zero therefore means the bit pattern
//! of `+0.0`; `-0.0` is a value, which the package's own reader gives back as well. The package
//! would have taken it for zero, so the bytes are its own where there is none. A group of more than
//! two values is refused; the package dropped the smallest.

use std::ops::Range;

use super::{
    Component, MatrixShape, dense,
    mask::{self, MaskedRows, gather, mark},
    sparse24,
};
use crate::{DType, FormatError, Result};

/// Marks a group of three or four values in [`KEPT`].
const TOO_MANY: u8 = 0x10;

/// Kept columns by which of the four (bit 0 is column 0) hold values.
const KEPT: [u8; 16] = [
    0b1100, 0b0101, 0b1010, 0b0011, // ----, 0, 1, 01
    0b1100, 0b0101, 0b0110, TOO_MANY, // 2, 02, 12, 012
    0b1100, 0b1001, 0b1010, TOO_MANY, // 3, 03, 13, 013
    0b1100, TOO_MANY, TOO_MANY, TOO_MANY, // 23, 023, 123, 0123
];

/// Refuses what no format of the package holds, and names the two dimensions of the others.
pub(super) fn check(
    name: &str,
    format: &str,
    dtype: DType,
    shape: &[usize],
) -> Result<(usize, usize)> {
    let refuse = |what| Err(FormatError::Encoding { name: name.to_owned(), what });
    if !name.ends_with(".weight") {
        return refuse(format!("{format} replaces the `.weight` of a module; the name has none"));
    }
    if !mask::holds(dtype) || dtype == DType::U8 {
        return refuse(format!(
            "{format} values of type {dtype}; expected F32, F16, BF16, F8_E4M3 or I8"
        ));
    }
    let &[rows, cols] = shape else {
        return refuse(format!("{format} needs a matrix, found shape {shape:?}"));
    };
    // The dense size bounds all components, and `.shape` is signed.
    let fits = |n: usize| i64::try_from(n).is_ok();
    if dense::size_bytes(dtype, shape).is_none() || !fits(rows) || !fits(cols) {
        return refuse(format!("the size of shape {shape:?} overflows"));
    }
    Ok((rows, cols))
}

/// A component of `shape`, whose size [`check`] has bounded.
pub(super) fn component(suffix: &'static str, dtype: DType, shape: Vec<usize>) -> Component {
    let elements: usize = shape.iter().product();
    Component { suffix, dtype, shape, bytes: elements as u64 * dtype.size_bytes() as u64 }
}

/// The bytes of `MODULE.shape`.
pub(super) fn shape_bytes(matrix: MatrixShape) -> Vec<u8> {
    [matrix.rows, matrix.cols].iter().flat_map(|&n| (n as i64).to_le_bytes()).collect()
}

/// The stored components of a 2:4 weight.
pub(super) fn components(name: &str, dtype: DType, shape: &[usize]) -> Result<Vec<Component>> {
    let (rows, cols) = check(name, "sparse-24-bitmask", dtype, shape)?;
    if cols % 4 != 0 {
        return Err(FormatError::Encoding {
            name: name.to_owned(),
            what: format!("sparse-24-bitmask needs a multiple of 4 columns, found {cols}"),
        });
    }
    Ok(vec![
        component(".compressed", dtype, vec![rows, cols / 2]),
        component(".bitmask", DType::U8, vec![rows, mask::stride(cols)]),
        component(".shape", DType::I64, vec![2, 1]),
    ])
}

/// Encodes and decodes one tensor that [`components`] accepts.
pub(super) struct Codec<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: DType,
    pub(super) matrix: MatrixShape,
}

impl Codec<'_> {
    /// Values and bitmask of whole rows, the first of which is row `first_row`.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming a group with more than two values.
    pub(super) fn encode(&self, first_row: usize, dense: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (width, cols) = (self.dtype.size_bytes(), self.matrix.cols);
        let (mut values, mut bitmask) = (vec![], vec![]);
        for (row, dense) in dense.chunks_exact((cols * width).max(1)).enumerate() {
            let (values_at, mask_at) = (values.len(), bitmask.len());
            bitmask.resize(mask_at + mask::stride(cols), 0);
            values.resize(values_at + dense.len() / 2, 0);
            let bits = &mut bitmask[mask_at..];
            mark(width, dense, bits);
            if !fill(bits, cols) {
                return Err(sparse24::too_many(
                    self.name,
                    self.dtype,
                    cols,
                    first_row + row,
                    dense,
                ));
            }
            gather(width, dense, bits, &mut values[values_at..]);
        }
        Ok(vec![values, bitmask, vec![]])
    }

    /// What follows the last row: the shape.
    pub(super) fn finish(&self) -> Vec<Vec<u8>> {
        vec![vec![], vec![], shape_bytes(self.matrix)]
    }
}

impl MaskedRows for Codec<'_> {
    fn row(&self) -> (DType, usize) {
        (self.dtype, self.matrix.cols)
    }

    fn decode_rows(
        &self,
        rows: Range<usize>,
        parts: &[&[u8]],
        mut show: impl FnMut(&[u8], &[u8]),
    ) -> Result<()> {
        let [values, bitmask, shape] = parts else { return Ok(()) };
        check_shape(self.name, ".shape", self.matrix, shape)?;
        if self.matrix.cols == 0 {
            // As many rows as `.shape` claims, and nothing in them.
            return Ok(());
        }
        let stride = mask::stride(self.matrix.cols);
        let row_bytes = self.matrix.cols / 2 * self.dtype.size_bytes();
        for row in rows {
            let bits = &bitmask[row * stride..][..stride];
            if let Some(what) = defect(bits, self.matrix.cols) {
                return Err(FormatError::Encoding {
                    name: component_name(self.name, ".bitmask"),
                    what: format!("row {row}{what}"),
                });
            }
            show(&values[row * row_bytes..][..row_bytes], bits);
        }
        Ok(())
    }
}

/// `MODULE.suffix` of `MODULE.weight`.
pub(super) fn component_name(name: &str, suffix: &str) -> String {
    format!("{}{suffix}", name.strip_suffix(".weight").unwrap_or(name))
}

/// Refuses a component with the shape that says something else than the tensor's.
pub(super) fn check_shape(
    name: &str,
    suffix: &str,
    matrix: MatrixShape,
    shape: &[u8],
) -> Result<()> {
    if shape == shape_bytes(matrix) {
        return Ok(());
    }
    let found: Vec<i64> =
        shape.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    Err(FormatError::Encoding {
        name: component_name(name, suffix),
        what: format!("expected {} and {}, found {found:?}", matrix.rows, matrix.cols),
    })
}

/// Adds the columns that groups with fewer than two values keep; false when one has more.
fn fill(bits: &mut [u8], cols: usize) -> bool {
    let mut flaws = 0;
    for byte in &mut *bits {
        let (low, high) = (KEPT[usize::from(*byte & 0xF)], KEPT[usize::from(*byte >> 4)]);
        flaws |= low | high;
        *byte = low & 0xF | high << 4;
    }
    if let (4, Some(last)) = (cols % 8, bits.last_mut()) {
        *last &= 0xF;
    }
    flaws & TOO_MANY == 0
}

/// What is wrong with a row's bits.
fn defect(bits: &[u8], cols: usize) -> Option<String> {
    let groups = bits.iter().flat_map(|byte| [byte & 0xF, byte >> 4]);
    let mut groups = groups.enumerate();
    let wrong = groups.by_ref().take(cols / 4).find(|(_, group)| group.count_ones() != 2);
    if let Some((group, bits)) = wrong {
        return Some(format!(
            ", columns {} to {}: {} bits are set; expected 2",
            4 * group,
            4 * group + 3,
            bits.count_ones()
        ));
    }
    (!mask::is_padded(bits, cols)).then(|| ": an unused mask bit is not 0".to_owned())
}

#[cfg(test)]
mod tests;

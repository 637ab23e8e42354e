//! Which encoding holds a matrix in the fewest bytes, found by looking at its values once.

use super::{Encoding, dense, mask, nm::MAX_GROUP};
use crate::{DType, Result};

/// An n:m encoding is taken although a bitmask would be smaller by up to this part of the dense size:
/// its rows have equal lengths, and a few weights that happen to be zero inside a pattern should not
/// hide the pattern.
const PATTERN_WORTH: u64 = 64;

/// Looks at the rows of a matrix in order, with memory for one row of bits.
#[derive(Debug)]
pub struct Survey {
    dtype: DType,
    shape: Vec<usize>,
    /// Elements that are not zero.
    kept: u64,
    /// Group widths that divide the columns, each with the most values of a group so far.
    patterns: Vec<(u8, u32)>,
    /// Marks of one row.
    mask: Vec<u8>,
}

impl Survey {
    /// A survey of a tensor of `shape` with elements of `dtype`. What is not a matrix of a type that the
    /// sparse encodings hold stays dense.
    pub fn new(dtype: DType, shape: &[usize]) -> Self {
        let fits = dense::size_bytes(dtype, shape).is_some();
        let cols = match shape {
            [rows, cols] if *rows > 0 && fits && mask::holds(dtype) => *cols,
            _ => 0,
        };
        let widths = (2..=MAX_GROUP).filter(|&m| cols > 0 && cols.is_multiple_of(usize::from(m)));
        Self {
            dtype,
            shape: shape.to_vec(),
            kept: 0,
            patterns: widths.map(|m| (m, 0)).collect(),
            mask: vec![0; mask::stride(cols)],
        }
    }

    /// Takes in whole rows, as little-endian bytes.
    pub fn rows(&mut self, dense: &[u8]) {
        let [_, cols] = self.shape[..] else { return };
        let (width, mask) = (self.dtype.size_bytes(), &mut self.mask);
        if mask.is_empty() {
            return;
        }
        for row in dense.chunks_exact(cols * width) {
            self.kept += mask::mark(width, row, mask) as u64;
            self.patterns.retain_mut(|(m, most)| {
                let m = usize::from(*m);
                let groups = (0..cols).step_by(m);
                let counts = groups.map(|first| mask::bits(mask, first, m).count_ones());
                *most = counts.fold(*most, u32::max);
                // A full group leaves nothing to save.
                (*most as usize) < m
            });
        }
    }

    /// Whether no aligned group of four columns has more than two elements that are not zero, in the
    /// rows seen so far.
    pub fn fits_2of4(&self) -> bool {
        self.patterns.iter().any(|&(m, most)| m == 4 && most <= 2)
    }

    /// Elements that are not zero, in the rows seen so far.
    pub fn kept(&self) -> u64 {
        self.kept
    }

    /// The encoding in which the rows seen so far, if they are all, take the fewest bytes. Of equal
    /// ones 2:4 is preferred, then the narrowest group; any n:m to a bitmask that is not smaller by
    /// more than 1/64 of the dense size.
    ///
    /// # Errors
    /// [`FormatError::Encoding`](crate::FormatError::Encoding) when the dense size overflows.
    pub fn cheapest(&self, name: &str) -> Result<Encoding> {
        let dtype = self.dtype;
        let dense = (self.bytes(name, Encoding::Dense { dtype })?, Encoding::Dense { dtype });
        if self.mask.is_empty() {
            return Ok(dense.1);
        }
        let bitmask = Encoding::Bitmask { dtype, kept: self.kept };
        let bitmask = (self.bytes(name, bitmask)?, bitmask);
        let mut pattern: Option<(u64, Encoding)> = None;
        for &(m, most) in &self.patterns {
            let encoding = match (most.max(1) as u8, m) {
                (2, 4) => Encoding::Sparse24 { dtype },
                (n, m) => Encoding::Nm { n, m, dtype },
            };
            let bytes = self.bytes(name, encoding)?;
            let hardware = matches!(encoding, Encoding::Sparse24 { .. });
            if pattern.is_none_or(|(least, _)| bytes < least || bytes == least && hardware) {
                pattern = Some((bytes, encoding));
            }
        }
        let worth = dense.0 / PATTERN_WORTH;
        let sparse = pattern.filter(|(bytes, _)| *bytes <= bitmask.0 + worth).unwrap_or(bitmask);
        Ok(if sparse.0 < dense.0 { sparse.1 } else { dense.1 })
    }

    fn bytes(&self, name: &str, encoding: Encoding) -> Result<u64> {
        let components = encoding.components(name, &self.shape)?;
        Ok(components.iter().map(|component| component.bytes).sum())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Encoder;

    /// The choice for a matrix of bytes, taken in as rows of `split` and the rest.
    fn choice(values: &[u8], cols: usize, split: usize) -> Encoding {
        let shape = [values.len() / cols, cols];
        let mut survey = Survey::new(DType::I8, &shape);
        survey.rows(&values[..split * cols]);
        survey.rows(&values[split * cols..]);
        survey.cheapest("w").unwrap()
    }

    const I8: DType = DType::I8;

    #[test]
    fn the_sparsest_pattern_is_found() {
        let repeat = |pattern: &[u8], times: usize| pattern.repeat(times);
        for (pattern, encoding) in [
            (&[1, 1, 0, 0][..], Encoding::Sparse24 { dtype: I8 }),
            (&[1, 0, 1, 0], Encoding::Sparse24 { dtype: I8 }),
            (&[1, 0, 0, 0], Encoding::Nm { n: 1, m: 4, dtype: I8 }),
            (&[1, 1, 1, 1, 0, 0, 0, 0], Encoding::Nm { n: 4, m: 8, dtype: I8 }),
            (&[1, 1, 1, 0, 1, 1, 0, 0], Encoding::Nm { n: 5, m: 8, dtype: I8 }),
            (&[1, 1, 1, 1, 1, 1, 1, 1], Encoding::Dense { dtype: I8 }),
            // One bit a weight saves nothing here.
            (&[1, 1, 1, 1, 1, 1, 1, 0], Encoding::Dense { dtype: I8 }),
        ] {
            assert_eq!(choice(&repeat(pattern, 64), 64, 3), encoding, "{pattern:?}");
        }
        // Six columns are no groups of four.
        let halves = repeat(&[1, 0, 0, 1, 1, 0], 64);
        assert_eq!(choice(&halves, 6, 1), Encoding::Nm { n: 1, m: 2, dtype: I8 });
    }

    #[test]
    fn without_a_pattern_it_is_a_bitmask_or_dense() {
        let mut values = vec![1; 64 * 64];
        values[..32 * 64].fill(0);
        assert_eq!(choice(&values, 64, 0), Encoding::Bitmask { dtype: I8, kept: 32 * 64 });
        assert_eq!(choice(&[1; 64], 8, 0), Encoding::Dense { dtype: I8 });
        assert_eq!(choice(&[0; 64 * 64], 64, 0), Encoding::Bitmask { dtype: I8, kept: 0 });
    }

    #[test]
    fn zeros_inside_a_pattern_do_not_hide_it() {
        let mut values = [1, 1, 0, 0].repeat(4096);
        values[..128].fill(0);
        assert_eq!(choice(&values, 128, 0), Encoding::Sparse24 { dtype: I8 });
        values[..4096].fill(0);
        assert_eq!(choice(&values, 128, 0), Encoding::Bitmask { dtype: I8, kept: 6144 });
    }

    #[test]
    fn what_no_sparse_encoding_holds_is_dense() {
        for (dtype, shape) in
            [(DType::F16, &[64][..]), (DType::I32, &[8, 8]), (DType::F16, &[0, 8])]
        {
            let mut survey = Survey::new(dtype, shape);
            survey.rows(&[0; 64]);
            assert_eq!(survey.cheapest("w").unwrap(), Encoding::Dense { dtype });
        }
    }

    proptest! {
        #[test]
        fn the_choice_holds_the_matrix_and_nothing_is_much_smaller(
            rows in 1..40usize,
            cols in 1..49usize,
            draws in proptest::collection::vec(0..8u8, 1..50),
            most in 1..8u8,
        ) {
            let values: Vec<u8> =
                (0..rows * cols).map(|i| u8::from(draws[i * 7 % draws.len()] < most)).collect();
            let shape = [rows, cols];
            let encoding = choice(&values, cols, rows / 2);
            let bytes = |encoding: Encoding| {
                let parts = encoding.components("w", &shape).unwrap();
                parts.iter().map(|part| part.bytes).sum::<u64>()
            };
            let holds = |encoding: Encoding| {
                Encoder::new(encoding, "w", &shape).and_then(|mut encoder| encoder.rows(&values)).is_ok()
            };
            prop_assert!(holds(encoding));
            let kept = values.iter().filter(|value| **value != 0).count() as u64;
            let mut others = vec![Encoding::Dense { dtype: I8 }, Encoding::Sparse24 { dtype: I8 }];
            others.extend((2..=16).flat_map(|m| (1..m).map(move |n| Encoding::Nm { n, m, dtype: I8 })));
            for other in others.into_iter().filter(|other| holds(*other)) {
                prop_assert!(bytes(encoding) <= bytes(other), "{} {}", encoding, other);
            }
            let bitmask = bytes(Encoding::Bitmask { dtype: I8, kept });
            prop_assert!(bytes(encoding) <= bitmask + (rows * cols) as u64 / 64);
        }
    }
}

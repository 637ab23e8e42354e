//! Codes, scales and zero points of rows: what is checked, and what they stand for.

use std::ops::Range;

use super::{IntGrid, QuantizedRows, groups};
use crate::{
    DType, FormatError, Result,
    encoding::{MatrixShape, dense, f8},
};

/// What codes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codes {
    /// Numbers of so many bits.
    Int { bits: u8, symmetric: bool },
    /// Bits of `F8_E4M3` values.
    F8E4m3,
}

/// The grid of one matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid<'a> {
    pub(super) name: &'a str,
    pub(super) codes: Codes,
    /// Element type of scales and values.
    pub(super) scale: DType,
    pub(super) matrix: MatrixShape,
    /// Scales of a row.
    pub(super) groups: usize,
}

/// One row, unpacked.
#[derive(Debug)]
pub(super) struct Row {
    /// As many as the matrix has columns.
    pub(super) codes: Vec<i8>,
    /// One for each group.
    pub(super) scales: Vec<f32>,
    /// One for each group, of a symmetric grid too.
    pub(super) zero_points: Vec<i8>,
}

/// Where decoded rows go.
pub(in crate::encoding) enum Sink<'a> {
    /// Bytes of the scales' type are appended.
    Bytes(&'a mut Vec<u8>),
    /// f32, as many as are decoded.
    F32(&'a mut [f32]),
}

impl<'a> Grid<'a> {
    /// The integer grid of a tensor of `shape`.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] for parameters out of range, or a shape that has no such grid.
    pub(super) fn int(name: &'a str, grid: IntGrid, shape: &[usize]) -> Result<Self> {
        let IntGrid { bits, group_size, symmetric, scale } = grid;
        if !(2..=8).contains(&bits) {
            return Err(refuse(name, format!("codes of {bits} bits; expected 2 to 8")));
        }
        Self::new(name, Codes::Int { bits, symmetric }, scale, group_size, shape)
    }

    /// The grid of 8-bit floats with a scale for each row.
    ///
    /// # Errors
    /// As [`int`](Self::int).
    pub(super) fn f8(name: &'a str, scale: DType, shape: &[usize]) -> Result<Self> {
        Self::new(name, Codes::F8E4m3, scale, None, shape)
    }

    fn new(
        name: &'a str,
        codes: Codes,
        scale: DType,
        group_size: Option<u32>,
        shape: &[usize],
    ) -> Result<Self> {
        if !matches!(scale, DType::F16 | DType::Bf16 | DType::F32) {
            return Err(refuse(name, format!("scales of type {scale}; expected F16, BF16 or F32")));
        }
        let &[rows, cols] = shape else {
            return Err(refuse(name, format!("codes need a matrix, found shape {shape:?}")));
        };
        if cols == 0 {
            return Err(refuse(name, format!("codes need columns, found shape {shape:?}")));
        }
        // Bounds every component, in bits of codes too, and everything computed from them.
        if dense::size_bytes(DType::U64, shape).is_none() {
            return Err(refuse(name, format!("the size of shape {shape:?} overflows")));
        }
        let groups = groups(name, group_size, cols)?;
        Ok(Self { name, codes, scale, matrix: MatrixShape { rows, cols }, groups })
    }

    /// Whether zero points are stored.
    pub(super) fn has_zero_points(&self) -> bool {
        matches!(self.codes, Codes::Int { symmetric: false, .. })
    }

    /// Columns of a group.
    pub(super) fn group_cols(&self) -> usize {
        self.matrix.cols / self.groups
    }

    /// Checks rows of which the first is row `first_row`, and counts them.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming row and column or group of a code, zero point or scale that the
    /// grid does not have, or of a value that is not finite.
    pub(super) fn check(&self, first_row: usize, given: &QuantizedRows<'_>) -> Result<usize> {
        let MatrixShape { cols, .. } = self.matrix;
        let rows = given.codes.len() / cols;
        let points = if self.has_zero_points() { rows * self.groups } else { 0 };
        let lengths = [given.codes.len(), given.scales.len(), given.zero_points.len()];
        if lengths != [rows * cols, rows * self.groups, points]
            || rows > self.matrix.rows - first_row
        {
            return Err(self.refuse(format!(
                "{} codes, {} scales and {} zero points after row {first_row}; expected whole rows of {cols}, {} and {}, {} in all",
                lengths[0],
                lengths[1],
                lengths[2],
                self.groups,
                if self.has_zero_points() { self.groups } else { 0 },
                self.matrix.rows
            )));
        }
        for row in 0..rows {
            self.check_row(first_row + row, &self.row(given, row))?;
        }
        Ok(rows)
    }

    /// One of the given rows.
    pub(super) fn row(&self, given: &QuantizedRows<'_>, row: usize) -> Row {
        let (cols, groups) = (self.matrix.cols, self.groups);
        Row {
            codes: given.codes[row * cols..][..cols].to_vec(),
            scales: given.scales[row * groups..][..groups].to_vec(),
            zero_points: match given.zero_points {
                [] => vec![0; groups],
                all => all[row * groups..][..groups].to_vec(),
            },
        }
    }

    fn check_row(&self, at: usize, row: &Row) -> Result<()> {
        if let Codes::Int { bits, .. } = self.codes {
            let half = 1i16 << (bits - 1);
            let beyond = |code: &i8| !(-half..half).contains(&i16::from(*code));
            let message = |what, number| {
                format!("{what} {number} is not of {bits} bits ({} to {})", -half, half - 1)
            };
            if let Some(col) = row.codes.iter().position(beyond) {
                let what = message("code", row.codes[col]);
                return Err(self.refuse(format!("row {at}, column {col}: {what}")));
            }
            if let Some(group) = row.zero_points.iter().position(beyond) {
                let what = message("zero point", row.zero_points[group]);
                return Err(self.refuse(format!("row {at}, group {group}: {what}")));
            }
        }
        check_scales(self.name, at, &row.scales)?;
        for (group, (codes, scale)) in
            row.codes.chunks(self.group_cols()).zip(&row.scales).enumerate()
        {
            let is_zero = |code: &i8| match self.codes {
                Codes::Int { .. } => *code == row.zero_points[group],
                Codes::F8E4m3 => *code & i8::MAX == 0,
            };
            if *scale == 0.0 && !codes.iter().all(is_zero) {
                return Err(self.refuse(format!(
                    "row {at}, group {group}: the scale is 0 but not every code is a zero"
                )));
            }
        }
        self.values(at, row, &mut vec![0.0; self.matrix.cols])
    }

    /// The scales of a row as bytes.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming a scale that is not a value of their type.
    pub(super) fn scale_bytes(&self, at: usize, scales: &[f32], out: &mut Vec<u8>) -> Result<()> {
        let before = out.len();
        let inexact = |group: usize| {
            let (scale, dtype) = (scales[group], self.scale);
            self.refuse(format!(
                "row {at}, group {group}: the scale {scale:e} is not a {dtype} value"
            ))
        };
        for (group, scale) in scales.iter().enumerate() {
            dense::encode_f32(self.name, self.scale, &[*scale], out).map_err(|_| inexact(group))?;
        }
        let mut back = vec![0.0; scales.len()];
        dense::to_f32(self.scale, &out[before..], &mut back);
        let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
        match back.iter().zip(scales).position(differs) {
            Some(group) => Err(inexact(group)),
            None => Ok(()),
        }
    }

    /// The scales of a row from the bytes of all rows, which component `component` holds.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming one that is negative or not finite.
    pub(super) fn read_scales(
        &self,
        component: &str,
        at: usize,
        bytes: &[u8],
        scales: &mut [f32],
    ) -> Result<()> {
        let row_bytes = self.groups * self.scale.size_bytes();
        dense::to_f32(self.scale, &bytes[at * row_bytes..][..row_bytes], scales);
        check_scales(component, at, scales)
    }

    /// The values of a row, exact in the scales' type.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming a value that is not finite in it.
    fn values(&self, at: usize, row: &Row, out: &mut [f32]) -> Result<()> {
        let cols = self.group_cols();
        let groups = row.scales.iter().zip(&row.zero_points).zip(row.codes.chunks_exact(cols));
        for (((scale, zero_point), codes), out) in groups.zip(out.chunks_exact_mut(cols)) {
            match self.codes {
                Codes::Int { .. } => {
                    let zero_point = i16::from(*zero_point);
                    for (out, code) in out.iter_mut().zip(codes) {
                        *out = scale * f32::from(i16::from(*code) - zero_point);
                    }
                }
                Codes::F8E4m3 => {
                    for (out, code) in out.iter_mut().zip(codes) {
                        *out = scale * f8::to_f32(code.cast_unsigned());
                    }
                }
            }
        }
        match self.scale {
            DType::F16 => out.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
            DType::Bf16 => out.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
            _ => {}
        }
        // Fold without a branch first: it is rare and this vectorises.
        if out.iter().fold(true, |all, value| all & value.is_finite()) {
            return Ok(());
        }
        let col = out.iter().position(|value| !value.is_finite()).unwrap_or_default();
        Err(self.refuse(format!(
            "row {at}, column {col}: code {} with scale {:e} is not a finite {} value",
            row.codes[col],
            row.scales[col / cols],
            self.scale
        )))
    }

    /// Decodes rows `rows` of which `read` unpacks one at a time. Rows appended before an error are
    /// taken back.
    ///
    /// # Errors
    /// Those of `read`, and [`FormatError::Encoding`] for a value that is not finite.
    pub(super) fn decode(
        &self,
        rows: Range<usize>,
        mut sink: Sink<'_>,
        mut read: impl FnMut(usize, &mut Row) -> Result<()>,
    ) -> Result<()> {
        let cols = self.matrix.cols;
        if rows.is_empty() {
            return Ok(());
        }
        let mut row = Row {
            codes: vec![0; cols],
            scales: vec![0.0; self.groups],
            zero_points: vec![0; self.groups],
        };
        let mut values = vec![0.0; cols];
        let (before, first) =
            (if let Sink::Bytes(out) = &sink { out.len() } else { 0 }, rows.start);
        for at in rows {
            let result = read(at, &mut row).and_then(|()| self.values(at, &row, &mut values));
            let result = match (&mut sink, result) {
                (Sink::F32(out), Ok(())) => {
                    out[(at - first) * cols..][..cols].copy_from_slice(&values);
                    Ok(())
                }
                (Sink::Bytes(out), Ok(())) => {
                    dense::encode_f32(self.name, self.scale, &values, out)
                }
                (_, Err(error)) => Err(error),
            };
            if let Err(error) = result {
                if let Sink::Bytes(out) = &mut sink {
                    out.truncate(before);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn refuse(&self, what: String) -> FormatError {
        refuse(self.name, what)
    }
}

pub(super) fn refuse(name: &str, what: String) -> FormatError {
    FormatError::Encoding { name: name.to_owned(), what }
}

/// Refuses a scale that is negative or not finite.
fn check_scales(name: &str, at: usize, scales: &[f32]) -> Result<()> {
    let bad = |scale: &f32| !scale.is_finite() || scale.is_sign_negative();
    match scales.iter().position(bad) {
        None => Ok(()),
        Some(group) => Err(refuse(
            name,
            format!(
                "row {at}, group {group}: the scale is {}; expected a number that is not negative",
                scales[group]
            ),
        )),
    }
}

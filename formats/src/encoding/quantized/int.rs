//! Integer codes as sparsepack stores them: all of them, or those that are not zeros.
//!
//! For a matrix of `R` rows and `C` columns on a grid of `b` bits with `G` groups in a row, of which `K`
//! codes of a row are stored (`C`, `C/2` for 2:4, `C/m·n` for n:m):
//!
//! ```text
//! NAME.codes        I8 [R, K] for b = 8, else U8 [R, ceil(K·b/8)]
//!                   low b bits of each stored code in two's complement, in ascending column
//! NAME.metadata     for 2:4: U8 [R, ceil(C/8)], as in sparse24
//! NAME.mask         for n:m and bitmasks: U8 [R, ceil(C/8)], as in nm and bitmask
//! NAME.offsets      for bitmasks: U64 [ceil(R/64) + 1], as in bitmask
//! NAME.scales       F16, BF16 or F32 [R, G]
//! NAME.zero_points  unless symmetric: as `.codes` of a matrix of G columns
//! ```
//!
//! Code `i` of a row has bits `i·b` to `i·b + b - 1`, the lowest of a byte first. Rows start at whole
//! bytes; unused bits are 0. Of a bitmask the codes of all rows are one stream, `[ceil(room·b/8)]`
//! bytes (I8 `[room]` for 8 bits) with zeros behind the last.
//!
//! A code that is its zero point is a zero, and exactly those may be left out. A group of more others
//! than the pattern has room for is refused, never pruned; one of fewer is filled up as in the encodings
//! of values.

use std::ops::Range;

use super::{
    IntGrid, Kept, QuantizedRows,
    bits::{self, BitWriter},
    grid::{Grid, Row, Sink},
};
use crate::{
    DType, Result,
    encoding::{Component, MatrixShape, bitmask, mask, nm, sparse24},
};

/// The stored components of a matrix.
pub(in crate::encoding) fn components(
    name: &str,
    grid: IntGrid,
    kept: Kept,
    shape: &[usize],
) -> Result<Vec<Component>> {
    let Grid { matrix: MatrixShape { rows, cols }, groups, .. } = Grid::int(name, grid, shape)?;
    let positions = match kept {
        Kept::All => vec![],
        Kept::Sparse24 => sparse24::components(name, DType::U8, shape)?,
        Kept::Nm { n, m } => nm::components(name, nm::Pattern { n, m }, DType::U8, shape)?,
        Kept::Bitmask { kept } => bitmask::components(name, DType::U8, kept, shape)?,
    };
    // The grid has bounded all sizes.
    let component = |suffix, dtype: DType, shape: Vec<usize>| {
        let elements: usize = shape.iter().product();
        let bytes = elements as u64 * dtype.size_bytes() as u64;
        Component { suffix, dtype, shape, bytes }
    };
    let packed = |suffix, mut shape: Vec<usize>| match (grid.bits, shape.last_mut()) {
        (bits, Some(codes)) if bits < 8 => {
            *codes = bits::bytes(*codes, bits);
            component(suffix, DType::U8, shape)
        }
        _ => component(suffix, DType::I8, shape),
    };
    let codes = positions.first().map_or(vec![rows, cols], |values| values.shape.clone());
    let mut parts = vec![packed(".codes", codes)];
    parts.extend(positions.into_iter().skip(1));
    parts.push(component(".scales", grid.scale, vec![rows, groups]));
    if !grid.symmetric {
        parts.push(packed(".zero_points", vec![rows, groups]));
    }
    Ok(parts)
}

/// What rows encoded so far leave behind: of a bitmask only.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct State {
    codes: BitWriter,
    bitmask: bitmask::State,
}

/// Encodes and decodes one tensor that [`components`] accepts.
pub(super) struct Codec<'a> {
    grid: Grid<'a>,
    kept: Kept,
    bits: u8,
}

impl<'a> Codec<'a> {
    pub(super) fn new(name: &'a str, grid: IntGrid, kept: Kept, shape: &[usize]) -> Result<Self> {
        Ok(Self { grid: Grid::int(name, grid, shape)?, kept, bits: grid.bits })
    }

    /// The components' bytes of rows of which the first is row `first_row`, and their number.
    ///
    /// # Errors
    /// [`FormatError::Encoding`](crate::FormatError::Encoding) naming what is not on the grid, or more
    /// codes that are not zeros than there is room for. `state` is then as it was.
    pub(super) fn encode(
        &self,
        state: &mut State,
        first_row: usize,
        given: &QuantizedRows<'_>,
    ) -> Result<(usize, Vec<Vec<u8>>)> {
        let rows = self.grid.check(first_row, given)?;
        let mut next = *state;
        let (masks, positions) =
            self.positions(&mut next.bitmask, first_row, rows, &self.marks(given))?;
        let mask_bytes = mask::stride(self.grid.matrix.cols);
        let (mut codes, mut scales, mut zero_points) = (vec![], vec![], vec![]);
        for row in 0..rows {
            let Row { codes: all, scales: row_scales, zero_points: points } =
                self.grid.row(given, row);
            let all: Vec<u8> = all.iter().map(|code| code.cast_unsigned()).collect();
            let stored = match masks.chunks_exact(mask_bytes).nth(row) {
                None => all,
                Some(mask) => {
                    let mut stored = vec![0; mask::count(mask)];
                    mask::gather(1, &all, mask, &mut stored);
                    stored
                }
            };
            match self.kept {
                Kept::Bitmask { .. } => next.codes.write(&stored, self.bits, &mut codes),
                _ => bits::pack(&stored, self.bits, &mut codes),
            }
            self.grid.scale_bytes(first_row + row, &row_scales, &mut scales)?;
            let points: Vec<u8> = points.iter().map(|point| point.cast_unsigned()).collect();
            bits::pack(&points, self.bits, &mut zero_points);
        }
        *state = next;
        let mut parts = vec![codes];
        parts.extend(positions);
        parts.push(scales);
        if self.grid.has_zero_points() {
            parts.push(zero_points);
        }
        Ok((rows, parts))
    }

    /// A byte for each code, zero where it is its zero point.
    fn marks(&self, given: &QuantizedRows<'_>) -> Vec<u8> {
        let cols = self.grid.group_cols();
        let mut marks: Vec<u8> = given.codes.iter().map(|code| code.cast_unsigned()).collect();
        for (marks, point) in marks.chunks_exact_mut(cols).zip(given.zero_points) {
            for mark in marks {
                *mark = mark.wrapping_sub(point.cast_unsigned());
            }
        }
        marks
    }

    /// Which codes of rows are stored, as mask bits (none where all are), and the components that say so.
    fn positions(
        &self,
        bitmask: &mut bitmask::State,
        first_row: usize,
        rows: usize,
        marks: &[u8],
    ) -> Result<(Vec<u8>, Vec<Vec<u8>>)> {
        let Grid { name, matrix: MatrixShape { cols, .. }, .. } = self.grid;
        // Marks are values to these encodings; only the positions are kept.
        let mut values = vec![];
        match self.kept {
            Kept::All => Ok((vec![], vec![])),
            Kept::Sparse24 => {
                let (matrix, mut metadata) = (MatrixShape { rows, cols }, vec![]);
                let out = (&mut values, &mut metadata);
                sparse24::encode_from(first_row, name, DType::U8, matrix, marks, out.0, out.1)?;
                Ok((sparse24::masks(name, cols, first_row, &metadata)?, vec![metadata]))
            }
            Kept::Nm { n, m } => {
                let mut masks = vec![];
                let codec = nm::Codec::new(name, nm::Pattern { n, m }, DType::U8, cols);
                codec.encode(first_row, marks, &mut values, &mut masks)?;
                Ok((masks.clone(), vec![masks]))
            }
            Kept::Bitmask { kept } => {
                let parts = self.bitmask(kept).encode(bitmask, first_row, marks)?;
                let masks = parts.get(1).cloned().unwrap_or_default();
                Ok((masks, parts.into_iter().skip(1).collect()))
            }
        }
    }

    /// What follows the last row: the rest of a bitmask.
    pub(super) fn finish(&self, state: State) -> Vec<Vec<u8>> {
        let Kept::Bitmask { kept } = self.kept else { return vec![] };
        // `kept` is at most the number of elements.
        let bytes = bits::bytes(kept as usize, self.bits);
        let written = bits::whole_bytes(state.bitmask.count(), self.bits);
        let mut codes = vec![];
        state.codes.finish(&mut codes);
        codes.resize(bytes - written, 0);
        let mut parts = vec![codes];
        parts.extend(self.bitmask(kept).finish(state.bitmask).into_iter().skip(1));
        parts.push(vec![]);
        if self.grid.has_zero_points() {
            parts.push(vec![]);
        }
        parts
    }

    fn bitmask(&self, kept: u64) -> bitmask::Codec<'a> {
        let Grid { name, matrix, .. } = self.grid;
        bitmask::Codec { name, dtype: DType::U8, kept, matrix }
    }

    /// Decodes rows `rows`; `parts` are whole and of the right lengths.
    ///
    /// # Errors
    /// [`FormatError::Encoding`](crate::FormatError::Encoding) naming positions, scales or unused bits
    /// that are not legal, or a value that is not finite.
    pub(super) fn decode(&self, rows: Range<usize>, parts: &[&[u8]], sink: Sink<'_>) -> Result<()> {
        let stored = self.stored(parts);
        let codec = Reader { codec: self, stored: &stored };
        match self.kept {
            Kept::All => self.grid.decode(rows, sink, |at, row| codec.all(at, row)),
            Kept::Sparse24 => self.grid.decode(rows, sink, |at, row| codec.sparse24(at, row)),
            Kept::Nm { n, m } => {
                let Grid { name, matrix, .. } = self.grid;
                let nm = nm::Codec::new(name, nm::Pattern { n, m }, DType::U8, matrix.cols);
                self.grid.decode(rows, sink, |at, row| codec.nm(&nm, at, row))
            }
            Kept::Bitmask { kept } => codec.bitmask(&self.bitmask(kept), rows, sink),
        }
    }

    fn stored<'p>(&self, parts: &[&'p [u8]]) -> Stored<'p> {
        let mut parts = parts.iter().copied();
        let mut next = || parts.next().unwrap_or_default();
        Stored {
            codes: next(),
            positions: if self.kept == Kept::All { &[] } else { next() },
            offsets: if matches!(self.kept, Kept::Bitmask { .. }) { next() } else { &[] },
            scales: next(),
            zero_points: next(),
        }
    }
}

/// Components by what they hold; empty where there is none.
struct Stored<'p> {
    codes: &'p [u8],
    positions: &'p [u8],
    offsets: &'p [u8],
    scales: &'p [u8],
    zero_points: &'p [u8],
}

/// Unpacks rows.
struct Reader<'a> {
    codec: &'a Codec<'a>,
    stored: &'a Stored<'a>,
}

impl Reader<'_> {
    fn all(&self, at: usize, row: &mut Row) -> Result<()> {
        let mut codes = vec![0; row.codes.len()];
        self.row_codes(at, &mut codes)?;
        self.extended(&codes, &mut row.codes);
        self.scales_and_points(at, row)
    }

    fn sparse24(&self, at: usize, row: &mut Row) -> Result<()> {
        let Grid { name, matrix: MatrixShape { cols, .. }, .. } = self.codec.grid;
        let stride = mask::stride(cols);
        let metadata = &self.stored.positions[at * stride..][..stride];
        let mask = sparse24::masks(name, cols, at, metadata)?;
        self.masked(at, &mask, row)
    }

    fn nm(&self, nm: &nm::Codec<'_>, at: usize, row: &mut Row) -> Result<()> {
        let stride = mask::stride(self.codec.grid.matrix.cols);
        let mask = &self.stored.positions[at * stride..][..stride];
        nm.check_mask(at, mask)?;
        self.masked(at, mask, row)
    }

    fn bitmask(
        &self,
        bitmask: &bitmask::Codec<'_>,
        rows: Range<usize>,
        sink: Sink<'_>,
    ) -> Result<()> {
        let bits = self.codec.bits;
        let (masks, offsets) = (self.stored.positions, self.stored.offsets);
        let stride = mask::stride(self.codec.grid.matrix.cols);
        let mut first_codes = Vec::with_capacity(rows.len());
        bitmask.each_row(rows.clone(), masks, offsets, |first, _| first_codes.push(first))?;
        if rows.end == bitmask.matrix.rows {
            let total = bitmask.total(offsets)?;
            if !bits::is_padded(self.stored.codes, total, bits) {
                let what = format!("after the last of {total} codes not all is zero");
                return Err(self.refuse(".codes", what));
            }
        }
        let first = rows.start;
        self.codec.grid.decode(rows, sink, |at, row| {
            let mask = &masks[at * stride..][..stride];
            let mut codes = vec![0; mask::count(mask)];
            bits::unpack(self.stored.codes, first_codes[at - first], bits, &mut codes);
            self.scales_and_points(at, row)?;
            self.spread(&codes, mask, row);
            Ok(())
        })
    }

    /// Unpacks the stored codes of a row whose mask is legal.
    fn masked(&self, at: usize, mask: &[u8], row: &mut Row) -> Result<()> {
        let mut codes = vec![0; mask::count(mask)];
        self.row_codes(at, &mut codes)?;
        self.scales_and_points(at, row)?;
        self.spread(&codes, mask, row);
        Ok(())
    }

    /// The codes of a row that starts at a whole byte; as many as `codes` has room for.
    fn row_codes(&self, at: usize, codes: &mut [u8]) -> Result<()> {
        self.whole_row(".codes", self.stored.codes, at, codes)
    }

    fn whole_row(&self, suffix: &str, all: &[u8], at: usize, codes: &mut [u8]) -> Result<()> {
        let bits = self.codec.bits;
        let stride = bits::bytes(codes.len(), bits);
        let packed = &all[at * stride..][..stride];
        if !bits::is_padded(packed, codes.len(), bits) {
            return Err(self.refuse(suffix, format!("row {at}: an unused bit is not 0")));
        }
        bits::unpack(packed, 0, bits, codes);
        Ok(())
    }

    fn scales_and_points(&self, at: usize, row: &mut Row) -> Result<()> {
        let name = format!("{}.scales", self.codec.grid.name);
        self.codec.grid.read_scales(&name, at, self.stored.scales, &mut row.scales)?;
        if self.codec.grid.has_zero_points() {
            let mut points = vec![0; row.zero_points.len()];
            self.whole_row(".zero_points", self.stored.zero_points, at, &mut points)?;
            self.extended(&points, &mut row.zero_points);
        }
        Ok(())
    }

    /// Puts stored codes at the columns that a mask marks, and zero points at the others.
    fn spread(&self, codes: &[u8], mask: &[u8], row: &mut Row) {
        let mut all = vec![0; row.codes.len()];
        mask::spread(1, codes, mask, &mut all);
        self.extended(&all, &mut row.codes);
        if self.codec.grid.has_zero_points() {
            let cols = self.codec.grid.group_cols();
            for (column, code) in row.codes.iter_mut().enumerate() {
                if mask::bits(mask, column, 1) == 0 {
                    *code = row.zero_points[column / cols];
                }
            }
        }
    }

    fn extended(&self, codes: &[u8], out: &mut [i8]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = bits::sign_extend(*code, self.codec.bits);
        }
    }

    fn refuse(&self, suffix: &str, what: String) -> crate::FormatError {
        super::grid::refuse(&format!("{}{suffix}", self.codec.grid.name), what)
    }
}

//! From dense rows to the components of an encoding, some rows at a time.

use super::{
    Encoding, MatrixShape, QuantizedRows, bitmask, ct_sparse_bitmask, ct_sparse24, ggml, nm,
    quantized, sparse24, torch_cutlass,
};
use crate::{FormatError, Result};

/// Encodes one tensor in row order. What [`rows`](Self::rows) and [`finish`](Self::finish) return
/// is appended to the components, in [`Encoding::components`] order.
#[derive(Debug)]
pub struct Encoder {
    encoding: Encoding,
    name: String,
    matrix: MatrixShape,
    rows_done: usize,
    /// What a bitmask's rows have in common.
    bitmask: bitmask::State,
    /// Metadata of `torch-cutlass` so far.
    torch_cutlass: torch_cutlass::State,
    /// Values of `sparse-bitmask` so far.
    stored: u64,
    /// What a quantized matrix's rows have in common.
    quantized: quantized::State,
}

impl Encoder {
    /// An encoder for a tensor of `shape`.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] when the encoding cannot hold that shape.
    pub fn new(encoding: Encoding, name: &str, shape: &[usize]) -> Result<Self> {
        encoding.components(name, shape)?;
        let matrix = MatrixShape::of(shape);
        Ok(Self {
            encoding,
            name: name.to_owned(),
            matrix,
            rows_done: 0,
            bitmask: bitmask::State::default(),
            torch_cutlass: torch_cutlass::State::default(),
            stored: 0,
            quantized: quantized::State::default(),
        })
    }

    /// Encodes the next rows, given as little-endian bytes of [`Encoding::value_dtype`].
    ///
    /// # Errors
    /// [`FormatError::Encoding`]: not whole rows, more rows than the tensor has, or values that
    /// break the encoding's pattern or are beyond its range; an encoding of codes (see
    /// [`quantized_rows`](Self::quantized_rows)).
    pub fn rows(&mut self, dense: &[u8]) -> Result<Vec<Vec<u8>>> {
        let row_bytes = self.matrix.cols * self.encoding.value_dtype().size_bytes();
        let rows = dense.len().checked_div(row_bytes).unwrap_or(0);
        if rows * row_bytes != dense.len() || rows > self.matrix.rows - self.rows_done {
            return Err(self.refuse(format!(
                "{} bytes after row {}; expected whole rows of {row_bytes} bytes, {} in all",
                dense.len(),
                self.rows_done,
                self.matrix.rows
            )));
        }
        let parts =
            match self.encoding {
                Encoding::Dense { .. } => vec![dense.to_vec()],
                Encoding::Ggml { ty } => {
                    let mut blocks = Vec::new();
                    let MatrixShape { cols, .. } = self.matrix;
                    ggml::encode(&self.name, ty, cols, self.rows_done, dense, &mut blocks)?;
                    vec![blocks]
                }
                Encoding::Sparse24 { dtype } => {
                    let (mut values, mut metadata) = (Vec::new(), Vec::new());
                    let chunk = MatrixShape { rows, cols: self.matrix.cols };
                    let out = (&mut values, &mut metadata);
                    sparse24::encode_from(
                        self.rows_done,
                        &self.name,
                        dtype,
                        chunk,
                        dense,
                        out.0,
                        out.1,
                    )?;
                    vec![values, metadata]
                }
                Encoding::Nm { n, m, dtype } => {
                    let (mut values, mut mask) = (Vec::new(), Vec::new());
                    nm::Codec::new(&self.name, nm::Pattern { n, m }, dtype, self.matrix.cols)
                        .encode(self.rows_done, dense, &mut values, &mut mask)?;
                    vec![values, mask]
                }
                Encoding::Bitmask { dtype, kept } => {
                    let codec =
                        bitmask::Codec { name: &self.name, dtype, kept, matrix: self.matrix };
                    codec.encode(&mut self.bitmask, self.rows_done, dense)?
                }
                Encoding::TorchCutlass { dtype } => {
                    torch_cutlass::Codec { name: &self.name, dtype, matrix: self.matrix }.encode(
                        &mut self.torch_cutlass,
                        self.rows_done,
                        dense,
                    )?
                }
                Encoding::CtSparse24Bitmask { dtype } => {
                    ct_sparse24::Codec { name: &self.name, dtype, matrix: self.matrix }
                        .encode(self.rows_done, dense)?
                }
                Encoding::CtSparseBitmask { dtype, kept } => {
                    ct_sparse_bitmask::Codec { name: &self.name, dtype, kept, matrix: self.matrix }
                        .encode(&mut self.stored, self.rows_done, dense)?
                }
                Encoding::Int { .. }
                | Encoding::CtPackQuantized { .. }
                | Encoding::CtIntQuantized { .. }
                | Encoding::CtFloatQuantized { .. } => {
                    return Err(self.refuse(format!(
                        "the encoding {} holds codes on a grid, not values",
                        self.encoding
                    )));
                }
            };
        self.rows_done += rows;
        Ok(parts)
    }

    /// Encodes the next rows of a quantized matrix, as they are: nothing is rounded.
    ///
    /// # Errors
    /// [`FormatError::Encoding`]: an encoding that holds values (see [`rows`](Self::rows)); not whole rows,
    /// or more than the tensor has; codes, zero points or scales that are not on the grid (row and column
    /// or group named); a value that is not finite; more codes other than their zero points than the
    /// encoding's pattern holds. Nothing is encoded then.
    pub fn quantized_rows(&mut self, rows: QuantizedRows<'_>) -> Result<Vec<Vec<u8>>> {
        let layout = quantized::Layout::of(&self.name, self.encoding)?;
        let shape = [self.matrix.rows, self.matrix.cols];
        let (count, parts) =
            layout.encode(&self.name, &shape, &mut self.quantized, self.rows_done, &rows)?;
        self.rows_done += count;
        Ok(parts)
    }

    /// What remains to be appended after the last row; nothing for most encodings.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] when rows are missing.
    pub fn finish(self) -> Result<Vec<Vec<u8>>> {
        let MatrixShape { rows, cols } = self.matrix;
        if self.rows_done < rows && cols > 0 {
            return Err(self.refuse(format!("{} of {rows} rows were encoded", self.rows_done)));
        }
        Ok(match self.encoding {
            Encoding::Bitmask { dtype, kept } => {
                let codec = bitmask::Codec { name: &self.name, dtype, kept, matrix: self.matrix };
                codec.finish(self.bitmask)
            }
            Encoding::TorchCutlass { .. } => torch_cutlass::Codec::finish(self.torch_cutlass),
            Encoding::CtSparse24Bitmask { dtype } => {
                ct_sparse24::Codec { name: &self.name, dtype, matrix: self.matrix }.finish()
            }
            Encoding::CtSparseBitmask { dtype, kept } => {
                ct_sparse_bitmask::Codec { name: &self.name, dtype, kept, matrix: self.matrix }
                    .finish()
            }
            Encoding::Int { .. }
            | Encoding::CtPackQuantized { .. }
            | Encoding::CtIntQuantized { .. }
            | Encoding::CtFloatQuantized { .. } => {
                let layout = quantized::Layout::of(&self.name, self.encoding)?;
                layout.finish(&self.name, &[rows, cols], &self.quantized)?
            }
            Encoding::Dense { .. }
            | Encoding::Sparse24 { .. }
            | Encoding::Nm { .. }
            | Encoding::Ggml { .. } => vec![],
        })
    }

    fn refuse(&self, what: String) -> FormatError {
        FormatError::Encoding { name: self.name.clone(), what }
    }
}

//! How the values of one tensor become bytes, independent of the container they lie in.

mod bitmask;
mod ct_sparse24;
mod ct_sparse_bitmask;
pub mod dense;
mod encoder;
pub mod f8;
pub mod ggml;
mod mask;
mod nibbles;
pub mod nm;
mod quantized;
pub mod sparse24;
mod survey;
#[cfg(test)]
mod testing;
mod torch_cutlass;

use std::fmt;

use serde::{Deserialize, Serialize};

use mask::MaskedRows;

pub use encoder::Encoder;
pub use quantized::{IntGrid, Kept, QuantizedRows};
pub use survey::Survey;

use crate::{DType, FormatError, GgmlType, Result};

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "encoding", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Encoding {
    /// Every element in row-major order.
    Dense {
        /// Element type.
        dtype: DType,
    },
    /// 2:4 sparse: two kept values and two 2-bit positions per group of four columns
    /// (see [`sparse24`]).
    Sparse24 {
        /// Element type of the kept values (a float type, I8 or U8).
        dtype: DType,
    },
    /// n:m sparse: `n` kept values and `m` mask bits per group of `m` columns, `m` up to 16; not 2:4
    /// (see [`nm`]).
    Nm {
        /// Kept columns of a group.
        n: u8,
        /// Columns of a group.
        m: u8,
        /// Element type of the kept values (a float type, I8 or U8).
        dtype: DType,
    },
    /// Sparse without a pattern: kept values and a bit for each element.
    ///
    /// Components of a matrix `[R, C]`: `.values [kept]`, row-major, zeros behind the last;
    /// `.mask` U8 `[R, ceil(C/8)]`, least significant bit first; `.offsets` U64 `[ceil(R/64) + 1]`,
    /// the number of values before every 64th row, and in all.
    Bitmask {
        /// Element type of the kept values (a float type, I8 or U8).
        dtype: DType,
        /// Room for values; a matrix may have fewer that are not zero, not more.
        kept: u64,
    },
    /// 2:4 sparse as `PyTorch`'s CUTLASS semi-structured tensors hold it.
    ///
    /// Components of a matrix `[R, C]`: `.packed [R, C/2]`, kept values in ascending column; `.meta`,
    /// I16 `[R, C/16]` for 16-bit values and I32 `[R, C/32]` for I8, words of nibbles as in
    /// [`sparse24`], in the order of CUTLASS.
    TorchCutlass {
        /// Element type of the kept values: F16, BF16 or I8.
        dtype: DType,
    },
    /// 2:4 sparse as compressed-tensors 0.9 to 0.14 wrote it (`sparse-24-bitmask`).
    ///
    /// Components of `MODULE.weight [R, C]`: `MODULE.compressed [R, C/2]`, kept values in ascending
    /// column; `MODULE.bitmask` U8 `[R, ceil(C/8)]`, least significant bit first; `MODULE.shape` I64
    /// `[2, 1]`.
    CtSparse24Bitmask {
        /// Element type of the kept values (a float type or I8).
        dtype: DType,
    },
    /// Sparse without a pattern as compressed-tensors 0.9 to 0.14 wrote it (`sparse-bitmask`).
    ///
    /// Components of `MODULE.weight [R, C]`: `MODULE.compressed [kept]`, row-major; `MODULE.bitmask`
    /// U8 `[R, ceil(C/8)]`, least significant bit first; `MODULE.shape` I64 `[2]`;
    /// `MODULE.row_offsets` I64 `[R]`, the number of values before each row.
    CtSparseBitmask {
        /// Element type of the kept values (a float type or I8).
        dtype: DType,
        /// Values stored; where fewer elements are not zero, some zeros are stored too.
        kept: u64,
    },
    /// Integer codes, scales and zero points: a quantized matrix.
    ///
    /// Components of a matrix `[R, C]` with `G` groups in a row and `K` stored codes: `.codes`, U8
    /// `[R, ceil(K·bits/8)]` (I8 `[R, K]` for 8 bits); their positions, as of the encodings of values:
    /// `.metadata`, `.mask`, or `.mask` and `.offsets`; `.scales [R, G]`; `.zero_points` unless
    /// symmetric, packed as codes of `G` columns.
    Int {
        /// What codes stand for.
        #[serde(flatten)]
        grid: IntGrid,
        /// Which codes are stored.
        #[serde(flatten)]
        kept: Kept,
    },
    /// Integer codes as compressed-tensors packs them (`pack-quantized`).
    ///
    /// Components of `MODULE.weight [R, C]`: `MODULE.weight_packed` I32 `[R, ceil(C·bits/32)]`;
    /// `MODULE.weight_scale [R, G]`; unless symmetric `MODULE.weight_zero_point` I32
    /// `[ceil(R·bits/32), G]`; `MODULE.weight_shape` I64 `[2]`.
    CtPackQuantized {
        /// What codes stand for.
        #[serde(flatten)]
        grid: IntGrid,
    },
    /// 8-bit integer codes as compressed-tensors stores them (`int-quantized`).
    ///
    /// Components of `MODULE.weight [R, C]`: `MODULE.weight` I8 `[R, C]`; `MODULE.weight_scale [R, G]`;
    /// unless symmetric `MODULE.weight_zero_point` I8 `[R, G]`.
    CtIntQuantized {
        /// What codes stand for; of 8 bits.
        #[serde(flatten)]
        grid: IntGrid,
    },
    /// 8-bit floats with a scale for each row as compressed-tensors stores them (`float-quantized`).
    ///
    /// Components of `MODULE.weight [R, C]`: `MODULE.weight` `F8_E4M3` `[R, C]`;
    /// `MODULE.weight_scale [R, 1]`.
    CtFloatQuantized {
        /// Element type of the scales and of the decoded values: F16, BF16 or F32.
        #[serde(rename = "dtype")]
        scale: DType,
    },
    /// ggml quant blocks along each row.
    Ggml {
        /// Block type.
        #[serde(rename = "type")]
        ty: GgmlType,
    },
}

/// One stored piece of an encoded tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Last part of the name, e.g. `.values`; empty for a dense tensor. See
    /// [`Encoding::component_name`].
    pub suffix: &'static str,
    /// Element type in the container.
    pub dtype: DType,
    /// Shape in the container.
    pub shape: Vec<usize>,
    /// Bytes.
    pub bytes: u64,
}

/// What a GGUF file stores as this type: plain float types are dense like in any other container, the
/// rest are quant blocks.
impl From<GgmlType> for Encoding {
    fn from(ty: GgmlType) -> Self {
        match ty {
            GgmlType::F32 => Self::Dense { dtype: DType::F32 },
            GgmlType::F16 => Self::Dense { dtype: DType::F16 },
            GgmlType::BF16 => Self::Dense { dtype: DType::Bf16 },
            _ => Self::Ggml { ty },
        }
    }
}

impl Encoding {
    /// The pieces a tensor of `shape` is stored as, in order.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] when the encoding cannot hold that shape (n:m needs a matrix whose
    /// columns divide by m; ggml blocks need rows of whole blocks), its parameters are out of range, or
    /// its size overflows: a tensor may have `isize::MAX` bytes, counting dimensions of zero as one.
    pub fn components(self, name: &str, shape: &[usize]) -> Result<Vec<Component>> {
        match self {
            Self::Dense { dtype } => Ok(vec![Component {
                suffix: "",
                dtype,
                shape: shape.to_vec(),
                bytes: dense::size_bytes(dtype, shape).ok_or_else(|| FormatError::Encoding {
                    name: name.to_owned(),
                    what: format!("the size of shape {shape:?} overflows"),
                })?,
            }]),
            Self::Sparse24 { dtype } => sparse24::components(name, dtype, shape),
            Self::Nm { n, m, dtype } => nm::components(name, nm::Pattern { n, m }, dtype, shape),
            Self::Bitmask { dtype, kept } => bitmask::components(name, dtype, kept, shape),
            Self::TorchCutlass { dtype } => torch_cutlass::components(name, dtype, shape),
            Self::CtSparse24Bitmask { dtype } => ct_sparse24::components(name, dtype, shape),
            Self::CtSparseBitmask { dtype, kept } => {
                ct_sparse_bitmask::components(name, dtype, kept, shape)
            }
            Self::Ggml { ty } => Ok(vec![Component {
                suffix: "",
                dtype: DType::U8,
                shape: shape.to_vec(),
                bytes: ggml::size_bytes(name, ty, shape)?,
            }]),
            Self::Int { .. }
            | Self::CtPackQuantized { .. }
            | Self::CtIntQuantized { .. }
            | Self::CtFloatQuantized { .. } => {
                quantized::Layout::of(name, self)?.components(name, shape)
            }
        }
    }

    /// Bytes of each component that rows `rows` of a tensor of `shape` are decoded from: with them
    /// as parts, they are a tensor of this encoding with `rows.len()` rows. `None` where rows do not
    /// have bytes of their own, as many as any other row.
    ///
    /// # Errors
    /// As [`components`](Self::components), and for rows that the tensor does not have.
    pub fn row_ranges(
        self,
        name: &str,
        shape: &[usize],
        rows: std::ops::Range<usize>,
    ) -> Result<Option<Vec<std::ops::Range<u64>>>> {
        let matrix = MatrixShape::of(shape);
        check_rows(name, &rows, matrix.rows)?;
        match self {
            Self::Bitmask { .. }
            | Self::TorchCutlass { .. }
            | Self::CtSparse24Bitmask { .. }
            | Self::CtSparseBitmask { .. }
            | Self::Int { kept: Kept::Bitmask { .. }, .. }
            | Self::CtPackQuantized { .. } => return Ok(None),
            Self::Dense { .. }
            | Self::Sparse24 { .. }
            | Self::Nm { .. }
            | Self::Int { .. }
            | Self::CtIntQuantized { .. }
            | Self::CtFloatQuantized { .. }
            | Self::Ggml { .. } => {}
        }
        let components = self.components(name, shape)?;
        let ranges = components.iter().map(|component| {
            let row_bytes = component.bytes.checked_div(matrix.rows as u64).unwrap_or(0);
            rows.start as u64 * row_bytes..rows.end as u64 * row_bytes
        });
        Ok(Some(ranges.collect()))
    }

    /// Element type of the decoded values: what the encoding stores without loss, or, of codes, the type
    /// of the scales.
    pub fn value_dtype(self) -> DType {
        match self {
            Self::Dense { dtype }
            | Self::Sparse24 { dtype }
            | Self::Nm { dtype, .. }
            | Self::Bitmask { dtype, .. }
            | Self::TorchCutlass { dtype }
            | Self::CtSparse24Bitmask { dtype }
            | Self::CtSparseBitmask { dtype, .. } => dtype,
            Self::Int { grid, .. }
            | Self::CtPackQuantized { grid }
            | Self::CtIntQuantized { grid } => grid.scale,
            Self::CtFloatQuantized { scale } => scale,
            Self::Ggml { ty: GgmlType::F16 } => DType::F16,
            Self::Ggml { ty: GgmlType::BF16 } => DType::Bf16,
            Self::Ggml { .. } => DType::F32,
        }
    }

    /// Whether values of [`value_dtype`](Self::value_dtype) may differ once they are stored. Codes on a
    /// grid come back as they are, but not every value is on the grid.
    pub fn is_lossy(self) -> bool {
        !matches!(
            self,
            Self::Dense { .. }
                | Self::Sparse24 { .. }
                | Self::Nm { .. }
                | Self::Bitmask { .. }
                | Self::TorchCutlass { .. }
                | Self::CtSparse24Bitmask { .. }
                | Self::CtSparseBitmask { .. }
                | Self::Ggml { ty: GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 }
        )
    }

    /// Whether a tensor is stored as several components of a safetensors file.
    pub fn is_packed(self) -> bool {
        self.is_declared() || self.replaces_weight()
    }

    /// Whether components stand in the place of `MODULE.weight`, as compressed-tensors has them.
    fn replaces_weight(self) -> bool {
        matches!(
            self,
            Self::CtSparse24Bitmask { .. }
                | Self::CtSparseBitmask { .. }
                | Self::CtPackQuantized { .. }
                | Self::CtIntQuantized { .. }
                | Self::CtFloatQuantized { .. }
        )
    }

    /// Whether a tensor is stored as codes on a grid: those are encoded by
    /// [`Encoder::quantized_rows`], not from values.
    pub fn is_quantized(self) -> bool {
        matches!(
            self,
            Self::Int { .. }
                | Self::CtPackQuantized { .. }
                | Self::CtIntQuantized { .. }
                | Self::CtFloatQuantized { .. }
        )
    }

    /// Whether zeros are left out, so that a tensor of this encoding was sparse.
    pub fn is_sparse(self) -> bool {
        match self {
            Self::Sparse24 { .. }
            | Self::Nm { .. }
            | Self::Bitmask { .. }
            | Self::TorchCutlass { .. }
            | Self::CtSparse24Bitmask { .. }
            | Self::CtSparseBitmask { .. } => true,
            Self::Int { kept, .. } => kept != Kept::All,
            Self::Dense { .. }
            | Self::Ggml { .. }
            | Self::CtPackQuantized { .. }
            | Self::CtIntQuantized { .. }
            | Self::CtFloatQuantized { .. } => false,
        }
    }

    /// Whether a tensor is packed and the safetensors file says so. Those of compressed-tensors follow
    /// from `config.json`.
    pub fn is_declared(self) -> bool {
        matches!(
            self,
            Self::Sparse24 { .. }
                | Self::Nm { .. }
                | Self::Bitmask { .. }
                | Self::TorchCutlass { .. }
                | Self::Int { .. }
        )
    }

    /// Name in the container of a component of tensor `name`. The components of compressed-tensors
    /// stand in the place of `.weight`, all others behind the name.
    pub fn component_name(self, name: &str, component: &Component) -> String {
        let module = name.strip_suffix(".weight").filter(|_| self.replaces_weight());
        let owner = module.unwrap_or(name);
        format!("{owner}{}", component.suffix)
    }

    /// Decodes a whole tensor: [`decode_f32`](Self::decode_f32) of all its rows.
    ///
    /// # Errors
    /// As [`decode_f32`](Self::decode_f32).
    pub fn decode_all_f32(
        self,
        name: &str,
        shape: &[usize],
        parts: &[impl AsRef<[u8]>],
        out: &mut [f32],
    ) -> Result<()> {
        self.decode_f32(name, shape, parts, 0..MatrixShape::of(shape).rows, out)
    }

    /// Decodes rows `rows` of a tensor of `shape` from its components to f32, row-major, into `out`.
    ///
    /// `parts` are the components in [`Self::components`] order, whole. A tensor of rank 1 is one row;
    /// of rank 3 and more, the leading dimensions are flattened into rows.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] when the parts do not have the declared lengths, `out` is not
    /// `rows × columns` long, the element type is not a float, or metadata is not legal.
    pub fn decode_f32(
        self,
        name: &str,
        shape: &[usize],
        parts: &[impl AsRef<[u8]>],
        rows: std::ops::Range<usize>,
        out: &mut [f32],
    ) -> Result<()> {
        let matrix = MatrixShape::of(shape);
        let parts: &[&[u8]] = &parts.iter().map(AsRef::as_ref).collect::<Vec<_>>();
        self.check_parts(name, shape, parts)?;
        if rows.end > matrix.rows || rows.start > rows.end || out.len() != rows.len() * matrix.cols
        {
            return Err(FormatError::Encoding {
                name: name.to_owned(),
                what: format!(
                    "rows {rows:?} of {} × {} asked for into a buffer of {} values",
                    matrix.rows,
                    matrix.cols,
                    out.len()
                ),
            });
        }
        dense::check_float(name, self.value_dtype())?;
        if is_empty(parts) {
            return Ok(());
        }
        match self {
            Self::Dense { dtype } => dense::decode_f32(name, dtype, matrix, parts[0], rows, out),
            Self::Nm { n, m, dtype } => {
                let codec = nm::Codec::new(name, nm::Pattern { n, m }, dtype, matrix.cols);
                codec.decode_f32(dtype, rows, parts[0], parts[1], out)
            }
            Self::Bitmask { dtype, kept } => {
                bitmask::Codec { name, dtype, kept, matrix }.decode_f32(rows, parts, out)
            }
            Self::TorchCutlass { dtype } => {
                torch_cutlass::Codec { name, dtype, matrix }.decode_f32(rows, parts, out)
            }
            Self::CtSparse24Bitmask { dtype } => {
                ct_sparse24::Codec { name, dtype, matrix }.decode_f32(rows, parts, out)
            }
            Self::CtSparseBitmask { dtype, kept } => {
                ct_sparse_bitmask::Codec { name, dtype, kept, matrix }.decode_f32(rows, parts, out)
            }
            Self::Sparse24 { dtype } => {
                sparse24::decode_f32(name, dtype, matrix, parts[0], parts[1], rows, out)
            }
            Self::Int { .. }
            | Self::CtPackQuantized { .. }
            | Self::CtIntQuantized { .. }
            | Self::CtFloatQuantized { .. } => {
                let sink = quantized::Sink::F32(out);
                quantized::Layout::of(name, self)?.decode(name, shape, rows, parts, sink)
            }
            Self::Ggml { ty } => {
                ggml::decode_f32(ty, matrix, parts[0], rows, out);
                Ok(())
            }
        }
    }

    /// Appends rows `rows` to `out` as little-endian bytes of [`Self::value_dtype`].
    ///
    /// Dense and sparse tensors come out bit for bit; ggml blocks and codes come out as their decoded
    /// values.
    ///
    /// # Errors
    /// As [`Self::decode_f32`], but every dense element type is accepted. `out` is then as it was.
    pub fn decode_dense(
        self,
        name: &str,
        shape: &[usize],
        parts: &[impl AsRef<[u8]>],
        rows: std::ops::Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let matrix = MatrixShape::of(shape);
        let parts: &[&[u8]] = &parts.iter().map(AsRef::as_ref).collect::<Vec<_>>();
        self.check_parts(name, shape, parts)?;
        check_rows(name, &rows, matrix.rows)?;
        if is_empty(parts) {
            return Ok(());
        }
        match self {
            Self::Nm { n, m, dtype } => {
                let codec = nm::Codec::new(name, nm::Pattern { n, m }, dtype, matrix.cols);
                codec.decode(rows, parts[0], parts[1], out)
            }
            Self::Bitmask { dtype, kept } => {
                bitmask::Codec { name, dtype, kept, matrix }.decode(rows, parts, out)
            }
            Self::TorchCutlass { dtype } => {
                torch_cutlass::Codec { name, dtype, matrix }.decode(rows, parts, out)
            }
            Self::CtSparse24Bitmask { dtype } => {
                ct_sparse24::Codec { name, dtype, matrix }.decode(rows, parts, out)
            }
            Self::CtSparseBitmask { dtype, kept } => {
                ct_sparse_bitmask::Codec { name, dtype, kept, matrix }.decode(rows, parts, out)
            }
            Self::Dense { dtype } => {
                out.extend_from_slice(dense::row_bytes(dtype, matrix, parts[0], rows));
                Ok(())
            }
            Self::Sparse24 { dtype } => {
                sparse24::decode(name, dtype, matrix, parts[0], parts[1], rows, out)
            }
            // Plain elements keep all their bits, of a NaN too.
            Self::Ggml { ty: GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 } => {
                out.extend_from_slice(dense::row_bytes(self.value_dtype(), matrix, parts[0], rows));
                Ok(())
            }
            Self::Int { .. }
            | Self::CtPackQuantized { .. }
            | Self::CtIntQuantized { .. }
            | Self::CtFloatQuantized { .. } => {
                let sink = quantized::Sink::Bytes(out);
                quantized::Layout::of(name, self)?.decode(name, shape, rows, parts, sink)
            }
            Self::Ggml { ty } => {
                let mut values = vec![0.0; rows.len() * matrix.cols];
                ggml::decode_f32(ty, matrix, parts[0], rows, &mut values);
                dense::encode_f32(name, self.value_dtype(), &values, out)
            }
        }
    }

    fn check_parts(self, name: &str, shape: &[usize], parts: &[&[u8]]) -> Result<()> {
        let components = self.components(name, shape)?;
        if parts.len() != components.len() {
            return Err(FormatError::Encoding {
                name: name.to_owned(),
                what: format!("expected {} components, found {}", components.len(), parts.len()),
            });
        }
        for (component, part) in components.iter().zip(parts) {
            if component.bytes != part.len() as u64 {
                return Err(FormatError::Encoding {
                    name: self.component_name(name, component),
                    what: format!("expected {} bytes, found {}", component.bytes, part.len()),
                });
            }
        }
        Ok(())
    }
}

/// Whether there is nothing to decode: rows without columns, of which a header can claim any number,
/// or columns without rows.
fn is_empty(parts: &[&[u8]]) -> bool {
    parts.iter().all(|part| part.is_empty())
}

/// Room for one row of those that are asked for: columns without rows can be any number too.
fn row_scratch(rows: &std::ops::Range<usize>, row_bytes: usize) -> Vec<u8> {
    vec![0; if rows.is_empty() { 0 } else { row_bytes }]
}

/// Refuses rows that a tensor does not have.
fn check_rows(name: &str, rows: &std::ops::Range<usize>, has: usize) -> Result<()> {
    if rows.start <= rows.end && rows.end <= has {
        return Ok(());
    }
    Err(FormatError::Encoding {
        name: name.to_owned(),
        what: format!("rows {rows:?} of {has} asked for"),
    })
}

/// Refuses a buffer of another length than the shape demands.
fn check_length(name: &str, what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(FormatError::Encoding {
        name: name.to_owned(),
        what: format!("{what} has length {found}, expected {expected}"),
    })
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense { dtype } => write!(f, "{dtype}"),
            Self::Sparse24 { dtype } => write!(f, "2:4 {dtype}"),
            Self::Nm { n, m, dtype } => write!(f, "{n}:{m} {dtype}"),
            Self::Bitmask { dtype, .. } => write!(f, "bitmask {dtype}"),
            Self::TorchCutlass { dtype } => write!(f, "torch-cutlass {dtype}"),
            Self::CtSparse24Bitmask { dtype } => write!(f, "sparse-24-bitmask {dtype}"),
            Self::CtSparseBitmask { dtype, .. } => write!(f, "sparse-bitmask {dtype}"),
            Self::Int { grid, kept } => match kept {
                Kept::All => write!(f, "{grid}"),
                Kept::Sparse24 => write!(f, "2:4 {grid}"),
                Kept::Nm { n, m } => write!(f, "{n}:{m} {grid}"),
                Kept::Bitmask { .. } => write!(f, "bitmask {grid}"),
            },
            Self::CtPackQuantized { grid } => write!(f, "pack-quantized {grid}"),
            Self::CtIntQuantized { grid } => write!(f, "int-quantized {grid}"),
            Self::CtFloatQuantized { scale } => write!(f, "float-quantized {scale}"),
            Self::Ggml { ty } => write!(f, "{ty}"),
        }
    }
}

/// A tensor seen as rows of equal length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixShape {
    /// Product of all dimensions but the last, `usize::MAX` if it is larger.
    pub rows: usize,
    /// The last dimension (1 for a scalar).
    pub cols: usize,
}

impl MatrixShape {
    /// `[.., rows, cols]` flattened to rank 2; a vector is one row, and a scalar too.
    ///
    /// [`Encoding::components`] refuses every shape whose rows do not fit `usize`, and so does
    /// whatever decodes or encodes.
    pub fn of(shape: &[usize]) -> Self {
        match shape {
            [] => Self { rows: 1, cols: 1 },
            [leading @ .., cols] => Self {
                rows: leading.iter().fold(1, |rows: usize, &dim| rows.saturating_mul(dim)),
                cols: *cols,
            },
        }
    }
}

//! Shapes whose sizes overflow: an error from whatever takes a shape, never a panic and never a wrong
//! product.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests are test code too")]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sparsepack_formats::{
    DType, Encoder, Encoding, FormatError, GgmlType, IntGrid, Kept, MappedFile, QuantizedRows,
    SafetensorsWriter, ShardLayout, Survey, TensorIndex, TensorInfo,
    encoding::{MatrixShape, ggml, nm, sparse24},
    open,
    safetensors::SafetensorsReader,
};
use tempfile::TempDir;

const MAX: usize = usize::MAX;

/// The encodings of compressed-tensors are for weights only.
const NAME: &str = "w.weight";

fn encodings() -> Vec<Encoding> {
    let mut all: Vec<_> = DType::ALL.into_iter().map(|dtype| Encoding::Dense { dtype }).collect();
    for dtype in [DType::F32, DType::Bf16, DType::U8] {
        all.push(Encoding::Sparse24 { dtype });
        all.push(Encoding::Nm { n: 4, m: 8, dtype });
        all.push(Encoding::Bitmask { dtype, kept: 0 });
    }
    for dtype in [DType::F32, DType::Bf16, DType::I8] {
        all.push(Encoding::CtSparse24Bitmask { dtype });
        all.push(Encoding::CtSparseBitmask { dtype, kept: 0 });
    }
    for scale in [DType::F32, DType::F16] {
        let grid = IntGrid { bits: 8, group_size: None, symmetric: false, scale };
        for kept in [Kept::All, Kept::Sparse24, Kept::Nm { n: 4, m: 8 }, Kept::Bitmask { kept: 0 }]
        {
            all.push(Encoding::Int { grid, kept });
        }
        all.push(Encoding::CtPackQuantized { grid });
        all.push(Encoding::CtIntQuantized { grid });
        all.push(Encoding::CtFloatQuantized { scale });
    }
    all.extend(GgmlType::all().map(|ty| Encoding::Ggml { ty }));
    all
}

/// Everything that takes a shape refuses this one, in these words.
fn refused(encoding: Encoding, shape: &[usize]) {
    let expected = format!("tensor `w.weight`: the size of shape {shape:?} overflows");
    let check = |error: FormatError| {
        assert!(matches!(error, FormatError::Encoding { .. }), "{error:?}");
        assert_eq!(error.to_string(), expected, "{encoding}");
    };
    check(encoding.components(NAME, shape).unwrap_err());
    check(Encoder::new(encoding, NAME, shape).unwrap_err());
    let parts: &[&[u8]] = &[&[], &[]];
    check(encoding.decode_f32(NAME, shape, parts, 0..0, &mut []).unwrap_err());
    check(encoding.decode_all_f32(NAME, shape, parts, &mut []).unwrap_err());
    check(encoding.decode_dense(NAME, shape, parts, 0..MAX, &mut vec![]).unwrap_err());
}

#[test]
fn every_encoding_refuses_a_size_that_overflows() {
    // 2^62 elements of 256 columns: more than `isize::MAX` bytes of any type of two bytes and more.
    for shape in [[1 << 54, 256], [MAX / 256 + 1, 256], [1 << 40, 1 << 40], [0, MAX - 255]] {
        for encoding in encodings() {
            let one_byte = encoding.value_dtype().size_bytes() == 1;
            if !(one_byte && shape == [1 << 54, 256]) {
                refused(encoding, &shape);
            }
        }
    }
    for shape in [&[MAX, 2, 0][..], &[0, MAX, 2, 256], &[MAX, MAX, 0, 256], &[3, 0, MAX - 255]] {
        for encoding in encodings() {
            if matches!(encoding, Encoding::Dense { .. } | Encoding::Ggml { .. }) {
                refused(encoding, shape);
            }
        }
    }
}

#[test]
fn the_largest_shapes_that_fit_are_accepted() {
    let bytes = Encoding::Dense { dtype: DType::U8 };
    assert_eq!(bytes.components(NAME, &[MAX / 2]).unwrap()[0].bytes, (MAX / 2) as u64);
    refused(bytes, &[MAX / 2 + 1]);
    let floats = Encoding::Dense { dtype: DType::F32 };
    assert_eq!(floats.components(NAME, &[1 << 30, (1 << 31) - 1]).unwrap()[0].bytes, {
        4 * (1 << 30) * ((1 << 31) - 1)
    });
    refused(floats, &[1 << 30, 1 << 31]);
    assert_eq!(floats.components(NAME, &[]).unwrap()[0].bytes, 4);
    assert_eq!(floats.components(NAME, &[0, 1 << 60]).unwrap()[0].bytes, 0);
    // Eight bytes of offsets for each row.
    let encoding = Encoding::CtSparseBitmask { dtype: DType::I8, kept: 0 };
    refused(encoding, &[1 << 61, 0]);
    assert!(encoding.components(NAME, &[1 << 59, 0]).is_ok());
    // Decoded to f32 these are 2^63 bytes; the blocks are much smaller.
    refused(Encoding::Ggml { ty: GgmlType::Q2_K }, &[1 << 53, 256]);
}

#[test]
fn rows_without_columns_take_no_time() {
    let rows = 1usize << 59;
    let shape = [rows, 0];
    let shape_component = [rows.to_le_bytes(), [0; 8]].concat();
    for encoding in encodings() {
        let parts: &[&[u8]] = match encoding {
            Encoding::Dense { .. } | Encoding::Ggml { .. } => &[&[]],
            Encoding::Sparse24 { .. } | Encoding::Nm { .. } => &[&[], &[]],
            Encoding::CtSparse24Bitmask { .. } => &[&[], &[], &shape_component],
            // Their offsets are bytes that a file would have to have.
            _ => continue,
        };
        let mut out = vec![];
        encoding.decode_dense(NAME, &shape, parts, 0..1 << 59, &mut out).unwrap();
        assert!(out.is_empty());
        let decoded = encoding.decode_all_f32(NAME, &shape, parts, &mut []);
        assert_eq!(decoded.is_ok(), encoding.value_dtype().is_float_weight(), "{encoding}");
    }
    let mut codes = vec![];
    let matrix = MatrixShape { rows, cols: 0 };
    sparse24::decode_nibbles(NAME, matrix, &[], &[], 0..rows, &mut codes).unwrap();
    let pattern = nm::Pattern { n: 4, m: 8 };
    nm::decode_nibbles(NAME, pattern, matrix, &[], &[], 0..rows, &mut codes).unwrap();
    assert!(codes.is_empty());
}

#[test]
fn columns_without_rows_take_no_memory() {
    let cols = 1usize << 56;
    let shape = [0, cols];
    let shape_component = [[0; 8], cols.to_le_bytes()].concat();
    for encoding in encodings() {
        let parts: Vec<Vec<u8>> = encoding
            .components(NAME, &shape)
            .unwrap()
            .iter()
            .map(|part| {
                // Offsets, or nothing.
                let zeros = || vec![0; part.bytes as usize];
                if part.suffix.ends_with("shape") { shape_component.clone() } else { zeros() }
            })
            .collect();
        let mut out = vec![];
        encoding.decode_dense(NAME, &shape, &parts, 0..0, &mut out).unwrap();
        let decoded = encoding.decode_all_f32(NAME, &shape, &parts, &mut []);
        assert_eq!(decoded.is_ok(), encoding.value_dtype().is_float_weight(), "{encoding}");
    }
    let (mut codes, matrix) = (vec![], MatrixShape { rows: 0, cols });
    sparse24::decode_nibbles(NAME, matrix, &[], &[], 0..0, &mut codes).unwrap();
    let dense = Encoding::Dense { dtype: DType::U8 };
    assert_eq!(Survey::new(DType::U8, &shape).cheapest(NAME).unwrap(), dense);
    assert!(Survey::new(DType::U8, &[1, MAX]).cheapest(NAME).is_err());
}

#[test]
fn products_that_cannot_fail_saturate() {
    assert_eq!(MatrixShape::of(&[MAX, 2, 3]), MatrixShape { rows: MAX, cols: 3 });
    assert_eq!(MatrixShape::of(&[2, 3, 4]), MatrixShape { rows: 6, cols: 4 });
    assert_eq!(MatrixShape::of(&[MAX, 2, 0, 3]).rows, 0);
    let elements = |shape: &[usize]| {
        let encoding = Encoding::Dense { dtype: DType::U8 };
        TensorInfo { name: NAME.into(), encoding, shape: shape.to_vec(), stored_bytes: 0 }
            .elements()
    };
    assert_eq!(elements(&[MAX, 2]), MAX);
    assert_eq!(elements(&[MAX, 2, 0]), 0);
    assert_eq!(elements(&[2, 3, 4]), 24);
}

/// A file with an empty tensor `a`.
fn empty_tensor(dir: &TempDir, dtype: &str, shape: &[usize]) -> PathBuf {
    let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[0,0]}}}}"#);
    let path = dir.path().join("m.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn an_empty_tensor_of_integers_is_no_weight_either() {
    let dir = tempfile::tempdir().unwrap();
    for shape in [[0, 4], [4, 0], [1 << 59, 0]] {
        let error = open(&empty_tensor(&dir, "I32", &shape)).unwrap().read_f32("a").unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `a`: I32 values are not weights; expected F32, F16, BF16 or F8_E4M3"
        );
        let floats = open(&empty_tensor(&dir, "F32", &shape)).unwrap().read_f32("a").unwrap();
        assert!(floats.is_empty());
    }
}

#[test]
fn the_reader_refuses_an_empty_tensor_whose_other_dimensions_overflow() {
    let dir = tempfile::tempdir().unwrap();
    let path = empty_tensor(&dir, "F32", &[0, MAX]);
    let error = SafetensorsReader::open_file(MappedFile::open(&path).unwrap()).unwrap_err();
    assert!(matches!(error, FormatError::InvalidTensor { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        format!(
            "{}: tensor `a`: shape [0, {MAX}] of F32 needs more than can be addressed bytes, but the data offsets [0, 0] hold 0",
            path.display()
        )
    );
}

#[test]
fn the_writer_refuses_sums_that_overflow() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = |name: &str| {
        (name.to_owned(), Encoding::Dense { dtype: DType::U8 }, vec![isize::MAX as usize])
    };
    let shard = |names: &[&str]| ShardLayout {
        tensors: names.iter().map(|name| tensor(name)).collect(),
        ..ShardLayout::default()
    };
    let refusal = |shards: &[ShardLayout]| {
        let error = SafetensorsWriter::create(dir.path(), shards).unwrap_err();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "parts stay behind");
        error.to_string().replace(&format!("{}", dir.path().display()), "DIR")
    };
    assert_eq!(refusal(&[shard(&["a", "b", "c"])]), "tensor `c`: the size of the shard overflows");
    // Two tensors of isize::MAX bytes leave room for one byte.
    let two = refusal(&[shard(&["a", "b"])]);
    assert!(
        two.starts_with("DIR/model.safetensors: offset ")
            && two.ends_with(": 18446744073709551614 bytes of data and the header overflow"),
        "{two}"
    );
    assert_eq!(
        refusal(&[shard(&["a"]), shard(&["b"])]),
        "DIR: offset 0: the size of all shards together overflows"
    );
}

#[test]
fn a_row_number_beyond_all_rows_is_still_a_message() {
    let error =
        ggml::encode(NAME, GgmlType::Q8_0, 32, MAX, &[0xff; 4 * 64], &mut vec![]).unwrap_err();
    assert!(error.to_string().starts_with(&format!("tensor `w.weight`: row {MAX}, column 0: NaN")));
}

proptest! {
    /// Any shape is either refused, or its sizes are what exact arithmetic gives.
    #[test]
    fn sizes_are_exact_or_refused(
        shape in prop::collection::vec(prop_oneof![
            any::<usize>(),
            (0u32..64).prop_map(|bits| 1usize << bits),
            0usize..300,
            (0usize..20).prop_map(|n| n * 256),
        ], 0..4)
    ) {
        let mut index = TensorIndex::default();
        for encoding in encodings() {
            let Ok(components) = encoding.components(NAME, &shape) else { continue };
            let elements = shape.iter().fold(1u128, |n, &d| n.saturating_mul(d as u128));
            let mask = || shape[0] as u128 * (shape[1] as u128).div_ceil(8);
            let dim = |at: usize| shape[at] as u128;
            // A scale and a zero point of 8 bits for each row.
            let by_row = || dim(0) * (encoding.value_dtype().size_bytes() as u128 + 1);
            let expected = match encoding {
                Encoding::Dense { dtype } => elements * dtype.size_bytes() as u128,
                Encoding::Ggml { ty } => {
                    elements / ty.block_len() as u128 * ty.block_bytes() as u128
                }
                Encoding::Sparse24 { dtype } | Encoding::Nm { dtype, .. } => {
                    elements / 2 * dtype.size_bytes() as u128 + mask()
                }
                Encoding::Bitmask { .. } => mask() + 8 * ((shape[0] as u128).div_ceil(64) + 1),
                Encoding::CtSparse24Bitmask { dtype } => {
                    elements / 2 * dtype.size_bytes() as u128 + mask() + 16
                }
                Encoding::CtSparseBitmask { .. } => mask() + 16 + 8 * shape[0] as u128,
                Encoding::Int { kept: Kept::All, .. } | Encoding::CtIntQuantized { .. } => {
                    elements + by_row()
                }
                Encoding::Int { kept: Kept::Sparse24 | Kept::Nm { .. }, .. } => {
                    elements / 2 + mask() + by_row()
                }
                Encoding::Int { kept: Kept::Bitmask { .. }, .. } => {
                    mask() + 8 * (dim(0).div_ceil(64) + 1) + by_row()
                }
                Encoding::CtPackQuantized { .. } => {
                    let words = dim(0) * dim(1).div_ceil(4) + dim(0).div_ceil(4);
                    4 * words + by_row() - dim(0) + 16
                }
                Encoding::CtFloatQuantized { .. } => elements + by_row() - dim(0),
                _ => unreachable!("not among the encodings of this test"),
            };
            let stored_bytes = components.iter().map(|component| component.bytes).sum();
            prop_assert_eq!(u128::from(stored_bytes), expected);
            let info = TensorInfo { name: encoding.to_string(), encoding, shape: shape.clone(), stored_bytes };
            prop_assert_eq!(info.elements() as u128, elements);
            let MatrixShape { rows, cols } = MatrixShape::of(&shape);
            prop_assert_eq!(rows as u128 * cols as u128, elements);
            let _ = index.push(Path::new("m"), info);
            // Nothing below may panic, whatever the parts are.
            let _ = encoding.decode_f32(NAME, &shape, &[&[], &[]], 0..rows, &mut []);
            let _ = encoding.decode_dense(NAME, &shape, &[&[]], 0..rows.min(1), &mut vec![]);
            let mut encoder = Encoder::new(encoding, NAME, &shape).unwrap();
            let _ = encoder.rows(&[0; 64]);
            let (codes, scales) = (&[0; 64], &[1.0; 4]);
            let _ = encoder.quantized_rows(QuantizedRows { codes, scales, zero_points: &[0; 4] });
        }
    }
}

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::{Encoder, Encoding};

const DTYPES: [DType; 6] =
    [DType::F32, DType::F16, DType::Bf16, DType::F8E4m3, DType::I8, DType::U8];

fn nm(n: u8, m: u8, dtype: DType) -> Encoding {
    Encoding::Nm { n, m, dtype }
}

fn pack(encoding: Encoding, shape: &[usize], dense: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut encoder = Encoder::new(encoding, "w", shape)?;
    let parts = encoder.rows(dense)?;
    assert!(encoder.finish()?.is_empty());
    Ok(parts)
}

fn unpack(
    encoding: Encoding,
    shape: &[usize],
    parts: &[Vec<u8>],
    rows: Range<usize>,
) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![9];
    let result = encoding.decode_dense("w", shape, &parts, rows, &mut out);
    assert!(result.is_ok() || out == [9], "a refused decoding leaves its output alone");
    result.map(|()| out[1..].to_vec())
}

/// The example of docs/FORMATS.md.
fn example() -> Vec<u8> {
    [0., 1., 0., 0., 0., 2., 3., 0., 0., 4., 0., 0., 0., 0., 0., 0., 0., 5.]
        .iter()
        .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
        .collect()
}

#[test]
fn example_has_the_documented_bytes() {
    let (encoding, shape) = (nm(1, 3, DType::Bf16), [2, 9]);
    let parts = pack(encoding, &shape, &example()).unwrap();
    assert_eq!(
        parts[0],
        [[0x80, 0x3F, 0x00, 0x40, 0x40, 0x40], [0x80, 0x40, 0x00, 0x00, 0xA0, 0x40]].concat()
    );
    assert_eq!(parts[1], [0x62, 0x00, 0x09, 0x01]);
    assert_eq!(unpack(encoding, &shape, &parts, 1..2).unwrap(), example()[18..]);
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let mut floats = [9.0; 9];
    encoding.decode_f32("w", &shape, &parts, 0..1, &mut floats).unwrap();
    assert_eq!(floats.map(|value| value as i32), [0, 1, 0, 0, 0, 2, 3, 0, 0]);
}

#[test]
fn a_group_of_too_many_values_is_refused_and_named() {
    let mut dense = example();
    dense[2 * 14] = 1;
    dense[2 * 12 + 1] = 0x80;
    let mut encoder = Encoder::new(nm(1, 3, DType::Bf16), "w", &[2, 9]).unwrap();
    encoder.rows(&dense[..18]).unwrap();
    // The row is counted in the tensor, not in the chunk.
    assert_eq!(
        encoder.rows(&dense[18..]).unwrap_err().to_string(),
        "tensor `w`: row 1, columns 3 to 5: 2 values are not +0.0; 1:3 holds 1"
    );
}

#[test]
fn patterns_types_and_shapes_that_do_not_fit_are_refused() {
    let message = |n, m, dtype, shape: &[usize]| {
        nm(n, m, dtype).components("w", shape).unwrap_err().to_string()
    };
    for (n, m) in [(0, 4), (4, 4), (5, 4), (3, 17), (0, 0), (255, 255)] {
        assert_eq!(
            message(n, m, DType::F16, &[2, 8]),
            format!("tensor `w`: the pattern is {n}:{m}; expected 1 <= n < m <= 16")
        );
    }
    for (found, expected) in [
        (
            message(2, 4, DType::F16, &[2, 8]),
            "tensor `w`: the encoding nm does not hold 2:4; expected sparse24",
        ),
        (
            message(4, 8, DType::I32, &[2, 8]),
            "tensor `w`: 4:8 values of type I32; expected F32, F16, BF16, F8_E4M3, I8 or U8",
        ),
        (
            message(4, 8, DType::F16, &[2, 12]),
            "tensor `w`: 4:8 needs a multiple of 8 columns, found 12",
        ),
        (message(4, 8, DType::F16, &[8]), "tensor `w`: 4:8 needs a matrix, found shape [8]"),
        (
            message(4, 8, DType::F16, &[1 << 61, 8]),
            "tensor `w`: the size of shape [2305843009213693952, 8] overflows",
        ),
    ] {
        assert_eq!(found, expected);
    }
}

#[test]
fn illegal_masks_are_refused_and_named() {
    let (encoding, shape) = (nm(1, 3, DType::Bf16), [2, 9]);
    let good = pack(encoding, &shape, &example()).unwrap();
    let refused = |byte: usize, mask: u8| {
        let mut parts = good.clone();
        parts[1][byte] = mask;
        unpack(encoding, &shape, &parts, 0..2).unwrap_err().to_string()
    };
    assert_eq!(
        refused(0, 0x63),
        "tensor `w.mask`: row 0, columns 0 to 2: the mask keeps 2, expected 1"
    );
    assert_eq!(
        refused(2, 0x01),
        "tensor `w.mask`: row 1, columns 3 to 5: the mask keeps 0, expected 1"
    );
    assert_eq!(
        refused(3, 0x00),
        "tensor `w.mask`: row 1, columns 6 to 8: the mask keeps 0, expected 1"
    );
    assert_eq!(refused(3, 0x03), "tensor `w.mask`: row 1: an unused mask bit is not 0");
    let mut short = good.clone();
    short[1].pop();
    assert_eq!(
        unpack(encoding, &shape, &short, 0..2).unwrap_err().to_string(),
        "tensor `w.mask`: expected 4 bytes, found 3"
    );
    assert_eq!(
        unpack(encoding, &shape, &good, 1..3).unwrap_err().to_string(),
        "tensor `w`: rows 1..3 of 2 asked for"
    );
}

#[test]
fn nibbles_that_do_not_fit_are_refused_and_named() {
    let (pattern, matrix) = (Pattern { n: 1, m: 3 }, MatrixShape { rows: 2, cols: 3 });
    let (mut values, mut mask) = (vec![1], vec![2]);
    let mut encode = |codes: &[u8]| {
        let error = encode_nibbles("w", pattern, matrix, codes, &mut values, &mut mask);
        assert_eq!((&values, &mask), (&vec![1], &vec![2]));
        error.unwrap_err().to_string()
    };
    assert_eq!(
        encode(&[0x10, 0x00, 0x11, 0x00]),
        "tensor `w`: row 1, columns 0 to 2: 2 values are not +0.0; 1:3 holds 1"
    );
    assert_eq!(
        encode(&[0x00, 0x00, 0x00, 0x20]),
        "tensor `w`: row 1: the unused nibble is 0x2, expected 0x0"
    );
    assert_eq!(encode(&[0x00]), "tensor `w`: codes has length 1, expected 4");
    let decode = |values: &[u8], mask: &[u8]| {
        let mut out = vec![3];
        let error = decode_nibbles("w", pattern, matrix, values, mask, 0..2, &mut out);
        assert_eq!(out, [3]);
        error.unwrap_err().to_string()
    };
    assert_eq!(
        decode(&[0x01, 0x51], &[0x01, 0x02]),
        "tensor `w.values`: row 1: the unused nibble is 0x5, expected 0x0"
    );
    assert_eq!(
        decode(&[0x01, 0x01], &[0x01, 0x03]),
        "tensor `w.mask`: row 1, columns 0 to 2: the mask keeps 2, expected 1"
    );
    assert_eq!(decode(&[0x01], &[0x01, 0x03]), "tensor `w`: .values has length 1, expected 2");
    let error = Codec::of_nibbles("w", Pattern { n: 3, m: 3 }, matrix).err().unwrap();
    assert_eq!(error.to_string(), "tensor `w`: the pattern is 3:3; expected 1 <= n < m <= 16");
    let huge = MatrixShape { rows: usize::MAX, cols: 3 };
    let error = Codec::of_nibbles("w", pattern, huge).err().unwrap();
    assert!(error.to_string().ends_with("overflows"));
}

/// A pattern and a matrix of elements, as u32, that obeys it.
#[derive(Debug, Clone)]
struct Sparse {
    n: u8,
    m: u8,
    rows: usize,
    cols: usize,
    elements: Vec<u32>,
}

/// Groups are filled from random draws: some of them full, some with fewer values.
fn sparse() -> impl Strategy<Value = Sparse> {
    (2..=16u8, any::<u8>(), 0..4usize, 0..5usize, proptest::collection::vec(any::<u32>(), 200))
        .prop_map(|(m, n, rows, groups, draws)| {
            let n = 1 + n % (m - 1);
            let cols = groups * usize::from(m);
            let mut elements = vec![0; rows * cols];
            let special = [0x8000_8080, 0x7FC1_7E81, 0x7F81_7C01, 1];
            let mut draws = draws.into_iter().cycle();
            for group in elements.chunks_exact_mut(usize::from(m)) {
                for value in draws.by_ref().take(usize::from(n)).collect::<Vec<_>>() {
                    let at = value as usize % group.len();
                    group[at] = if value % 3 == 1 { special[value as usize % 4] } else { value };
                }
            }
            Sparse { n, m, rows, cols, elements }
        })
}

impl Sparse {
    fn dense(&self, dtype: DType) -> Vec<u8> {
        let size = dtype.size_bytes();
        self.elements.iter().flat_map(|bits| bits.to_le_bytes()[4 - size..].to_vec()).collect()
    }

    /// Values and mask by the definition, element by element.
    fn expected(&self, dense: &[u8], size: usize) -> (Vec<u8>, Vec<u8>) {
        let (n, m) = (usize::from(self.n), usize::from(self.m));
        let stride = self.cols.div_ceil(8);
        let (mut values, mut mask) = (vec![], vec![0; self.rows * stride]);
        for row in 0..self.rows {
            for first in (0..self.cols).step_by(m) {
                let element = |c: usize| &dense[(row * self.cols + c) * size..][..size];
                let is_value = |c: &usize| element(*c).iter().any(|&byte| byte != 0);
                let columns = first..first + m;
                let mut kept: Vec<usize> = columns.clone().filter(is_value).collect();
                let fillers = columns.filter(|c| !is_value(c)).take(n - kept.len());
                kept.extend(fillers);
                kept.sort_unstable();
                for column in kept {
                    values.extend_from_slice(element(column));
                    mask[row * stride + column / 8] |= 1 << (column % 8);
                }
            }
        }
        (values, mask)
    }
}

proptest! {
    #[test]
    fn bytes_are_those_of_the_definition_and_decode_to_every_bit(sparse in sparse(), cut: u8) {
        let Sparse { n, m, rows, cols, .. } = sparse;
        prop_assume!((n, m) != (2, 4));
        for dtype in DTYPES {
            let (encoding, shape) = (nm(n, m, dtype), [rows, cols]);
            let dense = sparse.dense(dtype);
            let (values, mask) = sparse.expected(&dense, dtype.size_bytes());
            let sizes = encoding.components("w", &shape).unwrap();
            prop_assert_eq!([sizes[0].bytes, sizes[1].bytes], [values.len() as u64, mask.len() as u64]);
            // In two chunks of rows.
            let mut encoder = Encoder::new(encoding, "w", &shape).unwrap();
            let first = usize::from(cut) % (rows + 1);
            let (start, end) = dense.split_at(first * cols * dtype.size_bytes());
            let mut parts = encoder.rows(start).unwrap();
            for (part, more) in parts.iter_mut().zip(encoder.rows(end).unwrap()) {
                part.extend(more);
            }
            encoder.finish().unwrap();
            prop_assert_eq!(&parts, &[values, mask]);
            prop_assert_eq!(&unpack(encoding, &shape, &parts, 0..rows).unwrap(), &dense);
            prop_assert_eq!(&unpack(encoding, &shape, &parts, first..rows).unwrap(), end);
            if dtype.is_float_weight() {
                let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                let (mut ours, mut plain) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
                encoding.decode_all_f32("w", &shape, &parts, &mut ours).unwrap();
                let dtype = Encoding::Dense { dtype };
                dtype.decode_all_f32("w", &shape, &[&dense], &mut plain).unwrap();
                let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&ours), bits(&plain));
            }
        }
    }

    #[test]
    fn nibbles_are_packed_as_bytes_are(sparse in sparse()) {
        let Sparse { n, m, rows, cols, .. } = sparse;
        let (pattern, matrix) = (Pattern { n, m }, MatrixShape { rows, cols });
        let codes: Vec<u8> = sparse.elements.iter().map(|bits| (bits % 16) as u8).collect();
        let packed = |codes: &[u8], cols: usize| -> Vec<u8> {
            let rows = codes.chunks(cols.max(1));
            rows.flat_map(|row| row.chunks(2))
                .map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4)
                .collect()
        };
        let (values, mask) = sparse.expected(&codes, 1);
        let dense = packed(&codes, cols);
        let (mut found, mut found_mask) = (vec![], vec![]);
        encode_nibbles("w", pattern, matrix, &dense, &mut found, &mut found_mask).unwrap();
        prop_assert_eq!(&found, &packed(&values, pattern.kept(cols)));
        prop_assert_eq!(&found_mask, &mask);
        let (some, mut out) = (rows / 2..rows, vec![]);
        decode_nibbles("w", pattern, matrix, &found, &mask, some.clone(), &mut out).unwrap();
        prop_assert_eq!(&out, &dense[some.start * cols.div_ceil(2)..]);
    }

    #[test]
    fn any_mask_decodes_or_is_refused(
        mask in proptest::collection::vec(any::<u8>(), 6),
        values in proptest::collection::vec(any::<u8>(), 2 * 20),
    ) {
        let _ = unpack(nm(1, 2, DType::F16), &[2, 20], &[values, mask], 0..2);
    }
}

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::{Encoder, Encoding};

const DTYPES: [DType; 6] =
    [DType::F32, DType::F16, DType::Bf16, DType::F8E4m3, DType::I8, DType::U8];

fn pack(encoding: Encoding, shape: &[usize], chunks: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
    let mut encoder = Encoder::new(encoding, "w", shape)?;
    let mut parts = vec![vec![]; 3];
    let mut append = |more: Vec<Vec<u8>>| {
        parts.iter_mut().zip(more).for_each(|(part, more)| part.extend(more));
    };
    for chunk in chunks {
        append(encoder.rows(chunk)?);
    }
    append(encoder.finish()?);
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

const EXAMPLE: Encoding = Encoding::Bitmask { dtype: DType::Bf16, kept: 5 };

/// The example of docs/FORMATS.md.
fn example() -> Vec<u8> {
    [1., 0., 0., 2., 0., 0., 0., 3., 0., 4.]
        .iter()
        .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
        .collect()
}

#[test]
fn example_has_the_documented_bytes() {
    let parts = pack(EXAMPLE, &[2, 5], &[&example()]).unwrap();
    assert_eq!(parts[0], [0x80, 0x3F, 0x00, 0x40, 0x40, 0x40, 0x80, 0x40, 0x00, 0x00]);
    assert_eq!(parts[1], [0x09, 0x14]);
    assert_eq!(parts[2], [[0; 8], [4, 0, 0, 0, 0, 0, 0, 0]].concat());
    assert_eq!(unpack(EXAMPLE, &[2, 5], &parts, 1..2).unwrap(), example()[10..]);
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let mut floats = [9.0; 5];
    EXAMPLE.decode_f32("w", &[2, 5], &parts, 1..2, &mut floats).unwrap();
    assert_eq!(floats.map(|value| value as i32), [0, 0, 3, 0, 4]);
}

#[test]
fn more_values_than_planned_are_refused_and_named() {
    let encoding = Encoding::Bitmask { dtype: DType::Bf16, kept: 3 };
    let dense = example();
    assert_eq!(
        pack(encoding, &[2, 5], &[&dense[..10], &dense[10..]]).unwrap_err().to_string(),
        "tensor `w`: row 1: more values than the 3 that were planned"
    );
}

#[test]
fn types_shapes_and_counts_that_do_not_fit_are_refused() {
    let message = |dtype, kept, shape: &[usize]| {
        Encoding::Bitmask { dtype, kept }.components("w", shape).unwrap_err().to_string()
    };
    assert_eq!(
        message(DType::I32, 5, &[2, 5]),
        "tensor `w`: bitmask values of type I32; expected F32, F16, BF16, F8_E4M3, I8 or U8"
    );
    assert_eq!(
        message(DType::F16, 5, &[5]),
        "tensor `w`: a bitmask needs a matrix, found shape [5]"
    );
    assert_eq!(message(DType::F16, 11, &[2, 5]), "tensor `w`: 11 kept values of 10 elements");
    assert_eq!(
        message(DType::F16, u64::MAX, &[2, 5]),
        "tensor `w`: 18446744073709551615 kept values of 10 elements"
    );
    assert_eq!(
        message(DType::F16, 1, &[1 << 60, 8]),
        "tensor `w`: the size of shape [1152921504606846976, 8] overflows"
    );
    assert!(message(DType::F16, 1, &[1 << 61, 0]).contains("1 kept values of 0 elements"));
    // Without columns too, or the offsets would overflow.
    assert!(message(DType::F16, 0, &[usize::MAX, 0]).contains("overflows"));
}

/// The example with one byte of a component changed, decoded whole.
fn damaged(part: usize, byte: usize, value: u8) -> String {
    let mut parts = pack(EXAMPLE, &[2, 5], &[&example()]).unwrap();
    parts[part][byte] = value;
    unpack(EXAMPLE, &[2, 5], &parts, 0..2).unwrap_err().to_string()
}

#[test]
fn masks_offsets_and_values_must_agree() {
    for (part, byte, value, expected) in [
        (
            1,
            0,
            0x0B,
            "`w.offsets`: rows 0 to 1: bitmask count not matching values (the mask keeps 5, the offsets are 0 and 4 of 5)",
        ),
        (
            2,
            0,
            1,
            "`w.offsets`: rows 0 to 1: bitmask count not matching values (the mask keeps 4, the offsets are 1 and 4 of 5)",
        ),
        (
            2,
            15,
            0x80,
            "`w.offsets`: rows 0 to 1: bitmask count not matching values (the mask keeps 4, the offsets are 0 and 9223372036854775812 of 5)",
        ),
        (1, 1, 0x30, "`w.mask`: row 1: an unused mask bit is not 0"),
        (0, 9, 1, "`w.values`: after the last of 4 values not all is zero"),
    ] {
        assert_eq!(damaged(part, byte, value), format!("tensor {expected}"));
    }
    // Counts that agree with each other but are more than there is room for, and a start that is not 0.
    let mut parts = pack(EXAMPLE, &[2, 5], &[&example()]).unwrap();
    parts[1] = vec![0x1F, 0x03];
    parts[2][8] = 7;
    assert_eq!(
        unpack(EXAMPLE, &[2, 5], &parts, 0..1).unwrap_err().to_string(),
        "tensor `w.offsets`: rows 0 to 1: bitmask count not matching values (the mask keeps 7, the offsets are 0 and 7 of 5)"
    );
    parts[1] = vec![0x01, 0x03];
    (parts[2][0], parts[2][8]) = (2, 5);
    assert!(unpack(EXAMPLE, &[2, 5], &parts, 0..1).is_err());
}

#[test]
fn matrices_without_elements_have_offsets_only() {
    let encoding = Encoding::Bitmask { dtype: DType::F16, kept: 0 };
    for (shape, offsets) in [([0, 8], 1), ([130, 0], 4)] {
        let parts = pack(encoding, &shape, &[]).unwrap();
        assert_eq!(parts, [vec![], vec![], vec![0; 8 * offsets]]);
        assert_eq!(encoding.components("w", &shape).unwrap()[2].bytes, 8 * offsets as u64);
        assert!(unpack(encoding, &shape, &parts, 0..shape[0]).unwrap().is_empty());
        let mut bad = parts.clone();
        bad[2][8 * offsets - 8] = 1;
        assert_eq!(
            unpack(encoding, &shape, &bad, 0..shape[0]).unwrap_err().to_string(),
            "tensor `w.offsets`: bitmask count not matching values (1 of 0)"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn bytes_are_those_of_the_definition_and_decode_to_every_bit(
        rows in 0..200usize,
        cols in 1..20usize,
        draws in proptest::collection::vec(any::<u32>(), 1..300),
        spare in 0..9u64,
        cuts in (any::<u16>(), any::<u16>()),
    ) {
        let special = [0x8000_8080, 0x7FC1_7E81, 0x7F81_7C01, 1];
        let elements: Vec<u32> = (0..rows * cols)
            .map(|i| (draws[i % draws.len()].wrapping_mul(2 * i as u32 + 1), i))
            .map(|(bits, i)| [0, bits, 0, special[i % 4]][bits as usize >> 8 & 3])
            .collect();
        let (a, b) = (usize::from(cuts.0) % (rows + 1), usize::from(cuts.1) % (rows + 1));
        let (a, b) = (a.min(b), a.max(b));
        for dtype in DTYPES {
            let size = dtype.size_bytes();
            let dense: Vec<u8> =
                elements.iter().flat_map(|bits| bits.to_le_bytes()[4 - size..].to_vec()).collect();
            // By the definition, element by element.
            let stride = cols.div_ceil(8);
            let (mut values, mut mask, mut offsets) = (vec![], vec![0; rows * stride], vec![]);
            for row in 0..rows {
                if row % 64 == 0 {
                    offsets.extend((values.len() as u64 / size as u64).to_le_bytes());
                }
                for column in 0..cols {
                    let element = &dense[(row * cols + column) * size..][..size];
                    if element.iter().any(|&byte| byte != 0) {
                        values.extend_from_slice(element);
                        mask[row * stride + column / 8] |= 1 << (column % 8);
                    }
                }
            }
            let count = (values.len() / size) as u64;
            offsets.extend(count.to_le_bytes());
            let kept = (count + spare).min((rows * cols) as u64);
            values.resize(kept as usize * size, 0);

            let (encoding, shape) = (Encoding::Bitmask { dtype, kept }, [rows, cols]);
            let at = |row: usize| row * cols * size;
            let chunks = [&dense[..at(a)], &dense[at(a)..at(b)], &dense[at(b)..]];
            let parts = pack(encoding, &shape, &chunks).unwrap();
            prop_assert_eq!(&parts, &[values, mask, offsets]);
            for (part, component) in parts.iter().zip(encoding.components("w", &shape).unwrap()) {
                prop_assert_eq!(part.len() as u64, component.bytes);
            }
            prop_assert_eq!(&unpack(encoding, &shape, &parts, 0..rows).unwrap(), &dense);
            prop_assert_eq!(&unpack(encoding, &shape, &parts, a..b).unwrap(), chunks[1]);
            if dtype.is_float_weight() {
                let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                let (mut ours, mut plain) = (vec![0.0; (b - a) * cols], vec![0.0; (b - a) * cols]);
                encoding.decode_f32("w", &shape, &parts, a..b, &mut ours).unwrap();
                let dense_encoding = Encoding::Dense { dtype };
                dense_encoding.decode_f32("w", &shape, &[&dense], a..b, &mut plain).unwrap();
                let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&ours), bits(&plain));
            }
            if count > 0 {
                let tight = Encoding::Bitmask { dtype, kept: count - 1 };
                prop_assert!(pack(tight, &shape, &chunks).is_err());
            }
        }
    }

    #[test]
    fn any_components_decode_or_are_refused(
        values in proptest::collection::vec(any::<u8>(), 10),
        mask in proptest::collection::vec(any::<u8>(), 66),
        offsets in proptest::collection::vec(0..70u8, 3),
        rows in (0..67usize, 0..67usize),
    ) {
        let offsets = offsets.iter().flat_map(|&n| u64::from(n).to_le_bytes()).collect();
        let encoding = Encoding::Bitmask { dtype: DType::F16, kept: 5 };
        let rows = rows.0.min(rows.1)..rows.0.max(rows.1);
        let _ = unpack(encoding, &[66, 3], &[values, mask, offsets], rows);
    }
}

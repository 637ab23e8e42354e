//! What is refused, and in which words.

use super::*;
use crate::Encoder;

fn grid(bits: u8, group_size: Option<u32>, symmetric: bool, scale: DType) -> IntGrid {
    IntGrid { bits, group_size, symmetric, scale }
}

const INT4: IntGrid = IntGrid { bits: 4, group_size: Some(4), symmetric: true, scale: DType::F16 };
const INT4_POINTS: IntGrid = IntGrid { symmetric: false, ..INT4 };

fn all(grid: IntGrid) -> Encoding {
    Encoding::Int { grid, kept: Kept::All }
}

fn shape_message(encoding: Encoding, name: &str, shape: &[usize]) -> String {
    encoding.components(name, shape).unwrap_err().to_string()
}

#[test]
fn grids_and_shapes_that_do_not_fit() {
    for (encoding, shape, expected) in [
        (all(grid(1, None, true, DType::F16)), &[2, 8][..], "codes of 1 bits; expected 2 to 8"),
        (all(grid(9, None, true, DType::F16)), &[2, 8], "codes of 9 bits; expected 2 to 8"),
        (
            all(grid(4, None, true, DType::F8E4m3)),
            &[2, 8],
            "scales of type F8_E4M3; expected F16, BF16 or F32",
        ),
        (all(INT4), &[2, 6], "groups of 4 columns do not divide 6 columns"),
        (
            all(IntGrid { group_size: Some(0), ..INT4 }),
            &[2, 6],
            "groups of 0 columns do not divide 6 columns",
        ),
        (all(INT4), &[8], "codes need a matrix, found shape [8]"),
        (all(INT4), &[2, 0], "codes need columns, found shape [2, 0]"),
        (
            all(INT4),
            &[1 << 40, 1 << 40],
            "the size of shape [1099511627776, 1099511627776] overflows",
        ),
        (
            Encoding::Int { grid: grid(4, Some(2), true, DType::F16), kept: Kept::Sparse24 },
            &[2, 6],
            "2:4 needs a multiple of 4 columns, found 6",
        ),
        (
            Encoding::Int { grid: INT4, kept: Kept::Nm { n: 2, m: 4 } },
            &[2, 8],
            "the encoding nm does not hold 2:4; expected sparse24",
        ),
        (
            Encoding::Int { grid: INT4, kept: Kept::Bitmask { kept: 17 } },
            &[2, 8],
            "17 kept values of 16 elements",
        ),
        (
            Encoding::CtIntQuantized { grid: INT4 },
            &[2, 8],
            "int-quantized codes of 4 bits; expected 8",
        ),
    ] {
        assert_eq!(
            shape_message(encoding, "w.weight", shape),
            format!("tensor `w.weight`: {expected}")
        );
    }
    for encoding in [
        Encoding::CtPackQuantized { grid: INT4 },
        Encoding::CtIntQuantized { grid: IntGrid { bits: 8, ..INT4 } },
        Encoding::CtFloatQuantized { scale: DType::F16 },
    ] {
        let format = encoding.to_string();
        let format = format.split(' ').next().unwrap();
        assert_eq!(
            shape_message(encoding, "w", &[2, 8]),
            format!("tensor `w`: {format} replaces the `.weight` of a module; the name has none")
        );
    }
}

#[test]
fn codes_are_not_values_and_values_are_not_codes() {
    let mut encoder = Encoder::new(all(INT4), "w", &[1, 4]).unwrap();
    assert_eq!(
        encoder.rows(&[0; 8]).unwrap_err().to_string(),
        "tensor `w`: the encoding int4 g4 F16 holds codes on a grid, not values"
    );
    let mut encoder = Encoder::new(Encoding::Sparse24 { dtype: DType::I8 }, "w", &[1, 4]).unwrap();
    let rows = QuantizedRows { codes: &[0; 4], scales: &[1.0], zero_points: &[] };
    assert_eq!(
        encoder.quantized_rows(rows).unwrap_err().to_string(),
        "tensor `w`: the encoding 2:4 I8 holds values, not codes on a grid"
    );
}

/// The message for the second row of `[2, 8]`, after the first was encoded.
fn row_message(encoding: Encoding, codes: [i8; 8], scales: [f32; 2], points: &[i8]) -> String {
    let symmetric = points.is_empty();
    let mut encoder = Encoder::new(encoding, "w.weight", &[2, 8]).unwrap();
    let zeros: &[i8] = if symmetric { &[] } else { &[0, 0] };
    let scales = match encoding {
        Encoding::CtFloatQuantized { .. } => &scales[..1],
        _ => &scales[..],
    };
    let ones = [1.0; 2];
    let first = QuantizedRows { codes: &[0; 8], scales: &ones[..scales.len()], zero_points: zeros };
    encoder.quantized_rows(first).unwrap();
    let rows = QuantizedRows { codes: &codes, scales, zero_points: points };
    let error = encoder.quantized_rows(rows).unwrap_err().to_string();
    // Nothing is encoded then, so that the right row still is.
    encoder.quantized_rows(first).unwrap();
    encoder.finish().unwrap();
    error.strip_prefix("tensor `w.weight`: ").unwrap().to_owned()
}

#[test]
fn rows_that_are_not_on_the_grid() {
    let ones = [1.0; 2];
    let code = |code| [0, 0, 0, 0, 0, 0, code, 0];
    let packed = Encoding::CtPackQuantized { grid: INT4_POINTS };
    for (found, expected) in [
        (
            row_message(all(INT4), code(8), ones, &[]),
            "row 1, column 6: code 8 is not of 4 bits (-8 to 7)",
        ),
        (
            row_message(packed, code(-9), ones, &[0, 0]),
            "row 1, column 6: code -9 is not of 4 bits (-8 to 7)",
        ),
        (
            row_message(all(INT4_POINTS), code(0), ones, &[0, 9]),
            "row 1, group 1: zero point 9 is not of 4 bits (-8 to 7)",
        ),
        (
            row_message(all(INT4), code(1), [1.0, f32::NAN], &[]),
            "row 1, group 1: the scale is NaN; expected a number that is not negative",
        ),
        (
            row_message(all(INT4), code(1), [f32::INFINITY, 1.0], &[]),
            "row 1, group 0: the scale is inf; expected a number that is not negative",
        ),
        (
            row_message(all(INT4), code(1), [1.0, -0.5], &[]),
            "row 1, group 1: the scale is -0.5; expected a number that is not negative",
        ),
        (
            row_message(all(INT4), code(1), [0.0, 0.0], &[]),
            "row 1, group 1: the scale is 0 but not every code is a zero",
        ),
        (
            row_message(all(INT4), code(1), [1.0, 0.1], &[]),
            "row 1, group 1: the scale 1e-1 is not a F16 value",
        ),
        (
            row_message(all(INT4), code(1), [1.0, 1e5], &[]),
            "row 1, column 6: code 1 with scale 1e5 is not a finite F16 value",
        ),
        (
            row_message(all(INT4_POINTS), code(7), [1.0, 8192.0], &[0, -1]),
            "row 1, column 6: code 7 with scale 8.192e3 is not a finite F16 value",
        ),
        (
            row_message(Encoding::CtFloatQuantized { scale: DType::F16 }, code(0x7F), ones, &[]),
            "row 1, column 6: code 127 with scale 1e0 is not a finite F16 value",
        ),
        (
            row_message(
                Encoding::Int { grid: INT4_POINTS, kept: Kept::Sparse24 },
                [1, 2, 3, 3, 0, 0, 0, 0],
                ones,
                &[3, 3],
            ),
            "row 1, columns 4 to 7: 4 values are not +0.0; 2:4 holds two",
        ),
        (
            row_message(
                Encoding::Int { grid: INT4, kept: Kept::Nm { n: 1, m: 4 } },
                [0, 0, 1, 1, 0, 0, 0, 0],
                ones,
                &[],
            ),
            "row 1, columns 0 to 3: 2 values are not +0.0; 1:4 holds 1",
        ),
        (
            row_message(
                Encoding::Int { grid: INT4, kept: Kept::Bitmask { kept: 1 } },
                [0, 0, 1, 1, 0, 0, 0, 0],
                ones,
                &[],
            ),
            "row 1: more values than the 1 that were planned",
        ),
    ] {
        assert_eq!(found, expected);
    }
}

#[test]
fn rows_of_other_lengths() {
    let mut encoder = Encoder::new(all(INT4_POINTS), "w", &[1, 8]).unwrap();
    for (codes, scales, zero_points, found) in [
        (&[0; 7][..], &[1.0; 2][..], &[0; 2][..], "7 codes, 2 scales and 2 zero points"),
        (&[0; 8], &[1.0; 1], &[0; 2], "8 codes, 1 scales and 2 zero points"),
        (&[0; 8], &[1.0; 2], &[], "8 codes, 2 scales and 0 zero points"),
        (&[0; 16], &[1.0; 4], &[0; 4], "16 codes, 4 scales and 4 zero points"),
    ] {
        let error = encoder.quantized_rows(QuantizedRows { codes, scales, zero_points });
        assert_eq!(
            error.unwrap_err().to_string(),
            format!("tensor `w`: {found} after row 0; expected whole rows of 8, 2 and 2, 1 in all")
        );
    }
    assert_eq!(encoder.finish().unwrap_err().to_string(), "tensor `w`: 0 of 1 rows were encoded");
}

/// The message after byte `at` of component `part` of a matrix of zeros with scales of 1 is `byte`.
fn damaged(encoding: Encoding, shape: [usize; 2], part: usize, at: usize, byte: u8) -> String {
    let [rows, cols] = shape;
    let mut encoder = Encoder::new(encoding, "w.weight", &shape).unwrap();
    let group = match encoding {
        Encoding::Int { grid, .. } | Encoding::CtPackQuantized { grid } => grid.group_size,
        _ => None,
    };
    let groups = group.map_or(1, |group| cols / group as usize);
    let (codes, scales) = (vec![0; rows * cols], vec![1.0; rows * groups]);
    let points = match encoding {
        Encoding::Int { grid, .. } | Encoding::CtPackQuantized { grid } if !grid.symmetric => {
            vec![0; rows * groups]
        }
        _ => vec![],
    };
    let given = QuantizedRows { codes: &codes, scales: &scales, zero_points: &points };
    let mut parts = encoder.quantized_rows(given).unwrap();
    for (part, rest) in parts.iter_mut().zip(encoder.finish().unwrap()) {
        part.extend(rest);
    }
    parts[part][at] = byte;
    let mut out = vec![9];
    let result = encoding.decode_dense("w.weight", &shape, &parts, 0..rows, &mut out);
    assert_eq!(out, [9], "a refused decoding leaves its output alone");
    result.unwrap_err().to_string()
}

#[test]
fn stored_bytes_that_are_not_legal() {
    let odd = grid(3, None, true, DType::F16);
    let odd_points = IntGrid { symmetric: false, ..odd };
    let kept = |kept| Encoding::Int { grid: INT4, kept };
    for (found, expected) in [
        (
            damaged(all(odd), [2, 3], 0, 3, 0x80),
            "tensor `w.weight.codes`: row 1: an unused bit is not 0",
        ),
        (
            damaged(all(odd_points), [2, 3], 2, 1, 0x08),
            "tensor `w.weight.zero_points`: row 1: an unused bit is not 0",
        ),
        (
            damaged(all(INT4), [2, 8], 1, 7, 0x7C),
            "tensor `w.weight.scales`: row 1, group 1: the scale is inf; expected a number that is not negative",
        ),
        (
            damaged(all(INT4), [2, 8], 1, 3, 0xBC),
            "tensor `w.weight.scales`: row 0, group 1: the scale is -1; expected a number that is not negative",
        ),
        (
            damaged(kept(Kept::Sparse24), [2, 8], 1, 1, 0xE3),
            "tensor `w.weight.metadata`: row 1, columns 0 to 3: metadata nibble 0x3 is not legal; expected 0x4, 0x8, 0x9, 0xc, 0xd or 0xe",
        ),
        (
            damaged(kept(Kept::Sparse24), [2, 4], 1, 1, 0x4E),
            "tensor `w.weight.metadata`: row 1: the unused metadata nibble is 0x4, expected 0xe",
        ),
        (
            damaged(kept(Kept::Nm { n: 1, m: 4 }), [2, 4], 1, 1, 0x03),
            "tensor `w.weight.mask`: row 1, columns 0 to 3: the mask keeps 2, expected 1",
        ),
        (
            damaged(kept(Kept::Nm { n: 1, m: 4 }), [2, 4], 1, 1, 0x11),
            "tensor `w.weight.mask`: row 1: an unused mask bit is not 0",
        ),
        (
            damaged(kept(Kept::Bitmask { kept: 3 }), [2, 4], 1, 1, 0x01),
            "tensor `w.weight.offsets`: rows 0 to 1: bitmask count not matching values (the mask keeps 1, the offsets are 0 and 0 of 3)",
        ),
        (
            damaged(kept(Kept::Bitmask { kept: 3 }), [2, 4], 0, 0, 0x01),
            "tensor `w.weight.codes`: after the last of 0 codes not all is zero",
        ),
        (
            damaged(Encoding::CtPackQuantized { grid: odd }, [2, 3], 0, 5, 0x02),
            "tensor `w.weight_packed`: row 1: an unused bit is not 0",
        ),
        (
            damaged(Encoding::CtPackQuantized { grid: odd_points }, [2, 3], 2, 0, 0x64),
            "tensor `w.weight_zero_point`: group 0: an unused bit is not 0",
        ),
        (
            damaged(Encoding::CtPackQuantized { grid: odd }, [2, 3], 2, 8, 0x04),
            "tensor `w.weight_shape`: expected 2 and 3, found [2, 4]",
        ),
        (
            damaged(Encoding::CtPackQuantized { grid: odd }, [2, 3], 1, 1, 0xFC),
            "tensor `w.weight_scale`: row 0, group 0: the scale is -inf; expected a number that is not negative",
        ),
        (
            damaged(Encoding::CtFloatQuantized { scale: DType::F16 }, [2, 3], 0, 4, 0xFF),
            "tensor `w.weight`: row 1, column 1: code -1 with scale 1e0 is not a finite F16 value",
        ),
    ] {
        assert_eq!(found, expected);
    }
}

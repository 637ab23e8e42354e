use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::{Encoder, encoding::testing::Golden};

const SCALES: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

fn grid(bits: u8, group_size: u32, scale: DType) -> IntGrid {
    IntGrid { bits, group_size: Some(group_size), symmetric: true, scale }
}

/// A matrix and its numbers.
struct Case {
    encoding: Encoding,
    shape: [usize; 2],
    codes: Vec<i8>,
    scales: Vec<f32>,
    zero_points: Vec<i8>,
}

impl Case {
    fn rows(&self, rows: Range<usize>) -> QuantizedRows<'_> {
        let groups = self.scales.len() / self.shape[0].max(1);
        let of = |width: usize| rows.start * width..rows.end * width;
        QuantizedRows {
            codes: &self.codes[of(self.shape[1])],
            scales: &self.scales[of(groups)],
            zero_points: if self.zero_points.is_empty() {
                &[]
            } else {
                &self.zero_points[of(groups)]
            },
        }
    }

    fn encode(&self, at_once: usize) -> Result<Vec<Vec<u8>>> {
        let components = self.encoding.components("w.weight", &self.shape)?;
        let mut encoder = Encoder::new(self.encoding, "w.weight", &self.shape)?;
        let mut parts = vec![vec![]; components.len()];
        for start in (0..self.shape[0]).step_by(at_once) {
            let rows = start..self.shape[0].min(start + at_once);
            let more = encoder.quantized_rows(self.rows(rows))?;
            assert_eq!(more.len(), parts.len());
            parts.iter_mut().zip(more).for_each(|(part, more)| part.extend(more));
        }
        parts.iter_mut().zip(encoder.finish()?).for_each(|(part, more)| part.extend(more));
        for (component, part) in components.iter().zip(&parts) {
            assert_eq!(component.bytes, part.len() as u64, "{}", component.suffix);
        }
        Ok(parts)
    }

    /// What the numbers stand for, rounded once from f64, which holds every product.
    fn expected(&self) -> Vec<u8> {
        let [rows, cols] = self.shape;
        let groups = self.scales.len() / rows.max(1);
        let value = |index: usize| {
            let (row, col) = (index / cols, index % cols);
            let at = row * groups + col / (cols / groups);
            let zero_point = self.zero_points.get(at).map_or(0, |point| i16::from(*point));
            f64::from(self.scales[at]) * f64::from(i16::from(self.codes[index]) - zero_point)
        };
        let values = (0..rows * cols).map(value);
        match self.encoding.value_dtype() {
            DType::F16 => values.flat_map(|v| f16::from_f64(v).to_le_bytes()).collect(),
            DType::Bf16 => values.flat_map(|v| bf16::from_f64(v).to_le_bytes()).collect(),
            _ => values.flat_map(|v| (v as f32).to_le_bytes()).collect(),
        }
    }
}

fn decode(case: &Case, parts: &[Vec<u8>], rows: Range<usize>) -> Result<Vec<u8>> {
    let mut out = vec![9];
    let result = case.encoding.decode_dense("w.weight", &case.shape, parts, rows.clone(), &mut out);
    assert!(result.is_ok() || out == [9], "a refused decoding leaves its output alone");
    let mut floats = vec![9.0; rows.len() * case.shape[1]];
    let as_f32 = case.encoding.decode_f32("w.weight", &case.shape, parts, rows, &mut floats);
    assert_eq!(result.is_ok(), as_f32.is_ok());
    if result.is_ok() {
        let mut back = vec![9];
        let dtype = case.encoding.value_dtype();
        crate::encoding::dense::encode_f32("w", dtype, &floats, &mut back).unwrap();
        assert_eq!(back, out, "both decoders agree");
    }
    result.map(|()| out[1..].to_vec())
}

/// `int4` in groups of four columns, the example of docs/FORMATS.md.
fn example(kept: Kept, symmetric: bool) -> Case {
    let grid = IntGrid { symmetric, ..grid(4, 4, DType::Bf16) };
    let (codes, zero_points): (_, &[i8]) = if symmetric {
        ([1, 0, 0, 2, 0, -3, 4, 0, 0, 0, 5, 6, 7, 0, 0, 0], &[])
    } else {
        ([1, -1, -1, 2, 3, -3, 4, 3, 0, 0, 5, 6, 7, -8, -8, -8], &[-1, 3, 0, -8])
    };
    Case {
        encoding: Encoding::Int { grid, kept },
        shape: [2, 8],
        codes: codes.to_vec(),
        scales: vec![0.5, 0.25, 1.0, 2.0],
        zero_points: zero_points.to_vec(),
    }
}

#[test]
fn examples_have_the_documented_bytes() {
    let scales = [0x00, 0x3F, 0x80, 0x3E, 0x80, 0x3F, 0x00, 0x40];
    let case = example(Kept::All, true);
    let codes = [0x01, 0x20, 0xD0, 0x04, 0x00, 0x65, 0x07, 0x00];
    assert_eq!(case.encode(1).unwrap(), [&codes[..], &scales]);
    let values = decode(&case, &case.encode(2).unwrap(), 0..1).unwrap();
    let values: Vec<f32> =
        values.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
    assert_eq!(values, [0.5, 0.0, 0.0, 1.0, 0.0, -0.75, 1.0, 0.0]);

    let case = example(Kept::Sparse24, true);
    let parts = case.encode(2).unwrap();
    assert_eq!(parts, [&[0x21, 0x4D, 0x65, 0x07][..], &[0x9C, 0x8E], &scales]);

    let case = example(Kept::Sparse24, false);
    let parts = case.encode(1).unwrap();
    assert_eq!(parts, [&[0x21, 0x4D, 0x65, 0x87][..], &[0x9C, 0x8E], &scales, &[0x3F, 0x80]]);

    let case = example(Kept::Bitmask { kept: 9 }, true);
    let offsets = [0, 7].map(u64::to_le_bytes);
    assert_eq!(
        case.encode(1).unwrap(),
        [&[0x21, 0x4D, 0x65, 0x07, 0x00][..], &[0x69, 0x1C], offsets.as_flattened(), &scales]
    );
}

#[test]
fn codes_of_three_bits_have_the_documented_bytes() {
    let mut case = example(Kept::All, true);
    case.encoding = Encoding::Int { grid: grid(3, 8, DType::F32), kept: Kept::All };
    (case.shape, case.scales) = ([1, 8], vec![1.0]);
    case.codes = vec![1, 0, -4, 3, -1, 2, 0, -2];
    // 110 000 010 111 011 100 000 001, from the last code to the first.
    let expected: [&[u8]; 2] = [&[0x01, 0x77, 0xC1], &[0, 0, 0x80, 0x3F]];
    assert_eq!(case.encode(1).unwrap(), expected);
    case.encoding = Encoding::CtPackQuantized { grid: grid(3, 8, DType::F32) };
    // Counted from -4: 010 100 110 011 111 000 100 101.
    let shape = [1u64.to_le_bytes(), 8u64.to_le_bytes()];
    let expected: [&[u8]; 3] =
        [&[0x25, 0x3E, 0x53, 0x00], &[0, 0, 0x80, 0x3F], shape.as_flattened()];
    assert_eq!(case.encode(1).unwrap(), expected);
}

/// The encoding that a case of the golden file names.
fn golden_encoding(case: &str) -> Encoding {
    let [format, bits, group, symmetry, scale] = case.split('-').collect::<Vec<_>>()[..] else {
        panic!("{case} has five parts");
    };
    let group: u32 = group.parse().unwrap();
    let grid = IntGrid {
        bits: bits.parse().unwrap(),
        group_size: (group > 0).then_some(group),
        symmetric: symmetry == "sym",
        scale: DType::from_name(&scale.to_uppercase()).unwrap(),
    };
    match format {
        "pack" => Encoding::CtPackQuantized { grid },
        "int" => Encoding::CtIntQuantized { grid },
        _ => Encoding::CtFloatQuantized { scale: grid.scale },
    }
}

#[test]
fn compressed_tensors_stores_the_same_bytes_and_reads_the_same_values() {
    let golden = Golden::open("quantized_ct.safetensors");
    let cases = golden.cases();
    assert_eq!(cases.len(), 21);
    for name in cases {
        let encoding = golden_encoding(&name);
        let signed = |suffix: &str| {
            let (_, _, bytes) = golden.tensor(&format!("{name}.{suffix}"));
            bytes.iter().map(|byte| byte.cast_signed()).collect::<Vec<i8>>()
        };
        let (_, shape, dense) = golden.tensor(&format!("{name}.dense"));
        let (_, _, scale_bytes) = golden.tensor(&format!("{name}.scales"));
        let scale = encoding.value_dtype();
        let mut scales = vec![0.0; scale_bytes.len() / scale.size_bytes()];
        crate::encoding::dense::to_f32(scale, &scale_bytes, &mut scales);
        let has_points = name.contains("asym");
        let case = Case {
            encoding,
            shape: [shape[0], shape[1]],
            codes: signed("codes"),
            scales,
            zero_points: if has_points { signed("zero_points") } else { vec![] },
        };
        let components = encoding.components("w.weight", &shape).unwrap();
        for at_once in [1, 5, 13] {
            let parts = case.encode(at_once).unwrap();
            for (component, part) in components.iter().zip(&parts) {
                let (dtype, shape, bytes) = golden.tensor(&format!("{name}{}", component.suffix));
                assert_eq!((dtype, &shape), (component.dtype, &component.shape), "{name}");
                assert_eq!(part, &bytes, "{name}{}", component.suffix);
            }
            assert_eq!(decode(&case, &parts, 0..13).unwrap(), dense, "{name}");
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    fn code(&mut self, bits: u8) -> i8 {
        bits::sign_extend(self.next() as u8 & (u8::MAX >> (8 - bits)), bits)
    }

    /// A scale of any size whose products with codes are finite.
    fn scale(&mut self, dtype: DType) -> f32 {
        match dtype {
            DType::F16 => f16::from_bits(self.next() as u16 % 0x5C00).to_f32(),
            DType::Bf16 => bf16::from_bits(self.next() as u16 % 0x7B00).to_f32(),
            _ => f32::from_bits(self.next() as u32 % 0x7B00_0000),
        }
    }
}

/// A matrix that the layout holds: `rows` rows of `units` times the columns of a pattern.
fn random_case(seed: u64, layout: usize, grid: IntGrid, rows: usize, units: usize) -> Case {
    let mut random = Random(seed | 1);
    let (n, m) =
        [(4, 4), (2, 4), (1, 3), (4, 8), (3, 16), (4, 4)].get(layout).copied().unwrap_or((4, 4));
    let cols = m * units;
    let divisors: Vec<usize> = (1..=cols).filter(|size| cols.is_multiple_of(*size)).collect();
    let group = grid.group_size.map(|_| divisors[random.below(divisors.len())]);
    let groups = group.map_or(1, |group| cols / group);
    let grid = IntGrid { group_size: group.map(|group| group as u32), ..grid };
    let points: Vec<i8> = (0..rows * groups)
        .map(|_| if grid.symmetric { 0 } else { random.code(grid.bits) })
        .collect();
    let point = |row: usize, col: usize| points[row * groups + col / (cols / groups)];
    let mut codes: Vec<i8> = (0..rows * cols).map(|i| point(i / cols, i % cols)).collect();
    for start in (0..rows * cols).step_by(m) {
        for _ in 0..random.below(n + 1) {
            codes[start + random.below(m)] = random.code(grid.bits);
        }
    }
    let zero = |at: usize| {
        let size = cols / groups;
        codes[at * size..][..size].iter().all(|code| *code == points[at])
    };
    let scales = (0..rows * groups)
        .map(|at| match random.scale(grid.scale) {
            0.0 if !zero(at) => 1.0,
            _ if zero(at) && random.below(2) == 0 => 0.0,
            scale => scale,
        })
        .collect();
    let kept =
        codes.iter().enumerate().filter(|(i, code)| **code != point(i / cols, i % cols)).count();
    let room = (rows * cols - kept).min(random.below(4));
    let encoding = match layout {
        0 => Encoding::Int { grid, kept: Kept::All },
        1 => Encoding::Int { grid, kept: Kept::Sparse24 },
        2..=4 => Encoding::Int { grid, kept: Kept::Nm { n: n as u8, m: m as u8 } },
        5 => Encoding::Int { grid, kept: Kept::Bitmask { kept: (kept + room) as u64 } },
        6 => Encoding::CtPackQuantized { grid },
        _ => Encoding::CtIntQuantized { grid: IntGrid { bits: 8, ..grid } },
    };
    let zero_points = if grid.symmetric { vec![] } else { points };
    Case { encoding, shape: [rows, cols], codes, scales, zero_points }
}

proptest! {
    #[test]
    fn what_is_decoded_is_what_the_numbers_stand_for(
        seed: u64,
        layout in 0..8usize,
        bits in 2..=8u8,
        symmetric: bool,
        scale in proptest::sample::select(&SCALES[..]),
        channel: bool,
        rows in 0..140usize,
        units in 1..9usize,
        at_once in 1..70usize,
        cut in 0..140usize,
    ) {
        let grid = IntGrid { bits, group_size: (!channel).then_some(1), symmetric, scale };
        let case = random_case(seed, layout, grid, rows, units);
        let (expected, row_bytes) = (case.expected(), case.shape[1] * scale.size_bytes());
        let parts = case.encode(at_once).unwrap();
        prop_assert_eq!(&parts, &case.encode(rows.max(1)).unwrap());
        prop_assert_eq!(&decode(&case, &parts, 0..rows).unwrap(), &expected);
        let cut = cut.min(rows);
        for rows in [0..cut, cut..rows, cut..cut] {
            let bytes = rows.start * row_bytes..rows.end * row_bytes;
            prop_assert_eq!(&decode(&case, &parts, rows).unwrap(), &expected[bytes]);
        }
        // Bytes of some rows are a matrix of their own.
        let name = "w.weight";
        if let Some(ranges) = case.encoding.row_ranges(name, &case.shape, cut..rows).unwrap() {
            let slices: Vec<&[u8]> = parts
                .iter()
                .zip(ranges)
                .map(|(part, range)| &part[range.start as usize..range.end as usize])
                .collect();
            let shape = [rows - cut, case.shape[1]];
            let mut out = vec![];
            case.encoding.decode_dense(name, &shape, &slices, 0..rows - cut, &mut out).unwrap();
            prop_assert_eq!(&out, &expected[cut * row_bytes..]);
        }
    }

    #[test]
    fn floats_are_scaled(
        seed: u64,
        scale in proptest::sample::select(&SCALES[..]),
        rows in 0..20usize,
        cols in 1..40usize,
    ) {
        let mut random = Random(seed | 1);
        let codes: Vec<i8> = (0..rows * cols)
            .map(|_| random.next() as i8)
            .map(|code| if code & 0x7F == 0x7F { 0 } else { code })
            .collect();
        let scales: Vec<f32> =
            (0..rows).map(|_| (random.scale(scale) / 4.0).clamp(1.0, 64.0)).collect();
        let mut exact = vec![];
        crate::encoding::dense::encode_f32("w", scale, &scales, &mut exact).unwrap();
        let mut scales = scales;
        crate::encoding::dense::to_f32(scale, &exact, &mut scales);
        let encoding = Encoding::CtFloatQuantized { scale };
        let case = Case { encoding, shape: [rows, cols], codes, scales, zero_points: vec![] };
        let parts = case.encode(3).unwrap();
        let expected = (0..rows * cols).map(|i| {
            let code = crate::encoding::f8::to_f32(case.codes[i].cast_unsigned());
            f64::from(code) * f64::from(case.scales[i / cols])
        });
        let expected: Vec<u8> = match scale {
            DType::F16 => expected.flat_map(|v| f16::from_f64(v).to_le_bytes()).collect(),
            DType::Bf16 => expected.flat_map(|v| bf16::from_f64(v).to_le_bytes()).collect(),
            _ => expected.flat_map(|v| (v as f32).to_le_bytes()).collect(),
        };
        prop_assert_eq!(decode(&case, &parts, 0..rows).unwrap(), expected);
    }
}

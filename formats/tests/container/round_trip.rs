//! What is written is what is read, whole, by rows and by bytes.

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use sparsepack_formats::{
    CheckpointReader, DType, Digest, Encoding, GgmlType, IntGrid, Kept, ModelMetadata,
    container::{
        CHUNK_BYTES, ChunkJob, ContainerReader, ContainerWriter, Executor, FILE_NAME, InPlace,
        largest_size,
    },
    encoding::MatrixShape,
};

use crate::builder::{Tensor, create, dense, index, layout, noise, open, put, put_all, write};

/// Row length of the tensor that needs several chunks; rows straddle them.
const COLS: usize = 1000;

fn tensors() -> Vec<Tensor> {
    let rows = 2 * CHUNK_BYTES / (2 * COLS) + 3;
    let packed = Encoding::Sparse24 { dtype: DType::F16 };
    let metadata: Vec<u8> = [0x44, 0xEE, 0x9C].into_iter().cycle().take(64).collect();
    let blocks = Encoding::Ggml { ty: GgmlType::Q8_0 };
    let grid = IntGrid { bits: 4, group_size: Some(16), symmetric: true, scale: DType::F16 };
    let codes = Encoding::Int { grid, kept: Kept::Sparse24 };
    let nibbles: Vec<u8> = [0x44, 0xEE, 0x9C, 0xD8].into_iter().cycle().take(128).collect();
    let scales: Vec<u8> = (0..64u16).flat_map(|bits| (0x3C00 + bits).to_le_bytes()).collect();
    let words = Encoding::CtPackQuantized { grid };
    let shape: Vec<u8> = [32u64, 32].iter().flat_map(|n| n.to_le_bytes()).collect();
    vec![
        dense("big", DType::Bf16, &[rows, COLS], noise(1, rows * COLS * 2, 2)),
        ("packed".to_owned(), packed, vec![32, 16], vec![noise(2, 512, 0), metadata]),
        dense("empty", DType::F32, &[0, 7], vec![]),
        ("codes".to_owned(), codes, vec![32, 32], vec![noise(7, 256, 0), nibbles, scales.clone()]),
        ("w.weight".to_owned(), words, vec![32, 32], vec![noise(8, 512, 0), scales, shape]),
        dense("vector", DType::F32, &[33], noise(3, 132, 0)),
        dense("scalar", DType::I64, &[], noise(4, 8, 0)),
        ("blocks".to_owned(), blocks, vec![3, 64], vec![noise(5, 3 * 68, 0)]),
        dense("zeros", DType::F16, &[64, 64], vec![0; 8192]),
        dense("bytes", DType::U8, &[5, 41], noise(6, 205, 3)),
    ]
}

#[test]
fn tensors_come_back_whole_by_rows_and_by_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = tensors();
    write(dir.path(), &tensors);
    let reader = open(dir.path()).unwrap();
    assert!(matches!(reader.metadata(), ModelMetadata::Bare));
    // A tensor without bytes has no place among the others, and comes last.
    let names: Vec<&str> = reader.tensors().iter().map(|info| info.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "big", "packed", "codes", "w.weight", "vector", "scalar", "blocks", "zeros", "bytes",
            "empty",
        ]
    );
    for (name, encoding, shape, parts) in &tensors {
        let info = reader.tensors().get(name).unwrap();
        assert_eq!((info.encoding, &info.shape), (*encoding, shape), "{name}");
        assert_eq!(reader.components(name).unwrap(), *parts, "{name}");
        let digests: Vec<Digest> = parts.iter().map(|part| Digest::of(part)).collect();
        assert_eq!(reader.digests(name).unwrap(), digests, "{name}");
        let MatrixShape { rows, cols } = MatrixShape::of(shape);
        let (mut whole, mut by_rows) = (vec![], vec![]);
        encoding.decode_dense(name, shape, parts, 0..rows, &mut whole).unwrap();
        for start in (0..rows).step_by(7) {
            let end = rows.min(start + 7);
            reader.read_rows_dense(name, start..end, &mut by_rows).unwrap();
        }
        assert!(whole == by_rows, "{name}");
        if encoding.value_dtype().is_float_weight() {
            let mut expected = vec![0.0; rows * cols];
            encoding.decode_all_f32(name, shape, parts, &mut expected).unwrap();
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert!(bits(reader.read_f32(name).unwrap()) == bits(expected), "{name}");
        }
        reader.prefetch(&[name]);
        reader.release(&[name]);
    }
    let part = &tensors[0].3[0];
    for range in [0..1, 5..5, CHUNK_BYTES - 1..CHUNK_BYTES + 2, part.len() - 3..part.len()] {
        let bytes = range.start as u64..range.end as u64;
        assert_eq!(reader.read_component("big", 0, bytes).unwrap()[..], part[range]);
    }
    assert!(reader.tensors().get("zeros").unwrap().stored_bytes < 100);
}

#[test]
fn a_row_costs_its_chunk_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = write(dir.path(), &tensors());
    let (_, entries) = index(&bytes);
    let chunks = entries["tensors"][0]["components"][0]["chunks"].as_array().unwrap();
    assert_eq!(chunks.len(), 3);
    // The middle chunk is spoilt: what does not need it can still be read.
    bytes[chunks[1]["offset"].as_u64().unwrap() as usize + 20] ^= 1;
    let reader = crate::builder::read(dir.path(), &bytes).unwrap();
    let rows = MatrixShape::of(&reader.tensors().get("big").unwrap().shape).rows;
    let mut out = vec![0.0; COLS];
    reader.read_rows_f32("big", 0..1, &mut out).unwrap();
    reader.read_rows_f32("big", rows - 1..rows, &mut out).unwrap();
    let error = reader.read_rows_f32("big", rows / 2..rows / 2 + 1, &mut out).unwrap_err();
    assert!(error.to_string().contains("tensor `big`: the frame at offset"), "{error}");
    assert!(reader.components("big").is_err());
    assert!(reader.read_f32("packed").is_ok());
}

/// Runs the jobs backwards and counts them.
#[derive(Debug)]
struct Backwards(usize);

static RAN: AtomicUsize = AtomicUsize::new(0);

impl Executor for Backwards {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, jobs: &mut [&mut ChunkJob]) {
        RAN.fetch_add(jobs.len(), Ordering::Relaxed);
        jobs.iter_mut().rev().for_each(|job| job.run());
    }
}

#[test]
fn the_file_does_not_depend_on_threads_and_stays_below_its_bound() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let expected = write(dir.path(), &tensors);
    for threads in [1, 5] {
        let other = tempfile::tempdir().unwrap();
        let executor = Box::new(Backwards(threads));
        let mut writer =
            ContainerWriter::create(other.path(), layout(&tensors), 1, executor).unwrap();
        put_all(writer.as_mut(), &tensors);
        let written = writer.finish().unwrap();
        assert_eq!(written[0].bytes, expected.len() as u64);
        assert!(std::fs::read(&written[0].path).unwrap() == expected);
    }
    assert_eq!(RAN.load(Ordering::Relaxed), 2 * 16);
    let bounds = tensors.iter();
    let bound: u64 = bounds.map(|(name, e, shape, _)| largest_size(name, *e, shape).unwrap()).sum();
    assert!(expected.len() as u64 <= bound + 200, "{} of {bound}", expected.len());
}

#[test]
fn the_writer_refuses_what_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let tensors =
        [dense("a", DType::U8, &[4], vec![1; 4]), dense("b", DType::U8, &[2], vec![2; 2])];
    let mut writer = create(dir.path(), layout(&tensors));
    let mut refused = |name: &str, component, bytes: &[u8]| {
        crate::builder::message(dir.path(), &writer.write(name, component, bytes).unwrap_err())
    };
    assert_eq!(refused("c", 0, &[0]), "model.spz: tensor `c` not found");
    assert_eq!(
        refused("a", 1, &[0]),
        "model.spz.part: tensor `a`: has 1 components, but component 1 was written"
    );
    assert_eq!(refused("a", 0, &[0; 5]), "model.spz.part: tensor `a`: 5 of 4 bytes were written");
    writer.write("a", 0, &[1; 3]).unwrap();
    let error = writer.write("b", 0, &[2; 2]).unwrap_err();
    assert!(error.to_string().ends_with("tensor `b`: cannot be begun before `a` is complete"));
    let error = writer.digests("a").unwrap_err();
    assert!(error.to_string().ends_with("tensor `a`: 3 of 4 bytes were written"));
    let error = writer.finish().unwrap_err();
    assert!(error.to_string().ends_with("tensor `a`: 3 of 4 bytes were written"));
    assert!(!dir.path().join(FILE_NAME).exists());

    let create = |layout, level| {
        let error = ContainerWriter::create(dir.path(), layout, level, Box::new(InPlace));
        crate::builder::message(dir.path(), &error.unwrap_err())
    };
    let twice = layout(&[tensors[0].clone(), tensors[0].clone()]);
    assert_eq!(create(twice, 1), "model.spz: tensor `a` appears twice");
    assert_eq!(
        create(layout(&tensors), 20),
        "model.spz: offset 0: level 20 of compression, expected 1 to 19"
    );
    assert_eq!(create(layout(&tensors), 1), "model.spz.part: cannot create");
}

/// The example of docs/FORMATS.md.
#[test]
fn the_worked_example() {
    let dir = tempfile::tempdir().unwrap();
    let values = [
        1.0, 0.0, 0.0, 2.0, 0.0, -3.0, 4.0, 0.0, //
        0.0, 0.0, 5.0, 6.0, 7.0, 0.0, 0.0, 0.0f32,
    ];
    let raw: Vec<u8> = values
        .iter()
        .flat_map(|value| (value.to_bits() >> 16).to_le_bytes()[..2].to_vec())
        .collect();
    let file = write(dir.path(), &[dense("W", DType::Bf16, &[2, 8], raw)]);
    let header = [
        0x5a, 0x2a, 0x4d, 0x18, 0x10, 0, 0, 0, b'S', b'P', b'A', b'R', b'S', b'E', b'P', b'K', 1,
        0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(file[..24], header);
    // Magic, descriptor, content size, header of a last raw block, content, checksum.
    let mask = [0x28, 0xb5, 0x2f, 0xfd, 0x24, 2, 0x11, 0, 0, 0b0110_1001, 0b0001_1100];
    assert_eq!(file[24..35], mask);
    let high = [0x28, 0xb5, 0x2f, 0xfd, 0x24, 7, 0x39, 0, 0, 127, 128, 128, 129, 129, 129, 129];
    assert_eq!(file[39..55], high);
    let low =
        [0x28, 0xb5, 0x2f, 0xfd, 0x24, 7, 0x39, 0, 0, 0x00, 0x00, 0x81, 0x00, 0x40, 0x80, 0xc0];
    assert_eq!(file[59..75], low);
    let entry = "{\"name\":\"W\",\"encoding\":\"dense\",\"dtype\":\"BF16\",\"shape\":[2,8],\
                 \"components\":[{\"sha256\":\
                 \"SHA\",\"chunks\":[{\"offset\":24,\"mask\":true,\"frames\":[15,20,20]}]}]}";
    let digest = Digest::of(&open(dir.path()).unwrap().components("W").unwrap()[0]);
    let entry = entry.replace("SHA", &digest.to_string());
    let record = [&[0x5b, 0x2a, 0x4d, 0x18, entry.len() as u8, 0, 0, 0], entry.as_bytes()].concat();
    assert_eq!(entry.len(), 210);
    assert_eq!(file[79..79 + record.len()], record);
    let index = format!("{{\"chunk_bytes\":2097152,\"tensors\":[{entry}],\"files\":[]}}");
    assert_eq!(file[79 + record.len()..], crate::builder::footer(index.as_bytes()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_values_of_any_type_survive(
        which in 0..DType::ALL.len(),
        rows in 0..20usize,
        cols in 0..20usize,
        seed: u64,
        zeros in 0..4usize,
        level in 1..20i32,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let dtype = DType::ALL[which];
        let tensor =
            dense("t", dtype, &[rows, cols], noise(seed, rows * cols * dtype.size_bytes(), zeros));
        let tensors = [tensor];
        let mut writer =
            ContainerWriter::create(dir.path(), layout(&tensors), level, Box::new(InPlace)).unwrap();
        put(writer.as_mut(), &tensors[0]);
        writer.finish().unwrap();
        let reader: ContainerReader = open(dir.path()).unwrap();
        prop_assert_eq!(&reader.components("t").unwrap()[0][..], &tensors[0].3[0][..]);
    }
}

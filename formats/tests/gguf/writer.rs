//! What the writer writes: the bytes of the format's description, what our reader and an
//! independent one (in `.ci`) read, and what it refuses.

use std::path::Path;

use proptest::prelude::*;
use sparsepack_formats::gguf::{GgufArray, GgufMetadata, GgufReader, GgufValue};
use sparsepack_formats::{
    CheckpointReader, DType, Encoding, FormatError, GgmlType, GgufLayout, GgufWriter,
    ModelMetadata, open,
};

use crate::builder::every_kind;
use crate::fixture;

const F32: Encoding = Encoding::Dense { dtype: DType::F32 };
const BF16: Encoding = Encoding::Dense { dtype: DType::Bf16 };
const Q8_0: Encoding = Encoding::Ggml { ty: GgmlType::Q8_0 };

fn metadata(pairs: &[(&str, GgufValue)]) -> GgufMetadata {
    let mut metadata = GgufMetadata::new(Path::new("memory"));
    for (key, value) in pairs {
        metadata.set(key, value.clone());
    }
    metadata
}

fn text(value: &str) -> GgufValue {
    GgufValue::String(value.to_owned())
}

fn file(tensors: &[(&str, Encoding, &[usize])]) -> Vec<(String, Encoding, Vec<usize>)> {
    tensors.iter().map(|&(name, e, shape)| (name.to_owned(), e, shape.to_vec())).collect()
}

/// One file with one pair.
fn layout(tensors: &[(&str, Encoding, &[usize])]) -> GgufLayout {
    let metadata = metadata(&[("general.architecture", text("llama"))]);
    GgufLayout { metadata, files: vec![file(tensors)] }
}

/// Bytes that differ between tensors and positions, with finite scales for quant blocks.
fn pattern(name: &str, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + name.len() * 7 + 1) % 60) as u8).collect()
}

fn write(dir: &Path, layout: &GgufLayout) {
    let mut writer = GgufWriter::create(dir, layout).unwrap();
    for (name, encoding, shape) in layout.files.iter().flatten().rev() {
        let bytes = encoding.components(name, shape).unwrap()[0].bytes as usize;
        for chunk in pattern(name, bytes).chunks(7) {
            writer.write(name, 0, chunk).unwrap();
        }
    }
    writer.finish().unwrap();
}

/// What a file holds, as a layout for writing it again.
fn layout_of(reader: &GgufReader) -> GgufLayout {
    let ModelMetadata::Gguf(metadata) = reader.metadata() else { panic!("not GGUF metadata") };
    let tensors = reader.tensors().iter();
    let tensors = tensors.map(|info| (info.name.clone(), info.encoding, info.shape.clone()));
    GgufLayout { metadata: metadata.clone(), files: vec![tensors.collect()] }
}

fn copy(reader: &GgufReader, dir: &Path) -> Vec<u8> {
    let layout = layout_of(reader);
    let mut writer = GgufWriter::create(dir, &layout).unwrap();
    for info in reader.tensors() {
        writer.write(&info.name, 0, &reader.components(&info.name).unwrap()[0]).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(dir.join("model.gguf")).unwrap()
}

/// The example of docs/FORMATS.md.
#[test]
fn the_smallest_model_has_these_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = metadata(&[
        ("general.architecture", text("llama")),
        ("llama.block_count", GgufValue::U32(1)),
    ]);
    let layout = GgufLayout { metadata, files: vec![file(&[("t.weight", F32, &[2, 3])])] };
    let mut writer = GgufWriter::create(dir.path(), &layout).unwrap();
    let values: Vec<u8> = (1..=6u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    writer.write("t.weight", 0, &values).unwrap();
    writer.finish().unwrap();
    let expected = [
        &b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"[..],
        b"\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"\x11\0\0\0\0\0\0\0llama.block_count\x04\0\0\0\x01\0\0\0",
        b"\x08\0\0\0\0\0\0\0t.weight\x02\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0",
        b"\0\0\0\0\0\0\0\0\0\0\0\0",
        &[0; 10],
        &values,
        &[0; 8],
    ]
    .concat();
    assert_eq!(std::fs::read(dir.path().join("model.gguf")).unwrap(), expected);
    assert_eq!(expected.len(), 192);
}

#[test]
fn files_of_the_python_package_are_rewritten_to_the_same_bytes() {
    for name in ["tiny/llama-gqa.gguf", "tiny/qwen2.gguf"] {
        let dir = tempfile::tempdir().unwrap();
        let found = copy(&GgufReader::open(&fixture(name)).unwrap(), dir.path());
        assert!(found == std::fs::read(fixture(name)).unwrap(), "{name} differs");
    }
}

#[test]
fn every_type_of_value_is_rewritten_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.gguf");
    std::fs::write(&source, every_kind().bytes()).unwrap();
    let reader = GgufReader::open(&source).unwrap();
    copy(&reader, dir.path());
    let again = GgufReader::open(&dir.path().join("model.gguf")).unwrap();
    let (ModelMetadata::Gguf(before), ModelMetadata::Gguf(after)) =
        (reader.metadata(), again.metadata())
    else {
        panic!("not GGUF metadata")
    };
    assert!(before.iter().eq(after.iter()));
    for info in reader.tensors() {
        assert_eq!(reader.components(&info.name).unwrap(), again.components(&info.name).unwrap());
    }
}

#[test]
fn the_alignment_of_the_metadata_is_used() {
    for alignment in [8u32, 32, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let mut layout = layout(&[("a", F32, &[3]), ("b", BF16, &[5]), ("c", Q8_0, &[2, 32])]);
        layout.metadata.set("general.alignment", GgufValue::U32(alignment));
        write(dir.path(), &layout);
        let reader = GgufReader::open(&dir.path().join("model.gguf")).unwrap();
        assert_eq!(reader.alignment(), u64::from(alignment));
        for info in reader.tensors() {
            let range = reader.byte_range(&info.name).unwrap();
            assert!(range.start.is_multiple_of(alignment as usize));
            assert_eq!(reader.components(&info.name).unwrap()[0], pattern(&info.name, range.len()));
        }
        let len = std::fs::metadata(dir.path().join("model.gguf")).unwrap().len();
        assert!(len.is_multiple_of(u64::from(alignment)), "the last tensor is padded too");
    }
}

#[test]
fn an_interrupted_run_is_resumed_tensor_by_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&[("a", F32, &[4]), ("b", Q8_0, &[1, 32])]);
    let mut writer = GgufWriter::create(dir.path(), &layout).unwrap();
    writer.write("b", 0, &pattern("b", 34)).unwrap();
    let digests = writer.digests("b").unwrap();
    writer.write("a", 0, &[1; 3]).unwrap();
    drop(writer);

    let mut writer = GgufWriter::resume(dir.path(), &layout).unwrap();
    writer.adopt("b", &digests).unwrap();
    writer.write("a", 0, &pattern("a", 16)).unwrap();
    writer.finish().unwrap();
    let reader = open(dir.path()).unwrap();
    assert_eq!(reader.components("b").unwrap(), [pattern("b", 34)]);

    let other =
        GgufLayout { metadata: metadata(&[("general.architecture", text("lla"))]), ..layout };
    let error = GgufWriter::resume(dir.path(), &other).unwrap_err().to_string();
    assert!(error.ends_with("the header differs from the layout of this run"), "{error}");
}

/// The message of a layout that is refused, and that it leaves nothing behind.
fn refused(layout: &GgufLayout) -> (FormatError, String) {
    let dir = tempfile::tempdir().unwrap();
    let error = GgufWriter::create(dir.path(), layout).unwrap_err();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let message = error.to_string().replace(&dir.path().display().to_string(), "DIR");
    (error, message)
}

#[test]
fn what_the_reader_would_refuse_is_refused_at_once() {
    let message = |layout: &GgufLayout| refused(layout).1;
    let long = "n".repeat(64);
    assert_eq!(
        message(&layout(&[(&long, F32, &[1])])),
        format!(
            "DIR/model.gguf: tensor `{long}`: the name has 64 bytes, more than the limit of 63"
        )
    );
    let (error, text) = refused(&layout(&[("a", F32, &[1]), ("a", F32, &[1])]));
    assert!(matches!(error, FormatError::DuplicateTensor { .. }));
    assert_eq!(text, "DIR/model.gguf: tensor `a` appears twice");
    assert_eq!(
        message(&layout(&[("a", Encoding::Dense { dtype: DType::I64 }, &[1])])),
        "tensor `a`: a GGUF file cannot hold I64"
    );
    assert_eq!(
        message(&layout(&[("a", Encoding::Sparse24 { dtype: DType::F32 }, &[1, 4])])),
        "tensor `a`: a GGUF file cannot hold 2:4 F32"
    );
    assert_eq!(
        message(&layout(&[("a", Q8_0, &[2, 33])])),
        "tensor `a`: a row of 33 elements is not a whole number of Q8_0 blocks of 32"
    );
    assert_eq!(
        message(&layout(&[("a", F32, &[1, 1, 1, 1, 1])])),
        "DIR/model.gguf: tensor `a`: expected at most 4 dimensions, found 5"
    );
    assert_eq!(
        message(&layout(&[("a", F32, &[2, 0])])),
        "DIR/model.gguf: tensor `a`: shape [2, 0] has a dimension of zero"
    );
    let mut odd = layout(&[]);
    odd.metadata.set("general.alignment", GgufValue::U32(24));
    assert!(message(&odd).ends_with("expected a power of two from 8 to 2^31, found 24"));
    let mut long = layout(&[]);
    long.metadata.set(&"k".repeat(1 << 16), GgufValue::Bool(true));
    assert!(message(&long).contains("the length of a metadata key is 65536, more than the limit"));
    let none = GgufLayout { files: vec![], ..layout(&[]) };
    assert_eq!(message(&none), "DIR: offset 0: a checkpoint needs at least one file");
}

#[test]
fn bytes_beyond_the_promise_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = GgufWriter::create(dir.path(), &layout(&[("a", F32, &[1])])).unwrap();
    let text = |error: FormatError| error.to_string().rsplit_once(": ").unwrap().1.to_owned();
    assert_eq!(text(writer.write("a", 0, &[0; 5]).unwrap_err()), "5 of 4 bytes were written");
    let error = writer.write("b", 0, &[0]).unwrap_err();
    assert!(matches!(error, FormatError::TensorNotFound { .. }));
    assert_eq!(text(writer.finish().unwrap_err()), "0 of 4 bytes were written");
    assert!(dir.path().join("model.gguf.part").is_file());
}

fn any_value() -> impl Strategy<Value = GgufValue> {
    prop_oneof![
        any::<u8>().prop_map(GgufValue::U8),
        any::<i16>().prop_map(GgufValue::I16),
        any::<i32>().prop_map(GgufValue::I32),
        any::<u64>().prop_map(GgufValue::U64),
        (-1e9f32..1e9).prop_map(GgufValue::F32),
        (-1e9f64..1e9).prop_map(GgufValue::F64),
        any::<bool>().prop_map(GgufValue::Bool),
        ".{0,20}".prop_map(GgufValue::String),
        proptest::collection::vec(any::<i64>(), 0..5)
            .prop_map(|values| GgufValue::Array(GgufArray::I64(values))),
        proptest::collection::vec(any::<bool>(), 0..5)
            .prop_map(|values| GgufValue::Array(GgufArray::Bool(values))),
        proptest::collection::vec(".{0,5}", 0..5)
            .prop_map(|values| GgufValue::Array(GgufArray::String(values.iter().collect()))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_layout_reads_back(
        values in proptest::collection::vec(any_value(), 0..6),
        shapes in proptest::collection::vec((1usize..4, 1usize..4, 0usize..4), 1..7),
        files in 1usize..4,
        alignment in 3u32..8,
    ) {
        let mut metadata = GgufMetadata::new(Path::new("memory"));
        for (i, value) in values.into_iter().enumerate() {
            metadata.set(&format!("key.{i}"), value);
        }
        metadata.set("general.alignment", GgufValue::U32(1 << alignment));
        let mut layout = GgufLayout { metadata, files: vec![vec![]; files] };
        for (i, (rows, blocks, kind)) in shapes.into_iter().enumerate() {
            let encoding = [F32, BF16, Q8_0, Encoding::Ggml { ty: GgmlType::Q4_K }][kind];
            let cols = blocks * [1, 3, 32, 256][kind];
            layout.files[i % files].push((format!("tensor.{i}"), encoding, vec![rows, cols]));
        }
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &layout);
        let reader = open(dir.path()).unwrap();
        let ModelMetadata::Gguf(found) = reader.metadata() else { panic!("not GGUF metadata") };
        prop_assert!(layout.metadata.iter().eq(found.iter().take(layout.metadata.len())));
        prop_assert_eq!(found.len(), layout.metadata.len() + if files > 1 { 3 } else { 0 });
        let expected: Vec<_> = layout.files.iter().flatten().collect();
        prop_assert_eq!(reader.tensors().len(), expected.len());
        for (info, (name, encoding, shape)) in reader.tensors().iter().zip(expected) {
            prop_assert_eq!((&info.name, &info.encoding, &info.shape), (name, encoding, shape));
            let bytes = &reader.components(name).unwrap()[0];
            prop_assert_eq!(&bytes[..], pattern(name, info.stored_bytes as usize));
        }
    }
}

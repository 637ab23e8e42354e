//! What is read from correct files built here.

use sparsepack_formats::gguf::{GgufArray, GgufMetadata, GgufValue};
use sparsepack_formats::{CheckpointReader, DType, Encoding, GgmlType, ModelMetadata};

use crate::builder::{Gguf, every_kind};
use crate::read;

fn metadata(reader: &dyn CheckpointReader) -> &GgufMetadata {
    let ModelMetadata::Gguf(metadata) = reader.metadata() else { panic!("not GGUF metadata") };
    metadata
}

#[test]
fn every_value_type_is_read_in_file_order() {
    let reader = read(&every_kind().bytes()).unwrap();
    let found: Vec<_> = metadata(&reader).iter().skip(1).collect();
    let strings = ["a", "bé"].into_iter().collect();
    let arrays = [
        ("u8s", GgufArray::U8(vec![1, 2])),
        ("i8s", GgufArray::I8(vec![-2])),
        ("u16s", GgufArray::U16(vec![257])),
        ("i16s", GgufArray::I16(vec![-1])),
        ("u32s", GgufArray::U32(vec![1])),
        ("i32s", GgufArray::I32(vec![1, -1])),
        ("f32s", GgufArray::F32(vec![1.5])),
        ("bools", GgufArray::Bool(vec![true, false, true])),
        ("strings", GgufArray::String(strings)),
        ("u64s", GgufArray::U64(vec![7])),
        ("i64s", GgufArray::I64(vec![-7])),
        ("f64s", GgufArray::F64(vec![2.5])),
        ("empty", GgufArray::U32(vec![])),
    ];
    let scalars = [
        ("u8", GgufValue::U8(200)),
        ("i8", GgufValue::I8(-1)),
        ("u16", GgufValue::U16(500)),
        ("i16", GgufValue::I16(-500)),
        ("u32", GgufValue::U32(70_000)),
        ("i32", GgufValue::I32(-70_000)),
        ("f32", GgufValue::F32(0.5)),
        ("bool", GgufValue::Bool(true)),
        ("u64", GgufValue::U64(u64::MAX)),
        ("i64", GgufValue::I64(i64::MIN)),
        ("f64", GgufValue::F64(0.25)),
    ];
    let arrays = arrays.map(|(key, array)| (key, GgufValue::Array(array)));
    let expected: Vec<_> =
        scalars.iter().chain(&arrays).map(|(key, value)| (*key, value)).collect();
    assert_eq!(found, expected);
    assert_eq!(metadata(&reader).str("general.architecture").unwrap(), "llama");
}

#[test]
fn tensors_are_listed_in_header_order_with_row_major_shapes() {
    let file = every_kind();
    let reader = read(&file.bytes()).unwrap();
    let start = file.header().len().next_multiple_of(32);
    let found: Vec<_> = reader
        .tensors()
        .iter()
        .map(|info| {
            let range = reader.byte_range(&info.name).unwrap();
            assert_eq!(info.stored_bytes, range.len() as u64);
            (
                info.name.as_str(),
                info.encoding,
                info.shape.clone(),
                range.start - start,
                range.len(),
            )
        })
        .collect();
    let dense = |dtype| Encoding::Dense { dtype };
    assert_eq!(
        found,
        [
            ("norm.weight", dense(DType::F32), vec![5], 0, 20),
            ("a.weight", Encoding::Ggml { ty: GgmlType::Q8_0 }, vec![2, 3, 32], 64, 204),
            ("b.weight", dense(DType::F16), vec![2, 3], 32, 12),
        ]
    );
    assert_eq!((reader.version(), reader.alignment()), (3, 32));
}

#[test]
fn components_are_the_bytes_of_the_file_and_decode() {
    let file = every_kind();
    let reader = read(&file.bytes()).unwrap();
    reader.prefetch(&["a.weight", "no such tensor"]);
    assert_eq!(reader.components("a.weight").unwrap(), [&file.data[64..]]);
    let expected: Vec<f32> = file.data[64..]
        .chunks(34)
        .flat_map(|block| block[2..].iter().map(|&q| f32::from(q as i8)))
        .collect();
    assert_eq!(reader.read_f32("a.weight").unwrap(), expected);
    reader.release(&["a.weight"]);
    assert_eq!(reader.components("a.weight").unwrap(), [&file.data[64..]]);
    assert!(
        reader.components("c.weight").unwrap_err().to_string().ends_with("`c.weight` not found")
    );
}

#[test]
fn version_2_is_laid_out_like_version_3() {
    let mut file = every_kind();
    file.version = 2;
    let reader = read(&file.bytes()).unwrap();
    assert_eq!((reader.version(), reader.tensors().len()), (2, 3));
}

#[test]
fn the_alignment_of_the_file_is_used() {
    let mut file = Gguf::new()
        .pair("general.alignment", 4, &64u32.to_le_bytes())
        .tensor("a", &[2], 0, 0)
        .tensor("b", &[2], 0, 64)
        .data(72);
    file.alignment = 64;
    let reader = read(&file.bytes()).unwrap();
    assert_eq!(reader.alignment(), 64);
    assert_eq!(reader.byte_range("a").unwrap().start, file.header().len().next_multiple_of(64));
    assert_eq!(reader.components("b").unwrap(), [&file.data[64..]]);
}

#[test]
fn a_file_without_tensors_needs_no_padding() {
    assert!(read(&Gguf::new().header()).unwrap().tensors().is_empty());
}

#[test]
fn a_tensor_without_dimensions_is_one_element() {
    let reader = read(&Gguf::new().tensor("scalar", &[], 0, 0).data(4).bytes()).unwrap();
    let info = reader.tensors().get("scalar").unwrap();
    assert_eq!((info.shape.len(), info.elements(), info.stored_bytes), (0, 1, 4));
}

#[test]
fn plain_float_types_are_dense() {
    for (id, dtype, len) in [(0, DType::F32, 1200), (1, DType::F16, 600), (30, DType::Bf16, 600)] {
        let reader = read(&Gguf::new().tensor("t", &[100, 3], id, 0).data(len).bytes()).unwrap();
        let info = reader.tensors().get("t").unwrap();
        assert_eq!(info.encoding, Encoding::Dense { dtype });
        assert_eq!(info.stored_bytes, len as u64);
    }
}

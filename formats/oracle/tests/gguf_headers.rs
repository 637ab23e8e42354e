//! The crate `gguf-rs` as a second reader of files that the `gguf` Python package wrote.
//!
//! Only facts it gets right are compared: it sizes BF16 and other types from number 10 on as if
//! they had blocks of 256, and it loses the types and the order of the metadata.

use std::path::{Path, PathBuf};

use gguf_rs::get_gguf_container_array_size;
use sparsepack_formats::gguf::{GgufArray, GgufReader, GgufValue};
use sparsepack_formats::{CheckpointReader, DType, Encoding, MappedFile, ModelMetadata};

/// A file under `fixtures/`.
fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)
}

#[test]
fn headers_agree() {
    for name in ["llama-gqa", "qwen2"] {
        let path = fixture(&format!("tiny/{name}.gguf"));
        let ours = GgufReader::new(MappedFile::open(&path).unwrap()).unwrap();
        let theirs = get_gguf_container_array_size(path.to_str().unwrap(), u64::MAX)
            .unwrap()
            .decode()
            .unwrap();
        compare_tensors(&ours, &theirs);
        compare_metadata(&ours, &theirs);
    }
}

fn compare_tensors(ours: &GgufReader, theirs: &gguf_rs::GGUFModel) {
    assert_eq!(ours.tensors().len(), theirs.tensors().len());
    assert_eq!(ours.alignment(), theirs.alignment());
    for (ours_info, tensor) in ours.tensors().iter().zip(theirs.tensors()) {
        assert_eq!(ours_info.name, tensor.name);
        let shape: Vec<u64> = ours_info.shape.iter().rev().map(|&dim| dim as u64).collect();
        assert_eq!(shape, tensor.shape, "{}", tensor.name);
        let kind = match ours_info.encoding {
            Encoding::Dense { dtype: DType::F32 } => 0,
            Encoding::Dense { dtype: DType::F16 } => 1,
            other => panic!("{}: {other}", tensor.name),
        };
        assert_eq!(kind, tensor.kind, "{}", tensor.name);
        let range = ours.byte_range(&tensor.name).unwrap();
        assert_eq!(range.start as u64, theirs.data_offset() + tensor.offset, "{}", tensor.name);
        assert_eq!(ours_info.stored_bytes, tensor.size, "{}", tensor.name);
    }
}

fn compare_metadata(ours: &GgufReader, theirs: &gguf_rs::GGUFModel) {
    let ModelMetadata::Gguf(ours) = ours.metadata() else { panic!("not GGUF metadata") };
    assert_eq!(ours.len(), theirs.metadata().len());
    for (key, value) in ours.iter() {
        let their = &theirs.metadata()[key];
        match value {
            GgufValue::String(text) => assert_eq!(Some(text.as_str()), their.as_str(), "{key}"),
            GgufValue::Bool(flag) => assert_eq!(Some(*flag), their.as_bool(), "{key}"),
            GgufValue::U32(number) => assert_eq!(Some(u64::from(*number)), their.as_u64(), "{key}"),
            GgufValue::F32(number) => {
                assert_eq!(Some(*number), their.as_f64().map(|theirs| theirs as f32), "{key}");
            }
            GgufValue::Array(GgufArray::String(strings)) => {
                let their: Vec<_> = their
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter_map(serde_json::Value::as_str)
                    .collect();
                assert_eq!(strings.iter().collect::<Vec<_>>(), their, "{key}");
            }
            GgufValue::Array(GgufArray::I32(numbers)) => {
                let their = their.as_array().unwrap().iter().filter_map(serde_json::Value::as_i64);
                assert!(numbers.iter().map(|&n| i64::from(n)).eq(their), "{key}");
            }
            other => panic!("{key}: {} is not in these files", other.type_name()),
        }
    }
}

//! Directories as compressed-tensors 0.14 left them, good ones and wrong ones.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests are test code too")]

use std::path::Path;

use serde_json::{Value, json};
use sparsepack_formats::{
    CheckpointReader, DType, Encoder, Encoding, Result, SafetensorsWriter, ShardLayout,
    compressed_tensors::SparseFormat, open,
};
use tempfile::TempDir;

/// A stored tensor.
#[derive(Clone)]
struct Stored(&'static str, DType, Vec<usize>, Vec<u8>);

fn numbers(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The example of docs/FORMATS.md as `sparse-24-bitmask`, and a norm beside it.
fn sparse24() -> Vec<Stored> {
    vec![
        Stored("m.compressed", DType::I8, vec![2, 4], vec![1, 2, 3, 4, 5, 6, 7, 0]),
        Stored("m.bitmask", DType::U8, vec![2, 1], vec![0x69, 0x5C]),
        Stored("m.shape", DType::I64, vec![2, 1], numbers(&[2, 8])),
        Stored("norm.weight", DType::I8, vec![2], vec![8, 9]),
    ]
}

/// The same matrix as `sparse-bitmask`.
fn bitmask() -> Vec<Stored> {
    vec![
        Stored("m.compressed", DType::I8, vec![7], vec![1, 2, 3, 4, 5, 6, 7]),
        Stored("m.bitmask", DType::U8, vec![2, 1], vec![0x69, 0x1C]),
        Stored("m.shape", DType::I64, vec![2], numbers(&[2, 8])),
        Stored("m.row_offsets", DType::I64, vec![2], numbers(&[0, 4])),
        Stored("norm.weight", DType::I8, vec![2], vec![8, 9]),
    ]
}

const DENSE: [u8; 16] = [1, 0, 0, 2, 0, 3, 4, 0, 0, 0, 5, 6, 7, 0, 0, 0];

fn write(format: SparseFormat, shards: &[&[Stored]]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let layouts: Vec<ShardLayout> = shards
        .iter()
        .map(|shard| ShardLayout {
            tensors: shard
                .iter()
                .map(|Stored(name, dtype, shape, _)| {
                    ((*name).to_owned(), Encoding::Dense { dtype: *dtype }, shape.clone())
                })
                .collect(),
            ..ShardLayout::default()
        })
        .collect();
    let mut writer = SafetensorsWriter::create(dir.path(), &layouts).unwrap();
    for Stored(name, _, _, bytes) in shards.iter().copied().flatten() {
        writer.write(name, 0, bytes).unwrap();
    }
    writer.finish().unwrap();
    write_config(dir.path(), &json!({ "quantization_config": format.to_config(&[], 0.5) }));
    dir
}

fn write_config(dir: &Path, config: &Value) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn dense(reader: &dyn CheckpointReader, name: &str) -> Result<Vec<u8>> {
    let info = reader.tensors().get(name).unwrap();
    let mut out = vec![];
    let parts = reader.components(name)?;
    info.encoding.decode_dense(name, &info.shape, &parts, 0..info.shape[0], &mut out)?;
    Ok(out)
}

/// A format and what stores the same weight in it.
type Case = (SparseFormat, fn() -> Vec<Stored>);

const CASES: [Case; 2] =
    [(SparseFormat::Sparse24Bitmask, sparse24), (SparseFormat::SparseBitmask, bitmask)];

#[test]
fn weights_go_by_their_own_names() {
    for (format, stored) in CASES {
        let dir = write(format, &[&stored()]);
        let reader = open(dir.path()).unwrap();
        let names: Vec<&str> = reader.tensors().iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["m.weight", "norm.weight"]);
        let info = reader.tensors().get("m.weight").unwrap();
        assert_eq!(info.encoding, format.encoding(DType::I8, 7));
        assert_eq!(info.shape, [2, 8]);
        assert_eq!(dense(reader.as_ref(), "m.weight").unwrap(), DENSE);
        reader.prefetch(&["m.weight"]);
        reader.release(&["m.weight"]);
    }
}

#[test]
fn components_may_lie_in_different_shards() {
    for (format, stored) in CASES {
        let stored = stored();
        let (first, second) = stored.split_at(2);
        let dir = write(format, &[second, first]);
        let reader = open(dir.path()).unwrap();
        assert_eq!(dense(reader.as_ref(), "m.weight").unwrap(), DENSE);
    }
}

#[test]
fn without_the_configuration_they_are_tensors_of_their_own() {
    let dir = write(SparseFormat::Sparse24Bitmask, &[&sparse24()]);
    write_config(dir.path(), &json!({}));
    assert_eq!(open(dir.path()).unwrap().tensors().len(), 4);
}

#[test]
fn what_is_written_opens() {
    let shape = vec![2, 8];
    for format in [SparseFormat::Sparse24Bitmask, SparseFormat::SparseBitmask] {
        let dir = tempfile::tempdir().unwrap();
        let encoding = format.encoding(DType::I8, 9);
        let layout = ShardLayout {
            tensors: vec![("m.weight".to_owned(), encoding, shape.clone())],
            ..ShardLayout::default()
        };
        let mut writer = SafetensorsWriter::create(dir.path(), &[layout]).unwrap();
        let mut encoder = Encoder::new(encoding, "m.weight", &shape).unwrap();
        for parts in [encoder.rows(&DENSE).unwrap(), encoder.finish().unwrap()] {
            for (component, bytes) in parts.iter().enumerate() {
                writer.write("m.weight", component, bytes).unwrap();
            }
        }
        writer.finish().unwrap();
        write_config(dir.path(), &json!({ "quantization_config": format.to_config(&[], 0.5) }));
        let reader = open(dir.path()).unwrap();
        assert_eq!(reader.tensors().get("m.weight").unwrap().encoding, encoding);
        assert_eq!(dense(reader.as_ref(), "m.weight").unwrap(), DENSE);
    }
}

/// What `open` says of stored tensors after a change.
fn refusal(format: SparseFormat, stored: &[Stored]) -> String {
    let dir = write(format, &[stored]);
    let error = open(dir.path()).map(|_| ()).unwrap_err().to_string();
    error.replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn components_that_do_not_belong_together_are_refused_and_named() {
    use SparseFormat::{Sparse24Bitmask, SparseBitmask};
    let without = |mut stored: Vec<Stored>, at: usize| {
        stored.remove(at);
        stored
    };
    let with = |mut stored: Vec<Stored>, at: usize, tensor: Stored| {
        stored[at] = tensor;
        stored
    };
    let tensor = |name: &str, what: &str| format!("model.safetensors: tensor `{name}`: {what}");
    for (at, name) in [(0, "m.compressed"), (1, "m.bitmask"), (2, "m.shape")] {
        assert_eq!(
            refusal(Sparse24Bitmask, &without(sparse24(), at)),
            tensor("m.weight", &format!("its component `{name}` is missing"))
        );
    }
    assert_eq!(
        refusal(SparseBitmask, &without(bitmask(), 3)),
        tensor("m.weight", "its component `m.row_offsets` is missing")
    );
    assert_eq!(
        refusal(Sparse24Bitmask, &bitmask()),
        tensor("m.row_offsets", "is not a component of sparse-24-bitmask")
    );
    let shape =
        |shape: Vec<usize>, values: &[i64]| Stored("m.shape", DType::I64, shape, numbers(values));
    assert_eq!(
        refusal(Sparse24Bitmask, &with(sparse24(), 2, shape(vec![2, 1], &[2, 16]))),
        tensor("m.compressed", "is I8 [2, 4]; expected I8 [2, 8]")
    );
    assert_eq!(
        refusal(Sparse24Bitmask, &with(sparse24(), 2, shape(vec![2], &[2, 8]))),
        tensor("m.shape", "is I64 [2]; expected I64 [2, 1]")
    );
    assert_eq!(
        refusal(Sparse24Bitmask, &with(sparse24(), 2, shape(vec![2, 1], &[2, -8]))),
        tensor("m.shape", "holds -8; expected a length")
    );
    assert_eq!(
        refusal(SparseBitmask, &with(bitmask(), 2, shape(vec![3], &[2, 8, 1]))),
        tensor("m.shape", "is I64 [3]; expected two I64")
    );
    assert_eq!(
        refusal(SparseBitmask, &with(bitmask(), 2, shape(vec![2], &[i64::MAX, i64::MAX]))),
        tensor("m.weight", &format!("the size of shape [{0}, {0}] overflows", i64::MAX))
    );
    assert_eq!(
        refusal(SparseBitmask, &with(bitmask(), 2, shape(vec![2], &[1, 3]))),
        tensor("m.weight", "7 kept values of 3 elements")
    );
    let bits = Stored("m.bitmask", DType::I8, vec![2, 1], vec![0x69, 0x1C]);
    assert_eq!(
        refusal(SparseBitmask, &with(bitmask(), 1, bits)),
        tensor("m.bitmask", "is I8 [2, 1]; expected U8 [2, 1]")
    );
    let weight = Stored("m.weight", DType::I8, vec![1], vec![1]);
    assert_eq!(
        refusal(SparseBitmask, &with(bitmask(), 4, weight)),
        tensor("m.weight", "is stored, and packed too")
    );
    let old = Stored("m.weight.compressed", DType::I8, vec![1], vec![1]);
    assert_eq!(
        refusal(SparseBitmask, &with(bitmask(), 4, old)),
        tensor(
            "m.weight.compressed",
            "is named as by compressed-tensors 0.8 and older, which is not supported; expected MODULE.compressed"
        )
    );
}

#[test]
fn unknown_sparse_formats_are_refused() {
    let dir = write(SparseFormat::SparseBitmask, &[&bitmask()]);
    write_config(
        dir.path(),
        &json!({"quantization_config": {
            "quant_method": "compressed-tensors", "sparsity_config": {"format": "marlin-24"}
        }}),
    );
    let error = open(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.ends_with(
        "config.json: offset 0: quantization_config.sparsity_config.format is `marlin-24`; expected dense, sparse-24-bitmask or sparse-bitmask"
    ), "{error}");
}

#[test]
fn defects_of_the_bits_are_found_when_they_are_read() {
    let mut stored = bitmask();
    stored[1].3[1] = 0x1D;
    let dir = write(SparseFormat::SparseBitmask, &[&stored]);
    let error = dense(open(dir.path()).unwrap().as_ref(), "m.weight").unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `m.row_offsets`: row 1: bitmask count not matching values (4 bits are set, the values are 4 to 7 of 7)"
    );
}

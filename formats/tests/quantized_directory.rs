//! Directories with quantized weights as compressed-tensors 0.20 leaves them, good ones and wrong ones.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests are test code too")]

#[path = "../examples/quantize.rs"]
#[expect(dead_code, reason = "its `main` is for the command line")]
mod quantize;

use std::path::Path;

use serde_json::{Value, json};
use sparsepack_formats::{
    DType, Encoding, IntGrid, SafetensorsWriter, ShardLayout,
    compressed_tensors::quantization_config, open,
};
use tempfile::TempDir;

/// A stored tensor.
#[derive(Clone)]
struct Stored(&'static str, DType, Vec<usize>, Vec<u8>);

const GRID: IntGrid = IntGrid { bits: 4, group_size: Some(4), symmetric: false, scale: DType::F16 };

/// One row of two groups, `-8 0 1 7 | 2 2 2 3` with scales 1 and 2 and zero points 0 and 2.
fn packed() -> Vec<Stored> {
    vec![
        Stored("m.weight_packed", DType::I32, vec![1, 1], vec![0x80, 0xF9, 0xAA, 0xBA]),
        Stored("m.weight_scale", DType::F16, vec![1, 2], vec![0x00, 0x3C, 0x00, 0x40]),
        Stored("m.weight_zero_point", DType::I32, vec![1, 2], vec![8, 0, 0, 0, 10, 0, 0, 0]),
        Stored("m.weight_shape", DType::I64, vec![2], numbers(&[1, 8])),
        Stored("m.bias", DType::F16, vec![1], vec![0, 0]),
        Stored("norm.weight", DType::F16, vec![1], vec![0, 0]),
    ]
}

fn floats() -> Vec<Stored> {
    vec![
        Stored("m.weight", DType::F8E4m3, vec![1, 2], vec![0x38, 0xC0]),
        Stored("m.weight_scale", DType::F16, vec![1, 1], vec![0x00, 0x38]),
        Stored("norm.weight", DType::F16, vec![1], vec![0, 0]),
    ]
}

fn numbers(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn config(encoding: Encoding) -> Value {
    quantization_config(&[("m".to_owned(), encoding)], &["lm_head".to_owned()]).unwrap().unwrap()
}

fn write(config: &Value, shards: &[&[Stored]]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tensor = |Stored(name, dtype, shape, _): &Stored| {
        ((*name).to_owned(), Encoding::Dense { dtype: *dtype }, shape.clone())
    };
    let layouts: Vec<ShardLayout> = shards
        .iter()
        .map(|shard| ShardLayout {
            tensors: shard.iter().map(tensor).collect(),
            ..ShardLayout::default()
        })
        .collect();
    let mut writer = SafetensorsWriter::create(dir.path(), &layouts).unwrap();
    for Stored(name, _, _, bytes) in shards.iter().copied().flatten() {
        writer.write(name, 0, bytes).unwrap();
    }
    writer.finish().unwrap();
    let config = json!({ "quantization_config": config });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn message(config: &Value, stored: &[Stored]) -> String {
    let dir = write(config, &[stored]);
    let text = open(dir.path()).unwrap_err().to_string();
    text.replace(&format!("{}/", dir.path().display()), "")
}

/// The message after one of the packed tensors is replaced, or left out where its shape is empty.
fn changed(change: Stored) -> String {
    let mut stored = packed();
    stored.retain(|tensor| tensor.0 != change.0);
    if !change.2.is_empty() {
        stored.push(change);
    }
    message(&config(Encoding::CtPackQuantized { grid: GRID }), &stored)
}

#[test]
fn weights_go_by_their_own_names() {
    let encoding = Encoding::CtPackQuantized { grid: GRID };
    let stored = packed();
    let (first, second) = stored.split_at(3);
    // Components may lie in different shards.
    for shards in [vec![&stored[..]], vec![second, first]] {
        let dir = write(&config(encoding), &shards);
        let reader = open(dir.path()).unwrap();
        let mut names: Vec<&str> = reader.tensors().iter().map(|info| info.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["m.bias", "m.weight", "norm.weight"]);
        let info = reader.tensors().get("m.weight").unwrap();
        assert_eq!(
            (info.encoding, &info.shape[..], info.stored_bytes),
            (encoding, &[1, 8][..], 32)
        );
        let values = reader.read_f32("m.weight").unwrap();
        assert_eq!(values, [-8.0, 0.0, 1.0, 7.0, 0.0, 0.0, 0.0, 2.0]);
    }
    let encoding = Encoding::CtFloatQuantized { scale: DType::F16 };
    let dir = write(&config(encoding), &[&floats()]);
    let reader = open(dir.path()).unwrap();
    assert_eq!(reader.tensors().len(), 2);
    assert_eq!(reader.tensors().get("m.weight").unwrap().encoding, encoding);
    assert_eq!(reader.read_f32("m.weight").unwrap(), [0.5, -1.0]);
}

#[test]
fn wrong_components_are_refused_and_named() {
    let none = |name| Stored(name, DType::F16, vec![], vec![]);
    let file = "model.safetensors: tensor";
    for (found, expected) in [
        (
            changed(none("m.weight_packed")),
            format!("{file} `m.weight`: its component `m.weight_packed` is missing"),
        ),
        (
            changed(none("m.weight_scale")),
            format!("{file} `m.weight`: its component `m.weight_scale` is missing"),
        ),
        (
            changed(none("m.weight_zero_point")),
            format!("{file} `m.weight`: its component `m.weight_zero_point` is missing"),
        ),
        (
            changed(none("m.weight_shape")),
            format!("{file} `m.weight`: its component `m.weight_shape` is missing"),
        ),
        (
            changed(Stored("m.weight_packed", DType::U32, vec![1, 1], vec![0; 4])),
            format!("{file} `m.weight_packed`: is U32 [1, 1]; expected I32 [1, 1]"),
        ),
        (
            changed(Stored("m.weight_zero_point", DType::I8, vec![1, 2], vec![0; 2])),
            format!("{file} `m.weight_zero_point`: is I8 [1, 2]; expected I32 [1, 2]"),
        ),
        (
            changed(Stored("m.weight_shape", DType::I64, vec![2], numbers(&[1, -8]))),
            format!("{file} `m.weight_shape`: holds -8; expected a length"),
        ),
        (
            changed(Stored("m.weight_shape", DType::I32, vec![2], vec![0; 8])),
            format!("{file} `m.weight_shape`: is I32 [2]; expected two I64"),
        ),
        (
            changed(Stored("m.weight_shape", DType::I64, vec![2], numbers(&[1, 6]))),
            format!("{file} `m.weight`: groups of 4 columns do not divide 6 columns"),
        ),
        (
            changed(Stored("m.weight_shape", DType::I64, vec![2], numbers(&[2, 8]))),
            format!("{file} `m.weight_packed`: is I32 [1, 1]; expected I32 [2, 1]"),
        ),
        (
            changed(Stored("m.weight", DType::F16, vec![1], vec![0; 2])),
            format!(
                "{file} `m.weight`: is not a component of a weight that is pack-quantized int4 g4 asymmetric F16"
            ),
        ),
        (
            changed(Stored("m.weight_g_idx", DType::I32, vec![8], vec![0; 32])),
            format!(
                "{file} `m.weight_g_idx`: is not supported; expected codes, scales and zero points of the weight"
            ),
        ),
        (
            changed(Stored("lm_head.weight_scale", DType::F16, vec![1, 1], vec![0; 2])),
            format!(
                "{file} `lm_head.weight_scale`: belongs to a module that quantization_config.ignore lists"
            ),
        ),
        (
            changed(Stored("m.weight_scale", DType::I64, vec![1, 2], vec![0; 16])),
            format!("{file} `m.weight`: scales of type I64; expected F16, BF16 or F32"),
        ),
    ] {
        assert_eq!(found, expected);
    }
    let mut quantization = config(Encoding::CtFloatQuantized { scale: DType::F16 });
    quantization["config_groups"]["group_0"]["targets"] = json!(["m", "norm"]);
    assert_eq!(
        message(&quantization, &floats()),
        format!(
            "{file} `norm.weight`: is not quantized; quantization_config.config_groups names its module"
        )
    );
}

/// Every tensor as bytes of its values' type.
fn values(path: &Path) -> Vec<(String, Vec<u8>)> {
    let reader = open(path).unwrap();
    let read = |info: &sparsepack_formats::TensorInfo| {
        let mut bytes = vec![];
        let rows = info.shape.iter().rev().skip(1).product();
        reader.read_rows_dense(&info.name, 0..rows, &mut bytes).unwrap();
        (info.name.clone(), bytes)
    };
    let mut all: Vec<_> = reader.tensors().iter().map(read).collect();
    all.sort();
    all
}

#[test]
fn the_example_quantizes_a_model_that_reads_as_its_values() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/model");
    for grids in [
        vec![
            "pack-quantized,4,32,asymmetric",
            "down_proj=int-quantized,8,0",
            "o_proj=float-quantized,8,0",
        ],
        vec!["int,3,64", "down_proj=int,8,0,asymmetric"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let grids: Vec<_> = grids.iter().map(|grid| quantize::parse(grid).unwrap()).collect();
        quantize::quantize(&model, dir.path(), &grids).unwrap();
        let (quantized, dense) = (dir.path().join("quantized"), dir.path().join("dense"));
        assert_eq!(values(&quantized), values(&dense));
        let reader = open(&quantized).unwrap();
        let linears = reader.tensors().iter().filter(|info| info.encoding.is_quantized()).count();
        assert_eq!((linears, reader.tensors().len()), (28, 38));
        let original = open(&model).unwrap();
        let name = "model.layers.1.mlp.down_proj.weight";
        let (ours, theirs) = (reader.read_f32(name).unwrap(), original.read_f32(name).unwrap());
        let power = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
        let noise = power(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
        assert!(noise < 1e-3 * power(&mut theirs.iter().copied()), "8 bits are near");
    }
}

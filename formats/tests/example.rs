//! The example of the crate, on a packed tensor and on a GGUF file.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests are test code too")]

#[path = "../examples/read_packed.rs"]
#[expect(dead_code, reason = "its `main` is for the command line")]
mod read_packed;

use std::path::Path;

use sparsepack_formats::{DType, Encoder, Encoding, SafetensorsWriter, ShardLayout};

fn output(path: &Path, name: &str) -> String {
    let mut text = vec![];
    read_packed::print_first_row(path, name, &mut text).unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn the_example_prints_a_packed_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let (name, encoding, shape) = ("w", Encoding::Sparse24 { dtype: DType::F32 }, vec![2, 4]);
    let layout =
        ShardLayout { tensors: vec![(name.into(), encoding, shape.clone())], ..Default::default() };
    let mut writer = SafetensorsWriter::create(dir.path(), &[layout]).unwrap();
    let rows = [0.0f32, 1.5, 0.0, -2.0, 3.0, 0.0, 0.0, 0.0].map(f32::to_le_bytes);
    let mut encoder = Encoder::new(encoding, name, &shape).unwrap();
    for (part, bytes) in encoder.rows(rows.as_flattened()).unwrap().iter().enumerate() {
        writer.write(name, part, bytes).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(
        output(&dir.path().join("model.safetensors"), name),
        "w: [2, 4], 2:4 F32, 18 bytes\n[0.0, 1.5, 0.0, -2.0]\n"
    );
}

#[test]
fn the_example_prints_a_tensor_of_a_gguf_file() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny/llama-gqa.gguf");
    let text = output(&fixture, "output_norm.weight");
    let first = text.lines().next().unwrap();
    assert_eq!(first, "output_norm.weight: [32], F32, 128 bytes");
    assert_eq!(text.lines().nth(1).unwrap().split(", ").count(), 32);
    let mut unused = vec![];
    let error = read_packed::print_first_row(&fixture, "w", &mut unused).unwrap_err();
    assert_eq!(error.to_string(), "there is no such tensor");
}

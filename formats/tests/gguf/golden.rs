//! Blocks and files made by the `gguf` Python package: our values are the same bits.

use half::f16;
use safetensors::SafeTensors;
use sparsepack_formats::{DType, Encoding, GgmlType, open};

use crate::fixture;

#[test]
fn decoded_blocks_equal_the_python_package_bit_for_bit() {
    let bytes = std::fs::read(fixture("golden/gguf/dequant.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let types: Vec<_> = GgmlType::all().filter(|ty| *ty != GgmlType::F32).collect();
    assert_eq!(golden.len(), 2 * types.len(), "every recorded type is decoded");
    for ty in types {
        let blocks = golden.tensor(&format!("{ty}.blocks")).unwrap();
        let values = golden.tensor(&format!("{ty}.values")).unwrap();
        let expected: Vec<f32> =
            values.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let mut found = vec![0.0; expected.len()];
        let rows = values.shape()[0];
        Encoding::Ggml { ty }
            .decode_f32(ty.name(), values.shape(), &[blocks.data()], 0..rows, &mut found)
            .unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                "{ty} element {i}: expected {expected:e}, found {found:e}"
            );
        }
    }
}

/// Tensors whose rows are in the same order in both formats.
const SAME_TENSORS: [(&str, &str); 6] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
    ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight"),
    ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
    ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
];

#[test]
fn a_file_holds_the_tensors_of_the_checkpoint_it_was_made_from() {
    for model in ["llama-gqa", "qwen2"] {
        let packed = open(&fixture(&format!("tiny/{model}.gguf"))).unwrap();
        let original = open(&fixture(&format!("tiny/{model}"))).unwrap();
        for (gguf_name, name) in SAME_TENSORS {
            let info = packed.tensors().get(gguf_name).unwrap();
            assert_eq!(info.shape, original.tensors().get(name).unwrap().shape, "{name}");
            let mut expected = original.read_f32(name).unwrap();
            if info.encoding == (Encoding::Dense { dtype: DType::F16 }) {
                for value in &mut expected {
                    *value = f16::from_f32(*value).to_f32();
                }
            }
            assert_eq!(packed.read_f32(gguf_name).unwrap(), expected, "{model}: {name}");
        }
    }
}

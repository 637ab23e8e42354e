//! A directory of safetensors shards, plain or of compressed-tensors: an index of any text, or one that
//! names what the shards hold, more or less.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::compressed_tensors::{SparseFormat, quantization_config};
use sparsepack_formats_fuzz::{File, Scratch, encoding, name, read_everything};

const SHARDS: [&str; 3] = ["model-00001-of-00002.safetensors", "s", "../s"];

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let scratch = Scratch::new();
    let config = match u.int_in_range(0..=9)? {
        0 => u.arbitrary()?,
        1 => "{}".to_owned(),
        2..=4 => {
            // The letters that files name their tensors by.
            let modules: Vec<_> = ('a'..='f')
                .map(|module| Ok((module.to_string(), encoding(u)?)))
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .filter(|(_, encoding)| encoding.is_quantized() && !encoding.is_declared())
                .collect();
            let quantization = quantization_config(&modules, &[]).expect("all are of that kind");
            serde_json::json!({ "quantization_config": quantization }).to_string()
        }
        n => {
            let format =
                if n < 7 { SparseFormat::Sparse24Bitmask } else { SparseFormat::SparseBitmask };
            serde_json::json!({ "quantization_config": format.to_config(&[], 0.5) }).to_string()
        }
    };
    scratch.write("config.json", config.as_bytes());
    let mut map = serde_json::Map::new();
    for shard in &SHARDS[..u.int_in_range(0..=2)?] {
        let file = File::arbitrary(u)?;
        for stored in &file.stored {
            let shard = if u.ratio(1, 16)? { name(u, &SHARDS)? } else { (*shard).to_owned() };
            map.insert(stored.name.clone(), shard.into());
        }
        scratch.write(shard, &file.bytes());
    }
    if u.ratio(1, 8)? {
        map.insert(u.arbitrary()?, name(u, &SHARDS)?.into());
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    let index = if u.ratio(1, 8)? { u.arbitrary()? } else { index.as_str() };
    let index_name =
        if u.ratio(1, 8)? { "model.safetensors" } else { "model.safetensors.index.json" };
    scratch.write(index_name, index.as_bytes());
    if let Ok(reader) = sparsepack_formats::open(scratch.path()) {
        read_everything(&*reader);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

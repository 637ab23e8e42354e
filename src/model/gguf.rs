//! The metadata of a GGUF output.

use std::path::Path;

use sparsepack_formats::ModelMetadata;
use sparsepack_formats::gguf::{GgufMetadata, GgufValue, SPLIT_KEYS};

use super::error::{ModelError, Result};
use super::source::ModelSource;
use super::tokenizer::put_tokenizer;

/// The version of ggml's quant blocks: its `GGML_QNT_VERSION`.
const QUANTIZATION_VERSION: u32 = 2;

/// What a GGUF file says of its tensors as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufSummary {
    /// `general.file_type`: llama.cpp's `llama_ftype`.
    pub file_type: u32,
    /// Whether any tensor is in quant blocks.
    pub quantized: bool,
}

/// The key-value pairs of a GGUF file of this model. Those of a GGUF source are kept, in order and
/// with their types; with `changed`, what they say of the tensors is set anew.
///
/// # Errors
/// A family, a setting or a tokenizer that GGUF cannot express, by name.
pub fn gguf_metadata(
    source: &ModelSource,
    summary: GgufSummary,
    changed: bool,
) -> Result<GgufMetadata> {
    match source.reader().metadata() {
        ModelMetadata::Gguf(metadata) => {
            let mut metadata = metadata.clone();
            for key in SPLIT_KEYS {
                metadata.remove(key);
            }
            if changed {
                put_summary(&mut metadata, summary);
            }
            Ok(metadata)
        }
        ModelMetadata::HuggingFace { config, directory } => {
            let mut metadata = GgufMetadata::new(directory);
            let (arch, model) = (source.arch(), source.config());
            let architecture = arch.gguf.as_deref().unwrap_or_default();
            let mut text = |key: &str, value: &str| {
                metadata.set(key, GgufValue::String(value.to_owned()));
            };
            text("general.architecture", architecture);
            text("general.type", "model");
            if let Some(name) = name(config, directory) {
                text("general.name", &name);
            }
            model.put_gguf(arch, &mut metadata)?;
            put_summary(&mut metadata, summary);
            put_tokenizer(directory, model, &mut metadata)?;
            Ok(metadata)
        }
        _ => Err(ModelError::NoConfig { path: source.path().to_owned() }),
    }
}

fn put_summary(metadata: &mut GgufMetadata, summary: GgufSummary) {
    metadata.set("general.file_type", GgufValue::U32(summary.file_type));
    if summary.quantized {
        metadata.set("general.quantization_version", GgufValue::U32(QUANTIZATION_VERSION));
    }
}

/// What the model is called: the last part of `_name_or_path`, or the directory.
fn name(config: &serde_json::Value, directory: &Path) -> Option<String> {
    let recorded = config["_name_or_path"].as_str().and_then(|path| path.rsplit('/').next());
    if let Some(name) = recorded.filter(|name| !name.is_empty()) {
        return Some(name.to_owned());
    }
    let directory = directory.canonicalize().ok()?;
    Some(directory.file_name()?.to_str()?.to_owned())
}

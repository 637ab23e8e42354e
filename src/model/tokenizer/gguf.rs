//! The tokenizer of a GGUF file from its keys, and the files that transformers needs for it.

use std::path::Path;

use serde_json::{Map, Value, json};
use sparsepack_formats::gguf::{GgufMetadata, GgufValue};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;

use super::pre::Pre;
use super::spm::{self, Pieces};
use super::{ModelError, ModelSource, Result, Sidecar, SidecarContent, add_tokens, defect};

/// Builds the tokenizer of a GGUF file.
///
/// # Errors
/// A kind of tokenizer that is not supported, by name; missing keys; merges that name unknown
/// tokens.
pub(super) fn build(path: &Path, metadata: &GgufMetadata) -> Result<tokenizers::Tokenizer> {
    let mut tokenizer = match metadata.str("tokenizer.ggml.model")? {
        "gpt2" => byte_level(path, metadata)?,
        spm::MODEL => Pieces::of_gguf(metadata)?.tokenizer(path)?,
        other => {
            return Err(ModelError::UnsupportedValue {
                key: "tokenizer.ggml.model".to_owned(),
                found: other.to_owned(),
                supported: "gpt2, llama".to_owned(),
            });
        }
    };
    if let Some((id, bos)) = special(metadata, "bos").filter(|_| adds_bos(metadata)) {
        let template = TemplateProcessing::builder()
            .try_single(format!("{bos} $A"))
            .and_then(|builder| builder.try_pair(format!("{bos} $A {bos}:1 $B:1")))
            .map_err(|reason| ModelError::Tokenizer { path: path.to_owned(), reason })?
            .special_tokens(vec![(bos.to_owned(), id)])
            .build()
            .map_err(|reason| ModelError::Tokenizer {
                path: path.to_owned(),
                reason: reason.to_string(),
            })?;
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

/// Byte-level BPE.
fn byte_level(path: &Path, metadata: &GgufMetadata) -> Result<tokenizers::Tokenizer> {
    let pre = Pre::of(metadata)?;
    let tokens = metadata.strings("tokenizer.ggml.tokens")?;
    let types = metadata.i32s("tokenizer.ggml.token_type")?;
    let merges =
        metadata.strings("tokenizer.ggml.merges")?.iter().map(|merge| split_merge(path, merge));
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| (token.to_owned(), id)).collect();
    let failed = |error: tokenizers::Error| defect(path, &error);
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges.collect::<Result<Vec<_>>>()?)
        .ignore_merges(pre.ignores_merges())
        .build()
        .map_err(failed)?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer().map_err(failed)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let tokens: Vec<&str> = tokens.iter().collect();
    add_tokens(&mut tokenizer, &tokens, types).map_err(failed)?;
    tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
    Ok(tokenizer)
}

/// The tokenizer and generation settings as files that transformers reads.
pub(super) fn sidecars(source: &ModelSource, metadata: &GgufMetadata) -> Result<Vec<Sidecar>> {
    let tokenizer = build(source.path(), metadata)?;
    let text = tokenizer.to_string(true).map_err(|error| defect(source.path(), &error))?;
    let mut config = Map::new();
    let mut generation = Map::new();
    for (key, name) in [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")] {
        let Some((id, token)) = special(metadata, key) else { continue };
        config.insert(format!("{name}_token"), json!(token));
        if name != "unk" {
            generation.insert(format!("{name}_token_id"), json!(id));
        }
    }
    config.insert("add_bos_token".to_owned(), json!(adds_bos(metadata)));
    config.insert("add_prefix_space".to_owned(), json!(prefixes_space(metadata)));
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    let positions = source.config().max_position_embeddings;
    config.insert("model_max_length".to_owned(), json!(positions));
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    let template = metadata.get("tokenizer.chat_template").and_then(GgufValue::as_str);
    if let Some(template) = template {
        config.insert("chat_template".to_owned(), json!(template));
    }
    Ok(vec![
        bytes("tokenizer.json", text.into_bytes()),
        bytes("tokenizer_config.json", pretty(config)),
        bytes("generation_config.json", pretty(generation)),
    ])
}

/// Id and text of the token that `tokenizer.ggml.{name}_token_id` names. In a SentencePiece vocabulary
/// llama.cpp knows three of them without a key.
fn special<'a>(metadata: &'a GgufMetadata, name: &str) -> Option<(u32, &'a str)> {
    let known = ["unknown", "bos", "eos"].iter().position(|known| *known == name);
    let id = match metadata.get(&format!("tokenizer.ggml.{name}_token_id")) {
        Some(id) => id.as_u64()?,
        None => known.filter(|_| is_sentencepiece(metadata))? as u64,
    };
    let tokens = metadata.strings("tokenizer.ggml.tokens").ok()?;
    Some((id.try_into().ok()?, tokens.get(id.try_into().ok()?)?))
}

fn is_sentencepiece(metadata: &GgufMetadata) -> bool {
    metadata.str("tokenizer.ggml.model").is_ok_and(|model| model == spm::MODEL)
}

/// Whether prompts start with the first token; llama.cpp's default depends on vocabulary and split.
fn adds_bos(metadata: &GgufMetadata) -> bool {
    let key = metadata.get("tokenizer.ggml.add_bos_token").and_then(GgufValue::as_bool);
    let default =
        || is_sentencepiece(metadata) || Pre::of(metadata).is_ok_and(|pre| pre == Pre::Llama3);
    key.unwrap_or_else(default)
}

/// Whether a text gets a space before it.
fn prefixes_space(metadata: &GgufMetadata) -> bool {
    let key = metadata.get("tokenizer.ggml.add_space_prefix").and_then(GgufValue::as_bool);
    is_sentencepiece(metadata) && key.unwrap_or(true)
}

/// The two parts of a merge. A part may start with a space, not hold one further on.
fn split_merge(path: &Path, merge: &str) -> Result<(String, String)> {
    let space = merge.char_indices().skip(1).find(|(_, c)| *c == ' ');
    let (left, right) = space.map(|(at, _)| (&merge[..at], &merge[at + 1..])).ok_or_else(|| {
        ModelError::Tokenizer {
            path: path.to_owned(),
            reason: format!("merge `{merge}` has one part (expected two)"),
        }
    })?;
    Ok((left.to_owned(), right.to_owned()))
}

fn bytes(name: &str, content: Vec<u8>) -> Sidecar {
    Sidecar { name: name.to_owned(), content: SidecarContent::Bytes(content) }
}

fn pretty(object: Map<String, Value>) -> Vec<u8> {
    let mut text = format!("{:#}", Value::Object(object));
    text.push('\n');
    text.into_bytes()
}

//! A Hugging Face tokenizer as the keys of a GGUF file.
//!
//! Byte-level BPE and SentencePiece BPE. Token types are those of llama.cpp's converter: added tokens
//! are control tokens when they are special and user-defined otherwise, ids without a token are unused.

use std::path::Path;

use serde_json::Value;
use sparsepack_formats::gguf::{GgufArray, GgufMetadata, GgufStrings, GgufValue};

use super::super::config::ModelConfig;
use super::super::error::{ModelError, Result};
use super::{
    CONTROL, NORMAL, UNUSED, USER_DEFINED, merge_pairs, pre, pre::Pre, read, read_json, spm,
};

/// The files of a tokenizer, as JSON.
struct Files<'a> {
    /// The file that errors name.
    path: &'a Path,
    /// `tokenizer.json`, `null` where there is none.
    tokenizer: Value,
    /// `tokenizer_config.json`, `null` where there is none.
    settings: Value,
    /// `chat_template.jinja`, which goes before the setting of that name.
    template: Option<String>,
}

/// Adds the tokenizer in `directory` to `metadata`.
///
/// # Errors
/// [`ModelError::NoTokenizer`]; a tokenizer that is neither byte-level BPE nor SentencePiece BPE or
/// treats text in a way that llama.cpp has no name for, or tokens beyond the vocabulary of the model.
pub(crate) fn put_tokenizer(
    directory: &Path,
    config: &ModelConfig,
    metadata: &mut GgufMetadata,
) -> Result<()> {
    let path = directory.join("tokenizer.json");
    let tokenizer = read_json(&path)?;
    let settings = read_json(&directory.join("tokenizer_config.json"))?.unwrap_or_default();
    let template = read(&directory.join("chat_template.jinja"))?;
    let pieces = match &tokenizer {
        Some(tokenizer) if !spm::is_sentencepiece(tokenizer) => None,
        other => spm::of_directory(directory, other.as_ref(), &settings)?,
    };
    if tokenizer.is_none() && pieces.is_none() {
        return Err(ModelError::NoTokenizer { path });
    }
    let path = if tokenizer.is_some() { path } else { directory.join(spm::MODEL_FILE) };
    let tokenizer = tokenizer.unwrap_or_default();
    let files = Files { path: &path, tokenizer, settings, template };
    match pieces {
        Some(pieces) => files.put_sentencepiece(pieces, config, metadata)?,
        None => files.put_byte_level(config, metadata)?,
    }
    files.put_templates(metadata)
}

/// Sets the ids of special tokens, and whether a text gets a first and a last one.
fn put_special(
    ids: &[(&str, u32)],
    (adds_bos, adds_eos): (bool, bool),
    metadata: &mut GgufMetadata,
) {
    for (name, id) in ids {
        metadata.set(&format!("tokenizer.ggml.{name}_token_id"), GgufValue::U32(*id));
    }
    metadata.set("tokenizer.ggml.add_bos_token", GgufValue::Bool(adds_bos));
    if adds_eos {
        metadata.set("tokenizer.ggml.add_eos_token", GgufValue::Bool(true));
    }
}

fn strings(values: &[String]) -> GgufValue {
    GgufValue::Array(GgufArray::String(values.iter().collect::<GgufStrings>()))
}

impl Files<'_> {
    fn defect(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.path.to_owned(), reason }
    }

    fn put_sentencepiece(
        &self,
        mut pieces: spm::Pieces,
        config: &ModelConfig,
        metadata: &mut GgufMetadata,
    ) -> Result<()> {
        pieces.put(self.path, config.vocab_size, metadata)?;
        let mut special = self.special_ids(config, &pieces.tokens);
        for (name, id) in spm::ID_NAMES.into_iter().zip(pieces.ids) {
            // The model's own ids where neither configuration nor settings have one.
            let id = id.filter(|id| (*id as usize) < pieces.tokens.len());
            if let Some(id) = id.filter(|_| special.iter().all(|(known, _)| *known != name)) {
                special.push((name, id));
            }
        }
        // Without a tokenizer.json there is no template; SentencePiece models start with a token.
        put_special(&special, self.adds(self.tokenizer.is_null()), metadata);
        Ok(())
    }

    fn put_byte_level(&self, config: &ModelConfig, metadata: &mut GgufMetadata) -> Result<()> {
        self.check_model()?;
        let pre = Pre::recognize(&self.tokenizer).ok_or_else(|| {
            self.defect(
                "llama.cpp has no name for the way it normalizes and splits text (pre_tokenizer, \
                 normalizer and ignore_merges together); known are those of SmolLM, GPT-2, \
                 Llama 3, Qwen2 and llama.cpp's default"
                    .to_owned(),
            )
        })?;
        let (tokens, types) = self.tokens(config.vocab_size)?;
        let merges = merge_pairs(self.path, &self.tokenizer)?;
        let merges: Vec<String> =
            merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
        metadata.set("tokenizer.ggml.model", GgufValue::String("gpt2".to_owned()));
        metadata.set(pre::KEY, GgufValue::String(pre.name().to_owned()));
        metadata.set("tokenizer.ggml.tokens", strings(&tokens));
        metadata.set("tokenizer.ggml.token_type", GgufValue::Array(GgufArray::I32(types)));
        metadata.set("tokenizer.ggml.merges", strings(&merges));
        put_special(&self.special_ids(config, &tokens), self.adds(false), metadata);
        Ok(())
    }

    /// Refuses what is not byte-level BPE.
    fn check_model(&self) -> Result<()> {
        let model = &self.tokenizer["model"];
        let kind = model["type"].as_str().unwrap_or("unnamed");
        let refuse = |what: String| {
            Err(self.defect(format!("{what}; GGUF output is for byte-level and SentencePiece BPE")))
        };
        if kind != "BPE" {
            return refuse(format!("a model of type {kind}"));
        }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if model[key].as_str().is_some_and(|text| !text.is_empty()) {
                return refuse(format!("`{key}` is {}", model[key]));
            }
        }
        Ok(())
    }

    /// Every token by its id, and its type.
    fn tokens(&self, vocab_size: usize) -> Result<(Vec<String>, Vec<i32>)> {
        let mut tokens: Vec<Option<String>> = vec![None; vocab_size];
        let mut types = vec![UNUSED; vocab_size];
        let mut put = |id: Option<u64>, token: &str, kind: i32| {
            let slot = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocab_size);
            let Some(slot) = slot else {
                return Err(self.defect(format!(
                    "token `{token}` has no id below the model's vocab_size of {vocab_size}"
                )));
            };
            if tokens[slot].as_deref().is_some_and(|before| before != token) {
                return Err(
                    self.defect(format!("id {slot} is that of `{token}` and another token"))
                );
            }
            tokens[slot] = Some(token.to_owned());
            types[slot] = kind;
            Ok(())
        };
        let vocab = self.tokenizer.pointer("/model/vocab").and_then(Value::as_object);
        let vocab = vocab.ok_or_else(|| self.defect("no vocabulary".to_owned()))?;
        for (token, id) in vocab {
            put(id.as_u64(), token, NORMAL)?;
        }
        for added in self.added() {
            let token = added["content"].as_str().unwrap_or_default();
            let special = added["special"].as_bool().unwrap_or(false);
            put(added["id"].as_u64(), token, if special { CONTROL } else { USER_DEFINED })?;
        }
        let name = |(id, token): (usize, Option<String>)| token.unwrap_or(format!("[PAD{id}]"));
        Ok((tokens.into_iter().enumerate().map(name).collect(), types))
    }

    fn added(&self) -> impl Iterator<Item = &Value> {
        self.tokenizer["added_tokens"].as_array().into_iter().flatten()
    }

    /// Ids of the special tokens by llama.cpp's names. What the configuration of the model says of
    /// start and end goes before the tokenizer's own settings; of several ends, the tokenizer
    /// chooses.
    fn special_ids(&self, config: &ModelConfig, tokens: &[String]) -> Vec<(&'static str, u32)> {
        let named = |name: &str| {
            let setting = &self.settings[name];
            let text = setting.as_str().or_else(|| setting["content"].as_str())?;
            u32::try_from(tokens.iter().position(|token| token == text)?).ok()
        };
        let ends = &config.eos_token_ids;
        let eos = named("eos_token").filter(|id| ends.is_empty() || ends.contains(id));
        let ids = [
            ("bos", config.bos_token_id.or_else(|| named("bos_token"))),
            ("eos", eos.or(ends.first().copied())),
            ("unknown", named("unk_token")),
            ("padding", named("pad_token")),
        ];
        let in_range = |id: &u32| (*id as usize) < tokens.len();
        ids.into_iter().filter_map(|(name, id)| Some((name, id.filter(in_range)?))).collect()
    }

    /// Whether a text gets a token before it and one after it: what the template of the
    /// post-processor does, unless `tokenizer_config.json` says otherwise. `first` is what a text gets
    /// where neither says anything.
    fn adds(&self, first: bool) -> (bool, bool) {
        let processor = &self.tokenizer["post_processor"];
        let inner = processor["processors"].as_array();
        let all = inner.map_or(std::slice::from_ref(processor), Vec::as_slice);
        let template = all.iter().find(|one| one["type"] == "TemplateProcessing");
        let pieces =
            template.and_then(|one| one["single"].as_array()).map_or(&[][..], Vec::as_slice);
        let special = |piece: Option<&Value>| {
            pieces.len() > 1 && piece.is_some_and(|piece| piece.get("SpecialToken").is_some())
        };
        let setting = |key: &str, found: bool| self.settings[key].as_bool().unwrap_or(found);
        (
            setting("add_bos_token", first || special(pieces.first())),
            setting("add_eos_token", special(pieces.last())),
        )
    }

    /// The chat template, or several by name.
    fn put_templates(&self, metadata: &mut GgufMetadata) -> Result<()> {
        let mut put = |key: &str, text: &str| {
            metadata.set(key, GgufValue::String(text.to_owned()));
        };
        let key = "tokenizer.chat_template";
        if let Some(text) = &self.template {
            put(key, text);
            return Ok(());
        }
        match &self.settings["chat_template"] {
            Value::Null => {}
            Value::String(text) => put(key, text),
            Value::Array(templates) => {
                let mut names = Vec::new();
                for template in templates {
                    let (Some(name), Some(text)) =
                        (template["name"].as_str(), template["template"].as_str())
                    else {
                        return Err(self.defect("a chat template without a name".to_owned()));
                    };
                    if name == "default" {
                        put(key, text);
                    } else {
                        put(&format!("{key}.{name}"), text);
                        names.push(name);
                    }
                }
                let names = GgufArray::String(names.into_iter().collect());
                metadata.set("tokenizer.chat_templates", GgufValue::Array(names));
            }
            _ => return Err(self.defect("chat_template is not text".to_owned())),
        }
        Ok(())
    }
}

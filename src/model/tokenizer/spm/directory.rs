//! The vocabulary of a Hugging Face directory: `tokenizer.model` where there is one, else what
//! `tokenizer.json` says of it, and the added tokens.

use std::path::Path;

use serde_json::Value;

use super::super::super::error::Result;
use super::super::read_json;
use super::{Pieces, UNUSED, defect, json, proto};

/// Name of SentencePiece's own file.
pub(in super::super) const MODEL_FILE: &str = "tokenizer.model";

/// The vocabulary of `directory`, whose `tokenizer.json` is `tokenizer` and whose `tokenizer_config.json` is
/// `settings`; `None` where no file has one.
///
/// # Errors
/// Files that cannot be read or contradict each other; what llama.cpp does not do as they say.
pub(in super::super) fn of_directory(
    directory: &Path,
    tokenizer: Option<&Value>,
    settings: &Value,
) -> Result<Option<Pieces>> {
    let path = directory.join(MODEL_FILE);
    let Some(model) = proto::read(&path)? else {
        let path = directory.join("tokenizer.json");
        return tokenizer.map(|tokenizer| json::pieces(&path, tokenizer, settings)).transpose();
    };
    let Some(tokenizer) = tokenizer else {
        model.check_normalizer(&path)?;
        let mut pieces = model.pieces(&path)?;
        add_settings(directory, settings, &mut pieces)?;
        return Ok(Some(pieces));
    };
    // What transformers does to a text is in tokenizer.json, whatever the model says of it.
    let mut pieces = model.pieces(&path)?;
    let path = directory.join("tokenizer.json");
    pieces.space_prefix = json::space_prefix(&path, tokenizer)?;
    compare(&path, tokenizer, &pieces)?;
    json::add(&path, tokenizer, &mut pieces)?;
    Ok(Some(pieces))
}

/// Refuses a `tokenizer.json` with other tokens than `tokenizer.model`. It may have more.
fn compare(path: &Path, tokenizer: &Value, pieces: &Pieces) -> Result<()> {
    for (token, id) in json::vocab(path, tokenizer)? {
        let known = usize::try_from(id).ok().and_then(|id| pieces.tokens.get(id));
        if let Some(other) =
            known.filter(|other| *other != token && **other != token.replace(super::SPACE, " "))
        {
            let reason = format!("id {id} is `{token}`, but `{other}` in {MODEL_FILE}");
            return Err(defect(path, reason));
        }
    }
    Ok(())
}

/// Added tokens where there is no `tokenizer.json`: `added_tokens.json` has ids by text, `tokenizer_config.json`
/// tokens by id.
fn add_settings(directory: &Path, settings: &Value, pieces: &mut Pieces) -> Result<()> {
    let path = directory.join("added_tokens.json");
    let added = read_json(&path)?.unwrap_or_default();
    for (text, id) in added.as_object().into_iter().flatten() {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
        let id = id.ok_or_else(|| defect(&path, format!("token `{text}` has no id")))?;
        // Control tokens of the model stay what they are.
        if pieces.types.get(id).is_none_or(|kind| *kind == UNUSED) {
            pieces.add(&path, id, text, false)?;
        }
    }
    let path = directory.join("tokenizer_config.json");
    for (id, token) in settings["added_tokens_decoder"].as_object().into_iter().flatten() {
        let text = token["content"].as_str();
        let (Ok(id), Some(text)) = (id.parse(), text) else {
            return Err(defect(&path, format!("added token {id} has no text or no id")));
        };
        pieces.add(&path, id, text, token["special"].as_bool().unwrap_or(false))?;
    }
    Ok(())
}

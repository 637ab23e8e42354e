//! Where every byte of the output goes, known before the first is written.

use std::{collections::HashSet, path::Path};

use super::{
    SINGLE_NAME,
    declared::{self, Declaration, KEY},
    header::{Header, StoredTensor},
    writer::ShardLayout,
};
use crate::{Encoding, FormatError, Result};

/// One file laid out.
#[derive(Debug)]
pub(super) struct FileLayout {
    pub(super) name: String,
    /// Length, JSON and padding.
    pub(super) header: Vec<u8>,
    pub(super) bytes: u64,
    /// Stored tensors in file order.
    pub(super) stored: Vec<Stored>,
    /// Logical tensors in the order they were given.
    pub(super) tensors: Vec<String>,
}

/// One stored component.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) name: String,
    /// Position in [`FileLayout::tensors`].
    pub(super) tensor: usize,
    /// Position in [`Encoding::components`].
    pub(super) component: usize,
    /// First byte in the file.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Lays out every shard.
///
/// # Errors
/// [`FormatError`] when a name is used twice or not legal, an encoding does not fit its shape or the
/// container, or a header grows beyond its limit.
pub(super) fn lay_out(directory: &Path, shards: &[ShardLayout]) -> Result<Vec<FileLayout>> {
    if shards.is_empty() {
        return Err(FormatError::InvalidHeader {
            path: directory.to_owned(),
            offset: 0,
            what: "a checkpoint needs at least one shard".to_owned(),
        });
    }
    let mut names = HashSet::new();
    shards
        .iter()
        .enumerate()
        .map(|(index, shard)| {
            let name = shard_name(index, shards.len());
            let path = directory.join(&name);
            // Logical and stored names share one space, as the reader presents both.
            let mut claim = |name: &str| {
                if names.insert(name.to_owned()) {
                    return Ok(());
                }
                Err(FormatError::DuplicateTensor { path: path.clone(), name: name.to_owned() })
            };
            let file = lay_out_shard(&path, name, shard)?;
            file.tensors.iter().try_for_each(|name| claim(name))?;
            let packed = file.stored.iter().filter(|s| s.name != file.tensors[s.tensor]);
            packed.map(|stored| stored.name.as_str()).try_for_each(claim)?;
            Ok(file)
        })
        .collect()
}

/// `model.safetensors`, or `model-00001-of-0000N.safetensors` as Hugging Face counts.
fn shard_name(index: usize, count: usize) -> String {
    match count {
        1 => SINGLE_NAME.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

fn lay_out_shard(path: &Path, name: String, shard: &ShardLayout) -> Result<FileLayout> {
    let mut components = vec![];
    for (tensor, (name, encoding, shape)) in shard.tensors.iter().enumerate() {
        if matches!(encoding, Encoding::Ggml { .. }) {
            return Err(FormatError::Encoding {
                name: name.clone(),
                what: format!("a safetensors file cannot hold {encoding} blocks"),
            });
        }
        for (position, component) in encoding.components(name, shape)?.into_iter().enumerate() {
            components.push((tensor, position, component));
        }
    }
    // Wide elements first, otherwise in the given order. Every size is a multiple of its element's,
    // so each tensor is aligned to its element.
    components.sort_by_key(|(_, _, component)| std::cmp::Reverse(component.dtype.size_bytes()));

    let mut header = Header { tensors: vec![], metadata: metadata(path, shard)? };
    let mut end = 0u64;
    for (tensor, _, component) in &components {
        let (name, encoding, _) = &shard.tensors[*tensor];
        let start = end;
        end = start.checked_add(component.bytes).ok_or_else(|| FormatError::Encoding {
            name: name.clone(),
            what: "the size of the shard overflows".to_owned(),
        })?;
        header.tensors.push(StoredTensor {
            name: encoding.component_name(name, component),
            dtype: component.dtype,
            shape: component.shape.clone(),
            start,
            end,
        });
    }
    let bytes = header.to_bytes(path)?;
    let file_bytes = bytes.len() as u64 + end;
    // What the reader would refuse is refused now, in its words.
    declared::logical_tensors(path, &Header::parse(path, &bytes, file_bytes)?)?;
    let stored = components
        .into_iter()
        .zip(header.tensors)
        .map(|((tensor, component, _), StoredTensor { name, start, end, .. })| Stored {
            name,
            tensor,
            component,
            start: bytes.len() as u64 + start,
            bytes: end - start,
        })
        .collect();
    let tensors = shard.tensors.iter().map(|(name, ..)| name.clone()).collect();
    Ok(FileLayout { name, header: bytes, bytes: file_bytes, stored, tensors })
}

/// The given pairs, `format` as every Hugging Face loader expects it, and the declared encodings.
fn metadata(
    path: &Path,
    shard: &ShardLayout,
) -> Result<std::collections::BTreeMap<String, String>> {
    let mut metadata = shard.metadata.clone();
    if metadata.contains_key(KEY) {
        return Err(FormatError::InvalidHeader {
            path: path.to_owned(),
            offset: 0,
            what: format!("the metadata key `{KEY}` is reserved"),
        });
    }
    metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    let declared: serde_json::Map<_, _> = shard
        .tensors
        .iter()
        .filter(|(_, encoding, _)| encoding.is_declared())
        .map(|(name, encoding, shape)| {
            let declaration = Declaration { encoding: *encoding, shape: shape.clone() };
            (name.clone(), serde_json::json!(declaration))
        })
        .collect();
    if !declared.is_empty() {
        metadata.insert(KEY.to_owned(), serde_json::Value::Object(declared).to_string());
    }
    Ok(metadata)
}

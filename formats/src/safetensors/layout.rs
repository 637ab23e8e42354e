//! Where every byte of the output goes, known before the first is written.

use std::{collections::HashSet, path::Path};

use super::{
    SINGLE_NAME,
    declared::{self, Declaration, KEY},
    header::{Header, StoredTensor},
    writer::ShardLayout,
};
use crate::{
    Encoding, FormatError, Result,
    parts::{FileLayout, Place},
};

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
    let files: Vec<FileLayout> = shards
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
            file.tensors.iter().try_for_each(|(name, _)| claim(name))?;
            for (name, places) in &file.tensors {
                let packed = places.iter().filter(|place| place.name != *name);
                packed.map(|place| place.name.as_str()).try_for_each(&mut claim)?;
            }
            Ok(file)
        })
        .collect::<Result<_>>()?;
    // The index counts the bytes of all of them.
    match files.iter().try_fold(0u64, |bytes, file| bytes.checked_add(file.bytes)) {
        Some(_) => Ok(files),
        None => Err(FormatError::InvalidHeader {
            path: directory.to_owned(),
            offset: 0,
            what: "the size of all shards together overflows".to_owned(),
        }),
    }
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
    let file_bytes =
        end.checked_add(bytes.len() as u64).ok_or_else(|| FormatError::InvalidHeader {
            path: path.to_owned(),
            offset: bytes.len() as u64,
            what: format!("{end} bytes of data and the header overflow"),
        })?;
    // What the reader would refuse is refused now, in its words.
    declared::logical_tensors(path, &Header::parse(path, &bytes, file_bytes)?)?;
    let mut tensors: Vec<(String, Vec<Place>)> =
        shard.tensors.iter().map(|(name, ..)| (name.clone(), vec![])).collect();
    let mut places: Vec<_> = components.iter().zip(header.tensors).collect();
    places.sort_by_key(|((tensor, position, _), _)| (*tensor, *position));
    for ((tensor, ..), StoredTensor { name, start, end, .. }) in places {
        let start_in_file = bytes.len() as u64 + start;
        tensors[*tensor].1.push(Place { name, start: start_in_file, bytes: end - start });
    }
    Ok(FileLayout { name, header: bytes, bytes: file_bytes, tensors })
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

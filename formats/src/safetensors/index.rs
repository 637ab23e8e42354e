//! `model.safetensors.index.json`: which shard holds which stored tensor.
//!
//! ```text
//! {"metadata": {"total_size": BYTES}, "weight_map": {"stored tensor name": "shard file name"}}
//! ```

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use serde::Deserialize;

use super::{header::Header, json::UniqueMap};
use crate::{FormatError, Result};

/// Longest index or configuration file: as much as a header.
const MAX_JSON_BYTES: u64 = super::header::MAX_HEADER_BYTES;

#[derive(Deserialize)]
struct IndexFile {
    weight_map: UniqueMap<String>,
}

/// A parsed index whose shards are plain names of existing files.
#[derive(Debug)]
pub(super) struct ShardIndex {
    /// In name order, which is also tensor order.
    pub(super) shards: Vec<String>,
    shard_of: HashMap<String, String>,
}

impl ShardIndex {
    /// Reads the index at `path`.
    ///
    /// # Errors
    /// [`FormatError::Json`], [`FormatError::BadShard`], [`FormatError::Io`].
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file: IndexFile = parse_json_file(path)?;
        let shards: BTreeSet<&String> = file.weight_map.0.iter().map(|(_, shard)| shard).collect();
        let directory = path.parent().unwrap_or(Path::new(""));
        for shard in &shards {
            let problem = if !is_plain_name(shard) {
                "is not a plain file name"
            } else if !directory.join(shard).is_file() {
                "does not exist"
            } else {
                continue;
            };
            let (path, shard) = (path.to_owned(), (*shard).clone());
            return Err(FormatError::BadShard { path, shard, problem });
        }
        let shards = shards.into_iter().cloned().collect();
        Ok(Self { shards, shard_of: file.weight_map.0.into_iter().collect() })
    }

    /// Checks one shard against the map and takes its tensors off it.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] when the map places a tensor of the shard elsewhere or nowhere.
    pub(super) fn claim(&mut self, path: &Path, shard: &str, header: &Header) -> Result<()> {
        for tensor in &header.tensors {
            let what = match self.shard_of.get(&tensor.name) {
                Some(mapped) if mapped == shard => {
                    self.shard_of.remove(&tensor.name);
                    continue;
                }
                Some(mapped) => {
                    format!("stored in shard `{shard}`, but the index names shard `{mapped}`")
                }
                None => format!("stored in shard `{shard}`, but missing from the index"),
            };
            let (path, name) = (path.to_owned(), tensor.name.clone());
            return Err(FormatError::InvalidTensor { path, name, what });
        }
        Ok(())
    }

    /// Checks that every tensor of the map was found.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] for the first by name that was not.
    pub(super) fn finish(self, path: &Path) -> Result<()> {
        match self.shard_of.into_iter().min() {
            None => Ok(()),
            Some((name, shard)) => Err(FormatError::InvalidTensor {
                path: path.to_owned(),
                name,
                what: format!("the index names shard `{shard}`, which does not hold it"),
            }),
        }
    }
}

/// Whether `name` stays in its directory.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.contains(['/', '\\', '\0']) && !matches!(name, "" | "." | "..")
}

/// Parses a small JSON file.
///
/// # Errors
/// [`FormatError::Io`], [`FormatError::LimitExceeded`], [`FormatError::Json`].
pub(crate) fn parse_json_file<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let io = |action: &'static str| crate::file::io_error(path, action);
    let found = std::fs::metadata(path).map_err(io("read the size"))?.len();
    if found > MAX_JSON_BYTES {
        return Err(FormatError::LimitExceeded {
            path: path.to_owned(),
            offset: 0,
            what: "the file size",
            found,
            limit: MAX_JSON_BYTES,
        });
    }
    let bytes = std::fs::read(path).map_err(io("read"))?;
    serde_json::from_slice(&bytes)
        .map_err(|source| FormatError::Json { path: path.to_owned(), source })
}

/// The text of an index: `weights` are pairs of stored tensor name and shard in file order.
pub(super) fn to_text<'a>(
    total_size: u64,
    weights: impl Iterator<Item = (&'a str, &'a str)>,
) -> String {
    let weight_map: serde_json::Map<_, _> =
        weights.map(|(name, shard)| (name.to_owned(), shard.into())).collect();
    let index = serde_json::json!({
        "metadata": { "total_size": total_size },
        "weight_map": weight_map,
    });
    format!("{index:#}\n")
}

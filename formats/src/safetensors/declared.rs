//! Packed tensors: how a file says that several stored tensors are one.
//!
//! `__metadata__` holds under [`KEY`] a JSON object from logical tensor name to encoding and shape:
//!
//! ```text
//! {"model.layers.0.mlp.up_proj.weight": {"encoding":"sparse24","dtype":"BF16","shape":[R,C]}}
//! ```
//!
//! and the stored tensors are the name with the suffixes of
//! [`Encoding::components`](crate::Encoding::components). Each file describes its own tensors.

use std::{collections::HashMap, ops::Range, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    header::{Header, StoredTensor},
    json::UniqueMap,
};
use crate::{Encoding, FormatError, Result, TensorInfo};

/// The `__metadata__` key that declares packed tensors.
pub(super) const KEY: &str = "sparsepack.encodings";

/// What is declared of one tensor.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Declaration {
    #[serde(flatten)]
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
}

/// A logical tensor and the byte ranges of its components in the file.
#[derive(Debug)]
pub(super) struct Located {
    pub(super) info: TensorInfo,
    pub(super) parts: Vec<Range<usize>>,
}

/// The logical tensors of a file, in the order of their first components.
///
/// # Errors
/// [`FormatError::InvalidTensor`] for a component that is missing, of another type or shape, or not
/// one of its tensor's; [`FormatError::InvalidHeader`] for a declaration that does not parse.
pub(super) fn logical_tensors(path: &Path, header: &Header) -> Result<Vec<Located>> {
    let declared = declarations(path, header)?;
    if declared.is_empty() {
        return Ok(header.tensors.iter().map(plain).collect());
    }
    let positions: HashMap<&str, usize> =
        header.tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    // The logical tensor each stored one belongs to, as (declaration, component).
    let mut owners = vec![None; header.tensors.len()];
    for (index, (name, declaration)) in declared.iter().enumerate() {
        let invalid =
            |what| FormatError::InvalidTensor { path: path.to_owned(), name: name.clone(), what };
        let Declaration { encoding, shape } = declaration;
        if !encoding.is_declared() {
            return Err(invalid(format!(
                "the encoding {encoding} cannot be declared in a safetensors file; expected sparse24, nm, bitmask, torch-cutlass or int"
            )));
        }
        for (part, component) in encoding.components(name, shape)?.iter().enumerate() {
            let stored_name = format!("{name}{}", component.suffix);
            let Some(&position) = positions.get(stored_name.as_str()) else {
                return Err(invalid(format!("its component `{stored_name}` is missing")));
            };
            let stored = &header.tensors[position];
            if stored.dtype != component.dtype || stored.shape != component.shape {
                return Err(invalid(format!(
                    "its component `{stored_name}` is {} {:?}; expected {} {:?}",
                    stored.dtype, stored.shape, component.dtype, component.shape
                )));
            }
            if owners[position].replace((index, part)).is_some() {
                return Err(invalid(format!(
                    "its component `{stored_name}` belongs to another tensor too"
                )));
            }
        }
    }
    let is_declared: HashMap<&str, usize> =
        declared.iter().enumerate().map(|(index, (name, _))| (name.as_str(), index)).collect();
    let mut out = vec![];
    for (stored, owner) in header.tensors.iter().zip(owners) {
        match owner {
            None => {
                check_not_extra(path, stored, &is_declared)?;
                out.push(plain(stored));
            }
            Some((index, 0)) => out.push(packed(&declared[index], &positions, header)?),
            Some(_) => {}
        }
    }
    Ok(out)
}

fn declarations(path: &Path, header: &Header) -> Result<Vec<(String, Declaration)>> {
    let Some(text) = header.metadata.get(KEY) else {
        return Ok(vec![]);
    };
    let parsed: UniqueMap<Declaration> =
        serde_json::from_str(text).map_err(|error| FormatError::InvalidHeader {
            path: path.to_owned(),
            offset: super::header::LENGTH_BYTES,
            what: format!("`{KEY}` in `__metadata__` is not valid: {error}"),
        })?;
    Ok(parsed.0)
}

/// Beside the components of `NAME` there is neither `NAME` itself nor another `NAME.suffix`.
fn check_not_extra(
    path: &Path,
    stored: &StoredTensor,
    declared: &HashMap<&str, usize>,
) -> Result<()> {
    let owner = stored.name.rsplit_once('.').map_or("", |(owner, _)| owner);
    for name in [stored.name.as_str(), owner] {
        if declared.contains_key(name) {
            return Err(FormatError::InvalidTensor {
                path: path.to_owned(),
                name: name.to_owned(),
                what: format!("`{}` is stored but is not one of its components", stored.name),
            });
        }
    }
    Ok(())
}

fn range(stored: &StoredTensor) -> Range<usize> {
    // Within the file, which is mapped.
    stored.start as usize..stored.end as usize
}

fn plain(stored: &StoredTensor) -> Located {
    Located {
        info: TensorInfo {
            name: stored.name.clone(),
            encoding: Encoding::Dense { dtype: stored.dtype },
            shape: stored.shape.clone(),
            stored_bytes: stored.end - stored.start,
        },
        parts: vec![range(stored)],
    }
}

fn packed(
    (name, declaration): &(String, Declaration),
    positions: &HashMap<&str, usize>,
    header: &Header,
) -> Result<Located> {
    let Declaration { encoding, shape } = declaration;
    let components = encoding.components(name, shape)?;
    let parts = components
        .iter()
        .filter_map(|component| positions.get(format!("{name}{}", component.suffix).as_str()))
        .map(|&position| range(&header.tensors[position]))
        .collect();
    Ok(Located {
        info: TensorInfo {
            name: name.clone(),
            encoding: *encoding,
            shape: shape.clone(),
            stored_bytes: components.iter().map(|component| component.bytes).sum(),
        },
        parts,
    })
}

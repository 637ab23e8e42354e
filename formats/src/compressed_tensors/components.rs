//! From the stored tensors of sparse formats to the weights of modules.

use std::collections::HashMap;

use super::{
    SparseFormat,
    stored::{Found, Stored, replace},
};
use crate::{MappedFile, Result};

/// Last parts of the names of components, in the order of
/// [`Encoding::components`](crate::Encoding::components). `sparse-24-bitmask` does without the last.
const SUFFIXES: [&str; 4] = [".compressed", ".bitmask", ".shape", ".row_offsets"];

/// Puts the components among `tensors` together, whichever files they are in. A weight stands where its
/// first component was; other tensors stay as they are.
///
/// # Errors
/// [`FormatError::InvalidTensor`](crate::FormatError::InvalidTensor) for a component that is missing, is
/// one too many, is of another type or shape, or does not say the same as the others.
pub(crate) fn join(
    format: SparseFormat,
    files: &[MappedFile],
    tensors: Vec<Found>,
) -> Result<Vec<Found>> {
    let stored = Stored::new(files, &tensors);
    let mut weights = HashMap::new();
    for found in &tensors {
        let Some((module, suffix)) = split(&found.info.name) else { continue };
        if suffix == SUFFIXES[0] {
            weights.insert(found.info.name.clone(), weight(format, &stored, module, found)?);
        } else {
            stored.component(module, SUFFIXES[0], found)?;
        }
    }
    Ok(replace(tensors, weights, |name| split(name).is_some()))
}

/// Module and suffix of a component's name.
fn split(name: &str) -> Option<(&str, &'static str)> {
    SUFFIXES.iter().find_map(|suffix| Some((name.strip_suffix(suffix)?, *suffix)))
}

/// The weight whose values `compressed` holds.
fn weight(
    format: SparseFormat,
    stored: &Stored<'_>,
    module: &str,
    compressed: &Found,
) -> Result<Found> {
    if module.ends_with(".weight") {
        return Err(stored.invalid(
            compressed,
            "is named as by compressed-tensors 0.8 and older, which is not supported; expected MODULE.compressed".to_owned(),
        ));
    }
    if let Some(weight) = stored.get(&format!("{module}.weight")) {
        return Err(stored.invalid(weight, "is stored, and packed too".to_owned()));
    }
    let shape = stored.shape(stored.component(module, ".shape", compressed)?)?;
    let kept = compressed.info.elements() as u64;
    let encoding = format.encoding(compressed.info.encoding.value_dtype(), kept);
    let extra = stored.get(&format!("{module}.row_offsets"));
    if let (SparseFormat::Sparse24Bitmask, Some(extra)) = (format, extra) {
        let what = format!("is not a component of {}", format.name());
        return Err(stored.invalid(extra, what));
    }
    stored.weight(module, compressed, encoding, shape)
}

//! From the stored tensors of quantized formats to the weights of modules.

use std::collections::{HashMap, HashSet};

use super::{
    scheme::{Schemes, Storage},
    stored::{Found, Stored, replace},
};
use crate::{Encoding, IntGrid, MappedFile, Result};

/// Last parts of the names of components that only quantized modules have.
const SUFFIXES: [&str; 4] =
    [".weight_scale", ".weight_packed", ".weight_zero_point", ".weight_shape"];

/// What a module may have besides, which this crate does not read.
const FOREIGN: [&str; 6] = [
    ".weight_g_idx",
    ".weight_global_scale",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
];

/// Puts the components among `tensors` together, whichever files they are in. A weight stands where its
/// codes were; other tensors stay as they are.
///
/// # Errors
/// [`FormatError::InvalidTensor`](crate::FormatError::InvalidTensor) for a module that no group of the
/// configuration is for, or that one names and is not quantized; for a component that is missing, is one
/// too many, or is of another type or shape.
pub(crate) fn join_quantized(
    schemes: &Schemes,
    files: &[MappedFile],
    tensors: Vec<Found>,
) -> Result<Vec<Found>> {
    let stored = Stored::new(files, &tensors);
    let (mut weights, mut modules) = (HashMap::new(), HashSet::new());
    for found in &tensors {
        let name = found.info.name.as_str();
        let module = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
        if let Some(module) = module
            && modules.insert(module)
        {
            let (codes, weight) = weight(schemes, &stored, module, found)?;
            weights.insert(codes, weight);
        }
    }
    for module in schemes.named().filter(|module| !modules.contains(module)) {
        if let Some(plain) = stored.get(&format!("{module}.weight")) {
            let what = "is not quantized; quantization_config.config_groups names its module";
            return Err(stored.invalid(plain, what.to_owned()));
        }
    }
    let is_component = |name: &str| SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
    Ok(replace(tensors, weights, is_component))
}

/// The name of a module's codes, and its weight; `found` is one of its components.
fn weight(
    schemes: &Schemes,
    stored: &Stored<'_>,
    module: &str,
    found: &Found,
) -> Result<(String, Found)> {
    let scheme = schemes.of(module).map_err(|what| stored.invalid(found, what))?;
    for suffix in FOREIGN {
        if let Some(foreign) = stored.get(&format!("{module}{suffix}")) {
            let what = "is not supported; expected codes, scales and zero points of the weight";
            return Err(stored.invalid(foreign, what.to_owned()));
        }
    }
    let scale = stored.component(module, ".weight_scale", found)?;
    let scale = stored.dtype(scale)?;
    let grid = IntGrid {
        bits: scheme.bits,
        group_size: scheme.group_size,
        symmetric: scheme.symmetric,
        scale,
    };
    let (encoding, suffix) = match scheme.storage {
        Storage::Pack => (Encoding::CtPackQuantized { grid }, ".weight_packed"),
        Storage::Int => (Encoding::CtIntQuantized { grid }, ".weight"),
        Storage::Float => (Encoding::CtFloatQuantized { scale }, ".weight"),
    };
    let codes = stored.component(module, suffix, found)?;
    let shape = match scheme.storage {
        Storage::Pack => stored.shape(stored.component(module, ".weight_shape", found)?)?,
        Storage::Int | Storage::Float => codes.info.shape.clone(),
    };
    let weight = stored.weight(module, codes, encoding, shape)?;
    let components = encoding.components(&weight.info.name, &weight.info.shape)?;
    for suffix in SUFFIXES.iter().chain(&[".weight"]) {
        let extra = stored.get(&format!("{module}{suffix}"));
        if let (Some(extra), false) = (extra, components.iter().any(|part| part.suffix == *suffix))
        {
            let what = format!("is not a component of a weight that is {encoding}");
            return Err(stored.invalid(extra, what));
        }
    }
    Ok((codes.info.name.clone(), weight))
}

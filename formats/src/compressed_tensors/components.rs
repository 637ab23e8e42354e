//! From stored tensors to the weights of modules.

use std::{collections::HashMap, ops::Range, path::Path};

use super::SparseFormat;
use crate::{DType, Encoding, FormatError, MappedFile, Result, TensorInfo};

/// Last parts of the names of components, in the order of
/// [`Encoding::components`]. `sparse-24-bitmask` does without the last.
const SUFFIXES: [&str; 4] = [".compressed", ".bitmask", ".shape", ".row_offsets"];

/// A tensor, and for each of its components the number of its file and its bytes there.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) info: TensorInfo,
    pub(crate) parts: Vec<(usize, Range<usize>)>,
}

/// Puts the components among `tensors` together, whichever files they are in. A weight stands where its
/// first component was; other tensors stay as they are.
///
/// # Errors
/// [`FormatError::InvalidTensor`] for a component that is missing, is one too many, is of another type
/// or shape, or does not say the same as the others.
pub(crate) fn join(
    format: SparseFormat,
    files: &[MappedFile],
    tensors: Vec<Found>,
) -> Result<Vec<Found>> {
    let by_name: HashMap<&str, &Found> =
        tensors.iter().map(|found| (found.info.name.as_str(), found)).collect();
    let mut joined = HashMap::new();
    for found in &tensors {
        let Some((module, suffix)) = split(&found.info.name) else { continue };
        let module = Module { format, files, by_name: &by_name, name: module };
        if suffix == SUFFIXES[0] {
            joined.insert(found.info.name.clone(), module.weight(found)?);
        } else {
            module.component(SUFFIXES[0])?;
        }
    }
    let mut out = Vec::with_capacity(tensors.len());
    for found in tensors {
        match joined.remove(&found.info.name) {
            Some(weight) => out.push(weight),
            None if split(&found.info.name).is_none() => out.push(found),
            // A component that is not the first.
            None => {}
        }
    }
    Ok(out)
}

/// Module and suffix of a component's name.
fn split(name: &str) -> Option<(&str, &'static str)> {
    SUFFIXES.iter().find_map(|suffix| Some((name.strip_suffix(suffix)?, *suffix)))
}

struct Module<'a> {
    format: SparseFormat,
    files: &'a [MappedFile],
    by_name: &'a HashMap<&'a str, &'a Found>,
    name: &'a str,
}

impl Module<'_> {
    /// The weight whose values `compressed` holds.
    fn weight(&self, compressed: &Found) -> Result<Found> {
        if self.name.ends_with(".weight") {
            return Err(self.invalid(
                compressed,
                "is named as by compressed-tensors 0.8 and older, which is not supported; expected MODULE.compressed".to_owned(),
            ));
        }
        let name = format!("{}.weight", self.name);
        if let Some(weight) = self.by_name.get(name.as_str()) {
            return Err(self.invalid(weight, "is stored, and packed too".to_owned()));
        }
        let shape = self.shape()?;
        let kept = compressed.info.elements() as u64;
        let encoding = self.format.encoding(compressed.info.encoding.value_dtype(), kept);
        let components = encoding.components(&name, &shape)?;
        if let [_, _, _] = components.as_slice()
            && let Some(extra) = self.by_name.get(format!("{}.row_offsets", self.name).as_str())
        {
            let what = format!("is not a component of {}", self.format.name());
            return Err(self.invalid(extra, what));
        }
        let mut parts = Vec::with_capacity(components.len());
        for component in &components {
            let found = self.component(component.suffix)?;
            let Encoding::Dense { dtype } = found.info.encoding else {
                return Err(self.invalid(found, "is declared to be packed itself".to_owned()));
            };
            if dtype != component.dtype || found.info.shape != component.shape {
                return Err(self.invalid(
                    found,
                    format!(
                        "is {dtype} {:?}; expected {} {:?}",
                        found.info.shape, component.dtype, component.shape
                    ),
                ));
            }
            parts.extend(found.parts.iter().cloned());
        }
        let stored_bytes = components.iter().map(|component| component.bytes).sum();
        Ok(Found { info: TensorInfo { name, encoding, shape, stored_bytes }, parts })
    }

    fn component(&self, suffix: &str) -> Result<&Found> {
        let name = format!("{}{suffix}", self.name);
        self.by_name.get(name.as_str()).copied().ok_or_else(|| FormatError::InvalidTensor {
            path: self.any_path().to_owned(),
            name: format!("{}.weight", self.name),
            what: format!("its component `{name}` is missing"),
        })
    }

    /// What `.shape` says. Whether the other components agree is checked with their sizes.
    fn shape(&self) -> Result<Vec<usize>> {
        let found = self.component(".shape")?;
        let two_integers = matches!(found.info.encoding, Encoding::Dense { dtype: DType::I64 })
            && found.info.elements() == 2;
        let [(file, range)] = found.parts.as_slice() else {
            return Err(self.invalid(found, "is declared to be packed itself".to_owned()));
        };
        if !two_integers {
            return Err(self.invalid(
                found,
                format!("is {} {:?}; expected two I64", found.info.encoding, found.info.shape),
            ));
        }
        let (numbers, _) = self.files[*file].bytes()[range.clone()].as_chunks::<8>();
        numbers
            .iter()
            .map(|bytes| {
                let number = i64::from_le_bytes(*bytes);
                usize::try_from(number)
                    .map_err(|_| self.invalid(found, format!("holds {number}; expected a length")))
            })
            .collect()
    }

    fn invalid(&self, found: &Found, what: String) -> FormatError {
        let path = match found.parts.first() {
            Some((file, _)) => self.files[*file].path(),
            None => self.any_path(),
        };
        FormatError::InvalidTensor { path: path.to_owned(), name: found.info.name.clone(), what }
    }

    /// The file of some component of the module: one exists.
    fn any_path(&self) -> &Path {
        let names = SUFFIXES.iter().map(|suffix| format!("{}{suffix}", self.name));
        let mut found = names.filter_map(|name| self.by_name.get(name.as_str()).copied());
        let file = found.find_map(|found| found.parts.first()).map_or(0, |(file, _)| *file);
        self.files[file].path()
    }
}

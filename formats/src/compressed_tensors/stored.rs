//! The stored tensors of a directory, found by name, and what is wrong with them.

use std::{collections::HashMap, ops::Range, path::Path};

use crate::{Component, DType, Encoding, FormatError, MappedFile, Result, TensorInfo};

/// A tensor, and for each of its components the number of its file and its bytes there.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) info: TensorInfo,
    pub(crate) parts: Vec<(usize, Range<usize>)>,
}

/// All stored tensors, whichever files they are in.
pub(super) struct Stored<'a> {
    files: &'a [MappedFile],
    by_name: HashMap<&'a str, &'a Found>,
}

impl<'a> Stored<'a> {
    pub(super) fn new(files: &'a [MappedFile], tensors: &'a [Found]) -> Self {
        let by_name = tensors.iter().map(|found| (found.info.name.as_str(), found)).collect();
        Self { files, by_name }
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a Found> {
        self.by_name.get(name).copied()
    }

    /// The weight of `module` as `encoding` in the place of `first`, one of its components.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] for a component that is missing, or of another type or shape.
    pub(super) fn weight(
        &self,
        module: &str,
        first: &Found,
        encoding: Encoding,
        shape: Vec<usize>,
    ) -> Result<Found> {
        let name = format!("{module}.weight");
        let components = encoding.components(&name, &shape).map_err(|error| match error {
            FormatError::Encoding { name, what } => {
                FormatError::InvalidTensor { path: self.path(first).to_owned(), name, what }
            }
            other => other,
        })?;
        let mut parts = Vec::with_capacity(components.len());
        for component in &components {
            let found = self.component(module, component.suffix, first)?;
            self.check(found, component)?;
            parts.extend(found.parts.iter().cloned());
        }
        let stored_bytes = components.iter().map(|component| component.bytes).sum();
        Ok(Found { info: TensorInfo { name, encoding, shape, stored_bytes }, parts })
    }

    /// `MODULE.suffix`. `beside` is another component, whose file the message names.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] when there is none.
    pub(super) fn component(
        &self,
        module: &str,
        suffix: &str,
        beside: &Found,
    ) -> Result<&'a Found> {
        let name = format!("{module}{suffix}");
        self.get(&name).ok_or_else(|| FormatError::InvalidTensor {
            path: self.path(beside).to_owned(),
            name: format!("{module}.weight"),
            what: format!("its component `{name}` is missing"),
        })
    }

    fn check(&self, found: &Found, component: &Component) -> Result<()> {
        let dtype = self.dtype(found)?;
        if dtype == component.dtype && found.info.shape == component.shape {
            return Ok(());
        }
        Err(self.invalid(
            found,
            format!(
                "is {dtype} {:?}; expected {} {:?}",
                found.info.shape, component.dtype, component.shape
            ),
        ))
    }

    /// The element type of a component.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] for one that is packed itself.
    pub(super) fn dtype(&self, found: &Found) -> Result<DType> {
        match found.info.encoding {
            Encoding::Dense { dtype } => Ok(dtype),
            _ => Err(self.invalid(found, "is declared to be packed itself".to_owned())),
        }
    }

    /// What a component with the shape of a matrix says. Whether the others agree is checked with their
    /// sizes.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] for anything but two lengths.
    pub(super) fn shape(&self, found: &Found) -> Result<Vec<usize>> {
        let two_integers = self.dtype(found)? == DType::I64 && found.info.elements() == 2;
        let ([(file, range)], true) = (found.parts.as_slice(), two_integers) else {
            return Err(self.invalid(
                found,
                format!("is {} {:?}; expected two I64", found.info.encoding, found.info.shape),
            ));
        };
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

    pub(super) fn invalid(&self, found: &Found, what: String) -> FormatError {
        FormatError::InvalidTensor {
            path: self.path(found).to_owned(),
            name: found.info.name.clone(),
            what,
        }
    }

    fn path(&self, found: &Found) -> &'a Path {
        // A tensor that was found has parts, and its file was opened.
        self.files[found.parts.first().map_or(0, |(file, _)| *file)].path()
    }
}

/// Replaces each first component by its weight, and drops the others.
pub(super) fn replace(
    tensors: Vec<Found>,
    mut weights: HashMap<String, Found>,
    is_component: impl Fn(&str) -> bool,
) -> Vec<Found> {
    let mut out = Vec::with_capacity(tensors.len());
    for found in tensors {
        match weights.remove(&found.info.name) {
            Some(weight) => out.push(weight),
            None if !is_component(&found.info.name) => out.push(found),
            None => {}
        }
    }
    out
}

//! Directories of compressed-tensors, whose `config.json` says how the weights of modules are stored.
//!
//! * Quantized weights (`pack-quantized`, `int-quantized`, `float-quantized`), as release 0.20 reads and
//!   writes them: `config_groups` say which modules have how many bits. The bytes are those of
//!   [`Encoding::CtPackQuantized`](crate::Encoding::CtPackQuantized),
//!   [`Encoding::CtIntQuantized`](crate::Encoding::CtIntQuantized) and
//!   [`Encoding::CtFloatQuantized`](crate::Encoding::CtFloatQuantized).
//! * Sparse weights (`sparse-24-bitmask`, `sparse-bitmask`), as releases 0.9 to 0.14.0.1 wrote and read
//!   them; 0.15.0 removed both:
//!
//!   ```text
//!   "quantization_config": { "quant_method": "compressed-tensors", "version": "0.14.0.1",
//!     "sparsity_config": { "format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"],
//!                          "global_sparsity": 0.5, "sparsity_structure": "2:4",
//!                          "registry_requires_subclass": false } }
//!   ```
//!
//!   `MODULE.compressed`, `MODULE.bitmask`, `MODULE.shape` (and `MODULE.row_offsets`) stand where
//!   `MODULE.weight` was; which modules those are follows from the names alone. The bytes are those of
//!   [`Encoding::CtSparse24Bitmask`](crate::Encoding::CtSparse24Bitmask) and
//!   [`Encoding::CtSparseBitmask`](crate::Encoding::CtSparseBitmask).

mod components;
mod config;
mod quantized;
mod scheme;
mod stored;

use std::path::Path;

use serde_json::Value;

use self::scheme::Schemes;
pub(crate) use self::stored::Found;
pub use self::{
    config::{SparseFormat, is_foreign},
    scheme::quantization_config,
};
use crate::{MappedFile, Result};

/// How the weights of a directory are stored.
#[derive(Debug)]
pub(crate) enum Storage {
    Plain,
    Sparse(SparseFormat),
    Quantized(Schemes),
}

impl Storage {
    /// What a configuration says; `path` is its own, for messages.
    ///
    /// # Errors
    /// [`FormatError::InvalidHeader`](crate::FormatError::InvalidHeader) for a format that is not known.
    pub(crate) fn from_config(path: &Path, config: &Value) -> Result<Self> {
        if let Some(schemes) = Schemes::from_config(path, config)? {
            return Ok(Self::Quantized(schemes));
        }
        Ok(SparseFormat::from_config(path, config)?.map_or(Self::Plain, Self::Sparse))
    }

    /// Puts the components among `tensors` together.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`](crate::FormatError::InvalidTensor) for components that do not make
    /// a weight.
    pub(crate) fn join(&self, files: &[MappedFile], tensors: Vec<Found>) -> Result<Vec<Found>> {
        match self {
            Self::Plain => Ok(tensors),
            Self::Sparse(format) => components::join(*format, files, tensors),
            Self::Quantized(schemes) => quantized::join_quantized(schemes, files, tensors),
        }
    }
}

//! The sparse formats of compressed-tensors, as its releases 0.9 to 0.14.0.1 wrote and read them.
//!
//! A directory says in `config.json` that the weights of some modules are packed:
//!
//! ```text
//! "quantization_config": { "quant_method": "compressed-tensors", "version": "0.14.0.1",
//!   "sparsity_config": { "format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"],
//!                        "global_sparsity": 0.5, "sparsity_structure": "2:4",
//!                        "registry_requires_subclass": false } }
//! ```
//!
//! and stores `MODULE.compressed`, `MODULE.bitmask`, `MODULE.shape` (and `MODULE.row_offsets`) where
//! `MODULE.weight` was. Which modules those are follows from the names alone. The bytes are those of
//! [`Encoding::CtSparse24Bitmask`](crate::Encoding::CtSparse24Bitmask) and
//! [`Encoding::CtSparseBitmask`](crate::Encoding::CtSparseBitmask). Release 0.15.0 removed both formats.

mod components;
mod config;

pub(crate) use components::{Found, join};
pub use config::{SparseFormat, is_quantized};

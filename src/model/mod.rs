//! What a checkpoint is as a model: its architecture, dimensions, tensors by Hugging Face name,
//! and tokenizer.
//!
//! Invariant: once a [`ModelSource`] is open, every tensor that the forward pass needs exists with
//! the shape that [`ModelConfig`] says, whatever the container and naming of the file.

pub mod arch;
mod block;
pub mod config;
mod embed;
mod error;
mod gguf;
mod outline;
mod roles;
pub mod rope;
mod row_order;
mod sliced;
pub mod source;
pub mod tokenizer;

pub use arch::{Architecture, MlpKind, NormKind};
pub use block::{Activations, Block, BlockGeometry, Linears, Norm};
pub use config::ModelConfig;
pub use embed::embed;
pub use error::{ModelError, Result};
pub use gguf::{GgufSummary, gguf_metadata};
pub use roles::{CapturePoint, Role, Space};
pub(crate) use row_order::hf_row;
pub use row_order::{from_gguf_rows, to_gguf_rows};
pub use sliced::{SLICED_CODE, SLICED_CODE_FILE, SlicedModel};
pub use source::{GGUF_ROPE_FACTORS, GgufTensor, LayerNames, ModelSource, ModelTensor, TensorKind};
pub use tokenizer::{Sidecar, SidecarContent, Tokenizer, sidecars};

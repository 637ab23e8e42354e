//! What a checkpoint is worth: perplexity on a text, by the protocol everybody uses.

mod logits;
mod perplexity;

pub use logits::{LmHead, logits};
pub use perplexity::{Perplexity, PerplexityJob};

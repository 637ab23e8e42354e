//! What a checkpoint is worth: perplexity on a text, by the protocol everybody uses.

mod perplexity;

pub use perplexity::{Perplexity, PerplexityJob};

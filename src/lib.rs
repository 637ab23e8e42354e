//! Streaming converter and packer for LLM checkpoints.

pub mod backend;

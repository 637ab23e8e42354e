//! Streaming converter and packer for LLM checkpoints.

pub mod backend;
pub mod calibration;
pub mod model;

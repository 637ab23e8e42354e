//! Integration tests: one crate, one module per subject.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]
#![allow(clippy::print_stdout, reason = "tests print what they measure and what they skip")]

mod bench;
mod cli;
#[cfg(all(unix, feature = "cuda"))]
mod cuda;
mod foreign;
mod gguf;
mod harness;
mod layering;
mod malformed;
mod matrix;
mod memory;
mod parity;
mod pipeline;
mod quality;
mod quantize;
mod resume;
mod slice;
mod zst;

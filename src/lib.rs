//! Streaming converter and packer for LLM checkpoints.
//!
//! ```text
//! checkpoint ─▶ ModelSource ─▶ ConversionPlan ─▶ loop over blocks ─▶ shards + manifest
//!                   recipe ────────▲                load, capture, solve, pack
//!        calibration text ─▶ CalibrationSet ─────────────▲
//! ```
//!
//! * [`model::ModelSource::open`] maps a Hugging Face directory, a GGUF file or a packed output.
//! * [`recipe::Recipe`] says what to do; [`pipeline::ConversionPlan::new`] decides every byte range
//!   before tensor data is read.
//! * [`pipeline::convert`] runs the plan block by block; [`pipeline::verify`],
//!   [`pipeline::unpack`] and [`eval::PerplexityJob`] look at the result.
//!
//! Reading order for newcomers: `pipeline/run.rs`, `pipeline/stages.rs`, `compress/obs.rs`,
//! then `encoding/sparse24.rs` in the formats crate.

pub mod backend;
pub mod calibration;
pub mod cli;
pub mod compress;
pub mod eval;
pub mod model;
pub mod pipeline;
pub mod recipe;

//! `sparsepack inspect`.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use serde::Serialize;
use sparsepack_formats::{CheckpointReader, Encoding, encoding::MatrixShape};

use super::{CliError, Status, render};
use crate::model::{ModelSource, TensorKind};

/// Groups that are looked for, sparsest first: the first that fits is reported.
const PATTERNS: [(usize, usize); 5] = [(1, 4), (2, 4), (4, 8), (8, 16), (6, 8)];

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Directory with config.json and safetensors, a .gguf file, or a packed output.
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// Headers only: no sparsity and no pattern.
    #[arg(long)]
    headers: bool,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

/// One tensor.
#[derive(Debug, Serialize)]
pub(super) struct TensorSummary {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
    pub(super) stored_bytes: u64,
    /// Share of zeros; absent with `--headers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sparsity: Option<f64>,
    /// The sparsest n:m pattern that every row obeys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pattern: Option<String>,
}

impl TensorSummary {
    /// What the headers say of a tensor.
    fn new(name: &str, encoding: Encoding, shape: &[usize], stored_bytes: u64) -> Self {
        Self {
            name: name.to_owned(),
            encoding,
            shape: shape.to_vec(),
            stored_bytes,
            sparsity: None,
            pattern: None,
        }
    }
}

/// A whole checkpoint.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    pub(super) architecture: Option<String>,
    pub(super) blocks: Option<usize>,
    pub(super) hidden_size: Option<usize>,
    pub(super) vocab_size: Option<usize>,
    pub(super) parameters: u64,
    pub(super) stored_bytes: u64,
    /// Share of zeros in the linears of the decoder blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) linear_sparsity: Option<f64>,
    pub(super) tensors: Vec<TensorSummary>,
}

pub(super) fn run(args: &InspectArgs) -> Result<Status, CliError> {
    let summary = match ModelSource::open(&args.model) {
        Ok(source) => summarise_model(&source, args.headers)?,
        // Tensors without a model around them can still be listed.
        Err(crate::model::ModelError::NoConfig { .. }) => {
            let reader = sparsepack_formats::open(&args.model)?;
            summarise_tensors(reader.as_ref(), args.headers)?
        }
        Err(error) => return Err(error.into()),
    };
    if args.json {
        render::json(&summary)?;
    } else {
        render::inspect(&args.model, &summary)?;
    }
    Ok(Status::Done)
}

fn summarise_model(source: &ModelSource, headers: bool) -> Result<Summary, CliError> {
    let (mut zeros, mut weights) = (0.0, 0.0);
    let mut tensors = Vec::new();
    for tensor in source.tensors() {
        let mut summary =
            TensorSummary::new(&tensor.name, tensor.encoding, &tensor.shape, tensor.stored_bytes);
        if !headers && tensor.encoding.value_dtype().is_float_weight() {
            let values = source.read_f32(&tensor.name)?;
            look_inside(&mut summary, &values);
            if matches!(tensor.kind, TensorKind::Linear { .. }) {
                zeros += summary.sparsity.unwrap_or(0.0) * values.len() as f64;
                weights += values.len() as f64;
            }
            source.reader().release(&[&tensor.stored_name]);
        }
        tensors.push(summary);
    }
    let config = source.config();
    Ok(Summary {
        architecture: Some(source.arch().name.clone()),
        blocks: Some(config.num_hidden_layers),
        hidden_size: Some(config.hidden_size),
        vocab_size: Some(config.vocab_size),
        linear_sparsity: (weights > 0.0).then(|| zeros / weights),
        ..totals(tensors)
    })
}

fn summarise_tensors(reader: &dyn CheckpointReader, headers: bool) -> Result<Summary, CliError> {
    let mut tensors = Vec::new();
    for info in reader.tensors() {
        let mut summary =
            TensorSummary::new(&info.name, info.encoding, &info.shape, info.stored_bytes);
        if !headers && info.encoding.value_dtype().is_float_weight() {
            look_inside(&mut summary, &reader.read_f32(&info.name)?);
            reader.release(&[&info.name]);
        }
        tensors.push(summary);
    }
    Ok(totals(tensors))
}

fn totals(tensors: Vec<TensorSummary>) -> Summary {
    let elements = |shape: &[usize]| shape.iter().map(|&n| n as u64).product::<u64>();
    Summary {
        architecture: None,
        blocks: None,
        hidden_size: None,
        vocab_size: None,
        parameters: tensors.iter().map(|tensor| elements(&tensor.shape)).sum(),
        stored_bytes: tensors.iter().map(|tensor| tensor.stored_bytes).sum(),
        linear_sparsity: None,
        tensors,
    }
}

fn look_inside(summary: &mut TensorSummary, values: &[f32]) {
    let zeros = values.iter().filter(|&&value| value == 0.0).count();
    summary.sparsity = Some(zeros as f64 / values.len().max(1) as f64);
    if summary.shape.len() < 2 || zeros == 0 {
        return;
    }
    let cols = MatrixShape::of(&summary.shape).cols;
    let fits = |&(n, m): &(usize, usize)| {
        cols.is_multiple_of(m)
            && values.chunks(m).all(|group| group.iter().filter(|v| **v != 0.0).count() <= n)
    };
    summary.pattern =
        PATTERNS.iter().find(|pattern| fits(pattern)).map(|(n, m)| format!("{n}:{m}"));
}

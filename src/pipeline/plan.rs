//! The plan: every output byte range, every layer's target and the peak memory, from headers and
//! recipe alone. No tensor data is read, but for a packed output with nothing to prune: then the
//! source's matrices are scanned for the zeros they have.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use sparsepack_formats::{
    Encoding, FormatError, GgmlType, GgufLayout, ShardLayout,
    container::{ContainerLayout, OriginalFile},
    encoding::MatrixShape,
};

use super::{
    archive,
    budget::MemoryBudget,
    encodings::{Encodings, Scan},
    error::{PipelineError, Result},
    gguf::{Fallback, GgufPlan},
    quantize::{Grids, Quantization},
    slice::{SliceAccount, Slicing},
    targets::{Targets, Wanted},
};
use crate::{
    calibration::StatKind,
    compress::{Method, Scheme, SolverOptions, Sparsity, check_target},
    model::{CapturePoint, ModelSource, ModelTensor, Role, TensorKind},
    recipe::{
        BlockRange, OutputFormat, OutputRecipe, Recipe, RecipeError, Sequential, SolverRecipe,
        WeightDType,
    },
};

/// A shard is closed before it would grow beyond this by default; a block is never split.
const SHARD_BYTES: u64 = 4 << 30;

/// Calibration tokens beyond which there is a mistake; below, sizes in bytes do not overflow.
const MAX_TOKENS: usize = 1 << 36;

/// How much of a matrix becomes zero, and how that is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Pruning {
    /// How weights are chosen.
    pub method: Method,
    /// What to reach.
    pub sparsity: Sparsity,
}

/// One linear to prune, to quantize, or both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerPlan {
    /// Module name, without `.weight`.
    pub module: String,
    /// What the layer is in its block.
    pub role: Role,
    /// The input it shares with others.
    pub capture: CapturePoint,
    /// `out_features`.
    pub rows: usize,
    /// `in_features`.
    pub cols: usize,
    /// What becomes zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prune: Option<Pruning>,
    /// What weights are rounded to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantization>,
    /// The block type that was asked for in a GGUF output; the grid is that of another where rows are
    /// not whole blocks, and absent where that is no block type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_type: Option<GgmlType>,
    /// The source's zeros were made by pruning, and stay.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub keep_zeros: bool,
}

impl LayerPlan {
    /// What calibration must collect for the layer.
    pub fn needs(&self) -> StatKind {
        let prune = self.prune.map_or(StatKind::None, |prune| prune.method.needs());
        prune.max(self.quantize.map_or(StatKind::None, |quantize| quantize.method.needs()))
    }

    /// How often a Hessian is factorised and the layer swept, if at all: twice where it is pruned
    /// before its columns are rounded in another order.
    pub(super) fn sweeps(&self) -> u8 {
        let act_order = self.quantize.is_some_and(|quantize| quantize.act_order);
        if self.prune.is_some() && act_order { 2 } else { 1 }
    }
}

/// A matrix outside the blocks (output matrix, embeddings) to prune. Its inputs are not captured,
/// so only methods that look at weights alone can.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TablePlan {
    /// Module name, without `.weight`.
    pub module: String,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// What becomes zero.
    pub prune: Pruning,
}

/// One decoder block.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BlockPlan {
    /// Its number.
    pub index: usize,
    /// Its linears to prune or quantize; the others stay as they are.
    pub layers: Vec<LayerPlan>,
}

impl BlockPlan {
    /// The layers to solve whose input is `point`.
    pub fn layers_at(&self, point: CapturePoint) -> impl Iterator<Item = &LayerPlan> {
        self.layers.iter().filter(move |layer| layer.capture == point)
    }

    /// What calibration must collect at `point`.
    pub fn needs_at(&self, point: CapturePoint) -> StatKind {
        self.layers_at(point).map(LayerPlan::needs).max().unwrap_or(StatKind::None)
    }

    /// The most that any point needs.
    pub fn needs(&self) -> StatKind {
        self.layers.iter().map(LayerPlan::needs).max().unwrap_or(StatKind::None)
    }
}

/// One tensor to write.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OutputTensor {
    /// Hugging Face name.
    pub name: String,
    /// Name in the container, where that is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_name: Option<String>,
    /// How it is stored.
    #[serde(flatten)]
    pub encoding: Encoding,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Bytes of all components, before compression.
    pub bytes: u64,
    /// The decoder block it belongs to.
    pub block: Option<usize>,
    /// Its role when it is a linear's weight, which the block loop writes.
    pub linear: Option<Role>,
    /// Heads whose rows are stored in the order of ggml's interleaved rope.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub permuted_heads: Option<usize>,
}

impl OutputTensor {
    /// Name in the container.
    pub fn stored_name(&self) -> &str {
        self.stored_name.as_deref().unwrap_or(&self.name)
    }

    /// A tensor under its own name.
    pub(super) fn new(tensor: &ModelTensor, encoding: Encoding) -> Result<Self> {
        Ok(Self {
            name: tensor.name.clone(),
            stored_name: None,
            encoding,
            shape: tensor.shape.clone(),
            bytes: super::encodings::stored_bytes(tensor, encoding)?,
            block: tensor.kind.block(),
            linear: match tensor.kind {
                TensorKind::Linear { role, .. } => Some(role),
                _ => None,
            },
            permuted_heads: None,
        })
    }
}

/// What a conversion will do.
#[derive(Debug, Clone, Serialize)]
pub struct ConversionPlan {
    /// The recipe with every default filled in.
    pub recipe: Recipe,
    /// What slicing saves and costs, where the model is sliced first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<SliceAccount>,
    #[serde(skip)]
    pub(super) slicing: Option<Arc<Slicing>>,
    /// Container of the output.
    pub format: OutputFormat,
    /// Order of capture and solving.
    pub sequential: Sequential,
    /// Every decoder block.
    pub blocks: Vec<BlockPlan>,
    /// Matrices outside the blocks to prune.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<TablePlan>,
    /// Tensors in output order.
    pub outputs: Vec<OutputTensor>,
    /// What was read of the source to choose encodings; absent where the recipe decides them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scan: Option<Scan>,
    /// Memory at the peak, by purpose.
    pub budget: MemoryBudget,
    /// Bytes of tensor data that will be written; at most, where they are compressed.
    pub output_bytes: u64,
    /// Bytes of tensor data in the source.
    pub source_bytes: u64,
    /// Floating-point operations of the conversion.
    pub flops: f64,
    /// Tensors of a GGUF output that get another type than the one asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fallbacks: Vec<Fallback>,
    #[serde(skip)]
    gguf: Option<GgufPlan>,
    /// Whether the output keeps every file of the source, to be restored byte for byte, so that
    /// tensors are copied as they are and not looked at.
    pub archive: bool,
    /// What a compressed output can restore.
    #[serde(skip)]
    originals: Vec<OriginalFile>,
    #[serde(skip)]
    shard_starts: Vec<usize>,
    #[serde(skip)]
    solver: SolverOptions,
}

impl ConversionPlan {
    /// Plans a conversion of `source`.
    ///
    /// # Errors
    /// A selector that matches nothing, a pattern that does not fit a layer, a format that cannot
    /// hold the result, options that contradict each other; a source that is scanned and cannot be
    /// read.
    pub fn new(source: &ModelSource, recipe: &Recipe) -> Result<Self> {
        let Some(slice) = &recipe.slice else { return Self::of(source, recipe) };
        let slicing = Slicing::new(source, recipe, slice)?;
        let mut plan = Self::of(&slicing.outline, recipe)?;
        plan.source_bytes = slicing.before.bytes;
        plan.budget = plan.budget.or_larger(slicing.budget);
        plan.flops += slicing.flops;
        plan.recipe.slice = Some(slicing.recipe.clone());
        plan.slice = Some(slicing.account(source, &plan.outputs));
        plan.slicing = Some(Arc::new(slicing));
        Ok(plan)
    }

    /// The plan of what is done to a model that is not sliced any more.
    fn of(source: &ModelSource, recipe: &Recipe) -> Result<Self> {
        if recipe.budget.is_some() {
            return Err(contradiction(
                "a size budget is resolved by measuring every layer, which `convert` does".into(),
            ));
        }
        let config = source.config();
        let format = recipe.output.format.unwrap_or(OutputFormat::Safetensors);
        check_output(&recipe.output, format)?;
        let solver = solver_options(recipe)?;
        let (blocks, tables) = plan_layers(source, recipe, format)?;
        let needs = blocks.iter().map(BlockPlan::needs).max().unwrap_or(StatKind::None);
        check_solver(recipe, needs)?;
        check_calibration(recipe, needs, config.max_position_embeddings)?;
        let level = archive::level(recipe, format)?;
        let archived = archive::source_files(source, recipe, format)?;
        let (outputs, scan, gguf) = if format == OutputFormat::Gguf {
            let (outputs, gguf) = super::gguf::plan(source, recipe, &blocks, &tables)?;
            (outputs, None, Some(gguf))
        } else if archived.is_some() {
            (archive::outputs(source)?, None, None)
        } else {
            let (blocks, tables) = (&blocks, &tables);
            let encodings = Encodings { source, recipe, format, blocks, tables, solver };
            let (outputs, scan) = encodings.plan()?;
            (outputs, scan, None)
        };
        super::support::check(format, &outputs)?;
        let default = if format == OutputFormat::Gguf { u64::MAX } else { SHARD_BYTES };
        let shard_starts = plan_shards(&outputs, recipe.output.shard_size.unwrap_or(default));
        let output_bytes = archive::output_bytes(&outputs, format)?;
        let source_bytes = source.tensors().iter().map(|tensor| tensor.stored_bytes).sum();
        let sequential = recipe.solver.sequential.unwrap_or_default();
        let mut resolved = recipe.clone();
        resolved.output.format = Some(format);
        resolved.output.level = level;
        resolved.solver = resolved_solver(&recipe.solver, needs);
        let mut plan = Self {
            budget: MemoryBudget::new(source, &blocks, &outputs, sequential, &recipe.calibration),
            flops: super::budget::conversion_flops(source, &blocks, &recipe.calibration),
            recipe: resolved,
            slice: None,
            slicing: None,
            format,
            sequential,
            solver,
            blocks,
            tables,
            outputs,
            scan,
            output_bytes,
            source_bytes,
            fallbacks: gguf.as_ref().map_or_else(Vec::new, |gguf| gguf.fallbacks.clone()),
            gguf,
            archive: archived.is_some(),
            originals: archived.unwrap_or_default(),
            shard_starts,
        };
        if plan.format == OutputFormat::Zst && !plan.archive {
            plan.originals = OriginalFile::of_shards(source.path(), &plan.shards())?;
        }
        Ok(plan)
    }

    /// What a compressed output holds.
    pub fn container(&self) -> ContainerLayout {
        let tensors = self.outputs.iter();
        ContainerLayout {
            tensors: tensors
                .map(|output| (output.name.clone(), output.encoding, output.shape.clone()))
                .collect(),
            files: self.originals.clone(),
        }
    }

    /// Settings of the solvers.
    pub fn solver_options(&self) -> SolverOptions {
        self.solver
    }

    /// The most that any layer needs from calibration.
    pub fn needs(&self) -> StatKind {
        self.blocks.iter().map(BlockPlan::needs).max().unwrap_or(StatKind::None)
    }

    /// Whether block `index` is copied as it is: nothing in it is pruned, and no later block needs its
    /// activations.
    pub fn copies_block(&self, index: usize) -> bool {
        self.blocks.get(index).is_some_and(|block| block.layers.is_empty())
            && self.last_calibrated_block().is_none_or(|last| index > last)
    }

    /// Whether a block is there and is not just copied: it is solved or run.
    pub(super) fn loads_block(&self, index: usize) -> bool {
        index < self.blocks.len() && !self.copies_block(index)
    }

    /// The last block that needs activations; later ones are written without running them.
    pub fn last_calibrated_block(&self) -> Option<usize> {
        self.blocks.iter().rposition(|block| block.needs() > StatKind::None)
    }

    /// Who reads the output, where that is not everyone.
    pub fn readers(&self) -> Option<&'static str> {
        let quantized = self.outputs.iter().any(|output| output.encoding.is_quantized());
        self.format.readers(quantized)
    }

    /// Files of tensors.
    pub fn file_count(&self) -> usize {
        self.shard_starts.len()
    }

    /// The files of a GGUF output.
    pub(super) fn gguf_layout(&self) -> Option<GgufLayout> {
        Some(self.gguf.as_ref()?.layout(&self.outputs, &self.shard_starts))
    }

    /// The safetensors shards, each with its tensors in order.
    pub fn shards(&self) -> Vec<ShardLayout> {
        let ends = self.shard_starts.iter().skip(1).copied().chain([self.outputs.len()]);
        self.shard_starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| ShardLayout {
                tensors: self.outputs[start..end]
                    .iter()
                    .map(|output| (output.name.clone(), output.encoding, output.shape.clone()))
                    .collect(),
                metadata: BTreeMap::new(),
            })
            .collect()
    }

    /// The output called `name`.
    ///
    /// # Errors
    /// There is none: a defect of the caller.
    pub fn output(&self, name: &str) -> Result<&OutputTensor> {
        self.outputs.iter().find(|output| output.name == name).ok_or_else(|| {
            FormatError::Encoding { name: name.to_owned(), what: "is not planned".to_owned() }
                .into()
        })
    }

    /// The planned linear whose weight is the tensor `name`.
    pub fn layer(&self, name: &str) -> Option<&LayerPlan> {
        let module = name.strip_suffix(".weight")?;
        let mut layers = self.blocks.iter().flat_map(|block| &block.layers);
        layers.find(|layer| layer.module == module)
    }

    /// How the tensor `name` is pruned, if it is.
    pub fn pruned(&self, name: &str) -> Option<Pruning> {
        let table = self.table(name).map(|table| table.prune);
        self.layer(name).and_then(|layer| layer.prune).or(table)
    }

    /// The planned matrix outside the blocks whose weight is the tensor `name`.
    pub fn table(&self, name: &str) -> Option<&TablePlan> {
        let module = name.strip_suffix(".weight")?;
        self.tables.iter().find(|table| table.module == module)
    }
}

/// The linears to solve and the tables to prune.
fn plan_layers(
    source: &ModelSource,
    recipe: &Recipe,
    format: OutputFormat,
) -> Result<(Vec<BlockPlan>, Vec<TablePlan>)> {
    let (arch, config) = (source.arch(), source.config());
    let count = config.num_hidden_layers;
    let mut targets = Targets::new(recipe)?;
    let grids = Grids::new(source, recipe, format)?;
    let only = recipe.solver.blocks.as_ref().map(|BlockRange(range)| range);
    if let Some(range) = only.filter(|range| range.end > count) {
        return Err(contradiction(format!(
            "blocks {}..{} were asked for but the model has {count}",
            range.start, range.end
        )));
    }

    let mut blocks = Vec::with_capacity(count);
    for index in 0..count {
        let mut layers = Vec::new();
        for spec in &arch.linears {
            let module = spec.module(index);
            let wanted = targets.of_linear(&module, spec.role, index);
            if only.is_some_and(|range| !range.contains(&index)) {
                continue;
            }
            let Wanted { prune, quantize } = wanted;
            let [rows, cols] = config.linear_shape_in(index, spec.role);
            if prune.is_none() && quantize.is_none() {
                continue;
            }
            let block_type = match quantize.map(|wanted| wanted.scheme) {
                Some(Scheme::Block(ty)) => Some(ty),
                _ => None,
            };
            let sparsity = prune.map(|prune| prune.sparsity);
            let quantize = match quantize {
                Some(quantize) => grids.of_layer(&module, cols, quantize)?,
                None => None,
            };
            let grid = quantize.map(|quantize| quantize.grid);
            check_target(&module, cols, sparsity, grid)?;
            layers.push(LayerPlan {
                keep_zeros: prune.is_none() && grids.was_pruned(&module),
                module,
                role: spec.role,
                capture: spec.capture,
                rows,
                cols,
                prune,
                quantize,
                block_type,
            });
        }
        blocks.push(BlockPlan { index, layers });
    }
    let tables = plan_tables(source, &mut targets)?;
    let example = arch.linears.first().map(|spec| spec.module(0)).unwrap_or_default();
    targets.check_all_matched(&example)?;
    let nothing = tables.is_empty() && blocks.iter().all(|block| block.layers.is_empty());
    if nothing && (recipe.prune.is_some() || recipe.quantize.is_some()) {
        return Err(contradiction("every layer is ignored, so there is nothing to do".into()));
    }
    Ok((blocks, tables))
}

/// The output matrix and the embeddings, where a selector names them. A tied output matrix is the
/// embeddings, and is named as such.
fn plan_tables(source: &ModelSource, targets: &mut Targets<'_>) -> Result<Vec<TablePlan>> {
    let mut tables = Vec::new();
    for tensor in source.tensors() {
        if !matches!(tensor.kind, TensorKind::Embedding | TensorKind::LmHead) {
            continue;
        }
        let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name).to_owned();
        let wanted = targets.of_table(&module);
        if wanted.quantize.is_some() {
            return Err(contradiction(format!(
                "{module}: only linears of the decoder blocks are quantized by a solver; --dtype \
                 chooses the type of this matrix"
            )));
        }
        let Some(prune) = wanted.prune else { continue };
        let MatrixShape { rows, cols } = MatrixShape::of(&tensor.shape);
        if prune.method.needs() > StatKind::None {
            return Err(contradiction(format!(
                "{module}: {} needs the inputs of a layer, which are captured for the linears of \
                 the decoder blocks only; prune it with method magnitude, in a [[rule]] of its own",
                prune.method.name()
            )));
        }
        check_target(&module, cols, Some(prune.sparsity), None)?;
        tables.push(TablePlan { module, rows, cols, prune });
    }
    Ok(tables)
}

fn solver_options(recipe: &Recipe) -> Result<SolverOptions> {
    let options = recipe.solver.options();
    if !(options.damp.is_finite() && options.damp > 0.0) {
        return Err(contradiction(format!(
            "damp is {} (expected a positive number)",
            options.damp
        )));
    }
    if options.column_block == 0 {
        return Err(contradiction("column_block is 0 (expected at least 1)".into()));
    }
    Ok(options)
}

/// Refuses settings of solvers that no layer's method has.
fn check_solver(recipe: &Recipe, needs: StatKind) -> Result<()> {
    let solver = &recipe.solver;
    if solver.blocks.is_some() && recipe.prune.is_none() && recipe.quantize.is_none() {
        return Err(contradiction(
            "blocks says where to prune and quantize, but neither is asked for".into(),
        ));
    }
    if solver.sequential.is_some() && needs == StatKind::None {
        return Err(contradiction(
            "sequential is the order in which inputs of layers are captured, but no layer's method uses \
             them (magnitude and rtn look at weights only)"
                .into(),
        ));
    }
    let of_hessian = [
        ("damp", solver.damp.is_some()),
        ("damping", solver.damping.is_some()),
        ("column_block", solver.column_block.is_some()),
    ];
    match of_hessian.into_iter().find(|(_, given)| *given) {
        Some((what, _)) if needs < StatKind::Hessian => Err(contradiction(format!(
            "{what} is about the Hessian that sparsegpt and gptq solve with, but no layer is solved by \
             either"
        ))),
        _ => Ok(()),
    }
}

/// The settings of solvers that apply, with their defaults filled in.
fn resolved_solver(solver: &SolverRecipe, needs: StatKind) -> SolverRecipe {
    let options = solver.options();
    let hessian = needs == StatKind::Hessian;
    SolverRecipe {
        blocks: solver.blocks.clone(),
        sequential: (needs > StatKind::None).then(|| solver.sequential.unwrap_or_default()),
        damp: hessian.then_some(options.damp),
        damping: hessian.then_some(options.damping),
        column_block: hessian.then_some(options.column_block),
    }
}

/// Settings of the calibration that no text can have, or that nothing asks for.
pub(super) fn check_calibration(
    recipe: &Recipe,
    needs: StatKind,
    max_positions: usize,
) -> Result<()> {
    let calibration = &recipe.calibration;
    match (&calibration.file, needs) {
        (None, StatKind::None) => Ok(()),
        (Some(_), StatKind::None) if recipe.slice.is_none() => Err(contradiction(
            "a calibration text is given, but no layer's method uses one (magnitude and rtn look at \
             weights only)"
                .into(),
        )),
        (None, _) => {
            Err(contradiction("this method needs calibration text: give --calibration FILE".into()))
        }
        (Some(_), _) if calibration.samples == 0 || calibration.seq_len < 2 => {
            Err(contradiction(format!(
                "{} calibration windows of {} tokens (expected at least 1 of at least 2)",
                calibration.samples, calibration.seq_len
            )))
        }
        (Some(_), _) if calibration.seq_len > max_positions => Err(contradiction(format!(
            "calibration windows of {} tokens are longer than the model's \
             max_position_embeddings of {max_positions}",
            calibration.seq_len
        ))),
        (Some(_), _) if calibration.samples > MAX_TOKENS / calibration.seq_len => {
            Err(contradiction(format!(
                "{} calibration windows of {} tokens (expected at most {MAX_TOKENS} tokens in all)",
                calibration.samples, calibration.seq_len
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses a size budget, which is fitted to the source and not to what slicing makes of it.
///
/// # Errors
/// A recipe with both.
pub(super) fn without_budget(recipe: &Recipe) -> Result<()> {
    if recipe.slice.is_some() && recipe.budget.is_some() {
        return Err(contradiction(
            "a size budget is fitted to the model that is there; slice first, and fit the result in a \
             second conversion"
                .into(),
        ));
    }
    Ok(())
}

pub(super) fn contradiction(what: String) -> PipelineError {
    RecipeError::Contradiction { what }.into()
}

/// Options of the output that the format does not have.
fn check_output(output: &OutputRecipe, format: OutputFormat) -> Result<()> {
    if output.shard_size == Some(0) {
        return Err(contradiction("a shard size of 0 bytes holds no tensor".into()));
    }
    if format == OutputFormat::Gguf {
        return Ok(());
    }
    if output.allow_zero_loss {
        return Err(contradiction(
            "--allow-zero-loss is about the block types of GGUF files; give --format gguf".into(),
        ));
    }
    let block_type = output.dtype.filter(|dtype| dtype.dense().is_none());
    match block_type.and_then(WeightDType::ggml) {
        Some(ty) => Err(PipelineError::Unsupported {
            format: format.name(),
            why: format!("{ty} is a block type of GGUF files; give --format gguf"),
        }),
        None => Ok(()),
    }
}

/// First output of every shard. Tensors of one block stay together.
fn plan_shards(outputs: &[OutputTensor], limit: u64) -> Vec<usize> {
    let mut starts = vec![0];
    let mut shard_bytes = 0;
    let mut unit_start = 0;
    while unit_start < outputs.len() {
        let block = outputs[unit_start].block;
        let unit_len = match block {
            None => 1,
            Some(_) => {
                outputs[unit_start..].iter().take_while(|output| output.block == block).count()
            }
        };
        let unit = &outputs[unit_start..unit_start + unit_len];
        let unit_bytes: u64 = unit.iter().map(|output| output.bytes).sum();
        if shard_bytes > 0 && shard_bytes + unit_bytes > limit {
            starts.push(unit_start);
            shard_bytes = 0;
        }
        shard_bytes += unit_bytes;
        unit_start += unit_len;
    }
    starts
}

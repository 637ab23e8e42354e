//! A checkpoint seen as a model: every tensor under its Hugging Face name, in model order, with the
//! shape that the configuration demands, whatever the file calls it.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use sparsepack_formats::encoding::MatrixShape;
use sparsepack_formats::{CheckpointReader, DType, Encoding, ModelMetadata, TensorInfo};

use super::arch::{Architecture, LinearSpec, NormSpec, Positions, TableSpec, in_block};
use super::config::ModelConfig;
use super::error::{ModelError, Result};
use super::outline::Outline;
use super::roles::{CapturePoint, Role};
use super::row_order::{from_gguf_rows, stored_row};
use super::sliced::SlicedModel;

/// Buffers that older checkpoints carry and no model reads.
const LEGACY_BUFFERS: [&str; 3] =
    [".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias"];

/// Where 8-bit checkpoints keep the scales of a module's weight.
const F8_SCALES: [&str; 3] = [".weight_scale", ".weight_scale_inv", ".scale_weight"];

/// Divisors of the rotary frequencies in a GGUF file. Hugging Face files have a setting instead.
pub const GGUF_ROPE_FACTORS: &str = "rope_freqs.weight";

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorKind {
    /// Token embeddings.
    Embedding,
    /// Learned position embeddings.
    Positions,
    /// Weight of a linear.
    Linear {
        /// Its block.
        block: usize,
        /// What it does.
        role: Role,
    },
    /// Bias of a linear.
    LinearBias {
        /// Its block.
        block: usize,
        /// What the linear does.
        role: Role,
    },
    /// Gain or bias of a norm of a block.
    BlockNorm {
        /// Its block.
        block: usize,
    },
    /// Matrix on a shortcut of a sliced model.
    Shortcut {
        /// Its block.
        block: usize,
        /// The linears past which it leads.
        past: CapturePoint,
    },
    /// Gain or bias of the norm after the last block.
    FinalNorm,
    /// Output matrix that is not tied.
    LmHead,
    /// Bias of the output matrix.
    LmHeadBias,
    /// A tensor that the forward pass does not read.
    Other,
}

impl TensorKind {
    /// The block that the tensor belongs to.
    pub fn block(self) -> Option<usize> {
        match self {
            Self::Linear { block, .. }
            | Self::LinearBias { block, .. }
            | Self::Shortcut { block, .. }
            | Self::BlockNorm { block } => Some(block),
            _ => None,
        }
    }
}

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelTensor {
    /// Hugging Face name.
    pub name: String,
    /// Name in the file.
    pub stored_name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub encoding: Encoding,
    /// Bytes of all stored components together.
    pub stored_bytes: u64,
    /// What it is for.
    pub kind: TensorKind,
    /// Heads whose rows this file stores in the order of ggml's interleaved rope: a GGUF file's q and
    /// k. Such a tensor's stored bytes are not those of the Hugging Face tensor.
    pub permuted_heads: Option<usize>,
    /// What a GGUF file makes of it, where GGUF has this family and this tensor.
    pub gguf: Option<GgufTensor>,
}

/// A tensor's place in GGUF files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name.
    pub name: String,
    /// Heads whose rows are in the order of ggml's interleaved rope.
    pub permuted_heads: Option<usize>,
}

/// Hugging Face names of a linear's or norm's tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerNames {
    /// Weight or gain.
    pub weight: String,
    /// Bias, if it has one.
    pub bias: Option<String>,
}

/// A checkpoint seen as a model.
#[derive(Debug)]
pub struct ModelSource {
    reader: Box<dyn CheckpointReader>,
    arch: &'static Architecture,
    config: ModelConfig,
    tensors: Vec<ModelTensor>,
    ignored: Vec<ModelTensor>,
    by_name: HashMap<String, usize>,
}

impl ModelSource {
    /// Opens a checkpoint directory, safetensors file or GGUF file and checks that it holds every
    /// tensor of its model. Reads headers only (and the rotary factors of a GGUF file).
    ///
    /// # Errors
    /// Any defect of the file, its configuration or its tensors, by name.
    pub fn open(path: &Path) -> Result<Self> {
        Self::over(sparsepack_formats::open(path)?)
    }

    /// The sliced form of this model as a plan sees it, with tensors of `dtype` and without data.
    /// Files beside the weights are taken from `directory`.
    ///
    /// # Errors
    /// A size that overflows.
    pub fn outline(&self, sliced: &SlicedModel, dtype: DType, directory: &Path) -> Result<Self> {
        let metadata = ModelMetadata::HuggingFace {
            config: sliced.json.clone(),
            directory: directory.to_owned(),
        };
        let tensors = sliced.tensors.iter();
        let tensors = tensors
            .map(|(name, shape, _)| (name.clone(), Encoding::Dense { dtype }, shape.clone()));
        Self::over(Box::new(Outline::new(self.path(), metadata, tensors)?))
    }

    fn over(reader: Box<dyn CheckpointReader>) -> Result<Self> {
        let (arch, config) = describe(reader.as_ref()).map_err(|source| match source {
            ModelError::NoConfig { .. } | ModelError::Format(_) => source,
            other => ModelError::Config { path: reader.path().to_owned(), source: Box::new(other) },
        })?;
        let gguf = matches!(reader.metadata(), ModelMetadata::Gguf(_));
        let mut listing = Listing {
            reader: reader.as_ref(),
            arch,
            config: &config,
            gguf,
            used: HashSet::new(),
            tensors: Vec::new(),
            ignored: Vec::new(),
        };
        listing.add_model()?;
        listing.add_others()?;
        let Listing { tensors, ignored, .. } = listing;
        let by_name =
            tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Ok(Self { reader, arch, config, tensors, ignored, by_name })
    }

    /// The reader underneath, for stored bytes and file names.
    pub fn reader(&self) -> &dyn CheckpointReader {
        self.reader.as_ref()
    }

    /// Where the checkpoint was opened from.
    pub fn path(&self) -> &Path {
        self.reader.path()
    }

    /// The family of the model.
    pub fn arch(&self) -> &'static Architecture {
        self.arch
    }

    /// The dimensions of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Every tensor in model order: embeddings, blocks, final norm, output matrix, then what the
    /// forward pass does not read.
    pub fn tensors(&self) -> &[ModelTensor] {
        &self.tensors
    }

    /// Tensors of a Hugging Face checkpoint that are not part of the model: old buffers, and a stored
    /// copy of a tied output matrix. Only an archive keeps them.
    pub fn ignored(&self) -> &[ModelTensor] {
        &self.ignored
    }

    /// The tensors of one block, in order.
    pub fn block_tensors(&self, block: usize) -> impl Iterator<Item = &ModelTensor> {
        self.tensors.iter().filter(move |tensor| tensor.kind.block() == Some(block))
    }

    /// The tensor with this Hugging Face name.
    ///
    /// # Errors
    /// [`ModelError::UnknownTensor`].
    pub fn tensor(&self, name: &str) -> Result<&ModelTensor> {
        self.by_name.get(name).map(|i| &self.tensors[*i]).ok_or_else(|| ModelError::UnknownTensor {
            path: self.path().to_owned(),
            tensor: name.to_owned(),
        })
    }

    /// Names of a linear of a block, or `None` for a role that the family does not have.
    pub fn linear(&self, block: usize, role: Role) -> Option<LayerNames> {
        let linear = self.arch.linear(role)?;
        let bias = self.config.has_bias(role).then(|| linear.bias(block));
        Some(LayerNames { weight: linear.weight(block), bias })
    }

    /// Names of the norm before attention.
    pub fn attn_norm(&self, block: usize) -> LayerNames {
        norm_names(&self.arch.attn_norm, block)
    }

    /// Names of the norm before the MLP.
    pub fn mlp_norm(&self, block: usize) -> LayerNames {
        norm_names(&self.arch.mlp_norm, block)
    }

    /// Names of the norm after the last block.
    pub fn final_norm(&self) -> LayerNames {
        norm_names(&self.arch.final_norm, 0)
    }

    /// Name of the matrix on the shortcut past the linears of `point`, of a sliced model.
    pub fn shortcut(&self, block: usize, point: CapturePoint) -> Option<String> {
        let names = self.arch.shortcuts.as_ref()?;
        let name = match point {
            CapturePoint::AttnOut => &names.attn,
            CapturePoint::MlpHidden => &names.mlp,
            CapturePoint::AttnIn | CapturePoint::MlpIn => return None,
        };
        Some(in_block(name, block) + ".weight")
    }

    /// Name of the bias of the output matrix, if it has one.
    pub fn lm_head_bias(&self) -> Option<String> {
        self.arch.lm_head_bias.then(|| format!("{}.bias", self.arch.lm_head.name))
    }

    /// Name of the output matrix: the embeddings' where they are tied.
    pub fn lm_head(&self) -> String {
        if self.config.tie_word_embeddings {
            self.arch.embed.weight()
        } else {
            self.arch.lm_head.weight()
        }
    }

    /// The divisors of the rotary frequencies that a GGUF file of this model holds, if any.
    pub fn rope_factors(&self) -> Option<Vec<f32>> {
        self.config.rope.as_ref()?.gguf_factors(self.config.head_dim)
    }

    /// Decodes a tensor to f32, row-major, its rows in Hugging Face order.
    ///
    /// # Errors
    /// [`ModelError::UnknownTensor`]; data that does not decode.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        let stored = self.reader.read_f32(&tensor.stored_name)?;
        Ok(match tensor.permuted_heads {
            None => stored,
            Some(heads) => from_gguf_rows(&stored, &tensor.shape, heads),
        })
    }

    /// Element type and bytes of a tensor that is stored as its plain values, in the order of the Hugging
    /// Face tensor; `None` of one that has to be decoded.
    ///
    /// # Errors
    /// [`ModelError::UnknownTensor`]; data that does not decompress.
    pub fn plain_values(&self, name: &str) -> Result<Option<(DType, Cow<'_, [u8]>)>> {
        let tensor = self.tensor(name)?;
        let Encoding::Dense { dtype } = tensor.encoding else { return Ok(None) };
        if tensor.permuted_heads.is_some() || !dtype.is_float_weight() {
            return Ok(None);
        }
        let mut parts = self.reader.components(&tensor.stored_name)?;
        Ok(parts.pop().map(|bytes| (dtype, bytes)))
    }

    /// Decodes a range of a matrix's rows to f32 without touching the others. A vector is a column.
    ///
    /// # Errors
    /// [`ModelError::UnknownTensor`], [`ModelError::RowOutOfRange`]; data that does not decode.
    pub fn read_rows_f32(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        if tensor.shape.len() < 2 {
            let all = self.read_f32(name)?;
            let values = all.get(rows.clone());
            return values
                .map(<[f32]>::to_vec)
                .ok_or_else(|| self.out_of_range(tensor, all.len(), &rows));
        }
        let matrix = MatrixShape::of(&tensor.shape);
        if rows.end > matrix.rows || rows.start > rows.end {
            return Err(self.out_of_range(tensor, matrix.rows, &rows));
        }
        let mut out = vec![0.0; rows.len() * matrix.cols];
        let decode = |rows: Range<usize>, out: &mut [f32]| {
            self.reader.read_rows_f32(&tensor.stored_name, rows, out)
        };
        match tensor.permuted_heads {
            None => decode(rows, &mut out)?,
            Some(heads) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(matrix.cols.max(1))) {
                    let from = stored_row(row, matrix.rows, heads);
                    decode(from..from + 1, out)?;
                }
            }
        }
        Ok(out)
    }

    /// Refuses NaN and infinities among a tensor's decoded values.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] naming row and column of the first one.
    pub fn check_finite(&self, name: &str, values: &[f32]) -> Result<()> {
        let Some(index) = values.iter().position(|value| !value.is_finite()) else {
            return Ok(());
        };
        let cols = MatrixShape::of(&self.tensor(name)?.shape).cols.max(1);
        Err(ModelError::NonFinite {
            path: self.path().to_owned(),
            tensor: name.to_owned(),
            row: index / cols,
            column: index % cols,
            value: values[index],
        })
    }

    /// Asks the system to read a block's tensors ahead.
    pub fn prefetch(&self, block: usize) {
        self.reader.prefetch(&self.stored_names(block));
    }

    /// Tells the system that a block's tensors are not needed any more.
    pub fn release(&self, block: usize) {
        self.reader.release(&self.stored_names(block));
    }

    fn stored_names(&self, block: usize) -> Vec<&str> {
        self.block_tensors(block).map(|tensor| tensor.stored_name.as_str()).collect()
    }

    fn out_of_range(&self, tensor: &ModelTensor, has: usize, rows: &Range<usize>) -> ModelError {
        ModelError::RowOutOfRange {
            path: self.path().to_owned(),
            tensor: tensor.name.clone(),
            rows: has,
            row: rows.end.max(has + 1) - 1,
        }
    }
}

/// Architecture and configuration by what the checkpoint says of itself.
fn describe(reader: &dyn CheckpointReader) -> Result<(&'static Architecture, ModelConfig)> {
    match reader.metadata() {
        ModelMetadata::HuggingFace { config, .. } => {
            let arch = Architecture::for_hf(config)?;
            Ok((arch, ModelConfig::from_hf(arch, config)?))
        }
        ModelMetadata::Gguf(metadata) => {
            let arch = Architecture::for_gguf(metadata.str("general.architecture")?)?;
            let mut config = ModelConfig::from_gguf(arch, metadata, reader.tensors())?;
            if let Some(rope) = &mut config.rope
                && reader.tensors().get(GGUF_ROPE_FACTORS).is_some()
            {
                rope.factors = Some(reader.read_f32(GGUF_ROPE_FACTORS)?);
                config.validate(arch.positions)?;
            }
            Ok((arch, config))
        }
        _ => Err(ModelError::NoConfig { path: reader.path().to_owned() }),
    }
}

fn norm_names(norm: &NormSpec, block: usize) -> LayerNames {
    LayerNames { weight: norm.weight(block), bias: norm.bias(block) }
}

/// A tensor that a model has.
#[derive(Debug)]
pub(super) struct Expected {
    /// Hugging Face name without suffix.
    pub(super) module: String,
    /// `.weight` or `.bias`.
    pub(super) suffix: &'static str,
    /// GGUF name without suffix.
    gguf: Option<String>,
    /// Row-major shape.
    pub(super) shape: Vec<usize>,
    /// What it is for.
    pub(super) kind: TensorKind,
    /// Heads whose rows a GGUF file has in the order of ggml's interleaved rope.
    permuted_heads: Option<usize>,
}

/// Every tensor of a model, in model order.
pub(super) fn expected(arch: &Architecture, config: &ModelConfig) -> Vec<Expected> {
    let mut all = Vec::new();
    let hidden = config.hidden_size;
    let table = |spec: &TableSpec, shape: [usize; 2], kind| Expected {
        module: spec.name.clone(),
        suffix: ".weight",
        gguf: spec.gguf.clone(),
        shape: shape.to_vec(),
        kind,
        permuted_heads: None,
    };
    all.push(table(&arch.embed, [config.vocab_size, hidden], TensorKind::Embedding));
    if let (Some(spec), Positions::Learned { offset }) = (&arch.position_embed, arch.positions) {
        let rows = config.max_position_embeddings + offset;
        all.push(table(spec, [rows, hidden], TensorKind::Positions));
    }
    for block in 0..config.num_hidden_layers {
        for point in CapturePoint::ALL {
            let kind = TensorKind::BlockNorm { block };
            match point {
                CapturePoint::AttnIn => all.extend(of_norm(&arch.attn_norm, block, hidden, kind)),
                CapturePoint::MlpIn => all.extend(of_norm(&arch.mlp_norm, block, hidden, kind)),
                CapturePoint::AttnOut | CapturePoint::MlpHidden => {}
            }
            for linear in arch.stage(point) {
                all.extend(of_linear(config, linear, block));
            }
            all.extend(of_shortcut(arch, config, block, point));
        }
    }
    let exit = config.exit_width();
    all.extend(of_norm(&arch.final_norm, 0, exit, TensorKind::FinalNorm));
    if !config.tie_word_embeddings {
        all.push(table(&arch.lm_head, [config.vocab_size, exit], TensorKind::LmHead));
    }
    if arch.lm_head_bias {
        let kind = TensorKind::LmHeadBias;
        let bias = table(&arch.lm_head, [config.vocab_size, 1], kind);
        all.push(Expected { suffix: ".bias", shape: vec![config.vocab_size], ..bias });
    }
    all
}

fn of_norm(norm: &NormSpec, block: usize, features: usize, kind: TensorKind) -> Vec<Expected> {
    let tensor = |suffix| Expected {
        module: in_block(&norm.name, block),
        suffix,
        gguf: norm.gguf.as_ref().map(|gguf| in_block(gguf, block)),
        shape: vec![features],
        kind,
        permuted_heads: None,
    };
    let bias = norm.bias.then(|| tensor(".bias"));
    [tensor(".weight")].into_iter().chain(bias).collect()
}

fn of_linear(config: &ModelConfig, linear: &LinearSpec, block: usize) -> Vec<Expected> {
    let role = linear.role;
    let shape = config.linear_shape_in(block, role);
    let heads = linear.gguf_permuted.then_some(match role {
        Role::QProj => config.num_attention_heads,
        _ => config.num_key_value_heads,
    });
    let tensor = |suffix, shape: &[usize], kind| Expected {
        module: in_block(&linear.name, block),
        suffix,
        gguf: linear.gguf.as_ref().map(|gguf| in_block(gguf, block)),
        shape: shape.to_vec(),
        kind,
        permuted_heads: heads,
    };
    let weight = tensor(".weight", &shape, TensorKind::Linear { block, role });
    let bias = config
        .has_bias(role)
        .then(|| tensor(".bias", &shape[..1], TensorKind::LinearBias { block, role }));
    [weight].into_iter().chain(bias).collect()
}

/// The matrix on the shortcut past the linears of `point`, if there is one.
fn of_shortcut(
    arch: &Architecture,
    config: &ModelConfig,
    block: usize,
    point: CapturePoint,
) -> Option<Expected> {
    let hidden = config.hidden_size;
    let (name, rows) = match (point, &arch.shortcuts) {
        (CapturePoint::AttnOut, Some(shortcuts)) => (&shortcuts.attn, hidden),
        (CapturePoint::MlpHidden, Some(shortcuts)) => (&shortcuts.mlp, config.width_after(block)),
        _ => return None,
    };
    Some(Expected {
        module: in_block(name, block),
        suffix: ".weight",
        gguf: None,
        shape: vec![rows, hidden],
        kind: TensorKind::Shortcut { block, past: point },
        permuted_heads: None,
    })
}

/// Lists the tensors of a model while checking them against the file.
struct Listing<'a> {
    reader: &'a dyn CheckpointReader,
    arch: &'a Architecture,
    config: &'a ModelConfig,
    gguf: bool,
    used: HashSet<String>,
    tensors: Vec<ModelTensor>,
    ignored: Vec<ModelTensor>,
}

impl Listing<'_> {
    fn add_model(&mut self) -> Result<()> {
        expected(self.arch, self.config).into_iter().try_for_each(|tensor| self.add(tensor))
    }

    fn add(&mut self, expected: Expected) -> Result<()> {
        let Expected { module, suffix, gguf, shape, kind, permuted_heads } = expected;
        let gguf = gguf.map(|name| GgufTensor { name: format!("{name}{suffix}"), permuted_heads });
        let stored_name = match &gguf {
            Some(gguf) if self.gguf => gguf.name.clone(),
            _ => format!("{module}{suffix}"),
        };
        let path = self.reader.path();
        let Some(info) = self.reader.tensors().get(&stored_name) else {
            return Err(ModelError::MissingTensor {
                path: path.to_owned(),
                tensor: stored_name,
                expected: shape,
            });
        };
        if info.shape != shape {
            return Err(ModelError::ShapeMismatch {
                path: path.to_owned(),
                tensor: stored_name,
                expected: shape,
                found: info.shape.clone(),
            });
        }
        if !info.encoding.value_dtype().is_float_weight() {
            return Err(ModelError::NotFloat {
                path: path.to_owned(),
                tensor: stored_name,
                found: info.encoding.to_string(),
            });
        }
        self.check_no_scales(&module, &stored_name, info)?;
        self.used.insert(stored_name);
        let permuted_heads = permuted_heads.filter(|_| self.gguf);
        let name = format!("{module}{suffix}");
        self.tensors.push(ModelTensor { permuted_heads, gguf, ..model_tensor(name, info, kind) });
        Ok(())
    }

    /// Refuses an 8-bit weight that has scales beside it.
    fn check_no_scales(&self, module: &str, tensor: &str, info: &TensorInfo) -> Result<()> {
        if info.encoding.value_dtype() != DType::F8E4m3 {
            return Ok(());
        }
        let mut names = F8_SCALES.iter().map(|suffix| format!("{module}{suffix}"));
        match names.find(|name| self.reader.tensors().get(name).is_some()) {
            None => Ok(()),
            Some(scales) => Err(ModelError::Scaled {
                path: self.reader.path().to_owned(),
                tensor: tensor.to_owned(),
                scales,
            }),
        }
    }

    /// Whatever else the file holds.
    fn add_others(&mut self) -> Result<()> {
        let path = self.reader.path();
        let tied_head = self.config.tie_word_embeddings.then(|| self.arch.lm_head.weight());
        for info in self.reader.tensors() {
            let name = info.name.as_str();
            if self.used.contains(name) {
                continue;
            }
            if self.gguf {
                if name == GGUF_ROPE_FACTORS && self.config.rope.is_some() {
                    continue;
                }
                return Err(ModelError::UnexpectedTensor {
                    path: path.to_owned(),
                    tensor: name.to_owned(),
                    architecture: self.arch.name.clone(),
                });
            }
            let other = model_tensor(name.to_owned(), info, TensorKind::Other);
            if LEGACY_BUFFERS.iter().any(|suffix| name.ends_with(suffix)) {
                tracing::debug!(tensor = name, "ignored a legacy buffer");
                self.ignored.push(other);
            } else if tied_head.as_deref() == Some(name) {
                tracing::warn!(
                    tensor = name,
                    "ignored: tie_word_embeddings is true, so the embeddings are the output matrix"
                );
                self.ignored.push(other);
            } else {
                self.tensors.push(other);
            }
        }
        Ok(())
    }
}

fn model_tensor(name: String, info: &TensorInfo, kind: TensorKind) -> ModelTensor {
    ModelTensor {
        name,
        stored_name: info.name.clone(),
        shape: info.shape.clone(),
        encoding: info.encoding,
        stored_bytes: info.stored_bytes,
        kind,
        permuted_heads: None,
        gguf: None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn tiny(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny").join(name)
    }

    fn open(name: &str) -> ModelSource {
        ModelSource::open(&tiny(name)).unwrap()
    }

    #[test]
    fn every_model_lists_its_tensors_in_model_order() {
        for name in [
            "llama-gqa",
            "llama-sharded",
            "llama-mha-tied",
            "llama3-rope",
            "mistral",
            "qwen2",
            "opt",
            "llama-gqa.gguf",
            "qwen2.gguf",
        ] {
            let source = open(name);
            let names: Vec<&str> = source.tensors().iter().map(|t| t.name.as_str()).collect();
            assert!(names[0].ends_with("embed_tokens.weight"), "{name}");
            assert_eq!(names.len(), source.reader().tensors().len(), "{name}");
            assert!(source.tensors().iter().all(|t| t.kind != TensorKind::Other), "{name}");
            let blocks: Vec<usize> =
                source.tensors().iter().filter_map(|t| t.kind.block()).collect();
            assert!(blocks.is_sorted() && blocks.last() == Some(&1), "{name}");
            let total: usize =
                source.tensors().iter().map(|t| t.shape.iter().product::<usize>()).sum();
            assert_eq!(source.config().parameters(source.arch()).total(), total as u64, "{name}");
            for tensor in source.tensors() {
                let values = source.read_f32(&tensor.name).unwrap();
                source.check_finite(&tensor.name, &values).unwrap();
            }
        }
    }

    #[test]
    fn a_block_lists_norms_before_the_linears_they_feed() {
        let source = open("opt");
        let names: Vec<&str> = source
            .block_tensors(1)
            .map(|t| t.name.trim_start_matches("model.decoder.layers.1."))
            .collect();
        assert_eq!(
            names,
            [
                "self_attn_layer_norm.weight",
                "self_attn_layer_norm.bias",
                "self_attn.q_proj.weight",
                "self_attn.q_proj.bias",
                "self_attn.k_proj.weight",
                "self_attn.k_proj.bias",
                "self_attn.v_proj.weight",
                "self_attn.v_proj.bias",
                "self_attn.out_proj.weight",
                "self_attn.out_proj.bias",
                "final_layer_norm.weight",
                "final_layer_norm.bias",
                "fc1.weight",
                "fc1.bias",
                "fc2.weight",
                "fc2.bias",
            ]
        );
        let names = source.linear(1, Role::UpProj).unwrap();
        assert_eq!(names.bias.as_deref(), Some("model.decoder.layers.1.fc1.bias"));
        assert_eq!(source.linear(1, Role::GateProj), None);
    }

    #[test]
    fn gguf_and_hugging_face_files_of_a_model_decode_to_equal_tensors() {
        for name in ["llama-gqa", "qwen2"] {
            let (hf, gguf) = (open(name), open(&format!("{name}.gguf")));
            assert_eq!(hf.tensors().len(), gguf.tensors().len());
            assert_eq!(hf.config(), gguf.config());
            for (a, b) in hf.tensors().iter().zip(gguf.tensors()) {
                assert_eq!((&a.name, &a.shape, a.kind), (&b.name, &b.shape, b.kind));
                let whole = gguf.read_f32(&b.name).unwrap();
                assert_eq!(hf.read_f32(&a.name).unwrap(), whole, "{}", a.name);
                let cols = a.shape.get(1).copied().unwrap_or(1);
                let some = gguf.read_rows_f32(&b.name, 3..9).unwrap();
                assert_eq!(some, whole[3 * cols..9 * cols], "{}", a.name);
            }
        }
        let permuted = open("llama-gqa.gguf").tensors().iter().any(|t| t.permuted_heads == Some(2));
        assert!(permuted, "k_proj has two heads in ggml's order");
    }

    #[test]
    fn a_scaled_model_has_rope_factors_for_gguf() {
        assert_eq!(open("llama-gqa").rope_factors(), None);
        let source = open("llama3-rope");
        let factors = source.rope_factors().unwrap();
        assert_eq!(factors.len(), source.config().head_dim / 2);
        let rope = crate::model::rope::RopeConfig {
            theta: source.config().rope.as_ref().unwrap().theta,
            scaling: None,
            factors: Some(factors),
        };
        for (stored, set) in rope
            .frequencies(source.config().head_dim)
            .iter()
            .zip(source.config().rope.as_ref().unwrap().frequencies(source.config().head_dim))
        {
            assert!((stored / set - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn sharded_and_whole_copies_decode_to_equal_tensors() {
        let (whole, sharded) = (open("llama-gqa"), open("llama-sharded"));
        for tensor in whole.tensors() {
            assert_eq!(
                whole.read_f32(&tensor.name).unwrap(),
                sharded.read_f32(&tensor.name).unwrap()
            );
        }
    }

    /// A copy of a tiny model with an edited config.json.
    fn edited(name: &str, edit: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let text = std::fs::read(tiny(name).join("config.json")).unwrap();
        let mut config = serde_json::from_slice(&text).unwrap();
        edit(&mut config);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let file = "model.safetensors";
        std::fs::copy(tiny(name).join(file), dir.path().join(file)).unwrap();
        dir
    }

    fn error(name: &str, edit: impl FnOnce(&mut serde_json::Value)) -> String {
        let dir = edited(name, edit);
        let error = ModelSource::open(dir.path()).unwrap_err();
        let cause = std::error::Error::source(&error).map(|source| format!(": {source}"));
        let text = error.to_string() + &cause.unwrap_or_default();
        text.replace(&dir.path().display().to_string(), "DIR")
    }

    #[test]
    fn tensors_that_contradict_the_configuration_are_named() {
        assert_eq!(
            error("llama-gqa", |config| config["num_hidden_layers"] = 3.into()),
            "DIR: tensor `model.layers.2.input_layernorm.weight` is missing (expected shape [32])"
        );
        assert_eq!(
            error("llama-gqa", |config| config["intermediate_size"] = 64.into()),
            "DIR: tensor `model.layers.0.mlp.gate_proj.weight` has shape [96, 32] \
             (expected [64, 32] by the configuration)"
        );
        assert_eq!(
            error("llama-gqa", |config| config["attention_bias"] = true.into()),
            "DIR: tensor `model.layers.0.self_attn.q_proj.bias` is missing (expected shape [32])"
        );
        assert_eq!(
            error("opt", |config| config["do_layer_norm_before"] = false.into()),
            "DIR: the model's configuration cannot be used: configuration key \
             `do_layer_norm_before` is false, which is not supported; supported: true"
        );
    }

    #[test]
    fn what_the_forward_pass_does_not_read_is_kept_or_ignored() {
        let dir = edited("qwen2", |config| config["num_hidden_layers"] = 1.into());
        let source = ModelSource::open(dir.path()).unwrap();
        let others: Vec<_> =
            source.tensors().iter().filter(|t| t.kind == TensorKind::Other).collect();
        assert_eq!(others.len(), 12, "the second block");
        // A stored output matrix of a model that ties it is not part of the model.
        let dir = edited("mistral", |config| config["tie_word_embeddings"] = true.into());
        let source = ModelSource::open(dir.path()).unwrap();
        assert!(source.tensor("lm_head.weight").is_err());
        assert_eq!(source.lm_head(), "model.embed_tokens.weight");
    }

    #[test]
    fn rows_and_values_that_cannot_be_used_are_named() {
        let source = open("llama-gqa");
        let name = "model.layers.0.self_attn.q_proj.weight";
        let message = |error: ModelError| {
            error.to_string().replace(&source.path().display().to_string(), "DIR")
        };
        assert_eq!(
            message(source.read_rows_f32(name, 30..33).unwrap_err()),
            format!("DIR: tensor `{name}` has 32 rows, but row 32 was asked for")
        );
        let mut values = source.read_f32(name).unwrap();
        values[3 * 32 + 5] = f32::NAN;
        assert_eq!(
            message(source.check_finite(name, &values).unwrap_err()),
            format!("DIR: tensor `{name}` has the non-finite value NaN at row 3, column 5")
        );
        assert_eq!(
            message(source.read_f32("nothing").unwrap_err()),
            "DIR: the model has no tensor `nothing`"
        );
    }
}

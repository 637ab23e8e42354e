//! Which encoding each output gets: by the recipe where it is pruned, by a look at its values where
//! a conversion only repacks.

use serde::Serialize;
use sparsepack_formats::{
    DType, Encoding, ModelMetadata, Survey,
    encoding::{IntGrid, Kept},
};

use super::{
    copy::stream_rows,
    error::{PipelineError, Result},
    plan::{BlockPlan, LayerPlan, OutputTensor, Pruning, TablePlan},
};
use crate::{
    backend::Grid,
    compress::{SolverOptions, Sparsity},
    model::{ModelSource, ModelTensor, TensorKind},
    recipe::{OutputFormat, Recipe, WeightDType},
};

/// What was read of the source to plan a repack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Scan {
    /// Matrices looked at: linears, embeddings and the output matrix.
    pub tensors: usize,
    /// Their bytes in the source.
    pub bytes: u64,
}

/// Chooses encodings for the outputs of a plan in safetensors.
pub(super) struct Encodings<'a> {
    /// The model.
    pub source: &'a ModelSource,
    /// What is asked for.
    pub recipe: &'a Recipe,
    /// Container of the output.
    pub format: OutputFormat,
    /// Every decoder block.
    pub blocks: &'a [BlockPlan],
    /// Matrices outside the blocks to prune.
    pub tables: &'a [TablePlan],
    /// Settings of the solvers, which decide how many weights become zero.
    pub solver: SolverOptions,
}

impl Encodings<'_> {
    /// Every output in order, and what was read of the source to know.
    ///
    /// # Errors
    /// Tensors that no encoding holds; a source that cannot be read; a packed format that would pack
    /// nothing.
    pub(super) fn plan(&self) -> Result<(Vec<OutputTensor>, Option<Scan>)> {
        let mut scan = None;
        let tensors = self.source.tensors();
        let encodings = match self.format {
            OutputFormat::CompressedTensors if self.recipe.quantize.is_some() => {
                let quantized = |tensor| {
                    let layer = self.layer(tensor).and_then(|layer| layer.quantize);
                    let dense = Encoding::Dense { dtype: self.dtype(tensor) };
                    layer.map_or(dense, |quantize| compressed_tensors(quantize.grid))
                };
                tensors.iter().map(quantized).collect()
            }
            OutputFormat::TorchCutlass | OutputFormat::CompressedTensors => {
                self.foreign(&mut scan)?
            }
            OutputFormat::Safetensors
            | OutputFormat::Packed
            | OutputFormat::Gguf
            | OutputFormat::Zst => tensors
                .iter()
                .map(|tensor| self.encoding(tensor, &mut scan))
                .collect::<Result<Vec<_>>>()?,
        };
        let outputs = tensors
            .iter()
            .zip(encodings)
            .map(|(tensor, encoding)| OutputTensor::new(tensor, encoding))
            .collect::<Result<Vec<_>>>()?;
        let packs = outputs.iter().any(|output| output.encoding.is_packed());
        let dense = matches!(self.format, OutputFormat::Safetensors | OutputFormat::Zst);
        if !dense && !packs {
            let why = match self.recipe.prune {
                Some(_) => {
                    "no pruned layer becomes smaller, since a mask takes a bit of each weight; \
                     prune more or write --format safetensors"
                }
                None if self.recipe.slice.is_some() => {
                    "a sliced model has no zeros; prune it too with --prune, or write --format \
                     safetensors"
                }
                None => {
                    "no matrix of the source has zeros enough to become smaller; prune it with \
                     --prune or write --format safetensors"
                }
            };
            return Err(PipelineError::Unsupported {
                format: self.format.name(),
                why: why.to_owned(),
            });
        }
        Ok((outputs, scan))
    }

    /// Whether values stay what they are in the source.
    fn repacks(&self) -> bool {
        let Recipe { slice, prune, quantize, .. } = self.recipe;
        slice.is_none() && prune.is_none() && quantize.is_none()
    }

    fn encoding(&self, tensor: &ModelTensor, scan: &mut Option<Scan>) -> Result<Encoding> {
        let dtype = self.dtype(tensor);
        let dense = Encoding::Dense { dtype };
        let is_matrix = matches!(
            tensor.kind,
            TensorKind::Linear { .. } | TensorKind::Embedding | TensorKind::LmHead
        );
        if self.format != OutputFormat::Packed || !is_matrix {
            return Ok(dense);
        }
        if let Some(layer) = self.layer(tensor)
            && let Some(Grid::Int { grid, .. }) = layer.quantize.map(|quantize| quantize.grid)
        {
            return self.of_quantized(tensor, layer, grid);
        }
        if tensor.encoding.is_quantized() && tensor.encoding.value_dtype() == dtype {
            return Ok(tensor.encoding);
        }
        let packed = match self.pruned(tensor) {
            Some(prune) => of_pruned(&tensor.shape, dtype, prune, self.solver),
            // What slicing leaves has no zeros to look for.
            None if self.repacks() => {
                let scan = scan.get_or_insert_default();
                scan.tensors += 1;
                scan.bytes += tensor.stored_bytes;
                return self.scan(tensor, dtype);
            }
            // What is packed in the source and left alone stays as it is.
            None => retyped(tensor.encoding, dtype),
        };
        let smaller = stored_bytes(tensor, packed)? < stored_bytes(tensor, dense)?;
        Ok(if smaller { packed } else { dense })
    }

    /// The plan of a linear that is solved.
    fn layer(&self, tensor: &ModelTensor) -> Option<&LayerPlan> {
        let TensorKind::Linear { block, role } = tensor.kind else { return None };
        self.blocks.get(block)?.layers.iter().find(|layer| layer.role == role)
    }

    /// How a tensor is pruned.
    pub(super) fn pruned(&self, tensor: &ModelTensor) -> Option<Pruning> {
        if matches!(tensor.kind, TensorKind::Linear { .. }) {
            return self.layer(tensor)?.prune;
        }
        let module = tensor.name.strip_suffix(".weight")?;
        self.tables.iter().find(|table| table.module == module).map(|table| table.prune)
    }

    /// Codes of a quantized linear: those that pruning keeps, where their positions cost less than the
    /// others.
    fn of_quantized(
        &self,
        tensor: &ModelTensor,
        layer: &LayerPlan,
        grid: IntGrid,
    ) -> Result<Encoding> {
        let all = Encoding::Int { grid, kept: Kept::All };
        let pattern = match layer.prune {
            Some(prune) => of_pruned(&tensor.shape, grid.scale, prune, self.solver),
            None => tensor.encoding,
        };
        let kept = match pattern {
            Encoding::Sparse24 { .. } => Kept::Sparse24,
            Encoding::Nm { n, m, .. } => Kept::Nm { n, m },
            Encoding::Bitmask { kept, .. } => Kept::Bitmask { kept },
            Encoding::Int { kept, .. } => kept,
            _ => Kept::All,
        };
        let packed = Encoding::Int { grid, kept };
        let smaller = stored_bytes(tensor, packed)? < stored_bytes(tensor, all)?;
        Ok(if smaller { packed } else { all })
    }

    /// The cheapest encoding that holds the source's matrix exactly, a few rows at a time.
    fn scan(&self, tensor: &ModelTensor, dtype: DType) -> Result<Encoding> {
        let mut survey = Survey::new(dtype, &tensor.shape);
        stream_rows(self.source, &tensor.name, dtype, |rows| {
            survey.rows(rows);
            Ok(())
        })?;
        Ok(survey.cheapest(&tensor.name)?)
    }

    /// The element type a tensor is written in: the one asked for, else its own. A GGUF file's types
    /// are mixed (quantized matrices, f32 norms), so all of it becomes bf16. Tensors that are not
    /// float weights keep their type, and 8-bit floats are for the linears only.
    pub(super) fn dtype(&self, tensor: &ModelTensor) -> DType {
        let own = tensor.encoding.value_dtype();
        if !own.is_float_weight() {
            return own;
        }
        let linear = matches!(tensor.kind, TensorKind::Linear { .. });
        let asked = self.recipe.output.dtype.and_then(WeightDType::dense);
        let gguf = matches!(self.source.reader().metadata(), ModelMetadata::Gguf(_));
        asked.filter(|&dtype| linear || dtype != DType::F8E4m3).unwrap_or(if gguf {
            DType::Bf16
        } else {
            own
        })
    }
}

/// The packed encoding that the pattern of a pruned matrix asks for.
pub(super) fn of_pruned(
    shape: &[usize],
    dtype: DType,
    Pruning { method, sparsity }: Pruning,
    options: SolverOptions,
) -> Encoding {
    match (sparsity, shape) {
        (Sparsity::NofM { n: 2, m: 4 }, _) => Encoding::Sparse24 { dtype },
        // Both are at most 16.
        (Sparsity::NofM { n, m }, _) => Encoding::Nm { n: n as u8, m: m as u8, dtype },
        (Sparsity::Unstructured(_), &[rows, cols]) => {
            let zeros = method.zeros(sparsity, rows, cols, options);
            Encoding::Bitmask { dtype, kept: (rows * cols - zeros) as u64 }
        }
        (Sparsity::Unstructured(_), _) => Encoding::Dense { dtype },
    }
}

/// How compressed-tensors stores a grid.
fn compressed_tensors(grid: Grid) -> Encoding {
    match grid {
        Grid::Int { grid, .. } if grid.bits == 8 => Encoding::CtIntQuantized { grid },
        Grid::Int { grid, .. } => Encoding::CtPackQuantized { grid },
        Grid::F8E4m3 { scale } => Encoding::CtFloatQuantized { scale },
        // Planning refuses blocks in this format.
        Grid::Block { ty, .. } => Encoding::Ggml { ty },
    }
}

pub(super) fn stored_bytes(tensor: &ModelTensor, encoding: Encoding) -> Result<u64> {
    let components = encoding.components(&tensor.name, &tensor.shape)?;
    Ok(components.iter().map(|component| component.bytes).sum())
}

/// A packed encoding with values of another type, dense where the source is not packed. Rounding
/// may add zeros and never removes one, so what an encoding holds it goes on to hold.
fn retyped(encoding: Encoding, dtype: DType) -> Encoding {
    match encoding {
        Encoding::Sparse24 { .. } => Encoding::Sparse24 { dtype },
        Encoding::Nm { n, m, .. } => Encoding::Nm { n, m, dtype },
        Encoding::Bitmask { kept, .. } => Encoding::Bitmask { dtype, kept },
        _ => Encoding::Dense { dtype },
    }
}

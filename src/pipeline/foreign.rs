//! Encodings of the formats that other libraries define. What they cannot hold is refused by name: they
//! have no second encoding to fall back to.

use sparsepack_formats::{Encoding, Survey, compressed_tensors::SparseFormat};

use super::{
    copy::stream_rows,
    encodings::{Encodings, Scan, stored_bytes},
    error::{PipelineError, Result},
    plan::Pruning,
};
use crate::{
    compress::Sparsity,
    model::{ModelTensor, TensorKind},
    recipe::OutputFormat,
};

/// How sparse a matrix is.
#[derive(Clone, Copy)]
struct Sparse {
    /// What the recipe makes of it; `None` when this was found in the source.
    asked: Option<Sparsity>,
    /// No group of four has more than two values.
    fits_2of4: bool,
    /// Values, at most.
    kept: u64,
}

impl Encodings<'_> {
    /// An encoding for each tensor of the source, for a format of another library.
    ///
    /// # Errors
    /// A pruned matrix that the format cannot hold, by name; a source that is scanned and cannot be
    /// read.
    pub(super) fn foreign(&self, scan: &mut Option<Scan>) -> Result<Vec<Encoding>> {
        let tensors = self.source.tensors();
        let sparse = tensors
            .iter()
            .map(|tensor| self.sparse(tensor, scan))
            .collect::<Result<Vec<Option<Sparse>>>>()?;
        // Those that are asked for decide; a scan takes what it finds.
        let asked = sparse.iter().flatten().filter(|sparse| sparse.asked.is_some());
        let format = match (asked.clone().count(), self.format) {
            (_, OutputFormat::TorchCutlass) => None,
            (0, _) if sparse.iter().flatten().any(|sparse| sparse.fits_2of4) => {
                Some(SparseFormat::Sparse24Bitmask)
            }
            (1.., _) if asked.clone().all(|sparse| sparse.fits_2of4) => {
                Some(SparseFormat::Sparse24Bitmask)
            }
            _ => Some(SparseFormat::SparseBitmask),
        };
        let pairs = tensors.iter().zip(sparse);
        pairs
            .map(|(tensor, sparse)| match sparse {
                None => Ok(Encoding::Dense { dtype: self.dtype(tensor) }),
                Some(sparse) => self.foreign_matrix(tensor, sparse, format),
            })
            .collect()
    }

    /// How sparse a tensor is going to be, `None` for what stays dense in these formats.
    fn sparse(&self, tensor: &ModelTensor, scan: &mut Option<Scan>) -> Result<Option<Sparse>> {
        let is_linear = matches!(tensor.kind, TensorKind::Linear { .. } | TensorKind::LmHead);
        if let Some(Pruning { method, sparsity }) = self.pruned(tensor) {
            let &[rows, cols] = tensor.shape.as_slice() else {
                return Err(self.refuse(tensor, "is not a matrix"));
            };
            if !is_linear {
                return Err(self.refuse(tensor, "is not the weight of a linear"));
            }
            let zeros = method.zeros(sparsity, rows, cols, self.solver);
            return Ok(Some(Sparse {
                asked: Some(sparsity),
                fits_2of4: matches!(sparsity, Sparsity::NofM { n: 1 | 2, m: 4 }),
                kept: (rows * cols - zeros) as u64,
            }));
        }
        if self.recipe.prune.is_some() || !is_linear {
            return Ok(None);
        }
        let counted = scan.get_or_insert_default();
        counted.tensors += 1;
        counted.bytes += tensor.stored_bytes;
        let dtype = self.dtype(tensor);
        let mut survey = Survey::new(dtype, &tensor.shape);
        stream_rows(self.source, &tensor.name, dtype, |rows| {
            survey.rows(rows);
            Ok(())
        })?;
        Ok(Some(Sparse { asked: None, fits_2of4: survey.fits_2of4(), kept: survey.kept() }))
    }

    /// The encoding of a sparse matrix; `format` is that of compressed-tensors.
    fn foreign_matrix(
        &self,
        tensor: &ModelTensor,
        sparse: Sparse,
        format: Option<SparseFormat>,
    ) -> Result<Encoding> {
        let dtype = self.dtype(tensor);
        let dense = Encoding::Dense { dtype };
        let encoding = match format {
            None => Encoding::TorchCutlass { dtype },
            Some(format) => format.encoding(dtype, sparse.kept),
        };
        let any_pattern = matches!(encoding, Encoding::CtSparseBitmask { .. });
        if !any_pattern && !sparse.fits_2of4 {
            return match sparse.asked {
                None => Ok(dense),
                Some(sparsity) => {
                    Err(self.refuse(tensor, &format!("becomes {sparsity} sparse, not 2:4")))
                }
            };
        }
        match encoding.components(&tensor.name, &tensor.shape) {
            // What the source holds may stay as it is; what is asked for may not.
            Err(_) if sparse.asked.is_none() => Ok(dense),
            Err(error) => Err(self.refuse(tensor, &format!("does not fit ({error})"))),
            Ok(_) if stored_bytes(tensor, encoding)? < stored_bytes(tensor, dense)? => Ok(encoding),
            // A bit for each weight costs more than these zeros save.
            Ok(_) => Ok(dense),
        }
    }

    fn refuse(&self, tensor: &ModelTensor, what: &str) -> PipelineError {
        PipelineError::Unsupported {
            format: self.format.name(),
            why: format!(
                "{} {what}; prune it otherwise, leave it dense, or write --format packed",
                tensor.name
            ),
        }
    }
}

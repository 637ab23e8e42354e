//! Loss of next-token prediction.

use super::{
    Cuda, CudaMatrix,
    driver::{Geometry, KernelFile},
    matrix::shape_error,
};
use crate::backend::Result;

pub(super) fn token_nll(cuda: &Cuda, logits: &CudaMatrix, targets: &[u32]) -> Result<Vec<f64>> {
    const OPERATION: &str = "token_nll";
    let (rows, cols) = (logits.rows, logits.cols);
    if targets.len() != rows {
        return Err(shape_error(OPERATION, format!("{} targets for {rows} rows", targets.len())));
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= cols) {
        return Err(shape_error(OPERATION, format!("target {target} of {cols} columns")));
    }
    let targets = cuda.gpu.upload(targets, OPERATION)?;
    let mut out = cuda.gpu.allocate::<f64>(rows, OPERATION)?;
    let logits = cuda.widened(logits)?;
    let threads = if cols < 100_000 { 256 } else { 1024 };
    let geometry = Geometry { blocks: [rows, 1, 1], threads: [threads, 1], shared: 0 };
    let args = [logits.memory().into(), (&targets).into(), (&mut out).into(), (cols as u32).into()];
    cuda.gpu.launch(KernelFile::Nll, OPERATION, geometry, &args)?;
    cuda.gpu.download(&out, rows, OPERATION)
}

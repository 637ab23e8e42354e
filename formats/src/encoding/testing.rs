//! What tests of several encodings share.

use super::{Encoder, Encoding};
use crate::{CheckpointReader, DType, Result};

/// Encodes a matrix some rows at a time.
pub(super) fn encode(
    encoding: Encoding,
    name: &str,
    shape: &[usize],
    dense: &[u8],
    at_once: usize,
) -> Result<Vec<Vec<u8>>> {
    let components = encoding.components(name, shape)?;
    let mut encoder = Encoder::new(encoding, name, shape)?;
    let mut parts = vec![vec![]; components.len()];
    let row_bytes = dense.len() / shape[0].max(1);
    for rows in dense.chunks((at_once * row_bytes).max(1)) {
        parts.iter_mut().zip(encoder.rows(rows)?).for_each(|(part, more)| part.extend(more));
    }
    parts.iter_mut().zip(encoder.finish()?).for_each(|(part, more)| part.extend(more));
    for (component, part) in components.iter().zip(&parts) {
        assert_eq!(component.bytes, part.len() as u64, "{}", component.suffix);
    }
    Ok(parts)
}

/// Elements of any bits (a quarter of them `-0.0` or a NaN) at no, one or two columns of each group.
pub(super) fn random_2of4(seed: u64, dtype: DType, elements: usize) -> Vec<u8> {
    let size = dtype.size_bytes();
    let mut state = seed | 1;
    let mut dense = vec![0; elements * size];
    for group in dense.chunks_exact_mut(4 * size) {
        for _ in 0..2 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let bits = match state >> 40 & 7 {
                0 => 0x8000_0000_u32,
                1 => 0x7F81_FF01,
                2 => 0,
                _ => state as u32,
            };
            let column = (state >> 50) as usize % 4;
            group[column * size..][..size].copy_from_slice(&bits.to_le_bytes()[4 - size..]);
        }
    }
    dense
}

/// Tensors of a file in fixtures/golden.
pub(super) struct Golden(Box<dyn CheckpointReader>);

impl Golden {
    pub(super) fn open(file: &str) -> Self {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/golden");
        Self(crate::open(&root.join(file)).unwrap())
    }

    /// What stands before `.dense`, sorted.
    pub(super) fn cases(&self) -> Vec<String> {
        let names = self.0.tensors().iter();
        let mut cases: Vec<String> =
            names.filter_map(|info| info.name.strip_suffix(".dense").map(str::to_owned)).collect();
        cases.sort();
        cases
    }

    /// Type, shape and bytes.
    pub(super) fn tensor(&self, name: &str) -> (DType, Vec<usize>, Vec<u8>) {
        let info = self.0.tensors().get(name).unwrap();
        let bytes = self.0.components(name).unwrap()[0].to_vec();
        (info.encoding.value_dtype(), info.shape.clone(), bytes)
    }
}

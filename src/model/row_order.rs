//! The order of the rows of q and k in GGUF files. ggml's rope rotates neighbouring rows of a head,
//! Hugging Face's the two halves: `[2, head_dim/2]` became `[head_dim/2, 2]` in every head.

use sparsepack_formats::encoding::MatrixShape;

/// A weight's rows and columns; a bias has one column.
fn rows_and_cols(shape: &[usize]) -> (usize, usize) {
    if let [rows] = shape {
        return (*rows, 1);
    }
    let matrix = MatrixShape::of(shape);
    (matrix.rows, matrix.cols)
}

/// Where a GGUF file stores row `row` of a Hugging Face q or k matrix.
pub(super) fn stored_row(row: usize, rows: usize, heads: usize) -> usize {
    let head_dim = rows / heads;
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + pair * 2 + half
}

/// The row of a Hugging Face q or k matrix that a GGUF file stores as row `row`: the inverse of
/// [`stored_row`].
pub(crate) fn hf_row(row: usize, rows: usize, heads: usize) -> usize {
    let head_dim = rows / heads;
    let (head, within) = (row / head_dim, row % head_dim);
    let (pair, half) = (within / 2, within % 2);
    head * head_dim + half * (head_dim / 2) + pair
}

/// The rows `from(0)`, `from(1)`, ... of `values`.
fn reordered<T: Copy>(
    values: &[T],
    rows: usize,
    cols: usize,
    from: impl Fn(usize) -> usize,
) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let start = from(row) * cols;
        out.extend_from_slice(&values[start..start + cols]);
    }
    out
}

/// The rows of a q or k tensor of `shape` (or of its bias) in the order of a GGUF file, from
/// Hugging Face order.
pub fn to_gguf_rows<T: Copy>(values: &[T], shape: &[usize], heads: usize) -> Vec<T> {
    let (rows, cols) = rows_and_cols(shape);
    reordered(values, rows, cols, |row| hf_row(row, rows, heads))
}

/// The inverse of [`to_gguf_rows`].
pub fn from_gguf_rows(values: &[f32], shape: &[usize], heads: usize) -> Vec<f32> {
    let (rows, cols) = rows_and_cols(shape);
    reordered(values, rows, cols, |row| stored_row(row, rows, heads))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::ModelSource;

    #[test]
    fn rows_go_to_gguf_order_and_back() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = ModelSource::open(&root.join("fixtures/tiny/llama-gqa.gguf")).unwrap();
        let name = "model.layers.1.self_attn.k_proj.weight";
        let tensor = source.tensor(name).unwrap();
        let stored = source.reader().read_f32(&tensor.stored_name).unwrap();
        let values = source.read_f32(name).unwrap();
        assert_ne!(values, stored);
        assert_eq!(to_gguf_rows(&values, &tensor.shape, 2), stored);
        assert_eq!(from_gguf_rows(&stored, &tensor.shape, 2), values);
    }

    #[test]
    fn a_bias_is_one_column() {
        // Two heads of four rows.
        let bias: Vec<f32> = (0..8u8).map(f32::from).collect();
        let stored = to_gguf_rows(&bias, &[8], 2);
        assert_eq!(stored, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(from_gguf_rows(&stored, &[8], 2), bias);
    }
}

//! Rotary position embeddings, half-split as in Hugging Face models.

use rayon::prelude::*;

use super::matrix::{STRIP, shape_error, strip_len};
use super::simd::{self, vectorised};
use super::{CpuMatrix, Products, buffers};
use crate::backend::{AttentionShape, HostData, Result, RopeTables, SequenceLens};

/// Rotates the query and key heads of a stacked matrix. It only feeds products, so where those are
/// bf16 it is rounded on the way.
pub(super) fn rope(
    products: Products,
    qkv: &mut CpuMatrix,
    shape: &AttentionShape,
    tables: &RopeTables,
    lens: &SequenceLens,
) -> Result<()> {
    const OPERATION: &str = "rope";
    let (cols, half) = (qkv.cols, tables.half_dim);
    qkv.expect_shape(OPERATION, lens.tokens(), shape.qkv_cols())?;
    if 2 * half != shape.head_dim {
        let detail = format!("{half} angles for heads of {} columns", shape.head_dim);
        return Err(shape_error(OPERATION, detail));
    }
    if tables.cos.len().min(tables.sin.len()) < lens.longest() * half {
        let detail = format!("tables too short for {} positions", lens.longest());
        return Err(shape_error(OPERATION, detail));
    }
    let positions: Vec<usize> = lens.ranges().flat_map(|range| 0..range.len()).collect();
    let rotated = (shape.num_heads + shape.num_kv_heads) * shape.head_dim;
    let values = qkv.f32s_mut(OPERATION)?;
    let strips = values.par_chunks_mut(strip_len(STRIP, cols)).zip(positions.par_chunks(STRIP));
    let rotate_row = |row: &mut [f32], position: usize| {
        let angles = position * half..(position + 1) * half;
        let (cos, sin) = (&tables.cos[angles.clone()], &tables.sin[angles]);
        for head in row[..rotated].chunks_exact_mut(shape.head_dim) {
            let (a, b) = head.split_at_mut(half);
            rotate(a, b, cos, sin);
        }
    };
    match products {
        Products::F32 => strips.for_each(|(rows, positions)| {
            for (row, position) in rows.chunks_exact_mut(cols).zip(positions) {
                rotate_row(row, *position);
            }
        }),
        Products::Bf16(_) => {
            let mut narrow = buffers::take(lens.tokens() * cols);
            let to = narrow.par_chunks_mut(strip_len(STRIP, cols));
            strips.zip(to).for_each(|((rows, positions), to)| {
                let rows = rows.chunks_exact_mut(cols).zip(to.chunks_exact_mut(cols));
                for ((row, to), position) in rows.zip(positions) {
                    rotate_row(row, *position);
                    simd::narrow(row, to);
                }
            });
            buffers::put_data(std::mem::replace(&mut qkv.data, HostData::Bf16(narrow)));
        }
    }
    Ok(())
}

vectorised! {
    fn rotate<'a>(a: &'a mut [f32], b: &'a mut [f32], cos: &'a [f32], sin: &'a [f32]) {
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

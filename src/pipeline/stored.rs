//! From solved weights to the bytes of an output.

use sparsepack_formats::{
    DType, Encoder, Encoding, FormatError,
    encoding::{self, MatrixShape, QuantizedRows},
};

use super::{
    error::{PipelineError, Result},
    plan::{LayerPlan, OutputTensor},
};
use crate::{
    backend::{Backend, BackendError, Fetch, Grid, Rounding, Scales},
    model::{from_gguf_rows, hf_row, to_gguf_rows},
};

/// Makes the bytes of a tensor's components, on any thread.
pub(super) type Packing = Box<dyn FnOnce() -> Result<Vec<Vec<u8>>> + Send>;

/// Leaves in `weight` what is stored of it as planned, so that the run goes on with that, and returns what
/// makes the bytes. `weight` has its rows in Hugging Face order.
pub(super) fn store_matrix<B: Backend>(
    b: &B,
    output: &OutputTensor,
    weight: &mut B::Matrix,
) -> Result<Packing> {
    if output.encoding.is_lossy() {
        let (rows, cols) = b.shape(weight);
        let mut values = b.download(weight)?;
        let parts = encode_matrix(output, &mut values)?;
        *weight = b.upload(&values, rows, cols)?;
        return Ok(Box::new(|| Ok(parts)));
    }
    let named = |error| match error {
        error @ BackendError::TooLarge { .. } => {
            let (name, what) = (output.name.clone(), error.to_string());
            FormatError::Encoding { name, what }.into()
        }
        error => PipelineError::from(error),
    };
    let dtype = output.encoding.value_dtype();
    if matches!(output.encoding, Encoding::Sparse24 { .. })
        && output.permuted_heads.is_none()
        && let Some(parts) = b.pack_24(weight, dtype).map_err(named)?
    {
        return Ok(Box::new(|| {
            Ok(parts.map(Fetch::wait).into_iter().collect::<std::result::Result<_, _>>()?)
        }));
    }
    let dense = b.store(weight, dtype).map_err(named)?;
    let output = output.clone();
    Ok(Box::new(move || encode_dense(&output, dense.wait()?)))
}

/// Encodes a matrix as planned and leaves in `weight` what is stored. Returns the bytes of its components.
/// `weight` has its rows in Hugging Face order.
fn encode_matrix(output: &OutputTensor, weight: &mut [f32]) -> Result<Vec<Vec<u8>>> {
    let dense = round_to_stored(&output.name, output.encoding.value_dtype(), weight)?;
    let parts = encode_dense(output, dense)?;
    let stored: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    output.encoding.decode_all_f32(&output.name, &output.shape, &stored, weight)?;
    if let Some(heads) = output.permuted_heads {
        weight.copy_from_slice(&from_gguf_rows(weight, &output.shape, heads));
    }
    Ok(parts)
}

/// Encodes values of the type that the encoding holds, rows in Hugging Face order. Returns the bytes of the
/// components.
fn encode_dense(output: &OutputTensor, mut dense: Vec<u8>) -> Result<Vec<Vec<u8>>> {
    if let Some(heads) = output.permuted_heads {
        let MatrixShape { rows, cols } = MatrixShape::of(&output.shape);
        let shape = [rows, cols * output.encoding.value_dtype().size_bytes()];
        dense = to_gguf_rows(&dense, &shape, heads);
    }
    if matches!(output.encoding, Encoding::Dense { .. }) {
        return Ok(vec![dense]);
    }
    let mut encoder = Encoder::new(output.encoding, &output.name, &output.shape)?;
    let mut parts = encoder.rows(&dense)?;
    drop(dense);
    for (part, rest) in parts.iter_mut().zip(encoder.finish()?) {
        part.extend(rest);
    }
    Ok(parts)
}

/// Rounds `weight` to `dtype` in place and returns the stored bytes, so that everything later in
/// the run sees exactly what is written.
///
/// # Errors
/// A value too large for `dtype`.
pub(super) fn round_to_stored(name: &str, dtype: DType, weight: &mut [f32]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(weight.len() * dtype.size_bytes());
    encoding::dense::encode_f32(name, dtype, weight, &mut bytes)?;
    encoding::dense::to_f32(dtype, &bytes, weight);
    Ok(bytes)
}

/// What makes the bytes of codes and scales.
pub(super) fn pack_rounded(output: &OutputTensor, rounding: Fetch<Rounding>) -> Packing {
    let output = output.clone();
    Box::new(move || encode_rounded(&output, &rounding.wait()?))
}

/// Bytes of what waits to be packed: at most those of the dense matrix in the type of its values.
pub(super) fn held_bytes(output: &OutputTensor) -> u64 {
    let MatrixShape { rows, cols } = MatrixShape::of(&output.shape);
    (rows * cols * output.encoding.value_dtype().size_bytes()) as u64
}

/// Encodes codes and scales as they are. Returns the bytes of the components.
fn encode_rounded(output: &OutputTensor, rounding: &Rounding) -> Result<Vec<Vec<u8>>> {
    let reordered = output.permuted_heads.map(|heads| {
        let rows = MatrixShape::of(&output.shape).rows;
        rounding.reorder_rows(|row| hf_row(row, rows, heads))
    });
    let Rounding { codes, scales, .. } = reordered.as_ref().unwrap_or(rounding);
    match (scales, output.encoding) {
        (Scales::Blocks(blocks), Encoding::Ggml { ty }) => {
            let mut bytes = Vec::new();
            encoding::ggml::assemble(&output.name, ty, blocks, codes, &mut bytes)?;
            Ok(vec![bytes])
        }
        (Scales::Groups { scales, zero_points }, encoding) => {
            let has_points = matches!(rounding.grid(), Grid::Int { grid, .. } if !grid.symmetric);
            let zero_points = if has_points { zero_points } else { &Vec::new() };
            let mut encoder = Encoder::new(encoding, &output.name, &output.shape)?;
            let rows = QuantizedRows { codes, scales, zero_points };
            let mut parts = encoder.quantized_rows(rows)?;
            for (part, rest) in parts.iter_mut().zip(encoder.finish()?) {
                part.extend(rest);
            }
            Ok(parts)
        }
        (Scales::Blocks(_), encoding) => Err(FormatError::Encoding {
            name: output.name.clone(),
            what: format!("blocks were solved for, but the plan stores {encoding}"),
        }
        .into()),
    }
}

/// What a solved layer's report says of its file.
pub(super) struct Stored {
    pub(super) layer: String,
    pub(super) zeros: Option<u64>,
    pub(super) bits_per_weight: Option<f64>,
}

impl Stored {
    pub(super) fn of<B: Backend>(
        b: &B,
        layer: &LayerPlan,
        output: &OutputTensor,
        weight: &B::Matrix,
    ) -> Result<Self> {
        let weights = (layer.rows * layer.cols) as f64;
        Ok(Self {
            layer: layer.module.clone(),
            zeros: if layer.prune.is_some() { zeros_left(b, output, weight)? } else { None },
            bits_per_weight: (weights > 0.0).then(|| output.bytes as f64 * 8.0 / weights),
        })
    }
}

/// Zeros of a matrix as stored, where its encoding moves zeros.
pub(super) fn zeros_left<B: Backend>(
    b: &B,
    output: &OutputTensor,
    stored: &B::Matrix,
) -> Result<Option<u64>> {
    if !matches!(output.encoding, Encoding::Ggml { ty } if !ty.keeps_zeros()) {
        return Ok(None);
    }
    let zeros = b.download(stored)?.into_iter().filter(|value| *value == 0.0).count();
    Ok(Some(zeros as u64))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use sparsepack_formats::{
        DType, GgmlType,
        encoding::{Kept, ggml::BlockGrid},
    };

    use super::*;
    use crate::{
        backend::{Precision, SolveOps, Storage, cpu::Cpu},
        compress::{GridOptions, GroupSize, ScaleSearch, Scheme},
    };

    const SHAPE: [usize; 2] = [70, 512];

    /// Weights of very different rows: one of zeros, one that is negative throughout, outliers.
    fn weights() -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut w: Vec<f32> = (0..SHAPE[0] * SHAPE[1])
            .map(|i| {
                rng.random_range(-1.0f32..1.0).powi(3) * 10f32.powi((i / SHAPE[1] % 7) as i32 - 4)
            })
            .collect();
        w[..SHAPE[1]].fill(0.0);
        w[SHAPE[1]..2 * SHAPE[1]].iter_mut().for_each(|w| *w = -w.abs());
        w[5 * SHAPE[1] + 40] = 3.0;
        w
    }

    fn schemes() -> Vec<(Scheme, GridOptions, DType)> {
        let mut all = Vec::new();
        let options = |group_size, symmetric, scales| GridOptions { group_size, symmetric, scales };
        for bits in 2..=8 {
            for (group, symmetric) in [
                (GroupSize::Channel, true),
                (GroupSize::Columns(64), true),
                (GroupSize::Columns(32), false),
            ] {
                for scales in [ScaleSearch::Mse, ScaleSearch::Minmax] {
                    for dtype in [DType::Bf16, DType::F16, DType::F32] {
                        all.push((
                            Scheme::Int(bits),
                            options(Some(group), symmetric, scales),
                            dtype,
                        ));
                    }
                }
            }
        }
        let plain = options(None, true, ScaleSearch::Mse);
        all.extend(BlockGrid::TYPES.map(|ty| (Scheme::Block(ty), plain, DType::Bf16)));
        all.push((Scheme::F8E4m3, plain, DType::Bf16));
        all
    }

    /// Each way of storing a grid that has one.
    fn encodings(grid: Grid) -> Vec<Encoding> {
        match grid {
            Grid::Int { grid, .. } if grid.bits == 8 => {
                vec![Encoding::Int { grid, kept: Kept::All }, Encoding::CtIntQuantized { grid }]
            }
            Grid::Int { grid, .. } => {
                vec![Encoding::Int { grid, kept: Kept::All }, Encoding::CtPackQuantized { grid }]
            }
            Grid::F8E4m3 { scale } => vec![Encoding::CtFloatQuantized { scale }],
            Grid::Block { ty, .. } => vec![Encoding::Ggml { ty }],
        }
    }

    fn output(encoding: Encoding, permuted_heads: Option<usize>) -> OutputTensor {
        OutputTensor {
            name: "m.weight".to_owned(),
            stored_name: None,
            encoding,
            shape: SHAPE.to_vec(),
            bytes: 0,
            block: None,
            linear: None,
            permuted_heads,
        }
    }

    #[test]
    fn what_is_decoded_is_what_was_rounded() {
        let b = Cpu::new(Precision::F32, Some(2)).unwrap();
        let w = weights();
        for (scheme, options, dtype) in schemes() {
            let grid = scheme.grid(options, dtype).unwrap();
            let mut rounding = Rounding::new(grid, SHAPE[0], SHAPE[1]);
            let mut matrix = b.upload(&w, SHAPE[0], SHAPE[1]).unwrap();
            b.choose_scales(&matrix, None, &mut rounding).unwrap();
            b.round(&mut matrix, &mut rounding).unwrap();
            let rounded = b.download(&matrix).unwrap();
            let heads = 7;
            for encoding in encodings(grid) {
                for permuted in [None, Some(heads)] {
                    let what = format!("{encoding} {options:?} {permuted:?}");
                    let output = output(encoding, permuted);
                    let parts = encode_rounded(&output, &rounding)
                        .unwrap_or_else(|error| panic!("{what}: {error}"));
                    let mut decoded = vec![0.0; w.len()];
                    encoding.decode_all_f32("m.weight", &SHAPE, &parts, &mut decoded).unwrap();
                    if let Some(heads) = permuted {
                        decoded = from_gguf_rows(&decoded, &SHAPE, heads);
                    }
                    assert_eq!(decoded, rounded, "{what}");
                }
            }
            if grid.keeps_zeros() {
                assert!(rounded[..SHAPE[1]].iter().all(|w| *w == 0.0), "{scheme}");
            }
        }
    }

    #[test]
    fn scales_beyond_their_type_are_refused() {
        let b = Cpu::new(Precision::F32, Some(1)).unwrap();
        let mut w = weights();
        w[3 * SHAPE[1] + 7] = 1e9;
        let options = GridOptions { group_size: None, symmetric: true, scales: ScaleSearch::Mse };
        for (scheme, dtype, text) in [
            (Scheme::Block(GgmlType::Q4_0), DType::F16, "Q4_0 cannot hold the scales"),
            (Scheme::Block(GgmlType::Q4_K), DType::F16, "Q4_K cannot hold the scales"),
            (Scheme::Int(4), DType::F16, "the scale is inf"),
        ] {
            let grid = scheme.grid(options, dtype).unwrap();
            let mut rounding = Rounding::new(grid, SHAPE[0], SHAPE[1]);
            let mut matrix = b.upload(&w, SHAPE[0], SHAPE[1]).unwrap();
            b.choose_scales(&matrix, None, &mut rounding).unwrap();
            b.round(&mut matrix, &mut rounding).unwrap();
            let output = output(encodings(grid)[0], None);
            let error = encode_rounded(&output, &rounding).unwrap_err().to_string();
            assert!(error.contains(text), "{scheme}: {error}");
        }
    }

    #[test]
    fn a_search_is_never_worse_than_the_plain_scale() {
        let b = Cpu::new(Precision::F32, Some(1)).unwrap();
        let w = weights();
        let error = |scales, bits, symmetric| {
            let options =
                GridOptions { group_size: Some(GroupSize::Columns(32)), symmetric, scales };
            let grid = Scheme::Int(bits).grid(options, DType::F32).unwrap();
            let mut rounding = Rounding::new(grid, SHAPE[0], SHAPE[1]);
            let mut matrix = b.upload(&w, SHAPE[0], SHAPE[1]).unwrap();
            b.choose_scales(&matrix, None, &mut rounding).unwrap();
            b.round(&mut matrix, &mut rounding).unwrap();
            let rounded = b.download(&matrix).unwrap();
            rounded.iter().zip(&w).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        };
        for bits in 2..=8 {
            for symmetric in [true, false] {
                let (searched, plain) = (
                    error(ScaleSearch::Mse, bits, symmetric),
                    error(ScaleSearch::Minmax, bits, symmetric),
                );
                assert!(searched <= plain, "int{bits} symmetric {symmetric}: {searched} {plain}");
            }
        }
    }
}

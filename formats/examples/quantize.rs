//! Rounds the linears of a model to grids, and writes two directories: `OUTPUT/quantized`, and the
//! values that its codes stand for as `OUTPUT/dense`:
//!
//! ```sh
//! cargo run -p sparsepack-formats --example quantize -- MODEL OUTPUT GRID [PART=GRID]...
//! ```
//!
//! `GRID` is `FORMAT,BITS,GROUP[,asymmetric]` with a format of compressed-tensors (`pack-quantized`,
//! `int-quantized`, `float-quantized`) or `int`, sparsepack's own; a `GROUP` of 0 is a whole row. Linears
//! whose names contain `PART` get its grid. Every group of columns is scaled by its extremes and rounded
//! to nearest, which is the simplest way to quantize and not a good one.

use std::{error::Error, fs, path::Path};

use half::bf16;
use sparsepack_formats::{
    CheckpointReader, DType, Encoder, Encoding, IntGrid, Kept, ModelMetadata, QuantizedRows,
    SafetensorsWriter, ShardLayout, compressed_tensors::quantization_config, encoding::dense, open,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, output, grids @ ..] = &arguments[..] else {
        return Err("usage: quantize MODEL OUTPUT GRID [PART=GRID]...".into());
    };
    let grids = grids.iter().map(|grid| parse(grid)).collect::<Outcome<Vec<_>>>()?;
    quantize(Path::new(model), Path::new(output), &grids)
}

/// The part of names and the encoding that an argument says.
pub(crate) fn parse(argument: &str) -> Outcome<(String, Encoding)> {
    let (part, grid) = argument.split_once('=').unwrap_or(("", argument));
    let (fields, symmetric) = match grid.strip_suffix(",asymmetric") {
        Some(fields) => (fields, false),
        None => (grid, true),
    };
    let [format, bits, group] = fields.split(',').collect::<Vec<_>>()[..] else {
        return Err(format!("`{grid}` is not FORMAT,BITS,GROUP[,asymmetric]").into());
    };
    let (group, scale): (u32, _) = (group.parse()?, DType::Bf16);
    let group_size = (group > 0).then_some(group);
    let grid = IntGrid { bits: bits.parse()?, group_size, symmetric, scale };
    let encoding = match format {
        "pack-quantized" => Encoding::CtPackQuantized { grid },
        "int-quantized" => Encoding::CtIntQuantized { grid },
        "float-quantized" => Encoding::CtFloatQuantized { scale },
        "int" => Encoding::Int { grid, kept: Kept::All },
        _ => return Err(format!("the format {format} is not known").into()),
    };
    Ok((part.to_owned(), encoding))
}

/// Writes both directories. The last grid whose part a linear's name contains counts.
pub(crate) fn quantize(model: &Path, output: &Path, grids: &[(String, Encoding)]) -> Outcome<()> {
    let source = open(model)?;
    let encoding_of = |name: &str| {
        let mut grids = grids.iter().rev().filter(|_| name.ends_with("_proj.weight"));
        grids.find(|(part, _)| name.contains(part.as_str())).map(|(_, encoding)| *encoding)
    };
    let quantized = output.join("quantized");
    write(source.as_ref(), &quantized, encoding_of)?;
    write(open(&quantized)?.as_ref(), &output.join("dense"), |_| None)
}

/// Writes a copy with some tensors quantized, and the others dense.
fn write(
    source: &dyn CheckpointReader,
    output: &Path,
    encoding_of: impl Fn(&str) -> Option<Encoding>,
) -> Outcome<()> {
    fs::create_dir_all(output)?;
    let tensors: Vec<_> = source.tensors().iter().collect();
    let layout = ShardLayout {
        tensors: tensors
            .iter()
            .map(|info| {
                let dense = Encoding::Dense { dtype: info.encoding.value_dtype() };
                (info.name.clone(), encoding_of(&info.name).unwrap_or(dense), info.shape.clone())
            })
            .collect(),
        ..ShardLayout::default()
    };
    let mut writer = SafetensorsWriter::create(output, &[layout])?;
    for info in tensors {
        let (name, rows) = (&info.name, info.shape.iter().rev().skip(1).product());
        let parts = if let Some(encoding) = encoding_of(name) {
            encode(&source.read_f32(name)?, name, &info.shape, encoding)?
        } else {
            let mut values = vec![];
            source.read_rows_dense(name, 0..rows, &mut values)?;
            vec![values]
        };
        for (component, bytes) in parts.iter().enumerate() {
            writer.write(name, component, bytes)?;
        }
    }
    writer.finish()?;
    write_config(source, output, encoding_of)
}

/// The components of a matrix rounded to a grid.
fn encode(
    values: &[f32],
    name: &str,
    shape: &[usize],
    encoding: Encoding,
) -> Outcome<Vec<Vec<u8>>> {
    let cols = shape[shape.len() - 1];
    let (group, range, symmetric) = match encoding {
        Encoding::Int { grid, .. }
        | Encoding::CtPackQuantized { grid }
        | Encoding::CtIntQuantized { grid } => {
            let half = f32::from(1u16 << (grid.bits - 1));
            (grid.group_size.map_or(cols, |size| size as usize), half, grid.symmetric)
        }
        _ => (cols, 448.0, true),
    };
    let (mut codes, mut scales, mut zero_points) = (vec![], vec![], vec![]);
    for group in values.chunks_exact(group) {
        let low = group.iter().copied().fold(0.0, f32::min);
        let high = group.iter().copied().fold(0.0, f32::max);
        let is_float = matches!(encoding, Encoding::CtFloatQuantized { .. });
        let steps = match (is_float, symmetric) {
            (true, _) => range,
            (false, true) => range - 0.5,
            (false, false) => 2.0 * range - 1.0,
        };
        let width = if symmetric { high.max(-low) } else { high - low };
        let scale = bf16::from_f32(width / steps).to_f32();
        let points = if symmetric { 0.0 } else { (-range - low / scale).round().max(-range) };
        if is_float {
            let scaled: Vec<f32> =
                group.iter().map(|value| (value / scale).clamp(-range, range)).collect();
            let mut bytes = vec![];
            dense::encode_f32(name, DType::F8E4m3, &scaled, &mut bytes)?;
            codes.extend(bytes.iter().map(|byte| byte.cast_signed()));
        } else {
            let code = |value: &f32| (value / scale).round() + points;
            codes.extend(group.iter().map(|v| code(v).clamp(-range, range - 1.0) as i8));
        }
        scales.push(scale);
        if !symmetric {
            zero_points.push(points as i8);
        }
    }
    let mut encoder = Encoder::new(encoding, name, shape)?;
    let rows = QuantizedRows { codes: &codes, scales: &scales, zero_points: &zero_points };
    let mut parts = encoder.quantized_rows(rows)?;
    for (part, rest) in parts.iter_mut().zip(encoder.finish()?) {
        part.extend(rest);
    }
    Ok(parts)
}

/// `config.json`, with what loaders have to know, and the small files beside it.
fn write_config(
    source: &dyn CheckpointReader,
    output: &Path,
    encoding_of: impl Fn(&str) -> Option<Encoding>,
) -> Outcome<()> {
    let ModelMetadata::HuggingFace { config, directory } = source.metadata() else {
        return Err("the model is not a directory with config.json".into());
    };
    let mut config = config.clone();
    let modules: Vec<(String, Encoding)> = source
        .tensors()
        .iter()
        .filter_map(|info| Some((info.name.strip_suffix(".weight")?, encoding_of(&info.name)?)))
        .filter(|(_, encoding)| !encoding.is_declared())
        .map(|(module, encoding)| (module.to_owned(), encoding))
        .collect();
    let object = config.as_object_mut().ok_or("config.json is not an object")?;
    object.remove("quantization_config");
    if let Some(quantization) = quantization_config(&modules, &["lm_head".to_owned()])? {
        object.insert("quantization_config".to_owned(), quantization);
    }
    fs::write(output.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("token") || name == "generation_config.json" {
            fs::copy(&path, output.join(name))?;
        }
    }
    Ok(())
}

//! From a packed directory back to plain safetensors, bit for bit.

use std::path::Path;

use sparsepack_formats::{
    CheckpointReader, Encoding, FormatError, ModelMetadata, OutputFile, SafetensorsWriter,
    ShardLayout, encoding::MatrixShape,
};

use super::{
    error::{PipelineError, Result},
    manifest::Manifest,
    output,
};

/// Values decoded at a time.
const CHUNK_VALUES: usize = 4 << 20;

/// Files of a packed directory that do not go along: they describe the packed form.
const LEFT_BEHIND: [&str; 2] = [super::MANIFEST, "model.safetensors.index.json"];

/// Writes the decoded tensors of the packed directory `packed` to `out`, with its other files.
/// Returns the bytes written.
///
/// # Errors
/// `packed` is not a packed directory; `out` exists; a tensor does not decode; I/O.
pub fn unpack(packed: &Path, out: &Path) -> Result<u64> {
    // Only outputs of ours have a manifest; it is not needed to decode.
    Manifest::read(packed)?;
    let reader = sparsepack_formats::open(packed)?;
    if matches!(reader.metadata(), ModelMetadata::Gguf(_)) {
        return Err(PipelineError::NotPacked { path: packed.to_owned() });
    }
    let layout = ShardLayout {
        tensors: reader
            .tensors()
            .iter()
            .map(|info| {
                let dense = Encoding::Dense { dtype: info.encoding.value_dtype() };
                (info.name.clone(), dense, info.shape.clone())
            })
            .collect(),
        ..ShardLayout::default()
    };
    let bytes = layout
        .tensors
        .iter()
        .map(|(name, encoding, shape)| encoding.components(name, shape))
        .collect::<std::result::Result<Vec<_>, _>>()?
        .iter()
        .flatten()
        .map(|component| component.bytes)
        .sum();
    output::prepare(out, packed, false, bytes)?;
    let done =
        write_all(reader.as_ref(), out, layout).and_then(|()| copy_sidecars(reader.as_ref(), out));
    if let Err(error) = done {
        output::discard(out, |name| packed.join(name).is_file());
        return Err(error);
    }
    Ok(bytes)
}

fn write_all(reader: &dyn CheckpointReader, out: &Path, layout: ShardLayout) -> Result<()> {
    let mut writer = SafetensorsWriter::create(out, &[layout])?;
    for info in reader.tensors() {
        let parts = reader.components(&info.name)?;
        let matrix = MatrixShape::of(&info.shape);
        let rows_at_once = (CHUNK_VALUES / matrix.cols.max(1)).max(1);
        let mut chunk = Vec::new();
        let mut row = 0;
        while row < matrix.rows {
            let rows = row..(row + rows_at_once).min(matrix.rows);
            row = rows.end;
            chunk.clear();
            info.encoding.decode_dense(&info.name, &info.shape, &parts, rows, &mut chunk)?;
            writer.write(&info.name, 0, &chunk)?;
            reader.release(&[&info.name]);
        }
    }
    writer.finish()?;
    Ok(())
}

/// Copies the plain files beside the tensors; `config.json` loses the record of the packed form.
fn copy_sidecars(reader: &dyn CheckpointReader, out: &Path) -> Result<()> {
    let ModelMetadata::HuggingFace { config, directory } = reader.metadata() else {
        return Ok(());
    };
    let io = |action| move |source| PipelineError::Io { path: directory.clone(), action, source };
    for entry in std::fs::read_dir(directory).map_err(io("list"))? {
        let path = entry.map_err(io("list"))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let skip = LEFT_BEHIND.contains(&name.as_str())
            || name == "config.json"
            || name.ends_with(".safetensors")
            || !path.is_file();
        if !skip {
            let bytes = std::fs::read(&path).map_err(io("read"))?;
            OutputFile::write_whole(&out.join(&name), &bytes)?;
        }
    }
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        // It told how the packed form is read.
        object.remove("quantization_config");
    }
    if let Some(record) = config.get_mut("sparsepack").and_then(|value| value.as_object_mut()) {
        record.insert("format".to_owned(), "safetensors".into());
    }
    let mut text = serde_json::to_vec_pretty(&config)
        .map_err(|source| FormatError::Json { path: directory.clone(), source })?;
    text.push(b'\n');
    OutputFile::write_whole(&out.join("config.json"), &text)?;
    OutputFile::sync_directory(out)?;
    Ok(())
}

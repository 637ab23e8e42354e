//! From a packed or compressed directory back to plain safetensors, bit for bit.

use std::{io::Write as _, path::Path};

use sparsepack_formats::{
    CheckpointReader, Encoding, FormatError, HashingWriter, ModelMetadata, OutputFile,
    SafetensorsWriter, ShardLayout,
    container::{self, ContainerReader, OriginalFile},
    encoding::MatrixShape,
};

use super::{
    error::{PipelineError, Result},
    manifest::Manifest,
    output,
    workers::Workers,
};

/// Values decoded at a time.
const CHUNK_VALUES: usize = 4 << 20;

/// Pieces that wait for a thread or for the file, for each thread.
const CHUNKS_PER_THREAD: usize = 2;

/// Files of a packed directory that do not go along: they describe the packed form.
const LEFT_BEHIND: [&str; 2] = [super::MANIFEST, "model.safetensors.index.json"];

/// Writes the decoded tensors of the packed directory `packed` to `out`, with its other files: of a
/// compressed one, the files that were compressed, byte for byte. Returns the bytes written.
///
/// # Errors
/// `packed` is not a packed directory; `out` exists; a tensor does not decode; I/O.
pub fn unpack(packed: &Path, out: &Path) -> Result<u64> {
    // Only outputs of ours have a manifest; it is not needed to decode. GGUF files say more of
    // themselves than that they have none.
    if let Err(error) = Manifest::read(packed) {
        return Err(if is_gguf(packed) {
            PipelineError::NotPacked { path: packed.to_owned() }
        } else {
            error
        });
    }
    if packed.join(container::FILE_NAME).is_file() {
        return restore(packed, out);
    }
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
    let done = write_all(reader.as_ref(), out, layout)
        .and_then(|()| copy_sidecars(reader.as_ref(), out))
        .and_then(|()| write_config(reader.as_ref(), out));
    if let Err(error) = done {
        output::discard(out, |name| packed.join(name).is_file());
        return Err(error);
    }
    Ok(bytes)
}

fn is_gguf(path: &Path) -> bool {
    let reader = sparsepack_formats::open(path);
    reader.is_ok_and(|reader| matches!(reader.metadata(), ModelMetadata::Gguf(_)))
}

fn write_all(reader: &dyn CheckpointReader, out: &Path, layout: ShardLayout) -> Result<()> {
    let mut writer = SafetensorsWriter::create(out, &[layout])?;
    for info in reader.tensors() {
        let matrix = MatrixShape::of(&info.shape);
        let rows_at_once = (CHUNK_VALUES / matrix.cols.max(1)).max(1);
        let mut chunk = Vec::new();
        let mut row = 0;
        while row < matrix.rows && matrix.cols > 0 {
            let rows = row..(row + rows_at_once).min(matrix.rows);
            row = rows.end;
            chunk.clear();
            reader.read_rows_dense(&info.name, rows, &mut chunk)?;
            writer.write(&info.name, 0, &chunk)?;
            reader.release(&[&info.name]);
        }
    }
    writer.finish()?;
    Ok(())
}

/// Writes the files that a container describes, and those beside it. A file has its final name only
/// once the digests of its tensors agree.
fn restore(packed: &Path, out: &Path) -> Result<u64> {
    let reader = ContainerReader::open_dir(packed)?;
    let files = reader.original_files()?;
    let bytes = files.iter().map(|file| file.bytes).fold(0u64, u64::saturating_add);
    output::prepare(out, packed, false, bytes)?;
    let workers = Workers::new(None);
    let restored = || {
        for file in &files {
            restore_file(&reader, file, out, workers)?;
        }
        copy_sidecars(&reader, out)?;
        if files.iter().any(|file| file.name == "config.json") {
            return Ok(OutputFile::sync_directory(out)?);
        }
        write_config(&reader, out)
    };
    if let Err(error) = restored() {
        let written = |name: &str| files.iter().any(|file| file.name == name);
        output::discard(out, |name| written(name) || packed.join(name).is_file());
        return Err(error);
    }
    Ok(bytes)
}

fn restore_file(
    reader: &ContainerReader,
    file: &OriginalFile,
    out: &Path,
    workers: Workers,
) -> Result<()> {
    let output = OutputFile::create(&out.join(&file.name), file.bytes)?;
    output.write_at(0, &file.head)?;
    let mut position = file.head.len() as u64;
    let chunk = reader.chunk_bytes();
    for part in reader.parts(file)? {
        let mut hasher = HashingWriter::new(std::io::sink());
        let starts: Vec<u64> = (0..part.bytes).step_by(chunk as usize).collect();
        for starts in starts.chunks(CHUNKS_PER_THREAD * workers.count()) {
            let pieces = workers.map(starts, |&start| {
                let range = start..(start + chunk).min(part.bytes);
                Ok(reader.read_component(&part.tensor, part.component, range)?.into_owned())
            })?;
            for piece in pieces {
                // A sink takes everything.
                let _ = hasher.write_all(&piece);
                output.write_at(position, &piece)?;
                position += piece.len() as u64;
            }
        }
        let (expected, found) = (reader.digests(&part.tensor)?[part.component], hasher.finish().1);
        if found != expected {
            return Err(FormatError::InvalidTensor {
                path: reader.path().to_owned(),
                name: part.tensor,
                what: format!("has sha256 {found}, but {expected} is recorded"),
            }
            .into());
        }
    }
    Ok(output.finish()?)
}

/// Copies the plain files beside the tensors.
fn copy_sidecars(reader: &dyn CheckpointReader, out: &Path) -> Result<()> {
    let ModelMetadata::HuggingFace { directory, .. } = reader.metadata() else {
        return Ok(());
    };
    let io = |action| move |source| PipelineError::Io { path: directory.clone(), action, source };
    for entry in std::fs::read_dir(directory).map_err(io("list"))? {
        let path = entry.map_err(io("list"))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let skip = LEFT_BEHIND.contains(&name.as_str())
            || name == "config.json"
            || name.ends_with(".safetensors")
            || name == container::FILE_NAME
            || !path.is_file();
        if !skip {
            let bytes = std::fs::read(&path).map_err(io("read"))?;
            OutputFile::write_whole(&out.join(&name), &bytes)?;
        }
    }
    OutputFile::sync_directory(out)?;
    Ok(())
}

/// Writes `config.json`, whose record of the packed form now says that it is not.
fn write_config(reader: &dyn CheckpointReader, out: &Path) -> Result<()> {
    let ModelMetadata::HuggingFace { config, directory } = reader.metadata() else {
        return Ok(());
    };
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

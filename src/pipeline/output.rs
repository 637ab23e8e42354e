//! The output directory: made or refused before work starts, completed after the last tensor.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use sparsepack_formats::{
    CheckpointReader, CheckpointWriter, DType, Digest, Encoding, GgufWriter, MappedFile,
    ModelMetadata, OutputFile, SafetensorsWriter,
    compressed_tensors::{self, SparseFormat},
    container::{self, ContainerReader, ContainerWriter},
};

use super::{
    error::{PipelineError, Result},
    journal::{SourceProbe, WORK_DIR},
    manifest::{
        ComponentRecord, MANIFEST, Manifest, QuantizedRecord, SourceFile, TensorRecord, Totals,
    },
    plan::{ConversionPlan, OutputTensor},
    quantize::Quantization,
    run::Outcome,
    slice::{SliceAccount, Sliced},
    workers::Workers,
};
use crate::{
    model::{ModelSource, SLICED_CODE, SLICED_CODE_FILE, Sidecar, SidecarContent},
    recipe::OutputFormat,
};

/// Room left free beside the planned bytes, for headers and sidecars.
const DISK_SLACK_BYTES: u64 = 16 << 20;

/// Makes the output directory, or checks that an existing one may be used: empty, or ours and
/// interrupted when resuming.
///
/// # Errors
/// [`PipelineError::OutputIsInput`], [`PipelineError::OutputExists`], [`PipelineError::DiskFull`].
pub(super) fn prepare(out: &Path, source: &Path, resume: bool, bytes: u64) -> Result<()> {
    let io = |action| move |source| PipelineError::Io { path: out.to_owned(), action, source };
    if let (Ok(a), Ok(b)) = (out.canonicalize(), source.canonicalize()) {
        let input_dir = if b.is_dir() { Some(b.as_path()) } else { b.parent() };
        if a == b || (input_dir == Some(a.as_path())) {
            return Err(PipelineError::OutputIsInput { path: out.to_owned() });
        }
    }
    let exists =
        |found, hint| Err(PipelineError::OutputExists { path: out.to_owned(), found, hint });
    if out.exists() {
        if !out.is_dir() {
            return exists("exists and is not a directory", "");
        }
        let interrupted = out.join(WORK_DIR).is_dir();
        let empty = std::fs::read_dir(out).map_err(io("list"))?.next().is_none();
        match (interrupted, resume, empty) {
            (true, true, _) | (false, false, true) => {}
            (true, false, _) => {
                return exists(
                    "holds an interrupted conversion",
                    ", continue it with --resume, or remove it",
                );
            }
            (false, _, false) if out.join(MANIFEST).is_file() => {
                return exists("holds a finished conversion", ", or remove it");
            }
            (false, _, false) => return exists("exists and was not written by sparsepack", ""),
            (false, true, true) => {
                return Err(PipelineError::Resume {
                    path: out.to_owned(),
                    why: "there is no interrupted run in it".to_owned(),
                });
            }
        }
    } else if resume {
        return Err(PipelineError::Resume {
            path: out.to_owned(),
            why: "it does not exist".to_owned(),
        });
    }
    let existed = out.exists();
    std::fs::create_dir_all(out).map_err(io("create the output directory"))?;
    if !resume {
        let needed = bytes + DISK_SLACK_BYTES;
        let free = free_bytes(out).map_err(io("read the free space of"))?;
        if free < needed {
            if !existed {
                let _ = std::fs::remove_dir(out);
            }
            return Err(PipelineError::DiskFull { path: out.to_owned(), needed, free });
        }
    }
    Ok(())
}

/// The writer of the planned container: with everything laid out in `*.part` files or, to resume, on
/// those of an interrupted run.
///
/// # Errors
/// I/O; a layout that the container cannot hold; parts of another layout.
pub(super) fn open_writer(
    plan: &ConversionPlan,
    out: &Path,
    workers: Workers,
    resume: bool,
) -> Result<Box<dyn CheckpointWriter>> {
    if plan.format == OutputFormat::Zst {
        let level = plan.recipe.output.level.unwrap_or(container::DEFAULT_LEVEL);
        let (layout, executor) = (plan.container(), Box::new(workers));
        return Ok(if resume {
            ContainerWriter::resume(out, layout, level, executor)?
        } else {
            ContainerWriter::create(out, layout, level, executor)?
        });
    }
    Ok(match (plan.gguf_layout(), resume) {
        (Some(layout), false) => GgufWriter::create(out, &layout)?,
        (Some(layout), true) => GgufWriter::resume(out, &layout)?,
        (None, false) => SafetensorsWriter::create(out, &plan.shards())?,
        (None, true) => SafetensorsWriter::resume(out, &plan.shards())?,
    })
}

/// Bytes that may still be written below `path`.
fn free_bytes(path: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Removes what a failed conversion that is not to be resumed left: everything that a conversion
/// writes, files that `copied` tells by their name and, when then empty, the directory itself.
pub(super) fn discard(out: &Path, copied: impl Fn(&str) -> bool) {
    let _ = std::fs::remove_dir_all(out.join(WORK_DIR));
    remove_parts(out);
    for path in entries(out) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("model") || name == "config.json" || name == MANIFEST || copied(&name) {
            let _ = std::fs::remove_file(&path);
        }
    }
    // Fails, as it should, when anything else is in it.
    let _ = std::fs::remove_dir(out);
}

/// Removes unfinished files.
pub(super) fn remove_parts(out: &Path) {
    for path in entries(out) {
        if path.extension().is_some_and(|extension| extension == "part") {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.flatten().map(|entry| entry.path()).collect()
}

/// Writes tokenizer, generation config and config.json beside the tensors (but of GGUF, which has
/// them inside), the code of a model that transformers has no class for, then the manifest, and
/// removes the journal: from then on the output is finished.
///
/// # Errors
/// A sidecar that cannot be read or written.
pub(super) fn complete(
    source: &ModelSource,
    sliced: Option<&Sliced>,
    plan: &ConversionPlan,
    out: &Path,
    source_files: Vec<SourceFile>,
    sidecars: &[Sidecar],
    outcome: Outcome,
) -> Result<(Manifest, Outcome)> {
    sidecars.iter().try_for_each(|sidecar| put_sidecar(out, sidecar))?;
    let slice = plan.slice.clone().zip(sliced).map(|(account, sliced)| SliceAccount {
        kept_variance: sliced.kept_variance.clone(),
        ..account
    });
    let source = sliced.map_or(source, |sliced| &sliced.model);
    let manifest = Manifest {
        slice,
        sparsepack: env!("CARGO_PKG_VERSION").to_owned(),
        recipe: plan.recipe.clone(),
        format: plan.format,
        readers: plan.readers().map(str::to_owned),
        architecture: source.arch().name.clone(),
        source: source_files,
        calibration: outcome.calibration.clone(),
        device: outcome.device.clone(),
        tensors: tensor_records(plan, out, &outcome)?,
        totals: Totals::default(),
    };
    let manifest = Manifest { totals: Totals::of(&manifest.tensors), ..manifest };
    let json = |source| sparsepack_formats::FormatError::Json { path: out.to_owned(), source };
    if plan.format != OutputFormat::Gguf {
        let config = output_config(source, plan, &manifest)?;
        let mut config = serde_json::to_vec_pretty(&config).map_err(json)?;
        config.push(b'\n');
        OutputFile::write_whole(&out.join("config.json"), &config)?;
        if source.arch().shortcuts.is_some() {
            OutputFile::write_whole(&out.join(SLICED_CODE_FILE), SLICED_CODE.as_bytes())?;
        }
    }
    OutputFile::write_whole(&out.join(MANIFEST), &manifest.to_bytes().map_err(json)?)?;
    OutputFile::sync_directory(out)?;
    Ok((manifest, outcome))
}

/// Writes a file that stands beside the weights.
///
/// # Errors
/// One that cannot be read or written.
pub(super) fn put_sidecar(directory: &Path, sidecar: &Sidecar) -> Result<()> {
    let path = directory.join(&sidecar.name);
    match &sidecar.content {
        SidecarContent::Bytes(bytes) => OutputFile::write_whole(&path, bytes)?,
        SidecarContent::Copy(from) => {
            let io = |source| PipelineError::Io { path: from.clone(), action: "read", source };
            OutputFile::write_whole(&path, &std::fs::read(from).map_err(io)?)?;
        }
    }
    Ok(())
}

/// The source's configuration, with the element type of the output and a short record of the
/// pruning under a key of our own. `quantization_config`, which loaders interpret, is written where the
/// format asks for it, and the source's, which was about its own packing, is left out.
fn output_config(
    source: &ModelSource,
    plan: &ConversionPlan,
    manifest: &Manifest,
) -> Result<serde_json::Value> {
    let dtype = computing_dtype(plan);
    let mut config = match source.reader().metadata() {
        ModelMetadata::HuggingFace { config, .. } => config.clone(),
        _ => source.config().to_hf_json(source.arch(), dtype)?,
    };
    if let Some(object) = config.as_object_mut() {
        let name = match dtype {
            DType::F16 => "float16",
            DType::F32 => "float32",
            _ => "bfloat16",
        };
        for key in ["torch_dtype", "dtype"] {
            if object.contains_key(key) {
                object.insert(key.to_owned(), name.into());
            }
        }
        object.remove("quantization_config");
        if let Some(quantization) = quantization_config(source, plan)? {
            object.insert("quantization_config".to_owned(), quantization);
        }
        // Left by earlier runs. What one said of its pruning goes where this one prunes.
        let earlier = object.get("sparsepack").is_some_and(serde_json::Value::is_object);
        let recipe = &plan.recipe;
        if earlier || plan.slice.is_some() || recipe.prune.is_some() || recipe.quantize.is_some() {
            let record = object.entry("sparsepack").or_insert_with(|| serde_json::json!({}));
            match record.as_object_mut() {
                Some(record) if recipe.prune.is_some() => record.retain(|key, _| key == "slice"),
                Some(_) => {}
                None => *record = serde_json::json!({}),
            }
            put_record(record, plan, manifest);
        }
    }
    Ok(config)
}

/// What this run did, in a few words.
fn put_record(record: &mut serde_json::Value, plan: &ConversionPlan, manifest: &Manifest) {
    use serde_json::json;
    let totals = &manifest.totals;
    record["version"] = json!(manifest.sparsepack);
    record["format"] = json!(manifest.format);
    if let Some(slice) = &manifest.slice {
        record["slice"] =
            json!({ "basis": slice.basis, "from_hidden_size": slice.before.hidden_size });
    }
    if let Some(prune) = &plan.recipe.prune {
        record["method"] = json!(prune.method);
        record["sparsity"] = json!(prune.sparsity);
        record["pruned_parameters"] = json!(totals.pruned_parameters);
        record["zeroed"] = json!(totals.zeroed);
    }
    if let Some(quantize) = &plan.recipe.quantize {
        record["quantization"] = json!({
            "method": quantize.method,
            "scheme": quantize.scheme,
            "quantized_parameters": totals.quantized_parameters,
        });
    }
}

/// What compressed-tensors has to know: the formats, and which linears are not in them.
fn quantization_config(
    source: &ModelSource,
    plan: &ConversionPlan,
) -> Result<Option<serde_json::Value>> {
    if plan.format != OutputFormat::CompressedTensors {
        return Ok(None);
    }
    let sparse = plan.outputs.iter().find_map(|output| match output.encoding {
        Encoding::CtSparse24Bitmask { .. } => Some(SparseFormat::Sparse24Bitmask),
        Encoding::CtSparseBitmask { .. } => Some(SparseFormat::SparseBitmask),
        _ => None,
    });
    let is_packed = |output: &OutputTensor| output.encoding.is_packed();
    let dense = plan.outputs.iter().filter(|output| output.linear.is_some() && !is_packed(output));
    let mut ignore: Vec<String> =
        dense.filter_map(|output| output.name.strip_suffix(".weight").map(str::to_owned)).collect();
    // A tied output matrix is a linear too, and is not among the tensors.
    let head = source.arch().lm_head.weight();
    if !plan.outputs.iter().any(|output| output.name == head && is_packed(output)) {
        ignore.extend(head.strip_suffix(".weight").map(str::to_owned));
    }
    let Some(sparse) = sparse else {
        let quantized = plan.outputs.iter().filter(|output| output.encoding.is_quantized());
        let modules = quantized.filter_map(|output| {
            Some((output.name.strip_suffix(".weight")?.to_owned(), output.encoding))
        });
        let modules: Vec<_> = modules.collect();
        return Ok(compressed_tensors::quantization_config(&modules, &ignore)?);
    };
    let (mut zeros, mut all) = (0, 0);
    for output in &plan.outputs {
        let elements: u64 = output.shape.iter().map(|&n| n as u64).product();
        all += elements;
        zeros += match output.encoding {
            Encoding::CtSparse24Bitmask { .. } => elements / 2,
            Encoding::CtSparseBitmask { kept, .. } => elements - kept,
            _ => 0,
        };
    }
    Ok(Some(sparse.to_config(&ignore, zeros as f64 / all as f64)))
}

/// The type that loaders shall compute in: the linears', or where those are 8-bit floats, which only
/// store, that of the tensors beside them.
fn computing_dtype(plan: &ConversionPlan) -> DType {
    let linears = plan.outputs.iter().filter(|output| output.linear.is_some());
    linears
        .chain(&plan.outputs)
        .map(|output| output.encoding.value_dtype())
        .find(|dtype| dtype.is_float_weight() && *dtype != DType::F8E4m3)
        .unwrap_or(DType::Bf16)
}

fn tensor_records(
    plan: &ConversionPlan,
    out: &Path,
    outcome: &Outcome,
) -> Result<Vec<TensorRecord>> {
    let compressed = if plan.format == OutputFormat::Zst {
        let file = MappedFile::open(&out.join(container::FILE_NAME))?;
        Some(ContainerReader::open_file(file)?)
    } else {
        None
    };
    let compressed_bytes = |name: &str| {
        let reader = compressed.as_ref()?;
        Some(reader.tensors().get(name)?.stored_bytes)
    };
    plan.outputs
        .iter()
        .map(|output| {
            let digests = outcome.digests.iter().find(|(name, _)| name == output.stored_name());
            let digests: &[Digest] = digests.map_or(&[], |(_, digests)| digests);
            Ok(TensorRecord {
                name: output.name.clone(),
                stored_name: output.stored_name.clone(),
                encoding: output.encoding,
                shape: output.shape.clone(),
                components: component_records(output, digests)?,
                compressed_bytes: compressed_bytes(&output.name),
                pruned: plan.pruned(&output.name),
                quantized: plan.layer(&output.name).and_then(|layer| layer.quantize).map(
                    |Quantization { method, grid, act_order }| QuantizedRecord {
                        act_order,
                        method,
                        grid: grid.to_string(),
                    },
                ),
                report: output.name.strip_suffix(".weight").and_then(|module| {
                    outcome.reports.iter().find(|report| report.layer == module).cloned()
                }),
            })
        })
        .collect()
}

fn component_records(output: &OutputTensor, digests: &[Digest]) -> Result<Vec<ComponentRecord>> {
    let components = output.encoding.components(&output.name, &output.shape)?;
    Ok(components
        .into_iter()
        .zip(digests)
        .map(|(component, &sha256)| ComponentRecord {
            name: output.encoding.component_name(output.stored_name(), &component),
            dtype: component.dtype,
            bytes: component.bytes,
            sha256,
        })
        .collect())
}

/// Pages that a probe of a file reads at most, and their size.
const PROBE_PAGES: u64 = 64;
const PAGE_BYTES: u64 = 4096;

/// Looks at every file of a source, cheaply however large it is.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn probe_source(source: &ModelSource) -> Result<Vec<SourceProbe>> {
    let of_file = |path: &Path, file| {
        let (bytes, pages) = probe(path).map_err(|source| unreadable(path, source))?;
        Ok(SourceProbe { file, bytes, pages })
    };
    of_files(source, of_file)
}

/// Size and digest of the probed pages.
fn probe(path: &Path) -> std::io::Result<(u64, Digest)> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let stride = (bytes / PROBE_PAGES).max(PAGE_BYTES);
    let mut pages = Vec::new();
    for page in 0..PROBE_PAGES.min(bytes.div_ceil(PAGE_BYTES)) {
        file.seek(SeekFrom::Start(page * stride))?;
        (&mut file).take(PAGE_BYTES).read_to_end(&mut pages)?;
    }
    Ok((bytes, Digest::of(&pages)))
}

/// Name, size and digest of every file of a source.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn source_digests(source: &ModelSource) -> Result<Vec<SourceFile>> {
    let of_file = |path: &Path, file| {
        let found = std::fs::metadata(path).map_err(|source| unreadable(path, source))?;
        Ok(SourceFile { file, bytes: found.len(), sha256: Digest::of_file(path)? })
    };
    of_files(source, of_file)
}

/// What `of_file` says of every file of a source and its name.
fn of_files<T>(
    source: &ModelSource,
    of_file: impl Fn(&Path, String) -> Result<T>,
) -> Result<Vec<T>> {
    let files = source.reader().files().into_iter();
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    files.map(|path| of_file(path, name(path))).collect()
}

fn unreadable(path: &Path, source: std::io::Error) -> PipelineError {
    PipelineError::Io { path: path.to_owned(), action: "examine", source }
}

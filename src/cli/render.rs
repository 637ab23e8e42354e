//! Results as text for people, and as JSON for programs.

use std::{
    error::Error,
    io::{self, Write},
    path::Path,
};

use serde::Serialize;

use super::{
    CliError,
    eval::EvalReport,
    inspect::{Summary, TensorSummary},
};
use crate::{
    model::ModelSource,
    pipeline::{
        ConversionPlan, Converted, Fallback, LayerTimes, Manifest, Phase, PhaseTimes, SliceAccount,
        TensorRecord, Totals, VerifyReport, resident_bytes,
    },
    recipe::OutputFormat,
};

/// Findings shown before the rest is only counted.
const MAX_FINDINGS: usize = 20;

/// Writes `value` as JSON to standard output.
pub(super) fn json<T: Serialize>(value: &T) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    out.write_all(b"\n")?;
    Ok(())
}

/// Writes an error and its causes to standard error.
pub(super) fn error(error: &CliError) {
    let mut text = format!("error: {error}");
    let mut cause = error.source();
    while let Some(source) = cause {
        let next = source.to_string();
        // Transparent variants repeat their source's message.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = source.source();
    }
    // Nothing is left to do when standard error is gone.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// `1234567` as `1.2 MB`.
pub(super) fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if value < 1000.0 || unit == "TB" {
            let decimals = usize::from(unit != "B" && value < 100.0);
            return format!("{value:.decimals$} {unit}");
        }
        value /= 1000.0;
    }
    unreachable!("the last unit returns")
}

/// `1234567` as `1,234,567`.
fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn ratio(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// A finished conversion as JSON.
#[derive(Debug, Serialize)]
pub(super) struct ConvertedJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    slice: Option<&'a SliceAccount>,
    totals: &'a Totals,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
    compute: &'a str,
    gemm_ceiling_flops_per_sec: Option<f64>,
    /// GGUF outputs: tensors that got another type than the one asked for.
    fallbacks: &'a [Fallback],
    /// Pruned tensors whose type stores some zeros as small values.
    zeros_lost: Vec<ZerosLost<'a>>,
    phases: Vec<PhaseJson>,
}

/// What a block type left of the zeros of a pruned tensor.
#[derive(Debug, Serialize)]
struct ZerosLost<'a> {
    tensor: &'a str,
    zeroed: u64,
    stored_zeros: u64,
}

#[derive(Debug, Serialize)]
struct PhaseJson {
    phase: Phase,
    seconds: f64,
    flops: f64,
}

impl<'a> ConvertedJson<'a> {
    pub(super) fn new(plan: &'a ConversionPlan, converted: &'a Converted) -> Self {
        Self {
            slice: converted.manifest.slice.as_ref(),
            totals: &converted.manifest.totals,
            seconds: converted.secs,
            peak_rss_bytes: resident_bytes().map(|(_, peak)| peak),
            compute: &converted.manifest.device,
            gemm_ceiling_flops_per_sec: converted.gemm_ceiling,
            fallbacks: &plan.fallbacks,
            zeros_lost: zeros_lost(&converted.manifest),
            phases: converted
                .times
                .iter()
                .map(|(phase, cost)| PhaseJson { phase, seconds: cost.secs, flops: cost.flops })
                .collect(),
        }
    }
}

/// The table at the end of a conversion.
pub(super) fn converted(
    out: &Path,
    plan: &ConversionPlan,
    converted: &Converted,
) -> Result<(), CliError> {
    let totals = &converted.manifest.totals;
    let mut text = io::stdout().lock();
    let slice = converted.manifest.slice.as_ref();
    growth(&mut text, slice)?;
    writeln!(text, "wrote {}", out.display())?;
    slice_lines(&mut text, slice)?;
    writeln!(
        text,
        "  all tensors     {:>10} -> {:>10}  ({:.1}% of dense)",
        bytes(totals.dense_bytes),
        bytes(totals.bytes),
        ratio(totals.bytes, totals.dense_bytes)
    )?;
    if totals.pruned_parameters > 0 {
        writeln!(
            text,
            "  pruned tensors  {:>10} -> {:>10}  ({:.2}% of dense)",
            bytes(totals.pruned_dense_bytes),
            bytes(totals.pruned_bytes),
            ratio(totals.pruned_bytes, totals.pruned_dense_bytes)
        )?;
        writeln!(
            text,
            "  kept weights    {} of {} in pruned layers ({:.2}%)",
            count(totals.pruned_parameters - totals.zeroed),
            count(totals.pruned_parameters),
            ratio(totals.pruned_parameters - totals.zeroed, totals.pruned_parameters)
        )?;
    }
    if totals.quantized_parameters > 0 {
        writeln!(
            text,
            "  quantized       {} weights in {} ({:.3} bits a weight)",
            count(totals.quantized_parameters),
            bytes(totals.quantized_bytes),
            totals.quantized_bytes as f64 * 8.0 / totals.quantized_parameters as f64
        )?;
    }
    output_errors(&mut text, &converted.manifest)?;
    readers_line(&mut text, plan)?;
    writeln!(text, "  source          {:>10}", bytes(plan.source_bytes))?;
    fallbacks(&mut text, plan)?;
    zero_loss(&mut text, &converted.manifest)?;
    phases(&mut text, &converted.times, converted.gemm_ceiling, converted.secs)?;
    if let Some((_, peak)) = resident_bytes() {
        writeln!(
            text,
            "  peak memory     {:>10}  (planned {})",
            bytes(peak),
            bytes(plan.budget.peak_bytes)
        )?;
    }
    writeln!(text, "  computed on     {}", converted.manifest.device)?;
    Ok(())
}

/// Tensors that got another type than the one asked for, those of a kind on one line.
fn fallbacks(text: &mut impl Write, plan: &ConversionPlan) -> io::Result<()> {
    let mut groups: Vec<(&Fallback, usize, Vec<&str>)> = Vec::new();
    for fallback in &plan.fallbacks {
        let module = fallback.tensor.trim_end_matches(".weight");
        let kind = module.rsplit('.').next().unwrap_or(module);
        let alike = |(first, ..): &&mut (&Fallback, usize, Vec<&str>)| {
            (first.asked, first.used, first.cols) == (fallback.asked, fallback.used, fallback.cols)
        };
        match groups.iter_mut().find(alike) {
            Some((_, tensors, kinds)) => {
                *tensors += 1;
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
            None => groups.push((fallback, 1, vec![kind])),
        }
    }
    for (Fallback { asked, used, cols, .. }, tensors, kinds) in groups {
        writeln!(
            text,
            "  {used} for {asked}   {tensors} tensors ({}): {cols} columns are not blocks of {}",
            kinds.join(", "),
            asked.block_len()
        )?;
    }
    Ok(())
}

/// The tensors with zeros that a block type turned into small values.
fn zeros_lost(manifest: &Manifest) -> Vec<ZerosLost<'_>> {
    let lost = |tensor: &'_ TensorRecord| {
        let report = tensor.report.as_ref()?;
        let stored_zeros = report.stored_zeros.filter(|left| *left < report.zeroed)?;
        Some((report.zeroed, stored_zeros))
    };
    let tensors = manifest.tensors.iter();
    tensors
        .filter_map(|tensor| {
            let (zeroed, stored_zeros) = lost(tensor)?;
            Some(ZerosLost { tensor: &tensor.name, zeroed, stored_zeros })
        })
        .collect()
}

/// Relative output errors of the solved layers: their mean, the worst, and what rounding to nearest
/// would have cost.
fn output_errors(text: &mut impl Write, manifest: &Manifest) -> io::Result<()> {
    let reports = || manifest.tensors.iter().filter_map(|tensor| tensor.report.as_ref());
    let errors: Vec<(f64, &str)> = reports()
        .filter_map(|report| Some((report.relative_error?, report.layer.as_str())))
        .collect();
    let Some((worst, layer)) = errors.iter().max_by(|a, b| a.0.total_cmp(&b.0)) else {
        return Ok(());
    };
    let mean = errors.iter().map(|(error, _)| error).sum::<f64>() / errors.len() as f64;
    write!(text, "  output error    {mean:.4} on average, at most {worst:.4} ({layer})")?;
    let nearest: Vec<f64> = reports().filter_map(|report| report.nearest_error).collect();
    if !nearest.is_empty() {
        let mean = nearest.iter().sum::<f64>() / nearest.len() as f64;
        write!(text, "; rounded to nearest {mean:.4}")?;
    }
    writeln!(text)
}

/// Says before anything else that a slice makes the model larger, and by what.
fn growth(text: &mut impl Write, slice: Option<&SliceAccount>) -> io::Result<()> {
    let Some(slice) = slice.filter(|slice| slice.grows()) else { return Ok(()) };
    let (before, after) = (slice.before.parameters, slice.after.parameters);
    write!(
        text,
        "LARGER: this slice makes the model larger, from {} to {} parameters",
        count(before),
        count(after)
    )?;
    let causes = [
        (slice.untied_parameters, "an output matrix of its own"),
        (slice.shortcut_parameters, "matrices on the shortcuts"),
    ];
    for (parameters, what) in causes.into_iter().filter(|(parameters, _)| *parameters > 0) {
        write!(text, "; {} of them for {what}", count(parameters))?;
    }
    writeln!(text)
}

/// What a slice saves and costs.
fn slice_lines(text: &mut impl Write, slice: Option<&SliceAccount>) -> io::Result<()> {
    let Some(slice) = slice else { return Ok(()) };
    let SliceAccount { before, after, .. } = slice;
    writeln!(
        text,
        "  slice           {} basis, hidden size {} -> {}, class {}",
        slice.basis.name(),
        before.hidden_size,
        after.hidden_size,
        slice.class
    )?;
    let mut change = |what: &str, before: String, after: String, ratio: f64| {
        writeln!(text, "    {what:<20} {before:>14} -> {after:>14}  ({ratio:.1}%)")
    };
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    for (what, before, after) in [
        ("parameters", before.parameters, after.parameters),
        ("FLOP a token", before.flops_per_token, after.flops_per_token),
    ] {
        change(what, count(before), count(after), share(after, before))?;
    }
    for (what, before, after) in [
        ("bytes of tensors", before.bytes, after.bytes),
        ("bytes a decoded token", before.decode_bytes, after.decode_bytes),
    ] {
        change(what, bytes(before), bytes(after), share(after, before))?;
    }
    if slice.untied_parameters > 0 {
        let parameters = count(slice.untied_parameters);
        writeln!(
            text,
            "    output matrix        {parameters} parameters, which were the embeddings'"
        )?;
    }
    if slice.shortcut_parameters > 0 {
        let parameters = count(slice.shortcut_parameters);
        writeln!(text, "    shortcuts            {parameters} parameters")?;
    }
    let kept = &slice.kept_variance;
    let least = kept.iter().copied().fold(1.0, f64::min);
    match kept.as_slice() {
        [] => Ok(()),
        [_] => writeln!(text, "    kept variance        {:.2}%", 100.0 * least),
        _ => {
            let mean = kept.iter().sum::<f64>() / kept.len() as f64;
            let (mean, least) = (100.0 * mean, 100.0 * least);
            writeln!(text, "    kept variance        {mean:.2}% on average, at least {least:.2}%")
        }
    }
}

/// The sum of [`zeros_lost`].
fn zero_loss(text: &mut impl Write, manifest: &Manifest) -> io::Result<()> {
    let lost = zeros_lost(manifest);
    let zeroed: u64 = lost.iter().map(|tensor| tensor.zeroed).sum();
    let left: u64 = lost.iter().map(|tensor| tensor.stored_zeros).sum();
    if !lost.is_empty() {
        writeln!(
            text,
            "  zeros lost      {} layers: of {} zeros {} are stored as zero ({:.2}%)",
            lost.len(),
            count(zeroed),
            count(left),
            ratio(left, zeroed)
        )?;
    }
    Ok(())
}

fn phases(
    text: &mut impl Write,
    times: &PhaseTimes,
    ceiling: Option<f64>,
    total: f64,
) -> io::Result<()> {
    writeln!(text, "  phase            seconds   share    GFLOP/s  of GEMM ceiling")?;
    let mut accounted = 0.0;
    for (phase, cost) in times.iter().filter(|(_, cost)| cost.secs > 0.0) {
        accounted += cost.secs;
        write!(
            text,
            "    {:<12} {:>9.2}  {:>5.1}%",
            phase.name(),
            cost.secs,
            100.0 * cost.secs / total
        )?;
        if cost.flops > 0.0 {
            let rate = cost.flops / cost.secs;
            write!(text, "  {:>9.1}", rate / 1e9)?;
            if let Some(ceiling) = ceiling {
                write!(text, "  {:>5.1}%", 100.0 * rate / ceiling)?;
            }
        }
        writeln!(text)?;
    }
    let rest = (total - accounted).max(0.0);
    writeln!(text, "    {:<12} {:>9.2}  {:>5.1}%", "other", rest, 100.0 * rest / total)?;
    write!(text, "    {:<12} {:>9.2}  100.0%", "all", total)?;
    if times.flops() > 0.0 {
        write!(text, "  {:>9.1}", times.flops() / total / 1e9)?;
        if let Some(ceiling) = ceiling {
            write!(
                text,
                "  {:>5.1}%  (ceiling {:.1})",
                100.0 * times.flops() / total / ceiling,
                ceiling / 1e9
            )?;
        }
    }
    writeln!(text)
}

/// What a conversion would do.
/// `seconds` is an estimate for this machine, where there is arithmetic to do.
pub(super) fn plan(
    source: &ModelSource,
    plan: &ConversionPlan,
    seconds: Option<f64>,
) -> Result<(), CliError> {
    let config = source.config();
    let mut text = io::stdout().lock();
    growth(&mut text, plan.slice.as_ref())?;
    writeln!(
        text,
        "{}: {}, {} blocks, hidden size {}, {} parameters",
        source.path().display(),
        source.arch().hf_class,
        config.num_hidden_layers,
        config.hidden_size,
        count(config.parameters(source.arch()).total())
    )?;
    let layers: Vec<_> = plan.blocks.iter().flat_map(|block| &block.layers).collect();
    match &plan.recipe.prune {
        Some(prune) => writeln!(
            text,
            "  prune           {} layers of {} blocks, {} {}",
            layers.iter().filter(|layer| layer.prune.is_some()).count(),
            plan.blocks
                .iter()
                .filter(|block| block.layers.iter().any(|layer| layer.prune.is_some()))
                .count(),
            prune.method.name(),
            prune.sparsity
        )?,
        None if plan.recipe.quantize.is_none() => writeln!(text, "  prune           nothing")?,
        None => {}
    }
    slice_lines(&mut text, plan.slice.as_ref())?;
    quantize_line(&mut text, plan)?;
    packed_line(&mut text, plan)?;
    readers_line(&mut text, plan)?;
    let calibration = &plan.recipe.calibration;
    if let Some(file) = &calibration.file {
        let order = match calibration.seed {
            Some(seed) => format!("random, seed {seed}"),
            None => "in order".to_owned(),
        };
        writeln!(
            text,
            "  calibration     {} windows of {} tokens of {}, {order}",
            calibration.samples,
            calibration.seq_len,
            file.display()
        )?;
    }
    if plan.format == OutputFormat::Zst {
        writeln!(
            text,
            "  output          at most {} in 1 file, known when it is compressed (source {})",
            bytes(plan.output_bytes),
            bytes(plan.source_bytes)
        )?;
        let files = if plan.archive { "the source's own" } else { "plain safetensors" };
        writeln!(text, "  unpack gives    {files}, byte for byte")?;
    } else {
        let shards = plan.file_count();
        writeln!(
            text,
            "  output          {} in {shards} file{} ({:.1}% of the source's {})",
            bytes(plan.output_bytes),
            if shards == 1 { "" } else { "s" },
            ratio(plan.output_bytes, plan.source_bytes),
            bytes(plan.source_bytes)
        )?;
        fallbacks(&mut text, plan)?;
    }
    let budget = &plan.budget;
    writeln!(
        text,
        "  peak memory     {} (activations {}, one block {}, Hessians {}, one batch {}, results to be \
         written {})",
        bytes(budget.peak_bytes),
        bytes(budget.hidden_bytes),
        bytes(budget.block_bytes),
        bytes(budget.statistics_bytes),
        bytes(budget.batch_bytes),
        bytes(budget.behind_bytes)
    )?;
    writeln!(
        text,
        "  on a GPU        {} of its memory, and up to {} more for activations where they fit",
        bytes(budget.device_bytes),
        bytes(budget.hidden_bytes)
    )?;
    writeln!(text, "  arithmetic      {:.3e} FLOP", plan.flops)?;
    if let Some(seconds) = seconds {
        writeln!(text, "  time            about {:.0} s on this machine", seconds.max(1.0))?;
    }
    Ok(())
}

/// Which encodings a packed output has, and what was read to choose them.
fn packed_line(text: &mut impl Write, plan: &ConversionPlan) -> io::Result<()> {
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    for output in plan.outputs.iter().filter(|output| output.encoding.is_packed()) {
        *counts.entry(output.encoding.to_string()).or_default() += 1;
    }
    if !counts.is_empty() {
        let counts: Vec<String> =
            counts.iter().map(|(encoding, count)| format!("{count} x {encoding}")).collect();
        writeln!(text, "  packed          {}", counts.join(", "))?;
    }
    if let Some(scan) = plan.scan {
        let (tensors, read) = (scan.tensors, bytes(scan.bytes));
        writeln!(
            text,
            "  scanned         {tensors} matrices of the source ({read}) for zeros, to choose encodings"
        )?;
    }
    Ok(())
}

/// What layers are rounded to.
fn quantize_line(text: &mut impl Write, plan: &ConversionPlan) -> io::Result<()> {
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    let layers = plan.blocks.iter().flat_map(|block| &block.layers);
    for quantize in layers.filter_map(|layer| layer.quantize) {
        let order = if quantize.act_order { " by activation" } else { "" };
        let how = format!("{} ({}{order})", quantize.grid, quantize.method.name());
        *counts.entry(how).or_default() += 1;
    }
    if counts.is_empty() {
        return Ok(());
    }
    let counts: Vec<String> =
        counts.iter().map(|(how, count)| format!("{count} x {how}")).collect();
    writeln!(text, "  quantize        {}", counts.join(", "))
}

/// Who reads an output that is not for everyone.
fn readers_line(text: &mut impl Write, plan: &ConversionPlan) -> io::Result<()> {
    match plan.readers() {
        Some(readers) => writeln!(text, "  format          {}: {readers}", plan.format.name()),
        None => Ok(()),
    }
}

/// What a checkpoint holds.
pub(super) fn inspect(path: &Path, summary: &Summary) -> Result<(), CliError> {
    let mut text = io::stdout().lock();
    let optional = |value: Option<usize>| value.map_or("-".to_owned(), |value| value.to_string());
    writeln!(
        text,
        "{}: {}, {} blocks, hidden size {}, vocabulary {}",
        path.display(),
        summary.architecture.as_deref().unwrap_or("tensors without a configuration"),
        optional(summary.blocks),
        optional(summary.hidden_size),
        optional(summary.vocab_size)
    )?;
    write!(
        text,
        "{} parameters in {} tensors, {} ({:.2} bits a weight)",
        count(summary.parameters),
        summary.tensors.len(),
        bytes(summary.stored_bytes),
        summary.stored_bytes as f64 * 8.0 / summary.parameters.max(1) as f64
    )?;
    if let Some(sparsity) = summary.linear_sparsity {
        write!(text, ", linears {:.2}% zero", 100.0 * sparsity)?;
    }
    writeln!(text)?;
    let names = summary.tensors.iter().map(|tensor| tensor.name.len());
    let encodings = summary.tensors.iter().map(|tensor| tensor.encoding.to_string().len());
    let widths = [names.max().unwrap_or(0), encodings.max().unwrap_or(0)];
    for tensor in &summary.tensors {
        inspect_tensor(&mut text, tensor, widths)?;
    }
    Ok(())
}

fn inspect_tensor(
    text: &mut impl Write,
    tensor: &TensorSummary,
    [name_width, encoding_width]: [usize; 2],
) -> io::Result<()> {
    let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
    write!(
        text,
        "{:<name_width$}  {:<encoding_width$} {:>14} {:>10}",
        tensor.name,
        tensor.encoding.to_string(),
        shape,
        bytes(tensor.stored_bytes)
    )?;
    if let Some(sparsity) = tensor.sparsity.filter(|&sparsity| sparsity > 0.0) {
        write!(text, "  {:>6.2}% zero", 100.0 * sparsity)?;
    }
    if let Some(pattern) = &tensor.pattern {
        write!(text, "  {pattern}")?;
    }
    writeln!(text)
}

/// A measured perplexity with its protocol.
pub(super) fn eval(report: &EvalReport) -> Result<(), CliError> {
    let mut text = io::stdout().lock();
    let perplexity = &report.perplexity;
    writeln!(text, "perplexity {:.4}", perplexity.perplexity)?;
    writeln!(
        text,
        "  protocol        {}: {} tokens, {} windows of {} without overlap, {} predicted, no BOS",
        report.text,
        count(perplexity.text_tokens as u64),
        perplexity.windows,
        perplexity.window,
        count(perplexity.predicted_tokens as u64)
    )?;
    writeln!(text, "  parameters      {}", count(report.parameters))?;
    writeln!(text, "  stored          {}", bytes(report.stored_bytes))?;
    writeln!(
        text,
        "  FLOPs a token   {} (dense, half a window of context)",
        count(report.flops_per_token)
    )?;
    writeln!(text, "  computed on     {}", report.compute)?;
    Ok(())
}

/// What a verification found.
pub(super) fn verify(path: &Path, report: &VerifyReport) -> Result<(), CliError> {
    let mut text = io::stdout().lock();
    for finding in report.findings.iter().take(MAX_FINDINGS) {
        writeln!(text, "{}: {}", finding.subject, finding.what)?;
    }
    if report.findings.len() > MAX_FINDINGS {
        writeln!(text, "... and {} more", report.findings.len() - MAX_FINDINGS)?;
    }
    let compared = match report.compared {
        0 => String::new(),
        compared => format!(", {compared} compared"),
    };
    writeln!(
        text,
        "{}: {} of {} tensors checked, {} hashed{compared}: {}",
        path.display(),
        report.checked,
        report.tensors,
        bytes(report.bytes),
        match report.findings.len() {
            0 => "all as promised".to_owned(),
            1 => "1 mismatch".to_owned(),
            n => format!("{n} mismatches"),
        }
    )?;
    Ok(())
}

/// A finished unpacking.
pub(super) fn unpacked(out: &Path, written: u64) -> Result<(), CliError> {
    writeln!(io::stdout().lock(), "wrote {} ({} of tensors)", out.display(), bytes(written))?;
    Ok(())
}

/// What a layer took.
pub(super) fn layer_times(times: &LayerTimes) -> Result<(), CliError> {
    let mut text = io::stdout().lock();
    writeln!(
        text,
        "layer of {} x {}, sparsegpt {}, {} tokens in batches of {} ({} distinct, in turn)",
        times.rows,
        times.cols,
        times.sparsity,
        count(times.tokens as u64),
        times.batch_tokens,
        times.distinct_batches
    )?;
    writeln!(text, "  phase         seconds   TFLOP/s      GB/s  of ceiling  arithmetic")?;
    for phase in &times.phases {
        let number =
            |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.3}"));
        let share =
            phase.of_ceiling.map_or(String::new(), |share| format!("{:.1}%", 100.0 * share));
        let line = format!(
            "  {:<9} {:>11.5} {:>9} {:>9} {:>11}  {}",
            phase.phase.name(),
            phase.seconds,
            number(phase.tflops_per_sec),
            number(phase.gbytes_per_sec),
            share,
            phase.arithmetic.unwrap_or_default()
        );
        writeln!(text, "{}", line.trim_end())?;
    }
    writeln!(text, "  median of {} after one that is not counted", times.repeat)?;
    writeln!(
        text,
        "  ceiling         {:.3} TFLOP/s, a large product as the backend computes it",
        times.gemm_ceiling_flops_per_sec / 1e12
    )?;
    writeln!(text, "  stored          {} as {}", bytes(times.packed_bytes), times.encoding)?;
    if let (Some(error), Some(damp)) = (times.relative_error, times.damp) {
        writeln!(text, "  output error    {error:.4} at damping {damp}")?;
    }
    writeln!(text, "  computed on     {}", times.compute)?;
    Ok(())
}

//! The progress bar, and log lines that do not tear it.

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::pipeline::{BlockReport, Progress};

static BARS: OnceLock<MultiProgress> = OnceLock::new();

fn bars() -> &'static MultiProgress {
    BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
}

/// A bar on standard error when that is a terminal, log lines always.
#[derive(Debug)]
pub(super) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    pub(super) fn new(verb: &'static str) -> Self {
        if !io::stderr().is_terminal() {
            return Self { bar: ProgressBar::hidden() };
        }
        let bar = bars().add(ProgressBar::new(0));
        let template = "{msg} [{elapsed_precise}] {wide_bar} {percent:>3}% eta {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(verb);
        Self { bar }
    }
}

impl Progress for Bar {
    fn start(&self, units: u64) {
        self.bar.set_length(units);
    }

    fn advance(&self, units: u64) {
        self.bar.inc(units);
    }

    fn block(&self, report: &BlockReport) {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
        };
        tracing::info!(
            block = report.block,
            sparsity = %format_args!("{:.4}", report.sparsity),
            relative_error = %number(report.relative_error, 4),
            damp = %number(report.damp, 4),
            bits_per_weight = %number(report.bits_per_weight, 2),
            secs = %format_args!("{:.2}", report.secs),
            rss_mib = report.rss_bytes.unwrap_or(0) >> 20,
            "block done"
        );
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Where log lines go: standard error, with the bar out of the way.
pub(super) fn log_writer() -> impl Write {
    LogLine
}

struct LogLine;

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match BARS.get() {
            Some(bars) => bars.suspend(|| io::stderr().lock().write(bytes)),
            None => io::stderr().lock().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

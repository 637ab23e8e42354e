#![allow(clippy::float_cmp, reason = "counts are exact")]

use super::*;
use crate::backend::{Precision, SequenceLens, cpu::Cpu};

fn bench(rows: usize, cols: usize, tokens: usize, sparsity: &str) -> LayerBench {
    LayerBench { rows, cols, tokens, sparsity: sparsity.parse().unwrap(), repeat: 2 }
}

fn count(of: &[(LayerPhase, f64)], phase: LayerPhase) -> f64 {
    of.iter().find(|(counted, _)| *counted == phase).unwrap().1
}

#[test]
fn counts_are_those_of_the_definition() {
    let bench = bench(6, 4, 10, "2:4");
    let flops = bench.flops();
    // Ten entries of the triangle, a multiply-add for each token.
    assert_eq!(count(&flops, LayerPhase::Gram), 2.0 * 10.0 * 10.0);
    assert_eq!(count(&flops, LayerPhase::Factor), 2.0 / 3.0 * 64.0);
    assert_eq!(count(&flops, LayerPhase::Sweep), 6.0 * 16.0);
    assert_eq!(count(&flops, LayerPhase::Error), 2.0 * 6.0 * 16.0);
    let bytes = bench.bytes();
    assert_eq!(count(&bytes, LayerPhase::Upload), 48.0);
    assert_eq!(count(&bytes, LayerPhase::Pack), 48.0);
}

#[test]
fn the_gram_count_is_that_of_a_conversion() {
    let lens = SequenceLens::new(vec![7, 3]);
    let bench = bench(6, 4, lens.tokens(), "2:4");
    let both: f64 = lens.ranges().map(|range| gram_flops(range.len() as f64, 4.0)).sum();
    assert_eq!(count(&bench.flops(), LayerPhase::Gram), both);
}

#[test]
fn memory_grows_with_what_runs_on_the_host() {
    // 49152 x 49152: two f32 matrices and two of f64 are 58 GB.
    let widest = bench(12288, 49152, 2048, "50%");
    let (host, device) = (widest.host_bytes(true), widest.host_bytes(false));
    assert!(host - device > 24 * 49152 * 49152, "{host} {device}");
    assert!(device > 6 * 12288 * 49152, "{device}");
    assert!(bench(1 << 20, 1 << 20, 1 << 30, "50%").host_bytes(true) > 40 << 40);
}

#[test]
fn every_phase_is_timed_and_its_layer_packed() {
    let b = Cpu::new(Precision::F32, Some(2)).unwrap();
    for (sparsity, bytes) in [("2:4", 64 * 96 * 9 / 8), ("4:8", 64 * 96 * 9 / 8)] {
        let times = b.scope(|| bench(64, 96, 300, sparsity).run(&b)).unwrap();
        assert_eq!(times.packed_bytes, bytes, "{sparsity}");
        assert_eq!(times.phases.len(), LayerPhase::ALL.len());
        for (phase, time) in LayerPhase::ALL.iter().zip(&times.phases) {
            assert_eq!(time.phase, *phase);
            assert!(time.seconds > 0.0, "{time:?}");
            assert_ne!(time.flops.is_some(), time.bytes.is_some(), "{time:?}");
            assert_eq!(time.flops.is_some(), time.of_ceiling.is_some(), "{time:?}");
        }
        // Half the weights are gone, and the others made up for some of it.
        let error = times.relative_error.unwrap();
        assert!(error > 0.0 && error < 0.5, "{error}");
        assert_eq!(times.damp, Some(SolverOptions::default().damp));
    }
}

#[test]
fn what_cannot_be_pruned_or_packed_is_refused() {
    let refused = |bench: LayerBench| bench.encoding().unwrap_err().to_string();
    assert_eq!(refused(bench(8, 10, 1, "2:4")), "layer: 10 columns do not divide into groups of 4");
    let text = "--format packed cannot hold this: at 5% the layer does not become smaller, since positions \
                take more than the zeros";
    assert_eq!(refused(bench(64, 64, 1, "5%")), text);
}

#[test]
fn medians() {
    assert_eq!(median(vec![]), 0.0);
    assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    assert_eq!(median(vec![4.0, 1.0, 2.0, 30.0]), 3.0);
}

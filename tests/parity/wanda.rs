//! Wanda against masks recorded with `PyTorch`.

use sparsepack::{
    backend::{Precision, Storage, cpu::Cpu},
    calibration::{StatKind, Statistic},
    compress::{Layer, LayerSolver, SolveTimes, Wanda},
};

use super::Golden;

/// Kept weights are the stored ones, so one comparison covers mask and values.
fn agrees(sparsity: &str, mask: &str) {
    let golden = Golden::open("golden/wanda.safetensors");
    let b = Cpu::new(Precision::F32, Some(1)).unwrap();
    let shape = golden.shape("weight");
    let (rows, cols) = (shape[0], shape[1]);
    let weight = golden.f32s("weight");
    let squares = b.upload(&golden.f32s("sumsq"), 1, cols).unwrap();
    let mut statistic = Statistic::from_matrix(StatKind::ColumnNorm, squares, 1);
    let layer = Layer {
        name: "layer".to_owned(),
        weight: b.upload(&weight, rows, cols).unwrap(),
        sparsity: Some(sparsity.parse().unwrap()),
        grid: None,
        keep_zeros: false,
    };
    let solved = Wanda.solve(&b, vec![layer], &mut statistic, &mut SolveTimes::default()).unwrap();
    let pruned = b.download(&solved[0].weight).unwrap();
    let mask = golden.bytes(mask);
    let expected: Vec<f32> =
        weight.iter().zip(mask).map(|(w, zero)| if zero == 1 { 0.0 } else { *w }).collect();
    assert_eq!(pruned, expected);
}

#[test]
fn half_of_each_row() {
    agrees("50%", "mask_50");
}

#[test]
fn two_of_each_four() {
    agrees("2:4", "mask_2_4");
}

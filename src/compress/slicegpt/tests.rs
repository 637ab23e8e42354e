use super::*;
use crate::backend::{Precision, cpu::Cpu};

fn cpu() -> Cpu {
    Cpu::new(Precision::F32, Some(1)).unwrap()
}

#[test]
fn a_reader_and_a_writer_of_a_whole_basis_cancel() {
    let b = cpu();
    let mut sum = Dense::zeros(4, 4);
    for i in 0..4 {
        for j in 0..=i {
            sum.data[i * 4 + j] = 1.0 / (1 + i + j) as f64;
        }
    }
    let q = b.symmetric_eigen(&sum).unwrap().vectors;
    let w = Dense::new(2, 4, &[1.0, 2.0, 3.0, 4.0, -1.0, 0.5, 0.0, 2.0]).unwrap();
    let gain = [1.0, 2.0, 0.5, -1.0];
    let read = reader(&b, w.clone(), &gain, &q).unwrap();
    let wrote = writer(&b, &w.transposed(), &q).unwrap();
    let there_and_back = b.dense_product(&read, &wrote).unwrap();
    let plain = b.dense_product(&w.clone().scale_columns(&gain), &w.transposed()).unwrap();
    for (a, b) in there_and_back.data.iter().zip(&plain.data) {
        assert!((a - b).abs() < 1e-12);
    }
}

#[test]
fn a_norm_over_fewer_columns_is_made_up_for() {
    // Of eight features the last four are zero; leaving them out must not change what is read.
    let (h, eps) = ([1.0, -2.0, 0.5, 3.0], 1e-3);
    let b = cpu();
    let w = Dense::new(1, 8, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).unwrap();
    let read = reader(&b, w.clone(), &[1.0; 8], &Dense::identity(8, 4)).unwrap();
    let square: f64 = h.iter().map(|h| h * h).sum();
    let dot = |w: &[f64]| h.iter().zip(w).map(|(h, w)| h * w).sum::<f64>();
    let before = dot(&w.data) / (square / 8.0 + eps).sqrt();
    let after = dot(&read.data) / (square / 4.0 + eps * 8.0 / 4.0).sqrt();
    assert!((before - after).abs() < 1e-12);
}

#[test]
fn centred_columns_have_no_mean() {
    let w = centred_rows(Dense::new(3, 2, &[1.0, 10.0, 2.0, 20.0, 6.0, 60.0]).unwrap());
    assert_eq!(w.data, [-2.0, -20.0, -1.0, -10.0, 3.0, 30.0]);
}

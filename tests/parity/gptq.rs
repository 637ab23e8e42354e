//! GPTQ, and pruning and rounding in one sweep, against golden cases in float64.

use sparsepack::{
    backend::{Grid, Precision, ScaleSearch, Scales, Storage, cpu::Cpu},
    calibration::{StatKind, Statistic},
    compress::{
        Damping, GridOptions, GroupSize, Layer, LayerSolver, Obs, Scheme, SolveTimes, Solved,
        SolverOptions, Sparsity,
    },
};
use sparsepack_formats::{DType, GgmlType};

use super::Golden;

/// A case of `golden/gptq.safetensors`.
struct Case {
    name: &'static str,
    scheme: Scheme,
    group_size: GroupSize,
    symmetric: bool,
    sparsity: Option<&'static str>,
    keep_zeros: bool,
    act_order: bool,
}

impl Case {
    fn int(name: &'static str, bits: u8, group_size: GroupSize) -> Self {
        Self {
            name,
            scheme: Scheme::Int(bits),
            group_size,
            symmetric: true,
            sparsity: None,
            keep_zeros: false,
            act_order: false,
        }
    }

    fn block(name: &'static str, ty: GgmlType) -> Self {
        Self { scheme: Scheme::Block(ty), ..Self::int(name, 8, GroupSize::Channel) }
    }

    fn grid(&self) -> Grid {
        let options = GridOptions {
            group_size: Some(self.group_size),
            symmetric: self.symmetric,
            scales: ScaleSearch::Minmax,
        };
        self.scheme.grid(options, DType::Bf16).unwrap()
    }

    fn solve(&self, b: &Cpu, golden: &Golden) -> Solved<Cpu> {
        let shape = golden.shape(&format!("{}.weight", self.name));
        let (rows, cols) = (shape[0], shape[1]);
        let bits = golden.bytes(&format!("{}.weight", self.name));
        let weight: Vec<f32> = bits
            .chunks_exact(2)
            .map(|bits| f32::from_bits(u32::from(u16::from_le_bytes([bits[0], bits[1]])) << 16))
            .collect();
        let layer = Layer {
            name: self.name.to_owned(),
            weight: b.upload(&weight, rows, cols).unwrap(),
            sparsity: self.sparsity.map(|text| text.parse::<Sparsity>().unwrap()),
            grid: Some(self.grid()),
            keep_zeros: self.keep_zeros,
        };
        let h = b.upload(&golden.f32s(&format!("hessian_{cols}")), cols, cols).unwrap();
        let mut statistic = Statistic::from_matrix(StatKind::Hessian, h, 1);
        let options = SolverOptions {
            damp: golden.metadata("damp"),
            damping: Damping::Mean,
            column_block: 32,
            act_order: self.act_order,
        };
        let solved = Obs::new(options, None).solve(
            b,
            vec![layer],
            &mut statistic,
            &mut SolveTimes::default(),
        );
        solved.unwrap().into_iter().next().unwrap()
    }

    /// Codes, scales, zero points and values are the recorded ones, each of them.
    fn agrees(&self) {
        let golden = Golden::open("golden/gptq.safetensors");
        let b = Cpu::new(Precision::F32, Some(1)).unwrap();
        let mut solved = self.solve(&b, &golden);
        let of = |what: &str| format!("{}.{what}", self.name);
        let rounding = solved.rounding.take().unwrap().wait().unwrap();
        let (scales, zero_points) = match &rounding.scales {
            Scales::Groups { scales, zero_points } => (scales.clone(), zero_points.clone()),
            Scales::Blocks(blocks) => {
                (blocks.iter().map(|block| block.group(0).0).collect(), vec![0; blocks.len()])
            }
        };
        assert_eq!(scales, golden.f32s(&of("scales")), "{}: scales", self.name);
        let recorded: Vec<i8> = golden.bytes(&of("zeros")).iter().map(|&b| b as i8).collect();
        assert_eq!(zero_points, recorded, "{}: zero points", self.name);
        let recorded: Vec<i8> = golden.bytes(&of("codes")).iter().map(|&b| b as i8).collect();
        let differing = rounding.codes.iter().zip(&recorded).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 0, "{}: codes", self.name);
        let weight = b.download(&solved.weight).unwrap();
        assert_eq!(weight, golden.f32s(&of("dequantized")), "{}: values", self.name);

        let expected: f64 = golden.metadata(&of("relative_error"));
        let found = solved.report.relative_error.unwrap();
        println!("gptq {}: relative error {found:.6} (recorded {expected:.6})", self.name);
        assert!((found - expected).abs() < 1e-4 * expected, "{}: {found} {expected}", self.name);
        assert!(found < solved.report.nearest_error.unwrap(), "{}", self.name);
    }
}

const GROUP: GroupSize = GroupSize::Columns(32);

#[test]
fn scales_of_rows_are_chosen_before_the_sweep() {
    Case::int("int4_channel", 4, GroupSize::Channel).agrees();
    let asymmetric = Case::int("int8_channel_asymmetric", 8, GroupSize::Channel);
    Case { symmetric: false, ..asymmetric }.agrees();
}

#[test]
fn scales_of_groups_are_chosen_when_the_sweep_reaches_them() {
    Case::int("int4_group", 4, GROUP).agrees();
    Case { symmetric: false, ..Case::int("int3_group_asymmetric", 3, GROUP) }.agrees();
}

#[test]
fn pruning_and_rounding_share_the_sweep() {
    Case { sparsity: Some("2:4"), ..Case::int("joint_2_4_int4_group", 4, GROUP) }.agrees();
    let half = Case::int("joint_50_int4_channel", 4, GroupSize::Channel);
    Case { sparsity: Some("50%"), ..half }.agrees();
}

#[test]
fn columns_in_activation_order_keep_their_groups() {
    Case { act_order: true, ..Case::int("act_order_int4_group", 4, GROUP) }.agrees();
}

#[test]
fn zeros_of_an_earlier_pruning_stay() {
    Case { keep_zeros: true, ..Case::int("fixed_mask_int4_group", 4, GROUP) }.agrees();
}

#[test]
fn ggml_blocks_are_grids_too() {
    Case::block("q4_0", GgmlType::Q4_0).agrees();
    Case::block("q8_0", GgmlType::Q8_0).agrees();
}

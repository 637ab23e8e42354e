//! The format matrix of the README is what the plan obeys, with sizes as the formats compute them and
//! speeds as they were measured.

use std::{collections::BTreeMap, fmt::Write as _, fs};

use sparsepack::{pipeline::supports, recipe::OutputFormat};
use sparsepack_formats::{DType, Encoding, GgmlType, IntGrid, Kept};

use crate::harness::root;

const BEGIN: &str =
    "<!-- matrix begin: written by `UPDATE_EXPECT=1 cargo test --test main matrix` -->\n";
const END: &str = "<!-- matrix end -->\n";

/// A matrix of this shape, half of it zero, is what sizes are given for.
const SHAPE: [usize; 2] = [4096, 4096];

/// One row: an encoding, its name in [`SPEEDS`], what it is for, and who loads it.
struct Row {
    key: &'static str,
    what: &'static str,
    encoding: Encoding,
    loaders: &'static [(OutputFormat, &'static str)],
}

const OURS: &str = "sparsepack; `python/`";

fn rows() -> Vec<Row> {
    use OutputFormat::{CompressedTensors, Gguf, Packed, Safetensors, TorchCutlass, Zst};
    let dtype = DType::Bf16;
    let kept = (SHAPE[0] * SHAPE[1] / 2) as u64;
    let row = |key, what, encoding, loaders| Row { key, what, encoding, loaders };
    let mut rows = vec![
        row(
            "dense",
            "any, zeros stored",
            Encoding::Dense { dtype },
            &[
                (Safetensors, "transformers 5.17 (`.ci/interop.py`); sparsepack; `python/`"),
                (Packed, OURS),
                (TorchCutlass, OURS),
                (CompressedTensors, OURS),
                (Gguf, "llama.cpp (`.ci/llama_cpp.py`); sparsepack"),
                (Zst, "sparsepack; `python/`; each frame, any zstd (`.ci/interop.py`)"),
            ][..],
        ),
        row("sparse24", "2:4", Encoding::Sparse24 { dtype }, &[(Packed, OURS), (Zst, OURS)]),
        row(
            "nm",
            "n:m, here 4:8",
            Encoding::Nm { n: 4, m: 8, dtype },
            &[(Packed, OURS), (Zst, OURS)],
        ),
        row(
            "bitmask",
            "any, here 50 %",
            Encoding::Bitmask { dtype, kept },
            &[(Packed, OURS), (Zst, OURS)],
        ),
        row(
            "torch-cutlass",
            "2:4",
            Encoding::TorchCutlass { dtype },
            &[
                (
                    TorchCutlass,
                    "sparsepack; `python/`, on a GPU of compute capability 8.x as `torch.sparse` weights without repacking",
                ),
                (Zst, OURS),
            ],
        ),
        row(
            "sparse-24-bitmask",
            "2:4, legacy",
            Encoding::CtSparse24Bitmask { dtype },
            &[
                (
                    CompressedTensors,
                    "transformers 4.57 with compressed-tensors 0.14.0.1 (`.ci/legacy_ct.py`); sparsepack; `python/`",
                ),
                (Zst, OURS),
            ],
        ),
        row(
            "sparse-bitmask",
            "any, legacy; here 50 %",
            Encoding::CtSparseBitmask { dtype, kept },
            &[
                (
                    CompressedTensors,
                    "compressed-tensors 0.14.0.1 (`.ci/legacy_ct.py`); sparsepack; `python/`",
                ),
                (Zst, OURS),
            ],
        ),
    ];
    rows.extend(quantized_rows(dtype, kept));
    for (key, ty) in [
        ("q8_0", GgmlType::Q8_0),
        ("q6_k", GgmlType::Q6_K),
        ("q5_0", GgmlType::Q5_0),
        ("q4_k", GgmlType::Q4_K),
        ("q4_0", GgmlType::Q4_0),
        ("mxfp4", GgmlType::MXFP4),
        ("q3_k", GgmlType::Q3_K),
        ("q2_k", GgmlType::Q2_K),
    ] {
        let what = if ty.keeps_zeros() { "any, zeros stored" } else { "none: zeros move" };
        let loaders = &[(Gguf, "llama.cpp (`.ci/llama_cpp.py`); sparsepack")];
        rows.push(row(key, what, Encoding::Ggml { ty }, loaders));
    }
    rows
}

/// Codes on grids with BF16 scales.
fn quantized_rows(scale: DType, kept: u64) -> Vec<Row> {
    const PACKED: &[(OutputFormat, &str)] =
        &[(OutputFormat::Packed, OURS), (OutputFormat::Zst, OURS)];
    const COMPRESSED_TENSORS: &[(OutputFormat, &str)] = &[
        (
            OutputFormat::CompressedTensors,
            "transformers 5.17 with compressed-tensors 0.20 (`.ci/quantized.py`); sparsepack; `python/`",
        ),
        (OutputFormat::Zst, OURS),
    ];
    let grid = |bits, group_size| IntGrid { bits, group_size, symmetric: true, scale };
    let (int4, int8) = (grid(4, Some(128)), grid(8, None));
    let packed = |grid, kept| Encoding::Int { grid, kept };
    let every = "any, codes of zeros stored";
    [
        ("int4 g128", every, packed(int4, Kept::All), PACKED),
        ("2:4 int4 g128", "2:4", packed(int4, Kept::Sparse24), PACKED),
        ("4:8 int4 g128", "n:m, here 4:8", packed(int4, Kept::Nm { n: 4, m: 8 }), PACKED),
        ("bitmask int4 g128", "any, here 50 %", packed(int4, Kept::Bitmask { kept }), PACKED),
        ("int8", every, packed(int8, Kept::All), PACKED),
        (
            "pack-quantized int4 g128",
            every,
            Encoding::CtPackQuantized { grid: int4 },
            COMPRESSED_TENSORS,
        ),
        ("int-quantized int8", every, Encoding::CtIntQuantized { grid: int8 }, COMPRESSED_TENSORS),
        ("float-quantized", every, Encoding::CtFloatQuantized { scale }, COMPRESSED_TENSORS),
    ]
    .map(|(key, what, encoding, loaders)| {
        // The name is the one that reports print, without the type of the scales.
        assert_eq!(encoding.to_string(), format!("{key} {scale}"));
        Row { key, what, encoding, loaders }
    })
    .into()
}

fn bits_per_weight(encoding: Encoding) -> f64 {
    let components = encoding.components("w.weight", &SHAPE).unwrap();
    let bytes: u64 = components.iter().map(|component| component.bytes).sum();
    bytes as f64 * 8.0 / (SHAPE[0] * SHAPE[1]) as f64
}

fn rendered() -> String {
    let speeds = fs::read_to_string(root().join("benches/encodings.json")).unwrap();
    let speeds: BTreeMap<String, [f64; 2]> = serde_json::from_str(&speeds).unwrap();
    let mut text =
        "| encoding | sparsity | `--format` | bits a weight | write, read GB/s | who loads it |\n\
                    |---|---|---|---|---|---|\n"
            .to_owned();
    for Row { key, what, encoding, loaders } in rows() {
        let [write, read] = speeds[key];
        let speed = format!("{write:.2}, {read:.2}");
        let bits = format!("{:.4}", bits_per_weight(encoding));
        let held: Vec<OutputFormat> =
            OutputFormat::ALL.into_iter().filter(|format| supports(*format, encoding)).collect();
        let named: Vec<OutputFormat> = loaders.iter().map(|(format, _)| *format).collect();
        assert_eq!(held, named, "{key}");
        for (format, who) in loaders {
            // What compression gives depends on the values.
            let (bits, speed) = match format {
                OutputFormat::Zst => ("compressed", "by level"),
                _ => (bits.as_str(), speed.as_str()),
            };
            let name = format.name();
            writeln!(text, "| `{key}` | {what} | `{name}` | {bits} | {speed} | {who} |").unwrap();
        }
    }
    text
}

#[test]
fn readme_shows_what_the_plan_obeys() {
    let path = root().join("README.md");
    let readme = fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once(BEGIN).unwrap();
    let (matrix, after) = rest.split_once(END).unwrap();
    let expected = rendered();
    if std::env::var_os("UPDATE_EXPECT").is_some_and(|value| value == "1") {
        fs::write(&path, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
        return;
    }
    assert_eq!(matrix, expected, "UPDATE_EXPECT=1 writes it again");
}

//! What the writer writes, our reader and the `safetensors` crate read.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests are test code too")]

use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;
use sparsepack_formats::{
    CheckpointReader, DType, Encoding, FormatError, IntGrid, Kept, MappedFile, ModelMetadata,
    SafetensorsWriter, ShardLayout,
    encoding::{MatrixShape, sparse24},
    open,
    safetensors::SafetensorsReader,
};

const BF16: Encoding = Encoding::Dense { dtype: DType::Bf16 };
const F32: Encoding = Encoding::Dense { dtype: DType::F32 };
const U8: Encoding = Encoding::Dense { dtype: DType::U8 };
const PACKED: Encoding = Encoding::Sparse24 { dtype: DType::Bf16 };

fn shard(tensors: &[(&str, Encoding, &[usize])]) -> ShardLayout {
    let tensors = tensors.iter().map(|&(name, e, shape)| (name.to_owned(), e, shape.to_vec()));
    ShardLayout { tensors: tensors.collect(), metadata: [].into() }
}

/// Bytes that differ between tensors and positions.
fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 7 + 1) as u8).collect()
}

/// Fills every component with a pattern and finishes.
fn write_patterns(dir: &Path, shards: &[ShardLayout]) {
    let mut writer = SafetensorsWriter::create(dir, shards).unwrap();
    for (name, encoding, shape) in shards.iter().flat_map(|shard| &shard.tensors) {
        for (part, component) in encoding.components(name, shape).unwrap().iter().enumerate() {
            let bytes = pattern(name.len() + part, component.bytes as usize);
            for chunk in bytes.chunks(5) {
                writer.write(name, part, chunk).unwrap();
            }
        }
    }
    writer.finish().unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn packed_and_dense_tensors_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = shard(&[
        ("model.norm.weight", BF16, &[3]),
        ("model.up.weight", PACKED, &[2, 12]),
        ("model.scale", F32, &[]),
        ("model.empty", BF16, &[0, 4]),
    ]);
    layout.metadata.insert("made-by".into(), "test \"quoted\"".into());
    let mut dense = vec![0u8; 48];
    dense[2..4].copy_from_slice(&[0x80, 0x3F]);
    dense[46..48].copy_from_slice(&[0xC1, 0xFF]);
    let (mut values, mut metadata) = (vec![], vec![]);
    let matrix = MatrixShape { rows: 2, cols: 12 };
    sparse24::encode("w", DType::Bf16, matrix, &dense, &mut values, &mut metadata).unwrap();

    let mut writer = SafetensorsWriter::create(dir.path(), &[layout]).unwrap();
    writer.write("model.up.weight", 1, &metadata).unwrap();
    writer.write("model.up.weight", 0, &values[..10]).unwrap();
    writer.write("model.scale", 0, &2.5f32.to_le_bytes()).unwrap();
    writer.write("model.norm.weight", 0, &[0x80, 0x3F, 0, 0, 0x80, 0xBF]).unwrap();
    writer.write("model.up.weight", 0, &values[10..]).unwrap();
    assert_eq!(names(dir.path()), ["model.safetensors.part"]);
    let written = writer.finish().unwrap();
    assert_eq!(names(dir.path()), ["model.safetensors"]);
    let path = dir.path().join("model.safetensors");
    assert_eq!(written.len(), 1);
    assert_eq!(written[0].path, path);
    assert_eq!(written[0].bytes, std::fs::metadata(&path).unwrap().len());

    let reader = open(&path).unwrap();
    assert!(matches!(reader.metadata(), ModelMetadata::Bare));
    let order: Vec<_> = reader.tensors().iter().map(|t| (t.name.as_str(), t.encoding)).collect();
    assert_eq!(
        order,
        [
            ("model.scale", F32),
            ("model.norm.weight", BF16),
            ("model.up.weight", PACKED),
            ("model.empty", BF16)
        ]
    );
    let info = reader.tensors().get("model.up.weight").unwrap();
    assert_eq!((info.shape.as_slice(), info.stored_bytes), ([2, 12].as_slice(), 24 + 4));
    assert_eq!(reader.components("model.up.weight").unwrap(), [&values[..], &metadata]);
    assert_eq!(reader.read_f32("model.norm.weight").unwrap(), [1.0, 0.0, -1.0]);
    assert_eq!(reader.read_f32("model.scale").unwrap(), [2.5]);
    assert_eq!(reader.read_f32("model.empty").unwrap(), [0.0; 0]);
    let parts = reader.components("model.up.weight").unwrap();
    let mut out = vec![];
    PACKED.decode_dense("model.up.weight", &info.shape, &parts, 0..2, &mut out).unwrap();
    assert_eq!(out, dense);
    let weights = reader.read_f32("model.up.weight").unwrap();
    assert_eq!((weights[1], weights[23].to_bits()), (1.0, 0xFFC1_0000));
    reader.prefetch(&["model.up.weight", "model.empty", "no such tensor"]);
    reader.release(&["model.up.weight", "model.empty", "no such tensor"]);
    assert_eq!(reader.components("model.up.weight").unwrap(), [&values[..], &metadata]);

    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let pairs = header.metadata().as_ref().unwrap();
    assert_eq!(pairs["format"], "pt");
    assert_eq!(pairs["made-by"], "test \"quoted\"");
    assert_eq!(
        pairs["sparsepack.encodings"],
        r#"{"model.up.weight":{"encoding":"sparse24","dtype":"BF16","shape":[2,12]}}"#
    );
}

#[test]
fn shards_get_hugging_face_names_and_an_index() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"model_type":"llama"}"#).unwrap();
    let shards =
        [shard(&[("a", BF16, &[2, 2]), ("b", PACKED, &[1, 4])]), shard(&[("c", F32, &[1])])];
    write_patterns(dir.path(), &shards);
    assert_eq!(
        names(dir.path()),
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json"
        ]
    );
    let index = std::fs::read(dir.path().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(
        index,
        serde_json::json!({
            "metadata": { "total_size": 8 + 4 + 1 + 4 },
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b.values": "model-00001-of-00002.safetensors",
                "b.metadata": "model-00001-of-00002.safetensors",
                "c": "model-00002-of-00002.safetensors",
            }
        })
    );
    let reader = open(dir.path()).unwrap();
    let order: Vec<_> = reader.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(order, ["a", "b", "c"]);
    assert_eq!(reader.files().len(), 2);
    assert_eq!(reader.path(), dir.path());
    assert_eq!(reader.components("a").unwrap(), [pattern(1, 8)]);
    let ModelMetadata::HuggingFace { config, directory } = reader.metadata() else { panic!() };
    assert_eq!((config["model_type"].as_str(), directory.as_path()), (Some("llama"), dir.path()));
    let error = reader.components("d").unwrap_err();
    assert_eq!(error.to_string(), format!("{}: tensor `d` not found", dir.path().display()));
}

#[test]
fn the_writer_refuses_what_it_was_not_promised() {
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("model.safetensors.part");
    let layout = [shard(&[("a", BF16, &[2]), ("b", PACKED, &[1, 4])])];
    let mut writer = SafetensorsWriter::create(dir.path(), &layout).unwrap();
    writer.write("a", 0, &[1, 2, 3]).unwrap();
    let error = writer.write("a", 0, &[4, 5]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{}: tensor `a`: 5 of 4 bytes were written", part.display())
    );
    assert!(matches!(error, FormatError::WrongLength { .. }));
    assert!(matches!(writer.digests("a"), Err(FormatError::WrongLength { .. })));
    writer.write("a", 0, &[4]).unwrap();
    assert_eq!(writer.digests("a").unwrap(), [sparsepack_formats::Digest::of(&[1, 2, 3, 4])]);
    assert!(matches!(writer.write("c", 0, &[]), Err(FormatError::TensorNotFound { .. })));
    let error = writer.write("b", 2, &[]).unwrap_err();
    assert!(error.to_string().ends_with("has 2 components, but component 2 was written"));
    writer.write("b", 0, &[0; 4]).unwrap();
    let error = writer.finish().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{}: tensor `b.metadata`: 0 of 1 bytes were written", part.display())
    );
    assert_eq!(names(dir.path()), ["model.safetensors.part"]);
}

#[test]
fn layouts_the_reader_would_refuse_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |shards: &[ShardLayout]| {
        let error = SafetensorsWriter::create(dir.path(), shards).unwrap_err();
        assert!(names(dir.path()).is_empty());
        let prefix = format!("{}/", dir.path().display());
        error.to_string().replace(&prefix, "")
    };
    assert_eq!(
        refused(&[shard(&[("a", U8, &[1]), ("a", U8, &[1])])]),
        "model.safetensors: tensor `a` appears twice"
    );
    assert_eq!(
        refused(&[shard(&[("a.values", U8, &[1])]), shard(&[("a", PACKED, &[1, 4])])]),
        "model-00002-of-00002.safetensors: tensor `a.values` appears twice"
    );
    assert_eq!(
        refused(&[shard(&[("a", PACKED, &[1, 6])])]),
        "tensor `a`: 2:4 needs a multiple of 4 columns, found 6"
    );
    assert_eq!(
        refused(&[shard(&[("a.bias", U8, &[1]), ("a", PACKED, &[1, 4])])]),
        "model.safetensors: tensor `a`: `a.bias` is stored but is not one of its components"
    );
    assert_eq!(
        refused(&[shard(&[("a\n", U8, &[1])])]),
        "model.safetensors: tensor `a\n`: the name holds the control character '\\n'"
    );
    assert_eq!(
        refused(&[shard(&[(
            "q",
            Encoding::Ggml { ty: sparsepack_formats::GgmlType::Q8_0 },
            &[32]
        )])]),
        "tensor `q`: a safetensors file cannot hold Q8_0 blocks"
    );
    let mut reserved = shard(&[]);
    reserved.metadata.insert("sparsepack.encodings".into(), "{}".into());
    assert_eq!(
        refused(&[reserved]),
        "model.safetensors: offset 0: the metadata key `sparsepack.encodings` is reserved"
    );
    assert!(refused(&[]).ends_with("a checkpoint needs at least one shard"));
    assert!(
        refused(&[shard(&[("a", U8, &[usize::MAX]), ("b", U8, &[usize::MAX])])])
            .contains("overflow")
    );
}

#[test]
fn a_part_in_the_way_stops_create_and_abandon_clears_up() {
    let dir = tempfile::tempdir().unwrap();
    let shards = [shard(&[("a", U8, &[1])]), shard(&[("b", U8, &[1])])];
    let second = dir.path().join("model-00002-of-00002.safetensors.part");
    std::fs::write(&second, b"other").unwrap();
    let error = SafetensorsWriter::create(dir.path(), &shards).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: cannot create", second.display()));
    assert_eq!(names(dir.path()), ["model-00002-of-00002.safetensors.part"]);
    std::fs::remove_file(&second).unwrap();
    let writer = SafetensorsWriter::create(dir.path(), &shards).unwrap();
    assert_eq!(names(dir.path()).len(), 2);
    writer.abandon().unwrap();
    assert!(names(dir.path()).is_empty());
}

#[test]
fn an_interrupted_run_is_resumed_tensor_by_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let shards = [shard(&[("a", U8, &[3]), ("b", PACKED, &[1, 4]), ("e", U8, &[0])])];
    let mut writer = SafetensorsWriter::create(dir.path(), &shards).unwrap();
    writer.write("b", 0, &[1, 2, 3, 4]).unwrap();
    writer.write("b", 1, &[0xE4]).unwrap();
    writer.write("a", 0, &[9]).unwrap();
    writer.sync().unwrap();
    let digests = writer.digests("b").unwrap();
    drop(writer);

    let mut other = shards.clone();
    other[0].tensors[0].0 = "c".into();
    let error = SafetensorsWriter::resume(dir.path(), &other).unwrap_err();
    assert!(
        error.to_string().ends_with("the header differs from the layout of this run"),
        "{error}"
    );
    other[0].tensors[0].2 = vec![4];
    let error = SafetensorsWriter::resume(dir.path(), &other).unwrap_err();
    assert!(error.to_string().contains("bytes, but the layout needs"), "{error}");

    let mut writer = SafetensorsWriter::resume(dir.path(), &shards).unwrap();
    let error = writer.adopt("b", &[digests[1], digests[0]]).unwrap_err();
    assert!(error.to_string().contains("tensor `b`: `b.values` has sha256 9f64a747"), "{error}");
    let error = writer.adopt("b", &digests[..1]).unwrap_err();
    assert!(error.to_string().ends_with("has 2 components, but 1 digests were recorded"));
    writer.adopt("b", &digests).unwrap();
    assert_eq!(writer.digests("b").unwrap(), digests);
    assert!(matches!(writer.write("b", 0, &[1]), Err(FormatError::WrongLength { .. })));
    writer.write("a", 0, &[5, 6]).unwrap();
    let error = writer.adopt("a", &digests[..1]).unwrap_err();
    assert!(error.to_string().ends_with("this run has begun to write it"));
    writer.write("a", 0, &[7]).unwrap();
    writer.finish().unwrap();

    // Interrupted between the renames and the caller's own record: everything is adopted.
    let mut writer = SafetensorsWriter::resume(dir.path(), &shards).unwrap();
    writer.adopt("a", &[sparsepack_formats::Digest::of(&[5, 6, 7])]).unwrap();
    writer.adopt("b", &digests).unwrap();
    writer.finish().unwrap();
    let reader = open(&dir.path().join("model.safetensors")).unwrap();
    assert_eq!(reader.components("a").unwrap(), [&[5, 6, 7][..]]);
}

#[test]
fn a_checkpoint_saved_by_transformers_reads_as_the_crate_reads_it() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny/llama-gqa");
    let reader = open(&dir).unwrap();
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let oracle = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reader.tensors().len(), oracle.len());
    for info in reader.tensors() {
        let view = oracle.tensor(&info.name).unwrap();
        assert_eq!(view.shape(), info.shape);
        assert_eq!(reader.components(&info.name).unwrap(), [view.data()]);
        assert!(reader.read_f32(&info.name).unwrap().iter().all(|value| value.is_finite()));
    }
}

/// Names, encodings and shapes of one shard.
fn layouts() -> impl Strategy<Value = ShardLayout> {
    let encoding = prop_oneof![
        proptest::sample::select(DType::ALL.to_vec()).prop_map(|dtype| Encoding::Dense { dtype }),
        proptest::sample::select(vec![DType::F16, DType::Bf16, DType::F32])
            .prop_map(|dtype| Encoding::Sparse24 { dtype }),
        (1..8u8).prop_map(|n| Encoding::Nm { n, m: 8, dtype: DType::F8E4m3 }),
        (0..9u64).prop_map(|kept| Encoding::Bitmask { dtype: DType::F16, kept }),
        (2..9u8, any::<bool>(), 0..9u64).prop_map(|(bits, symmetric, room)| {
            let kept = match room {
                0 => Kept::All,
                1 => Kept::Sparse24,
                2 => Kept::Nm { n: 3, m: 4 },
                kept => Kept::Bitmask { kept },
            };
            let grid = IntGrid { bits, group_size: Some(2), symmetric, scale: DType::F32 };
            Encoding::Int { grid, kept }
        }),
    ];
    let tensor =
        (encoding, proptest::collection::vec(0..5usize, 0..4)).prop_map(|(e, mut shape)| {
            if e.is_packed() {
                shape.resize(2, 3);
            }
            if let Encoding::Int { kept: Kept::Bitmask { .. }, .. } = e {
                // Room for at most 8.
                shape[0] += 2;
            }
            match e {
                Encoding::Sparse24 { .. } => shape[1] *= 4,
                Encoding::Nm { m, .. } => shape[1] *= usize::from(m),
                Encoding::Bitmask { dtype, kept } => {
                    let kept = kept.min((shape[0] * shape[1]) as u64);
                    return (Encoding::Bitmask { dtype, kept }, shape);
                }
                Encoding::Int { .. } => shape[1] = 4 * shape[1] + 4,
                _ => {}
            }
            (e, shape)
        });
    proptest::collection::vec(tensor, 0..8).prop_map(|tensors| ShardLayout {
        tensors: tensors
            .into_iter()
            .enumerate()
            .map(|(i, (e, shape))| (format!("t{i}.ü"), e, shape))
            .collect(),
        metadata: [("k".to_owned(), "v".to_owned())].into(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_layout_tiles_the_file_and_reads_back(layout in layouts()) {
        let dir = tempfile::tempdir().unwrap();
        write_patterns(dir.path(), std::slice::from_ref(&layout));
        let path = dir.path().join("model.safetensors");
        let reader = SafetensorsReader::open_file(MappedFile::open(&path).unwrap()).unwrap();
        prop_assert_eq!(reader.tensors().len(), layout.tensors.len());
        let bytes = std::fs::read(&path).unwrap();
        // The crate's reader refuses holes, overlaps and trailing bytes.
        let oracle = SafeTensors::deserialize(&bytes).unwrap();
        let mut stored = 0;
        for (name, encoding, shape) in &layout.tensors {
            let info = reader.tensors().get(name).unwrap();
            prop_assert_eq!((info.encoding, &info.shape), (*encoding, shape));
            let parts = reader.components(name).unwrap();
            let components = encoding.components(name, shape).unwrap();
            for (index, component) in components.iter().enumerate() {
                let view = oracle.tensor(&format!("{name}{}", component.suffix)).unwrap();
                prop_assert_eq!(view.shape(), &component.shape);
                prop_assert_eq!(view.dtype().to_string(), component.dtype.to_string());
                prop_assert_eq!(view.data(), &parts[index][..]);
                prop_assert_eq!(&parts[index][..], pattern(name.len() + index, component.bytes as usize));
                // Maps start at a page, so addresses are aligned as offsets are.
                let address = parts[index].as_ptr() as usize;
                prop_assert_eq!(address % component.dtype.size_bytes(), 0);
                stored += 1;
            }
        }
        prop_assert_eq!(oracle.len(), stored);
    }
}

//! Safetensors files described in a container, and written again from it.

use std::{collections::BTreeMap, path::Path};

use sparsepack_formats::{
    CheckpointReader, CheckpointWriter, DType, Encoding, SafetensorsWriter, ShardLayout,
    container::{ContainerLayout, ContainerReader, OriginalFile},
    safetensors::SafetensorsReader,
};

use crate::builder::{create, dense, layout, message, noise, open, put_all};

/// A file as no writer of ours makes it: order, spaces, metadata, an unpadded header.
const UNUSUAL: &str = r#"{ "b":{"shape":[ 2,2 ],"data_offsets":[6,14],"dtype":"F16"} ,
 "__metadata__":{"z":"last","a":"é\u0041"}, "a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}"#;

fn unusual() -> Vec<u8> {
    let mut bytes = (UNUSUAL.len() as u64).to_le_bytes().to_vec();
    bytes.extend(UNUSUAL.as_bytes());
    bytes.extend(noise(7, 14, 0));
    bytes
}

/// A file of `reader` as `unpack` puts it together.
fn restored(reader: &ContainerReader, file: &OriginalFile) -> Vec<u8> {
    let mut bytes = file.head.clone();
    for part in reader.parts(file).unwrap() {
        let stored = reader.read_component(&part.tensor, part.component, 0..part.bytes);
        bytes.extend_from_slice(&stored.unwrap());
    }
    assert_eq!(bytes.len() as u64, file.bytes);
    bytes
}

/// Archives every tensor of a directory, last first.
fn archive(source: &Path, out: &Path) {
    let reader = SafetensorsReader::open_dir(source).unwrap();
    let tensors = reader.tensors().iter().rev();
    let tensors: Vec<_> =
        tensors.map(|info| (info.name.clone(), info.encoding, info.shape.clone())).collect();
    let files = reader.original_files().unwrap();
    let layout = ContainerLayout { tensors: tensors.clone(), files };
    let mut writer = create(out, layout);
    for (name, ..) in &tensors {
        for (component, bytes) in reader.components(name).unwrap().iter().enumerate() {
            writer.write(name, component, bytes).unwrap();
        }
    }
    writer.finish().unwrap();
}

fn assert_restores(source: &Path, names: &[&str]) {
    let out = tempfile::tempdir().unwrap();
    archive(source, out.path());
    let reader = open(out.path()).unwrap();
    let files = reader.original_files().unwrap();
    assert_eq!(files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>(), names);
    for file in &files {
        let expected = std::fs::read(source.join(&file.name)).unwrap();
        assert!(restored(&reader, file) == expected, "{}", file.name);
    }
}

#[test]
fn an_unusual_header_is_restored_byte_for_byte() {
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("config.json"), "{ \"b\": 1,\n\"a\":2 }").unwrap();
    std::fs::write(source.path().join("model.safetensors"), unusual()).unwrap();
    assert_restores(source.path(), &["model.safetensors", "config.json"]);
}

#[test]
fn shards_of_any_name_and_their_index_are_restored() {
    let source = tempfile::tempdir().unwrap();
    let second = br#"{"c":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
    let second = [&(second.len() as u64).to_le_bytes(), second.as_slice()].concat();
    for (name, bytes) in [
        ("config.json", b"{}".to_vec()),
        ("odd one.safetensors", unusual()),
        ("weights-B.safetensors", second),
        (
            "model.safetensors.index.json",
            br#"{"weight_map": {"c": "weights-B.safetensors",  "b": "odd one.safetensors",
                 "a": "odd one.safetensors"}, "extra": null}"#
                .to_vec(),
        ),
    ] {
        std::fs::write(source.path().join(name), bytes).unwrap();
    }
    assert_restores(
        source.path(),
        &[
            "odd one.safetensors",
            "weights-B.safetensors",
            "model.safetensors.index.json",
            "config.json",
        ],
    );
}

#[test]
fn planned_shards_are_what_the_safetensors_writer_makes() {
    let packed = Encoding::Sparse24 { dtype: DType::Bf16 };
    let shard = |tensors: &[(&str, Encoding, &[usize])]| ShardLayout {
        tensors: tensors.iter().map(|(n, e, s)| ((*n).to_owned(), *e, s.to_vec())).collect(),
        metadata: BTreeMap::new(),
    };
    let shards = [
        shard(&[("a", Encoding::Dense { dtype: DType::U8 }, &[3]), ("p", packed, &[2, 8])]),
        shard(&[("z", Encoding::Dense { dtype: DType::F32 }, &[2])]),
    ];
    let (plain, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let files = OriginalFile::of_shards(plain.path(), &shards).unwrap();
    let tensors: Vec<_> = shards.iter().flat_map(|shard| shard.tensors.clone()).collect();
    let mut writers: [Box<dyn CheckpointWriter>; 2] = [
        SafetensorsWriter::create(plain.path(), &shards).unwrap(),
        create(out.path(), ContainerLayout { tensors: tensors.clone(), files }),
    ];
    for writer in &mut writers {
        for (name, encoding, shape) in &tensors {
            for (at, component) in encoding.components(name, shape).unwrap().iter().enumerate() {
                // Legal nibbles, and values.
                let bytes = vec![0x44; component.bytes as usize];
                writer.write(name, at, &bytes).unwrap();
            }
        }
    }
    for writer in writers {
        writer.finish().unwrap();
    }
    let reader = open(out.path()).unwrap();
    let files = reader.original_files().unwrap();
    assert_eq!(files.len(), 3);
    for file in &files {
        assert!(restored(&reader, file) == std::fs::read(plain.path().join(&file.name)).unwrap());
    }
}

#[test]
fn a_header_that_does_not_fit_the_tensors_is_refused() {
    let refused = |tensors: &[crate::builder::Tensor], bytes: u64| {
        let dir = tempfile::tempdir().unwrap();
        let head = unusual()[..8 + UNUSUAL.len()].to_vec();
        let file = OriginalFile { name: "m.safetensors".to_owned(), head, bytes };
        let mut writer =
            create(dir.path(), ContainerLayout { files: vec![file], ..layout(tensors) });
        put_all(writer.as_mut(), tensors);
        writer.finish().unwrap();
        let reader = open(dir.path()).unwrap();
        let files = reader.original_files().unwrap();
        message(dir.path(), &reader.parts(&files[0]).unwrap_err())
    };
    let (a, b) =
        (dense("a", DType::U8, &[6], vec![0; 6]), dense("b", DType::F16, &[4], vec![0; 8]));
    let size = unusual().len() as u64;
    assert_eq!(
        refused(std::slice::from_ref(&a), size),
        "model.spz/m.safetensors: tensor `b` not found"
    );
    let short = dense("b", DType::F16, &[3], vec![0; 6]);
    assert_eq!(
        refused(&[a.clone(), short], size),
        "model.spz/m.safetensors: tensor `b`: has 8 bytes in the header, but 6 here"
    );
    assert_eq!(
        refused(&[a, b], size + 5),
        format!(
            "model.spz/m.safetensors: offset {size}: expected the end of the file, found 5 more bytes"
        )
    );
}

#[test]
fn only_plain_names_of_model_files_can_be_described() {
    for name in
        ["../model.safetensors", "/etc/passwd", "run.sh", ".safetensors", "a/b.safetensors", ""]
    {
        let dir = tempfile::tempdir().unwrap();
        let files = vec![OriginalFile::whole(name, b"{}".to_vec())];
        let layout = ContainerLayout { tensors: vec![], files };
        let error = sparsepack_formats::container::ContainerWriter::create(
            dir.path(),
            layout,
            1,
            Box::new(sparsepack_formats::container::InPlace),
        );
        let error = message(dir.path(), &error.unwrap_err());
        assert!(error.ends_with("cannot be restored"), "{error}");
    }
}

//! One GGUF file or a split: what was written is read, and with changed bytes it is read or refused.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{
    CheckpointReader, GgufLayout, GgufWriter, ModelMetadata,
    gguf::{GgufArray, GgufMetadata, GgufReader, GgufStrings, GgufValue},
};
use sparsepack_formats_fuzz::{Scratch, encoding, name, parts, read_everything, shape};

fn metadata(u: &mut Unstructured<'_>) -> Result<GgufMetadata> {
    let mut metadata = GgufMetadata::new("m".as_ref());
    for _ in 0..u.int_in_range(0..=3)? {
        let key = name(u, &["general.architecture", "general.alignment", "split.count", "k"])?;
        let value = match u.int_in_range(0..=8)? {
            0 => GgufValue::U8(u.arbitrary()?),
            1 => GgufValue::I16(u.arbitrary()?),
            // A header is padded to the alignment, which may be 2 GiB.
            2 => GgufValue::U32(u.int_in_range(0..=1 << 12)?),
            3 => GgufValue::I64(u.int_in_range(-(1 << 12)..=1 << 12)?),
            4 => GgufValue::Bool(u.arbitrary()?),
            5 => GgufValue::String(u.arbitrary()?),
            6 => GgufValue::Array(GgufArray::I32(u.arbitrary()?)),
            7 => GgufValue::Array(GgufArray::Bool(u.arbitrary()?)),
            _ => {
                let strings: Vec<&str> = u.arbitrary()?;
                GgufValue::Array(GgufArray::String(GgufStrings::from_iter(strings)))
            }
        };
        metadata.set(&key, value);
    }
    Ok(metadata)
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let mut layout = GgufLayout { metadata: metadata(u)?, files: vec![] };
    let mut data = vec![];
    for _ in 0..u.int_in_range(1..=3)? {
        let mut tensors = vec![];
        for _ in 0..u.int_in_range(0..=2)? {
            let (name, encoding, shape) = (name(u, &["a", "b", "c"])?, encoding(u)?, shape(u)?);
            if let Some(parts) = parts(u, &name, encoding, &shape)? {
                tensors.push((name.clone(), encoding, shape));
                data.push((name, parts));
            }
        }
        layout.files.push(tensors);
    }
    let scratch = Scratch::new();
    let Ok(mut writer) = GgufWriter::create(scratch.path(), &layout) else { return Ok(()) };
    for (name, parts) in &data {
        writer.write(name, 0, &parts[0]).expect("bytes of a tensor");
    }
    let written = writer.finish().expect("everything was written");
    let reader = GgufReader::open(&written[0].path).expect("it was just written");
    for (name, parts) in &data {
        let read = reader.components(name).expect("it was just written");
        assert_eq!(&read[0][..], parts[0]);
    }
    let ModelMetadata::Gguf(read) = reader.metadata() else { panic!("metadata of another format") };
    for (key, value) in layout.metadata.iter().filter(|(key, _)| !key.starts_with("split.")) {
        assert_eq!(read.get(key), Some(value));
    }
    drop(reader);

    let changed = u.choose(&written)?;
    let mut bytes = std::fs::read(&changed.path).expect("it was just written");
    for (at, byte) in u.arbitrary::<Vec<(u16, u8)>>()? {
        let len = bytes.len();
        bytes[usize::from(at) % len] = byte;
    }
    std::fs::write(&changed.path, bytes).expect("a file in the temporary directory");
    if u.ratio(1, 8)? {
        let extra = name(u, &["model.gguf", "a-00001-of-00002.gguf", "x"])?;
        let _ = std::fs::write(scratch.path().join(extra.replace(['/', '\0'], "")), b"GGUF");
    }
    if let Ok(reader) = sparsepack_formats::open(scratch.path()) {
        read_everything(&*reader);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

//! A container of zstd frames: what was written is read, and with changed bytes or a changed index it
//! is read or refused.
#![no_main]

use std::fs;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{
    CheckpointReader, Digest, Encoding, MappedFile,
    container::{ContainerLayout, ContainerReader, ContainerWriter, FILE_NAME, InPlace},
};
use sparsepack_formats_fuzz::{Scratch, encoding, parts, read_everything, shape};

/// Digest, length and magic at the end of a file.
const TRAILER_BYTES: usize = 32 + 8 + 8;

type Tensor = ((String, Encoding, Vec<usize>), Vec<Vec<u8>>);

fn tensors(u: &mut Unstructured<'_>) -> Result<Vec<Tensor>> {
    let mut tensors = vec![];
    for name in ["a.weight", "b.weight", "c.weight"] {
        let (encoding, shape) = (encoding(u)?, shape(u)?);
        if let Some(parts) = parts(u, name, encoding, &shape)? {
            tensors.push(((name.to_owned(), encoding, shape), parts));
        }
    }
    Ok(tensors)
}

fn write(scratch: &Scratch, tensors: &[Tensor]) -> Vec<u8> {
    let layout = ContainerLayout {
        tensors: tensors.iter().map(|(tensor, _)| tensor.clone()).collect(),
        files: vec![],
    };
    let mut writer = ContainerWriter::create(scratch.path(), layout, 1, Box::new(InPlace))
        .expect("names and shapes are legal");
    for ((name, ..), parts) in tensors {
        for (component, bytes) in parts.iter().enumerate() {
            writer.write(name, component, bytes).expect("bytes of a component");
        }
    }
    writer.finish().expect("everything was written");
    fs::read(scratch.path().join(FILE_NAME)).expect("it was just written")
}

/// The file with an index that was changed, digest and lengths right again.
fn with_index(bytes: &[u8], change: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<Vec<u8>> {
    let end = bytes.len() - TRAILER_BYTES;
    let length: [u8; 8] = bytes[end + 32..end + 40].try_into().expect("eight bytes");
    let start = end - u64::from_le_bytes(length) as usize;
    let mut index = bytes[start..end].to_vec();
    change(&mut index)?;
    let mut out = bytes[..start - 4].to_vec();
    out.extend((index.len() as u32 + TRAILER_BYTES as u32).to_le_bytes());
    out.extend(&index);
    out.extend(Digest::of(&index).as_bytes());
    out.extend((index.len() as u64).to_le_bytes());
    out.extend(&bytes[bytes.len() - 8..]);
    Ok(out)
}

fn patch(u: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    for _ in 0..u.int_in_range(1..=4)? {
        let at = u.choose_index(bytes.len())?;
        match u.int_in_range(0..=2)? {
            0 => bytes[at] = u.arbitrary()?,
            1 => bytes[at] = *u.choose(b"0123456789")?,
            _ => bytes.insert(at, *u.choose(b"0123456789")?),
        }
    }
    Ok(())
}

fn open(scratch: &Scratch, bytes: &[u8]) -> sparsepack_formats::Result<ContainerReader> {
    let path = scratch.write("m.spz", bytes);
    ContainerReader::open_file(MappedFile::open(&path).expect("it was just written"))
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let scratch = Scratch::new();
    if u.ratio(1, 8)? {
        let _ = open(&scratch, u.bytes(u.len())?).map(|reader| read_everything(&reader));
        return Ok(());
    }
    let tensors = tensors(u)?;
    let bytes = write(&scratch, &tensors);
    let reader = open(&scratch, &bytes).expect("it was just written");
    for ((name, ..), parts) in &tensors {
        let read = reader.components(name).expect("it was just written");
        assert!(read.iter().map(|part| &part[..]).eq(parts.iter().map(|part| &part[..])));
    }
    let changed = match u.int_in_range(0..=2)? {
        0 => {
            let mut bytes = bytes;
            patch(u, &mut bytes)?;
            bytes
        }
        _ => with_index(&bytes, |index| patch(u, index))?,
    };
    let _ = open(&scratch, &changed).map(|reader| read_everything(&reader));
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

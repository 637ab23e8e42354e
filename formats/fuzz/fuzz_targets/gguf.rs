//! A GGUF file: any bytes, or pairs and tensors with a few bytes changed.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{
    Encoding, GgmlType, MappedFile,
    gguf::{ALIGNMENT_KEY, GgufReader},
};
use sparsepack_formats_fuzz::{Scratch, fill, name, read_everything, shape};

#[path = "../../tests/gguf/builder.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod builder;

use builder::{Gguf, array, string};

fn file(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    if u.ratio(1, 4)? {
        return Ok([&b"GGUF\x03\0\0\0"[..], u.bytes(u.len())?].concat());
    }
    let mut file = Gguf::new();
    for _ in 0..u.int_in_range(0..=3)? {
        let key = name(u, &["general.architecture", "k", ALIGNMENT_KEY])?;
        let (value_type, value) = value(u)?;
        file = file.pair(&key, value_type, &value);
    }
    let mut data = vec![];
    for _ in 0..u.int_in_range(0..=3)? {
        data.resize(usize::next_multiple_of(data.len(), 32), 0);
        let types: Vec<GgmlType> = GgmlType::all().collect();
        let (ty, shape) = (*u.choose(&types)?, shape(u)?);
        let encoding = Encoding::Ggml { ty };
        let bytes = encoding.components("", &shape).map_or(0, |parts| parts[0].bytes);
        let dims: Vec<u64> = shape.iter().rev().map(|&dim| dim as u64).collect();
        file = file.tensor(&name(u, &["a", "b", "c"])?, &dims, ty.id(), data.len() as u64);
        data.extend(fill(u, bytes.min(1 << 14) as usize)?);
    }
    file.data = data;
    let mut bytes = file.bytes();
    if u.ratio(1, 2)? {
        for (at, byte) in u.arbitrary::<Vec<(u16, u8)>>()? {
            if let Some(place) = bytes.get_mut(usize::from(at)) {
                *place = byte;
            }
        }
    }
    Ok(bytes)
}

/// A value and its type.
fn value(u: &mut Unstructured<'_>) -> Result<(u32, Vec<u8>)> {
    // Bytes of a value by its type; strings and arrays have no fixed length.
    const LENGTHS: [usize; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
    let value_type = u.int_in_range(0..=12)?;
    let text = |u: &mut Unstructured<'_>| u.arbitrary::<&str>().map(string);
    Ok((
        value_type,
        match value_type {
            7 => vec![u8::from(u.arbitrary::<bool>()?)],
            8 => text(u)?,
            9 => {
                let (element_type, count) = (u.int_in_range(0..=12)?, u.int_in_range(0..=5u8)?);
                let mut elements = vec![];
                for _ in 0..count {
                    match element_type {
                        7 => elements.push(u8::from(u.arbitrary::<bool>()?)),
                        8 => elements.extend(text(u)?),
                        _ => elements.extend(u.bytes(LENGTHS[element_type as usize])?),
                    }
                }
                array(element_type, count.into(), &elements)
            }
            _ => u.bytes(LENGTHS[value_type as usize])?.to_vec(),
        },
    ))
}

thread_local! {
    static SCRATCH: Scratch = Scratch::new();
}

fuzz_target!(|data: &[u8]| {
    let Ok(bytes) = file(&mut Unstructured::new(data)) else { return };
    let path = SCRATCH.with(|scratch| scratch.write("m.gguf", &bytes));
    let file = MappedFile::open(&path).expect("a file that was just written");
    if let Ok(reader) = GgufReader::new(file) {
        read_everything(&reader);
    }
});

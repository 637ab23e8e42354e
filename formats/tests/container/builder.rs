//! Containers to read, to continue and to damage.

use std::path::Path;

use serde_json::Value;
use sparsepack_formats::{
    CheckpointWriter, DType, Digest, Encoding, FormatError, MappedFile, Result,
    container::{ContainerLayout, ContainerReader, ContainerWriter, FILE_NAME, InPlace},
};

pub(crate) type Tensor = (String, Encoding, Vec<usize>, Vec<Vec<u8>>);

pub(crate) fn dense(name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    (name.to_owned(), Encoding::Dense { dtype }, shape.to_vec(), vec![bytes])
}

/// Bytes that look random, every `zeros`-th pair of them zero.
pub(crate) fn noise(seed: u64, count: usize, zeros: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as u8
    };
    let keep = |at: usize| zeros == 0 || !(at / 2).is_multiple_of(zeros);
    (0..count).map(|at| if keep(at) { next() } else { 0 }).collect()
}

pub(crate) fn layout(tensors: &[Tensor]) -> ContainerLayout {
    let tensors = tensors.iter();
    ContainerLayout {
        tensors: tensors
            .map(|(name, encoding, shape, _)| (name.clone(), *encoding, shape.clone()))
            .collect(),
        files: vec![],
    }
}

pub(crate) fn create(dir: &Path, layout: ContainerLayout) -> Box<dyn CheckpointWriter> {
    ContainerWriter::create(dir, layout, 1, Box::new(InPlace)).unwrap()
}

/// Writes the components of a tensor in turns, in pieces of an odd length.
pub(crate) fn put(writer: &mut dyn CheckpointWriter, (name, _, _, parts): &Tensor) {
    const PIECE: usize = 700_001;
    let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
    for start in (0..longest).step_by(PIECE) {
        for (component, part) in parts.iter().enumerate().filter(|(_, part)| start < part.len()) {
            writer.write(name, component, &part[start..part.len().min(start + PIECE)]).unwrap();
        }
    }
}

pub(crate) fn put_all(writer: &mut dyn CheckpointWriter, tensors: &[Tensor]) {
    for tensor in tensors {
        put(writer, tensor);
    }
}

pub(crate) fn write(dir: &Path, tensors: &[Tensor]) -> Vec<u8> {
    let mut writer = create(dir, layout(tensors));
    put_all(writer.as_mut(), tensors);
    writer.finish().unwrap();
    std::fs::read(dir.join(FILE_NAME)).unwrap()
}

pub(crate) fn open(dir: &Path) -> Result<ContainerReader> {
    ContainerReader::open_file(MappedFile::open(&dir.join(FILE_NAME))?)
}

/// Reads a file of these bytes.
pub(crate) fn read(dir: &Path, bytes: &[u8]) -> Result<ContainerReader> {
    std::fs::write(dir.join(FILE_NAME), bytes).unwrap();
    open(dir)
}

/// The error without the directory, which differs from run to run.
pub(crate) fn message(dir: &Path, error: &FormatError) -> String {
    error.to_string().replace(&format!("{}/", dir.display()), "")
}

/// Where the footer of a finished file starts, and its index.
pub(crate) fn index(file: &[u8]) -> (usize, Value) {
    let end = file.len() - 48;
    let length = u64::from_le_bytes(file[end + 32..end + 40].try_into().unwrap()) as usize;
    (end - length - 8, serde_json::from_slice(&file[end - length..end]).unwrap())
}

/// A footer around any index, with its right digest.
pub(crate) fn footer(json: &[u8]) -> Vec<u8> {
    let mut out = 0x184D_2A5C_u32.to_le_bytes().to_vec();
    out.extend((json.len() as u32 + 48).to_le_bytes());
    out.extend(json);
    out.extend(Digest::of(json).as_bytes());
    out.extend((json.len() as u64).to_le_bytes());
    out.extend(b"SPARSEPK");
    out
}

/// The file with another index.
pub(crate) fn edited(file: &[u8], edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (start, mut index) = index(file);
    edit(&mut index);
    let mut out = file[..start].to_vec();
    out.extend(footer(index.to_string().as_bytes()));
    out
}

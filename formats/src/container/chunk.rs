//! One chunk: up to `chunk_bytes` of a component, as zstd frames.
//!
//! Frames in order: the mask, where there is one, then the planes, most significant first. Chunks
//! are independent, so they are compressed and decompressed in any order and by any thread.

use std::io;

use zstd::{
    bulk::{Compressor, Decompressor},
    zstd_safe::{self, CParameter},
};

use super::planes::{self, Split};
use crate::DType;

/// First bytes of a zstd frame that is not skippable.
pub(super) const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();

/// Runs compression jobs. The writer has no threads of its own.
pub trait Executor: std::fmt::Debug + Send {
    /// How many jobs run at the same time; the writer collects a few times as many.
    fn threads(&self) -> usize;

    /// Calls [`ChunkJob::run`] on every job, in any order, and returns when all are done.
    fn run(&self, jobs: &mut [&mut ChunkJob]);
}

/// Runs jobs one after the other where it is called.
#[derive(Debug, Clone, Copy, Default)]
pub struct InPlace;

impl Executor for InPlace {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, jobs: &mut [&mut ChunkJob]) {
        for job in jobs {
            job.run();
        }
    }
}

/// A chunk to compress.
#[derive(Debug)]
pub struct ChunkJob {
    raw: Vec<u8>,
    split: Split,
    level: i32,
    done: Option<io::Result<Chunk>>,
}

/// A compressed chunk.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) mask: bool,
    pub(super) frames: Vec<Vec<u8>>,
}

impl ChunkJob {
    pub(super) fn new(raw: Vec<u8>, dtype: DType, level: i32) -> Self {
        Self { raw, split: Split::of(dtype), level, done: None }
    }

    /// Compresses the chunk, unless that is done already.
    pub fn run(&mut self) {
        if self.done.is_none() {
            self.done = Some(compress(&self.raw, self.split, self.level));
            self.raw = Vec::new();
        }
    }

    /// The result, compressed now if nobody has.
    pub(super) fn result(&mut self) -> Result<&Chunk, &io::Error> {
        let (raw, split, level) = (&self.raw, self.split, self.level);
        self.done.get_or_insert_with(|| compress(raw, split, level)).as_ref()
    }
}

fn compress(raw: &[u8], split: Split, level: i32) -> io::Result<Chunk> {
    let mut compressor = Compressor::new(level)?;
    compressor.set_parameter(CParameter::ChecksumFlag(true))?;
    let (mask, kept) = match split.squeeze(raw) {
        Some((mask, kept)) => (Some(mask), split.split(&kept)),
        None => (None, split.split(raw)),
    };
    let plane_bytes = kept.len() / split.width;
    let mut frames = Vec::with_capacity(split.width + 1);
    if let Some(mask) = &mask {
        frames.push(compressor.compress(mask)?);
    }
    for plane in 0..split.width {
        frames.push(compressor.compress(&kept[plane * plane_bytes..][..plane_bytes])?);
    }
    Ok(Chunk { mask: mask.is_some(), frames })
}

/// Compresses bytes that are not a chunk into one frame.
pub(super) fn compress_whole(bytes: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let mut compressor = Compressor::new(level)?;
    compressor.set_parameter(CParameter::ChecksumFlag(true))?;
    compressor.compress(bytes)
}

/// What is wrong with a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Defect {
    /// Position among the frames that were given.
    pub(super) frame: usize,
    pub(super) what: String,
}

/// The `raw_bytes` bytes of a chunk.
///
/// No more than `raw_bytes` and the like for planes and mask is allocated, whatever the frames say.
///
/// # Errors
/// [`Defect`] for the first frame that is damaged or holds another number of bytes.
pub(super) fn decompress(
    frames: &[&[u8]],
    mask: bool,
    dtype: DType,
    raw_bytes: usize,
) -> Result<Vec<u8>, Defect> {
    let split = Split::of(dtype);
    let count = raw_bytes / split.width;
    let at = |frame| move |what: String| Defect { frame, what };
    let (mask, planes) = match frames.split_first() {
        Some((first, rest)) if mask => {
            let mask = decompress_whole(first, count.div_ceil(8)).map_err(at(0))?;
            (Some(mask), rest)
        }
        _ => (None, frames),
    };
    let first_plane = frames.len() - planes.len();
    if planes.len() != split.width {
        let what = format!("{} planes, expected {}", planes.len(), split.width);
        return Err(Defect { frame: first_plane, what });
    }
    let kept = match &mask {
        Some(mask) => planes::kept(mask, count).map_err(str::to_owned).map_err(at(0))?,
        None => count,
    };
    if let [plane] = planes
        && mask.is_none()
    {
        return decompress_whole(plane, kept).map_err(at(0));
    }
    let mut bytes = Vec::with_capacity(kept * split.width);
    for (index, plane) in planes.iter().enumerate() {
        bytes.extend(decompress_whole(plane, kept).map_err(at(first_plane + index))?);
    }
    let elements = split.join(&bytes);
    Ok(match mask {
        Some(mask) => split.spread(&mask, &elements, count),
        None => elements,
    })
}

/// The content of a frame that must have exactly `expected` bytes; nothing else is allocated.
///
/// # Errors
/// What is wrong with the frame.
pub(super) fn decompress_whole(frame: &[u8], expected: usize) -> Result<Vec<u8>, String> {
    if !frame.starts_with(&ZSTD_MAGIC) {
        return Err("not a zstd frame".to_owned());
    }
    match zstd_safe::get_frame_content_size(frame) {
        Ok(Some(found)) if found == expected as u64 => {}
        Ok(Some(found)) => {
            return Err(format!("holds {found} bytes by its own header, expected {expected}"));
        }
        Ok(None) => return Err("does not say how many bytes it holds".to_owned()),
        Err(_) => return Err("its header is damaged".to_owned()),
    }
    match zstd_safe::find_frame_compressed_size(frame) {
        Ok(length) if length == frame.len() => {}
        Ok(length) => return Err(format!("ends after {length} of {} bytes", frame.len())),
        Err(_) => return Err("its blocks are damaged".to_owned()),
    }
    let mut out = Vec::with_capacity(expected);
    let found = Decompressor::new()
        .and_then(|mut decompressor| decompressor.decompress_to_buffer(frame, &mut out))
        .map_err(|error| format!("zstd: {error}"))?;
    if found != expected {
        return Err(format!("holds {found} bytes, expected {expected}"));
    }
    Ok(out)
}

/// Length of the frame at the start of `bytes`, if a whole zstd frame is there.
pub(super) fn frame_length(bytes: &[u8]) -> Option<usize> {
    bytes.starts_with(&ZSTD_MAGIC).then(|| zstd_safe::find_frame_compressed_size(bytes).ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(raw: &[u8], dtype: DType, level: i32) -> (Chunk, Vec<u8>) {
        let chunk = compress(raw, Split::of(dtype), level).unwrap();
        let frames: Vec<&[u8]> = chunk.frames.iter().map(Vec::as_slice).collect();
        let out = decompress(&frames, chunk.mask, dtype, raw.len()).unwrap();
        (chunk, out)
    }

    #[test]
    fn every_16_bit_pattern_comes_back_at_every_level() {
        let raw: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for level in [1, 3, 9, 19] {
            for dtype in [DType::Bf16, DType::F16, DType::I16, DType::U8, DType::F32, DType::I64] {
                assert_eq!(round_trip(&raw, dtype, level).1, raw, "{dtype} {level}");
            }
        }
    }

    #[test]
    fn nothing_but_zeros_is_a_mask_and_empty_planes() {
        let raw = [0; 4096];
        let (chunk, out) = round_trip(&raw, DType::Bf16, 1);
        assert!(chunk.mask);
        assert_eq!(chunk.frames.len(), 3);
        assert_eq!(out, raw);
        assert_eq!(round_trip(&[], DType::F32, 1).1, [0; 0]);
    }

    #[test]
    fn a_frame_of_another_size_is_refused_before_anything_is_allocated() {
        let bomb = compress_whole(&vec![0; 1 << 20], 19).unwrap();
        assert!(bomb.len() < 100);
        assert_eq!(
            decompress_whole(&bomb, 10).unwrap_err(),
            "holds 1048576 bytes by its own header, expected 10"
        );
        assert_eq!(
            decompress(&[&bomb, &bomb], false, DType::Bf16, 20).unwrap_err(),
            Defect {
                frame: 0,
                what: "holds 1048576 bytes by its own header, expected 10".to_owned()
            }
        );
        let mut two = bomb.clone();
        two.extend_from_slice(&bomb);
        assert_eq!(
            decompress_whole(&two, 1 << 20).unwrap_err(),
            format!("ends after {} of {} bytes", bomb.len(), two.len())
        );
        assert_eq!(decompress_whole(b"ordinary", 8).unwrap_err(), "not a zstd frame");
        let frame = compress_whole(b"twelve bytes", 1).unwrap();
        let end = frame.len() - 1;
        let mut damaged = frame.clone();
        damaged[end] ^= 1;
        assert!(decompress_whole(&damaged, 12).unwrap_err().contains("checksum"));
        assert_eq!(decompress_whole(&frame[..end], 12).unwrap_err(), "its blocks are damaged");
    }

    #[test]
    fn a_mask_must_fit() {
        let mask = compress_whole(&[0b1111_0001], 1).unwrap();
        let plane = compress_whole(&[7], 1).unwrap();
        let refused = |mask: &[u8], count| {
            decompress(&[mask, &plane], true, DType::U8, count).unwrap_err().what
        };
        assert_eq!(refused(&mask, 4), "the mask has bits set behind the last element");
        assert_eq!(refused(&mask, 8), "holds 1 bytes by its own header, expected 5");
        assert_eq!(refused(&mask, 9), "holds 1 bytes by its own header, expected 2");
    }

    proptest! {
        #[test]
        fn arbitrary_frames_never_panic(
            frames in proptest::collection::vec(
                proptest::collection::vec(any::<u8>(), 0..60), 0..4),
            mask: bool,
            raw_bytes in 0..200usize,
        ) {
            let mut frames = frames;
            for frame in frames.iter_mut().filter(|frame| frame.len() > 4) {
                frame[..4].copy_from_slice(&ZSTD_MAGIC);
            }
            let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
            let _ = decompress(&frames, mask, DType::Bf16, raw_bytes / 2 * 2);
        }
    }
}

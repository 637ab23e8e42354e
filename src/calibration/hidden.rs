//! The activations of the whole calibration set between two passes, held on the host.
//!
//! A pass takes one batch at a time, computes on it and puts it back, so the device never holds
//! more than one batch. In memory by default; in an unnamed temporary file when the caller's budget
//! is too small. Invariant: a batch that was taken must be put back before the next pass.

use std::{fs::File, path::Path};

use half::bf16;

use crate::backend::{HostData, HostMatrix, SequenceLens};

/// Activations of one batch on the host.
#[derive(Debug)]
pub struct HostActivations {
    /// The residual stream `[tokens, hidden]`, f32.
    pub residual: HostMatrix,
    /// Input of the linears at the current capture point, where it was kept.
    pub input: Option<HostMatrix>,
}

/// Why activations could not be kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HiddenError {
    /// The spill file failed.
    #[error("spilled activations in {dir}: cannot {action}")]
    Io {
        /// Directory of the temporary file.
        dir: std::path::PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A batch was taken twice: a defect of the caller.
    #[error("batch {batch} is not in the store")]
    Taken {
        /// Index of the batch.
        batch: usize,
    },
}

/// The store.
#[derive(Debug)]
pub struct HiddenStates {
    lens: Vec<SequenceLens>,
    slots: Vec<Option<Slot>>,
    spill: Option<Spill>,
}

#[derive(Debug)]
enum Slot {
    Memory(HostActivations),
    Spilled { residual: Extent, input: Option<Extent> },
}

/// Where a matrix lies in the spill file.
#[derive(Debug, Clone, Copy)]
struct Extent {
    offset: u64,
    rows: usize,
    cols: usize,
    bf16: bool,
}

#[derive(Debug)]
struct Spill {
    dir: std::path::PathBuf,
    file: File,
    /// Bytes reserved for one batch: residual first, then the widest input.
    residual_bytes: u64,
    batch_bytes: u64,
}

impl HiddenStates {
    /// An empty store for batches with these sequence lengths, kept in memory.
    pub fn in_memory(lens: Vec<SequenceLens>) -> Self {
        let slots = lens.iter().map(|_| None).collect();
        Self { lens, slots, spill: None }
    }

    /// An empty store that keeps activations in an unnamed temporary file in `dir`. `hidden` and
    /// `widest_input` are the columns of the residual stream and of the widest kept input.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn spilled(
        lens: Vec<SequenceLens>,
        dir: &Path,
        hidden: usize,
        widest_input: usize,
    ) -> Result<Self, HiddenError> {
        let file = tempfile::tempfile_in(dir).map_err(|source| HiddenError::Io {
            dir: dir.to_owned(),
            action: "create a temporary file",
            source,
        })?;
        let longest = lens.iter().map(SequenceLens::tokens).max().unwrap_or(0) as u64;
        let residual_bytes = longest * hidden as u64 * 4;
        let batch_bytes = residual_bytes + longest * widest_input as u64 * 4;
        let mut store = Self::in_memory(lens);
        store.spill = Some(Spill { dir: dir.to_owned(), file, residual_bytes, batch_bytes });
        Ok(store)
    }

    /// Number of batches.
    pub fn batches(&self) -> usize {
        self.lens.len()
    }

    /// Sequence lengths of a batch.
    pub fn lens(&self, batch: usize) -> &SequenceLens {
        &self.lens[batch]
    }

    /// Sequences of all batches.
    pub fn sequences(&self) -> usize {
        self.lens.iter().map(|lens| lens.ranges().count()).sum()
    }

    /// Takes a batch out of the store.
    ///
    /// # Errors
    /// The spill file cannot be read; the batch is not there.
    pub fn take(&mut self, batch: usize) -> Result<HostActivations, HiddenError> {
        match (self.slots[batch].take(), &self.spill) {
            (Some(Slot::Memory(activations)), _) => Ok(activations),
            (Some(Slot::Spilled { residual, input }), Some(spill)) => Ok(HostActivations {
                residual: spill.read(residual)?,
                input: input.map(|extent| spill.read(extent)).transpose()?,
            }),
            _ => Err(HiddenError::Taken { batch }),
        }
    }

    /// Puts a batch back.
    ///
    /// # Errors
    /// The spill file cannot be written.
    pub fn put(&mut self, batch: usize, activations: HostActivations) -> Result<(), HiddenError> {
        self.slots[batch] = Some(match &self.spill {
            None => Slot::Memory(activations),
            Some(spill) => {
                let start = batch as u64 * spill.batch_bytes;
                let residual = spill.write(start, &activations.residual)?;
                let input = activations
                    .input
                    .map(|input| spill.write(start + spill.residual_bytes, &input))
                    .transpose()?;
                Slot::Spilled { residual, input }
            }
        });
        Ok(())
    }
}

impl Spill {
    fn error(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> HiddenError {
        let dir = self.dir.clone();
        move |source| HiddenError::Io { dir, action, source }
    }

    fn write(&self, offset: u64, matrix: &HostMatrix) -> Result<Extent, HiddenError> {
        let (bytes, bf16): (&[u8], bool) = match &matrix.data {
            HostData::F32(values) => (bytemuck::cast_slice(values), false),
            HostData::Bf16(values) => (bytemuck::cast_slice(values), true),
        };
        positioned::write_all_at(&self.file, bytes, offset).map_err(self.error("write"))?;
        Ok(Extent { offset, rows: matrix.rows, cols: matrix.cols, bf16 })
    }

    fn read(&self, extent: Extent) -> Result<HostMatrix, HiddenError> {
        let len = extent.rows * extent.cols;
        let data = if extent.bf16 {
            let mut values = vec![bf16::ZERO; len];
            let bytes = bytemuck::cast_slice_mut(&mut values);
            positioned::read_exact_at(&self.file, bytes, extent.offset)
                .map_err(self.error("read"))?;
            HostData::Bf16(values)
        } else {
            let mut values = vec![0f32; len];
            let bytes = bytemuck::cast_slice_mut(&mut values);
            positioned::read_exact_at(&self.file, bytes, extent.offset)
                .map_err(self.error("read"))?;
            HostData::F32(values)
        };
        Ok(HostMatrix { rows: extent.rows, cols: extent.cols, data })
    }
}

/// Reads and writes at an offset; one cursor-free call where the system has one.
mod positioned {
    use std::{fs::File, io};

    #[cfg(unix)]
    pub(super) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }

    #[cfg(unix)]
    pub(super) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
    }

    #[cfg(not(unix))]
    pub(super) fn write_all_at(mut file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        use io::{Seek, Write};
        file.seek(io::SeekFrom::Start(offset))?;
        file.write_all(bytes)
    }

    #[cfg(not(unix))]
    pub(super) fn read_exact_at(mut file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        use io::{Read, Seek};
        file.seek(io::SeekFrom::Start(offset))?;
        file.read_exact(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(value: f32) -> HostActivations {
        let residual = HostMatrix { rows: 3, cols: 2, data: HostData::F32(vec![value; 6]) };
        let input = HostMatrix { rows: 3, cols: 4, data: HostData::Bf16(vec![bf16::ONE; 12]) };
        HostActivations { residual, input: Some(input) }
    }

    #[test]
    fn memory_and_spill_return_what_was_put() {
        let lens = vec![SequenceLens::new(vec![3]), SequenceLens::new(vec![2, 1])];
        let dir = tempfile::tempdir().unwrap();
        let spilled = HiddenStates::spilled(lens.clone(), dir.path(), 2, 4).unwrap();
        for mut store in [HiddenStates::in_memory(lens), spilled] {
            assert_eq!(store.sequences(), 3);
            for index in 0..2 {
                store.put(index, batch(index as f32)).unwrap();
            }
            for index in [1, 0] {
                let back = store.take(index).unwrap();
                assert_eq!(back.residual, batch(index as f32).residual);
                assert_eq!(back.input, batch(0.0).input);
                let error = store.take(index).unwrap_err();
                assert!(matches!(error, HiddenError::Taken { batch } if batch == index));
            }
        }
    }
}

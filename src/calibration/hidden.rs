//! The activations of the whole calibration set between two passes.
//!
//! A pass takes one batch at a time, computes on it and puts it back. Between passes a batch stays on the
//! device while the device has room for it, else in host memory, or in an unnamed temporary file when the
//! caller's budget is too small. Invariant: a batch that was taken must be put back before the next pass.

use std::{fs::File, path::Path};

use half::bf16;

use crate::backend::{BackendError, Fetch, HostData, HostMatrix, SequenceLens, Storage};

/// A matrix between two passes.
#[derive(Debug)]
pub enum Parked<B: Storage> {
    /// Where it was computed.
    Device(B::Matrix),
    /// In host memory.
    Host(HostMatrix),
    /// In host memory, and on its way to the device.
    Coming {
        /// What arrives.
        staged: B::Staged,
        /// What it is.
        host: HostMatrix,
    },
}

impl<B: Storage> Parked<B> {
    /// The matrix on the device.
    ///
    /// # Errors
    /// Out of device memory.
    pub fn onload(self, b: &B) -> Result<B::Matrix, BackendError> {
        match self {
            Self::Device(matrix) => Ok(matrix),
            Self::Host(matrix) => b.onload(matrix),
            Self::Coming { staged, .. } => b.receive(&staged),
        }
    }

    /// A copy on the device.
    ///
    /// # Errors
    /// Out of device memory.
    pub fn copy(&self, b: &B) -> Result<B::Matrix, BackendError> {
        match self {
            Self::Device(matrix) => b.duplicate(matrix),
            Self::Host(matrix) => b.onload(matrix.clone()),
            Self::Coming { staged, .. } => b.receive(staged),
        }
    }

    /// The matrix in host memory.
    ///
    /// # Errors
    /// Device failure.
    pub fn offload(self, b: &B) -> Result<HostMatrix, BackendError> {
        match self {
            Self::Device(matrix) => b.offload(matrix),
            Self::Host(matrix) | Self::Coming { host: matrix, .. } => Ok(matrix),
        }
    }
}

/// Activations of one batch between two passes.
#[derive(Debug)]
pub struct Kept<B: Storage> {
    /// The residual stream `[tokens, hidden]`, f32.
    pub residual: Parked<B>,
    /// Input of the linears at the current capture point, where it was kept.
    pub input: Option<Parked<B>>,
}

impl<B: Storage> Kept<B> {
    /// A residual stream alone, in host memory.
    pub fn on_host(residual: HostMatrix) -> Self {
        Self { residual: Parked::Host(residual), input: None }
    }
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
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A batch was taken twice: a defect of the caller.
    #[error("batch {batch} is not in the store")]
    Taken {
        /// Index of the batch.
        batch: usize,
    },
}

/// The store.
#[derive(Debug)]
pub struct HiddenStates<B: Storage> {
    lens: Vec<SequenceLens>,
    slots: Vec<Option<Slot<B>>>,
    /// Bytes of the device's own memory that activations may still take; `None` where its memory is the
    /// host's.
    room: Option<u64>,
    /// The batch that is leaving the device, of which there is one at a time.
    leaving: Option<usize>,
    spill: Option<Spill>,
}

#[derive(Debug)]
enum Slot<B: Storage> {
    Memory(Kept<B>),
    Leaving { residual: Left<B>, input: Option<Left<B>> },
    Spilled { residual: Extent, input: Option<Extent> },
}

/// A matrix of a batch of which one is on its way to the host.
#[derive(Debug)]
enum Left<B: Storage> {
    Parked(Parked<B>),
    Leaving(Fetch<HostMatrix>),
}

impl<B: Storage> Left<B> {
    fn settle(self) -> Result<Parked<B>, BackendError> {
        match self {
            Self::Parked(parked) => Ok(parked),
            Self::Leaving(fetch) => fetch.wait().map(Parked::Host),
        }
    }
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

impl<B: Storage> HiddenStates<B> {
    /// An empty store for batches with these sequence lengths, kept in memory: `room` bytes of them on
    /// the device, if it has memory of its own.
    pub fn in_memory(lens: Vec<SequenceLens>, room: Option<u64>) -> Self {
        let slots = lens.iter().map(|_| None).collect();
        Self { lens, slots, room, leaving: None, spill: None }
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
        let mut store = Self::in_memory(lens, None);
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
    pub fn take(&mut self, batch: usize) -> Result<Kept<B>, HiddenError> {
        self.settle(batch)?;
        match (self.slots[batch].take(), &self.spill) {
            (Some(Slot::Memory(kept)), _) => {
                let parked = std::iter::once(&kept.residual).chain(&kept.input);
                let given_back: u64 = parked.map(device_bytes).sum();
                self.room = self.room.map(|room| room + given_back);
                Ok(kept)
            }
            (Some(Slot::Spilled { residual, input }), Some(spill)) => Ok(Kept {
                residual: Parked::Host(spill.read(residual)?),
                input: input.map(|extent| spill.read(extent)).transpose()?.map(Parked::Host),
            }),
            _ => Err(HiddenError::Taken { batch }),
        }
    }

    /// Puts a batch back, where there is room for it: the residual stream first. What leaves the device for
    /// the host may be on its way until the next batch is put back.
    ///
    /// # Errors
    /// The spill file cannot be written; device failure.
    pub fn put(&mut self, b: &B, batch: usize, kept: Kept<B>) -> Result<(), HiddenError> {
        self.slots[batch] = Some(match &self.spill {
            None => {
                let residual = self.place(b, kept.residual)?;
                let input = kept.input.map(|input| self.place(b, input)).transpose()?;
                Slot::Leaving { residual, input }
            }
            Some(spill) => {
                let start = batch as u64 * spill.batch_bytes;
                let residual = spill.write(start, &kept.residual.offload(b)?)?;
                let input = kept.input.map(|input| input.offload(b)).transpose()?;
                let input = input
                    .map(|input| spill.write(start + spill.residual_bytes, &input))
                    .transpose()?;
                Slot::Spilled { residual, input }
            }
        });
        if self.room.is_none() { self.settle(batch) } else { self.settle_leaving(Some(batch)) }
    }

    /// Moves batches while the device works on others: begins to bring `next`, those that there are, and waits
    /// for the one that is leaving. To be called when the work is begun; else the device idles until
    /// [`take`](Self::take) and [`put`](Self::put) have done the same.
    ///
    /// # Errors
    /// Device failure.
    pub fn carry(&mut self, b: &B, next: &[usize]) -> Result<(), HiddenError> {
        if self.room.is_none() {
            return Ok(());
        }
        for &batch in next {
            if self.leaving == Some(batch) {
                self.settle_leaving(None)?;
            }
            let Some(Some(Slot::Memory(kept))) = self.slots.get_mut(batch) else { continue };
            for parked in std::iter::once(&mut kept.residual).chain(&mut kept.input) {
                if let Parked::Host(host) = parked {
                    let staged = b.bring(host)?;
                    let empty = HostMatrix { rows: 0, cols: 0, data: HostData::F32(Vec::new()) };
                    *parked = Parked::Coming { staged, host: std::mem::replace(host, empty) };
                }
            }
        }
        self.settle_leaving(None)
    }

    /// Waits for the batch that is leaving the device, after which `next` leaves it.
    fn settle_leaving(&mut self, next: Option<usize>) -> Result<(), HiddenError> {
        match std::mem::replace(&mut self.leaving, next) {
            Some(batch) if Some(batch) != next => self.settle(batch),
            _ => Ok(()),
        }
    }

    /// Waits for a batch that is leaving the device.
    fn settle(&mut self, batch: usize) -> Result<(), HiddenError> {
        let slot = &mut self.slots[batch];
        *slot = match slot.take() {
            Some(Slot::Leaving { residual, input }) => Some(Slot::Memory(Kept {
                residual: residual.settle()?,
                input: input.map(Left::settle).transpose()?,
            })),
            other => other,
        };
        Ok(())
    }

    /// Leaves a matrix on the device, or sends it to the host where it would take more than the room.
    fn place(&mut self, b: &B, parked: Parked<B>) -> Result<Left<B>, HiddenError> {
        let bytes = device_bytes(&parked);
        if let Some(room) = self.room.filter(|room| bytes <= *room) {
            self.room = Some(room - bytes);
            return Ok(Left::Parked(parked));
        }
        Ok(match parked {
            Parked::Device(matrix) => Left::Leaving(b.leave(matrix)?),
            other => Left::Parked(Parked::Host(other.offload(b)?)),
        })
    }
}

/// Bytes that a matrix takes on the device.
fn device_bytes<B: Storage>(parked: &Parked<B>) -> u64 {
    match parked {
        Parked::Device(matrix) => B::bytes(matrix),
        Parked::Host(_) | Parked::Coming { .. } => 0,
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
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::backend::{
        Precision, StoredValues,
        cpu::{Cpu, CpuMatrix, CpuWeight},
    };

    const RESIDUAL: usize = 3 * 2 * 4;

    fn batch(value: f32) -> Kept<Cpu> {
        let residual = HostMatrix { rows: 3, cols: 2, data: HostData::F32(vec![value; 6]) };
        let input = HostMatrix { rows: 3, cols: 4, data: HostData::Bf16(vec![bf16::ONE; 12]) };
        Kept { input: Some(Parked::Host(input)), ..Kept::on_host(residual) }
    }

    fn assert_same(b: &Cpu, found: Kept<Cpu>, expected: Kept<Cpu>) {
        assert_eq!(found.residual.offload(b).unwrap(), expected.residual.offload(b).unwrap());
        let inputs = [found.input, expected.input].map(|input| input.unwrap().offload(b).unwrap());
        assert_eq!(inputs[0], inputs[1]);
    }

    #[test]
    fn memory_and_spill_return_what_was_put() {
        let b = &Cpu::new(Precision::F32, Some(1)).unwrap();
        let lens = vec![SequenceLens::new(vec![3]), SequenceLens::new(vec![2, 1])];
        let dir = tempfile::tempdir().unwrap();
        let spilled = HiddenStates::spilled(lens.clone(), dir.path(), 2, 4).unwrap();
        for mut store in [
            HiddenStates::in_memory(lens.clone(), None),
            HiddenStates::in_memory(lens, Some(0)),
            spilled,
        ] {
            assert_eq!(store.sequences(), 3);
            for index in 0..2 {
                store.put(b, index, batch(index as f32)).unwrap();
            }
            store.carry(b, &[1]).unwrap();
            for index in [1, 0] {
                assert_same(b, store.take(index).unwrap(), batch(index as f32));
                let error = store.take(index).unwrap_err();
                assert!(matches!(error, HiddenError::Taken { batch } if batch == index));
            }
        }
    }

    /// The CPU as a device of its own, which counts what is leaving it.
    #[derive(Debug)]
    struct Device {
        cpu: Cpu,
        leaving: Arc<AtomicUsize>,
        most: AtomicUsize,
    }

    impl Storage for Device {
        type Matrix = CpuMatrix;
        type Weight = CpuWeight;
        type Staged = CpuMatrix;

        fn describe(&self) -> String {
            self.cpu.describe()
        }

        fn upload(
            &self,
            data: &[f32],
            rows: usize,
            cols: usize,
        ) -> Result<CpuMatrix, BackendError> {
            self.cpu.upload(data, rows, cols)
        }

        fn stage(
            &self,
            values: StoredValues<'_>,
            rows: usize,
            cols: usize,
        ) -> Result<CpuMatrix, BackendError> {
            self.cpu.stage(values, rows, cols)
        }

        fn bring(&self, matrix: &HostMatrix) -> Result<CpuMatrix, BackendError> {
            self.cpu.bring(matrix)
        }

        fn receive(&self, staged: &CpuMatrix) -> Result<CpuMatrix, BackendError> {
            self.cpu.receive(staged)
        }

        fn download(&self, matrix: &CpuMatrix) -> Result<Vec<f32>, BackendError> {
            self.cpu.download(matrix)
        }

        fn zeros(&self, rows: usize, cols: usize) -> Result<CpuMatrix, BackendError> {
            self.cpu.zeros(rows, cols)
        }

        fn duplicate(&self, matrix: &CpuMatrix) -> Result<CpuMatrix, BackendError> {
            self.cpu.duplicate(matrix)
        }

        fn shape(&self, matrix: &CpuMatrix) -> (usize, usize) {
            self.cpu.shape(matrix)
        }

        fn bytes(matrix: &CpuMatrix) -> u64 {
            Cpu::bytes(matrix)
        }

        fn offload(&self, matrix: CpuMatrix) -> Result<HostMatrix, BackendError> {
            self.cpu.offload(matrix)
        }

        fn leave(&self, matrix: CpuMatrix) -> Result<Fetch<HostMatrix>, BackendError> {
            let now = self.leaving.fetch_add(1, Ordering::Relaxed) + 1;
            self.most.fetch_max(now, Ordering::Relaxed);
            let (left, leaving) = (self.offload(matrix)?, self.leaving.clone());
            Ok(Fetch::new(move || {
                leaving.fetch_sub(1, Ordering::Relaxed);
                Ok(left)
            }))
        }

        fn onload(&self, matrix: HostMatrix) -> Result<CpuMatrix, BackendError> {
            self.cpu.onload(matrix)
        }

        fn measure_gemm_ceiling(&self) -> Result<f64, BackendError> {
            self.cpu.measure_gemm_ceiling()
        }
    }

    #[test]
    fn one_batch_leaves_the_device_at_a_time_and_the_next_comes() {
        const BATCHES: usize = 5;
        let b = &Device {
            cpu: Cpu::new(Precision::F32, Some(1)).unwrap(),
            leaving: Arc::default(),
            most: AtomicUsize::new(0),
        };
        let residual = |index: usize| HostMatrix {
            rows: 3,
            cols: 2,
            data: HostData::F32(vec![index as f32; 6]),
        };
        let lens = vec![SequenceLens::new(vec![3]); BATCHES];
        let mut store = HiddenStates::in_memory(lens, Some(0));
        let kept = |index| Kept {
            residual: Parked::Device(b.onload(residual(index)).unwrap()),
            input: None,
        };
        for index in 0..BATCHES {
            store.put(b, index, kept(index)).unwrap();
        }
        assert_eq!(b.most.load(Ordering::Relaxed), 2);
        for pass in 0..3 {
            for index in 0..BATCHES {
                let Kept { residual: found, .. } = store.take(index).unwrap();
                let came = matches!(found, Parked::Coming { .. });
                assert_eq!(came, pass < 2 && index > 0, "{pass} {index}");
                // Coming or not, both ways give the same.
                assert_eq!(b.offload(found.copy(b).unwrap()).unwrap(), residual(index));
                assert_eq!(found.offload(b).unwrap(), residual(index));
                if pass < 2 {
                    store.carry(b, &[index + 1]).unwrap();
                    assert_eq!(b.leaving.load(Ordering::Relaxed), 0);
                }
                store.put(b, index, kept(index)).unwrap();
            }
        }
        assert_eq!(b.most.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn what_fits_stays_on_the_device_and_gives_its_room_back() {
        let b = &Cpu::new(Precision::F32, Some(1)).unwrap();
        let lens = vec![SequenceLens::new(vec![3]); 2];
        let mut store = HiddenStates::in_memory(lens, Some(RESIDUAL as u64 + 8));
        let on_device = || {
            let Kept { residual, input } = batch(1.0);
            let device = |parked: Parked<Cpu>| Parked::Device(parked.onload(b).unwrap());
            Kept { residual: device(residual), input: input.map(device) }
        };
        // One residual stream fits; its input, and what comes after, does not.
        for index in 0..2 {
            store.put(b, index, on_device()).unwrap();
        }
        for round in 0..2 {
            let first = store.take(0).unwrap();
            assert!(matches!(first.residual, Parked::Device(_)), "{round}");
            assert!(matches!(first.input, Some(Parked::Host(_))), "{round}");
            assert_same(b, first, batch(1.0));
            store.put(b, 0, on_device()).unwrap();
        }
        let second = store.take(1).unwrap();
        assert!(matches!(second.residual, Parked::Host(_)));
        assert_same(b, second, batch(1.0));
    }
}

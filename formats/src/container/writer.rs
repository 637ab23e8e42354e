//! Writing: frames are appended as they are compressed, and the index comes last.
//!
//! Chunks wait in a queue until there are enough of them for every thread of the executor; they are
//! written in the order of the queue, so the file does not depend on the number of threads.

use std::{
    collections::{HashMap, VecDeque},
    io,
    path::Path,
};

use super::{
    CHUNK_BYTES, ContainerLayout, Executor, FILE_NAME, OriginalFile,
    chunk::{ChunkJob, compress_whole},
    footer,
    header::{self, HEADER_BYTES},
    index::{ChunkEntry, FileEntry, Index, TensorEntry},
    leftover::Leftover,
    pending::{Part, Tensor, check},
    skippable::{self, Kind},
};
use crate::{CheckpointWriter, Component, Digest, FormatError, OutputFile, Result, WrittenFile};

/// Chunks in the queue for each thread before they are compressed together.
const CHUNKS_PER_THREAD: usize = 2;

/// Writes `model.spz`. One tensor is complete before the next is begun.
#[derive(Debug)]
pub struct ContainerWriter {
    file: OutputFile,
    level: i32,
    executor: Box<dyn Executor>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    files: Vec<OriginalFile>,
    /// The tensor that is begun and not complete.
    begun: Option<usize>,
    queue: VecDeque<Queued>,
    /// Bytes of components in the queue.
    waiting: usize,
    /// Where the next frame goes.
    end: u64,
    /// Tensors in file order.
    index: Vec<TensorEntry>,
    /// What an interrupted run left, until something is written.
    left: Option<Leftover>,
}

#[derive(Debug)]
enum Queued {
    Chunk {
        tensor: usize,
        component: usize,
        job: ChunkJob,
    },
    /// All chunks of the tensor stand before this.
    End {
        tensor: usize,
    },
}

impl ContainerWriter {
    /// Begins `model.spz.part` in `dir`. An existing part is an error.
    ///
    /// # Errors
    /// [`FormatError`]: I/O; a level outside [`LEVELS`](super::LEVELS); an encoding that cannot hold its shape; names
    /// that are used twice.
    pub fn create(
        dir: &Path,
        layout: ContainerLayout,
        level: i32,
        executor: Box<dyn Executor>,
    ) -> Result<Box<dyn CheckpointWriter>> {
        let path = dir.join(FILE_NAME);
        let (tensors, by_name) = check(&path, &layout, level)?;
        let file = OutputFile::create(&path, 0)?;
        let header = header::to_bytes();
        if let Err(error) = file.write_at(0, &header) {
            file.abandon()?;
            return Err(error);
        }
        Ok(Box::new(Self::new(file, layout.files, level, executor, tensors, by_name, None)))
    }

    /// Reopens the part of an interrupted run with the same layout. Nothing counts as written until it
    /// is [adopted](CheckpointWriter::adopt); what is not adopted is cut off before anything is
    /// written.
    ///
    /// # Errors
    /// As [`create`](Self::create); a part that is not one of ours.
    pub fn resume(
        dir: &Path,
        layout: ContainerLayout,
        level: i32,
        executor: Box<dyn Executor>,
    ) -> Result<Box<dyn CheckpointWriter>> {
        let path = dir.join(FILE_NAME);
        let (tensors, by_name) = check(&path, &layout, level)?;
        let file = OutputFile::reopen_growing(&path)?;
        let left = Leftover::scan(file.current_path())?;
        Ok(Box::new(Self::new(file, layout.files, level, executor, tensors, by_name, Some(left))))
    }

    fn new(
        file: OutputFile,
        files: Vec<OriginalFile>,
        level: i32,
        executor: Box<dyn Executor>,
        tensors: Vec<Tensor>,
        by_name: HashMap<String, usize>,
        left: Option<Leftover>,
    ) -> Self {
        Self {
            file,
            level,
            executor,
            tensors,
            by_name,
            files,
            begun: None,
            queue: VecDeque::new(),
            waiting: 0,
            end: HEADER_BYTES as u64,
            index: vec![],
            left,
        }
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| FormatError::TensorNotFound {
            path: self.file.path().to_owned(),
            name: name.to_owned(),
        })
    }

    fn invalid(&self, name: &str, what: String) -> FormatError {
        let path = self.file.current_path().to_owned();
        FormatError::InvalidTensor { path, name: name.to_owned(), what }
    }

    fn wrong_length(&self, tensor: usize, component: usize, written: u64) -> FormatError {
        let Tensor { name, encoding, parts, .. } = &self.tensors[tensor];
        let described: &Component = &parts[component].component;
        FormatError::WrongLength {
            path: self.file.current_path().to_owned(),
            name: encoding.component_name(name, described),
            written,
            expected: described.bytes,
        }
    }

    /// Queues the chunks that are full, and the rest of a complete component.
    fn enqueue(&mut self, tensor: usize, component: usize) {
        let level = self.level;
        let part = &mut self.tensors[tensor].parts[component];
        while part.buffer.len() >= CHUNK_BYTES || (part.is_complete() && !part.buffer.is_empty()) {
            let rest = part.buffer.split_off(part.buffer.len().min(CHUNK_BYTES));
            let raw = std::mem::replace(&mut part.buffer, rest);
            self.waiting += raw.len();
            let job = ChunkJob::new(raw, part.component.dtype, level);
            self.queue.push_back(Queued::Chunk { tensor, component, job });
        }
    }

    fn end_if_complete(&mut self, tensor: usize) {
        let complete = self.tensors[tensor].parts.iter().all(Part::is_complete);
        self.begun = (!complete).then_some(tensor);
        if complete {
            self.queue.push_back(Queued::End { tensor });
        }
    }

    /// Compresses and writes the queue.
    fn flush(&mut self) -> Result<()> {
        let mut jobs: Vec<&mut ChunkJob> = self
            .queue
            .iter_mut()
            .filter_map(|queued| match queued {
                Queued::Chunk { job, .. } => Some(job),
                Queued::End { .. } => None,
            })
            .collect();
        self.executor.run(&mut jobs);
        self.waiting = 0;
        // Nothing leaves the queue before it is written, so a full disk can be tried again.
        while let Some(queued) = self.queue.front_mut() {
            match queued {
                Queued::Chunk { tensor, component, job } => {
                    let chunk = job.result().map_err(|error| FormatError::Io {
                        path: self.file.current_path().to_owned(),
                        action: format!("compress a chunk of `{}`", self.tensors[*tensor].name),
                        source: io::Error::new(error.kind(), error.to_string()),
                    })?;
                    let bytes = chunk.frames.concat();
                    self.file.write_at(self.end, &bytes)?;
                    // A frame is hardly longer than its chunk.
                    let frames = chunk.frames.iter().map(|frame| frame.len() as u32).collect();
                    let entry = ChunkEntry { offset: self.end, mask: chunk.mask, frames };
                    self.tensors[*tensor].parts[*component].chunks.push(entry);
                    self.end += bytes.len() as u64;
                }
                Queued::End { tensor } => {
                    let entry = self.tensors[*tensor].entry();
                    let record = entry.to_record(self.file.path())?;
                    let frame = skippable::frame(Kind::Record, &record).ok_or_else(|| {
                        FormatError::Encoding {
                            name: entry.name.clone(),
                            what: format!("its record has {} bytes, too many", record.len()),
                        }
                    })?;
                    self.file.write_at(self.end, &frame)?;
                    self.end += frame.len() as u64;
                    self.index.push(entry);
                }
            }
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Ends adopting: cuts off what was not adopted, and goes on behind the rest.
    fn settle(&mut self) -> Result<()> {
        if let Some(left) = &self.left {
            let (adopted, end) = left.settle(&self.file)?;
            self.file.truncate(end)?;
            (self.index, self.end, self.left) = (adopted, end, None);
        }
        Ok(())
    }

    /// Writes the starts of the files that can be restored.
    fn write_files(&mut self) -> Result<Vec<FileEntry>> {
        let mut entries = vec![];
        for file in &self.files {
            let io = |source| FormatError::Io {
                path: self.file.current_path().to_owned(),
                action: format!("compress the start of `{}`", file.name),
                source,
            };
            let frame = compress_whole(&file.head, self.level).map_err(io)?;
            self.file.write_at(self.end, &frame)?;
            entries.push(FileEntry {
                name: file.name.clone(),
                bytes: file.bytes,
                head: file.head.len() as u64,
                sha256: Digest::of(&file.head),
                offset: self.end,
                frame: frame.len() as u64,
            });
            self.end += frame.len() as u64;
        }
        Ok(entries)
    }
}

impl CheckpointWriter for ContainerWriter {
    fn write(&mut self, name: &str, component: usize, chunk: &[u8]) -> Result<()> {
        let tensor = self.position(name)?;
        let count = self.tensors[tensor].parts.len();
        let Some(part) = self.tensors[tensor].parts.get(component) else {
            return Err(self.invalid(
                name,
                format!("has {count} components, but component {component} was written"),
            ));
        };
        let written = part.written.saturating_add(chunk.len() as u64);
        if written > part.component.bytes {
            return Err(self.wrong_length(tensor, component, written));
        }
        if let Some(begun) = self.begun.filter(|&begun| begun != tensor) {
            let begun = &self.tensors[begun].name;
            return Err(self.invalid(name, format!("cannot be begun before `{begun}` is complete")));
        }
        self.settle()?;
        if chunk.is_empty() {
            return Ok(());
        }
        self.tensors[tensor].parts[component].take(chunk);
        self.enqueue(tensor, component);
        self.end_if_complete(tensor);
        if self.waiting >= CHUNKS_PER_THREAD * CHUNK_BYTES * self.executor.threads().max(1) {
            self.flush()?;
        }
        Ok(())
    }

    fn digests(&mut self, name: &str) -> Result<Vec<Digest>> {
        let tensor = self.position(name)?;
        let parts = self.tensors[tensor].parts.iter().enumerate();
        parts
            .map(|(component, part)| {
                part.digest.ok_or_else(|| self.wrong_length(tensor, component, part.written))
            })
            .collect()
    }

    fn adopt(&mut self, name: &str, digests: &[Digest]) -> Result<()> {
        let position = self.position(name)?;
        let Some(left) = &mut self.left else {
            let what = "cannot be adopted: this run has begun to write".to_owned();
            return Err(self.invalid(name, what));
        };
        let tensor = &mut self.tensors[position];
        left.adopt(&self.file, tensor, digests)?;
        for (part, digest) in tensor.parts.iter_mut().zip(digests) {
            part.written = part.component.bytes;
            part.digest = Some(*digest);
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.flush()?;
        self.file.sync()
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<WrittenFile>> {
        for (tensor, described) in self.tensors.iter().enumerate() {
            let missing = described.parts.iter().position(|part| part.digest.is_none());
            if let Some(component) = missing {
                let written = described.parts[component].written;
                return Err(self.wrong_length(tensor, component, written));
            }
        }
        self.settle()?;
        self.end_empty_tensors();
        self.flush()?;
        let files = self.write_files()?;
        let tensors = std::mem::take(&mut self.index);
        let index = Index { chunk_bytes: CHUNK_BYTES as u64, tensors, files };
        let footer = footer::to_bytes(self.file.path(), &index)?;
        self.file.write_at(self.end, &footer)?;
        let bytes = self.end + footer.len() as u64;
        // A part that was left may be longer.
        self.file.truncate(bytes)?;
        let path = self.file.path().to_owned();
        self.file.finish()?;
        OutputFile::sync_directory(path.parent().unwrap_or(Path::new("")))?;
        Ok(vec![WrittenFile { path, bytes }])
    }

    fn abandon(self: Box<Self>) -> Result<()> {
        self.file.abandon()
    }
}

impl ContainerWriter {
    /// Tensors without bytes are complete from the start, and nobody writes to them.
    fn end_empty_tensors(&mut self) {
        for (tensor, described) in self.tensors.iter().enumerate() {
            let there = self.index.iter().any(|entry| entry.name == described.name);
            if described.is_empty() && !there {
                self.queue.push_back(Queued::End { tensor });
            }
        }
    }
}

//! Encodes finished tensors and hands them to a writer thread, which hashes and writes behind.
//!
//! The channel is bounded, so a slow disk slows the conversion down instead of filling memory.

use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
};

use sparsepack_formats::{CheckpointWriter, Digest, WrittenFile};

use super::error::{PipelineError, Result};

/// Pieces that may wait for the writer at a time.
const QUEUE: usize = 16;

enum Job {
    Write { name: String, component: usize, bytes: Vec<u8> },
    Sync { names: Vec<String>, reply: SyncSender<Result<Vec<Vec<Digest>>>> },
}

/// The sending side of the writer thread.
#[derive(Debug)]
pub(super) struct Packer {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<Result<Box<dyn CheckpointWriter>>>>,
}

impl Packer {
    /// Starts the thread.
    pub(super) fn start(writer: Box<dyn CheckpointWriter>) -> Self {
        let (jobs, queue) = sync_channel(QUEUE);
        let thread = std::thread::spawn(move || write_behind(writer, &queue));
        Self { jobs: Some(jobs), thread: Some(thread) }
    }

    /// Appends bytes to a component of a tensor.
    ///
    /// # Errors
    /// The writer has failed; its own error is returned.
    pub(super) fn write(&mut self, name: &str, component: usize, bytes: Vec<u8>) -> Result<()> {
        self.send(Job::Write { name: name.to_owned(), component, bytes })
    }

    /// Waits until everything sent so far is on disk and returns the component digests of `names`.
    ///
    /// # Errors
    /// The writer has failed, or a tensor is not complete.
    pub(super) fn sync(&mut self, names: Vec<String>) -> Result<Vec<Vec<Digest>>> {
        let (reply, answer) = sync_channel(1);
        self.send(Job::Sync { names, reply })?;
        match answer.recv() {
            Ok(result) => result,
            Err(_) => Err(self.failure()),
        }
    }

    /// Waits for the thread, completes the files and moves them into place.
    ///
    /// # Errors
    /// The writer has failed; a tensor is missing.
    pub(super) fn finish(mut self) -> Result<Vec<WrittenFile>> {
        Ok(self.join()?.finish()?)
    }

    fn send(&mut self, job: Job) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if sent { Ok(()) } else { Err(self.failure()) }
    }

    fn failure(&mut self) -> PipelineError {
        match self.join() {
            Err(error) => error,
            Ok(_) => PipelineError::Thread { name: "writer" },
        }
    }

    fn join(&mut self) -> Result<Box<dyn CheckpointWriter>> {
        self.jobs = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Err(PipelineError::Thread { name: "writer" }),
        }
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        // The thread ends when the channel closes; its result no longer matters.
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_behind(
    mut writer: Box<dyn CheckpointWriter>,
    queue: &Receiver<Job>,
) -> Result<Box<dyn CheckpointWriter>> {
    while let Ok(job) = queue.recv() {
        match job {
            Job::Write { name, component, bytes } => writer.write(&name, component, &bytes)?,
            Job::Sync { names, reply } => {
                let digests = writer
                    .sync()
                    .and_then(|()| names.iter().map(|name| writer.digests(name)).collect());
                // A caller that no longer listens has failed itself.
                let _ = reply.send(digests.map_err(PipelineError::from));
            }
        }
    }
    Ok(writer)
}

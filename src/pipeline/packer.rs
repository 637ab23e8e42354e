//! Hands finished tensors to a writer thread, which encodes, hashes and writes behind.
//!
//! Both the channel and the bytes of what waits to be encoded are bounded, so a slow disk slows the
//! conversion down instead of filling memory.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use sparsepack_formats::{CheckpointWriter, Digest, WrittenFile};

use super::{
    error::{PipelineError, Result},
    stored::Packing,
};

/// Pieces that may wait for the writer at a time.
const QUEUE: usize = 16;

enum Job {
    Write { name: String, component: usize, bytes: Vec<u8> },
    Pack { name: String, bytes: u64, packing: Packing },
    Sync { names: Vec<String>, reply: SyncSender<Result<Vec<Vec<Digest>>>> },
}

/// The sending side of the writer thread.
#[derive(Debug)]
pub(super) struct Packer {
    jobs: Option<SyncSender<Job>>,
    room: Arc<Room>,
    thread: Option<JoinHandle<Result<Box<dyn CheckpointWriter>>>>,
}

impl Packer {
    /// Starts the thread. At most `behind` bytes wait to be encoded, or one tensor.
    pub(super) fn start(writer: Box<dyn CheckpointWriter>, behind: u64) -> Self {
        let (jobs, queue) = sync_channel(QUEUE);
        let room =
            Arc::new(Room { behind, taken: Mutex::new(Some(0)), given_back: Condvar::new() });
        let open = Open(room.clone());
        let thread = std::thread::spawn(move || write_behind(writer, &queue, &open));
        Self { jobs: Some(jobs), room, thread: Some(thread) }
    }

    /// Has a whole tensor encoded and written, which holds `bytes` bytes until then.
    ///
    /// # Errors
    /// The writer has failed, perhaps at encoding an earlier tensor; its own error is returned.
    pub(super) fn pack(&mut self, name: &str, bytes: u64, packing: Packing) -> Result<()> {
        self.room.take(bytes);
        self.send(Job::Pack { name: name.to_owned(), bytes, packing })
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

/// Bytes that may wait to be encoded.
#[derive(Debug)]
struct Room {
    behind: u64,
    /// Bytes that wait; `None` once nobody takes them any more.
    taken: Mutex<Option<u64>>,
    given_back: Condvar,
}

impl Room {
    /// Waits for room, unless nothing else is waiting or the thread has ended.
    fn take(&self, bytes: u64) {
        let full = |taken: &mut Option<u64>| {
            taken.is_some_and(|taken| taken > 0 && taken.saturating_add(bytes) > self.behind)
        };
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.given_back.wait_while(taken, full);
        let mut taken = waited.unwrap_or_else(PoisonError::into_inner);
        *taken = taken.map(|taken| taken.saturating_add(bytes));
    }

    fn give_back(&self, bytes: u64) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = taken.map(|taken| taken.saturating_sub(bytes));
        self.given_back.notify_all();
    }
}

/// The thread's side of a [`Room`]: closes it however the thread ends.
struct Open(Arc<Room>);

impl Drop for Open {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.0.given_back.notify_all();
    }
}

fn write_behind(
    mut writer: Box<dyn CheckpointWriter>,
    queue: &Receiver<Job>,
    Open(room): &Open,
) -> Result<Box<dyn CheckpointWriter>> {
    while let Ok(job) = queue.recv() {
        match job {
            Job::Write { name, component, bytes } => writer.write(&name, component, &bytes)?,
            Job::Pack { name, bytes, packing } => {
                let parts = packing().map_err(|error| match error {
                    PipelineError::Backend(source) => {
                        PipelineError::Fetch { name: name.clone(), source }
                    }
                    other => other,
                })?;
                room.give_back(bytes);
                for (component, part) in parts.into_iter().enumerate() {
                    writer.write(&name, component, &part)?;
                }
            }
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

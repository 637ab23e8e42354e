//! Output files that appear under their final name only when complete.
//!
//! Bytes go to `NAME.part`; [`OutputFile::finish`] syncs it and renames it. Whatever interrupts a run
//! therefore leaves `*.part` files and nothing that could be taken for a result.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use crate::{FormatError, Result};

/// A file being written as `NAME.part`.
#[derive(Debug)]
pub struct OutputFile {
    file: File,
    path: PathBuf,
    part: PathBuf,
    bytes: u64,
    /// An earlier run got as far as the rename.
    renamed: bool,
}

impl OutputFile {
    /// Creates `path` + `.part` with its full size, so that a file system that cannot hold a file of
    /// that size refuses it now.
    ///
    /// # Errors
    /// [`FormatError::Io`], also when the part already exists.
    pub fn create(path: &Path, bytes: u64) -> Result<Self> {
        let part = part_path(path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&part)
            .map_err(io_error(&part, "create"))?;
        let output = Self { file, path: path.to_owned(), part, bytes, renamed: false };
        if let Err(source) = output.file.set_len(bytes) {
            let error = output.error(format!("set the size to {bytes} bytes"))(source);
            output.abandon()?;
            return Err(error);
        }
        Ok(output)
    }

    /// Opens the part that an interrupted run left, or the finished file if that run had already
    /// renamed it. The size must be `bytes`.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::InvalidHeader`] for another size.
    pub fn reopen(path: &Path, bytes: u64) -> Result<Self> {
        let part = part_path(path);
        let (file, renamed) = match OpenOptions::new().read(true).write(true).open(&part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_file() => {
                (File::open(path).map_err(io_error(path, "open"))?, true)
            }
            opened => (opened.map_err(io_error(&part, "open"))?, false),
        };
        let output = Self { file, path: path.to_owned(), part, bytes, renamed };
        let found = output.file.metadata().map_err(output.error("read the size"))?.len();
        if found != bytes {
            return Err(FormatError::InvalidHeader {
                path: output.current_path().to_owned(),
                offset: 0,
                what: format!("the file has {found} bytes, but the layout needs {bytes}"),
            });
        }
        Ok(output)
    }

    /// Opens the part that an interrupted run left, of whatever size. A finished file that the run had
    /// already renamed becomes the part again.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn reopen_growing(path: &Path) -> Result<Self> {
        let part = part_path(path);
        if !part.exists() && path.is_file() {
            std::fs::rename(path, &part)
                .map_err(io_error(path, format!("rename to {}", part.display())))?;
        }
        let opened = OpenOptions::new().read(true).write(true).open(&part);
        let file = opened.map_err(io_error(&part, "open"))?;
        let bytes = file.metadata().map_err(io_error(&part, "read the size"))?.len();
        Ok(Self { file, path: path.to_owned(), part, bytes, renamed: false })
    }

    /// Cuts the file off, or extends it, at `bytes`.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn truncate(&mut self, bytes: u64) -> Result<()> {
        let action = format!("set the size to {bytes} bytes");
        self.file.set_len(bytes).map_err(|source| self.error(action)(source))?;
        self.bytes = bytes;
        Ok(())
    }

    /// The final path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The full size, as given or last [set](Self::truncate).
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where the bytes are now: the part, or the final path once renamed.
    pub fn current_path(&self) -> &Path {
        if self.renamed { &self.path } else { &self.part }
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// [`FormatError::Io`]; a finished file is not written to again.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let action = || format!("write {} bytes at offset {offset}", bytes.len());
        if self.renamed {
            return Err(self.error(action())(io::Error::other("the file is already finished")));
        }
        write_all_at(&self.file, bytes, offset).map_err(|source| self.error(action())(source))
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let len = buffer.len();
        read_exact_at(&self.file, buffer, offset)
            .map_err(|source| self.error(format!("read {len} bytes at offset {offset}"))(source))
    }

    /// Waits until the bytes written so far are on disk.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn sync(&self) -> Result<()> {
        if self.renamed {
            return Ok(());
        }
        self.file.sync_all().map_err(self.error("flush to disk"))
    }

    /// Syncs and gives the file its final name. The directory is the caller's to sync, once for all
    /// its files: [`sync_directory`](Self::sync_directory).
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn finish(self) -> Result<()> {
        self.sync()?;
        self.rename()
    }

    /// Renames the part without syncing it.
    pub(crate) fn rename(self) -> Result<()> {
        if self.renamed {
            return Ok(());
        }
        std::fs::rename(&self.part, &self.path)
            .map_err(self.error(format!("rename to {}", self.path.display())))
    }

    /// Removes the part.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn abandon(self) -> Result<()> {
        if self.renamed {
            return Ok(());
        }
        std::fs::remove_file(&self.part).map_err(self.error("remove"))
    }

    /// Writes a small file whole, through `NAME.part`, sync and rename; replaces an existing one.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
        let part = part_path(path);
        let file = File::create(&part).map_err(io_error(&part, "create"))?;
        let output =
            Self { file, path: path.to_owned(), part, bytes: bytes.len() as u64, renamed: false };
        output.write_at(0, bytes)?;
        output.finish()
    }

    /// Waits until the names in `directory` are on disk, after renames.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn sync_directory(directory: &Path) -> Result<()> {
        // Elsewhere a directory cannot be opened as a file, and renames are durable on their own.
        #[cfg(unix)]
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io_error(directory, "flush to disk"))?;
        #[cfg(not(unix))]
        let _ = directory;
        Ok(())
    }

    fn error<A: Into<String>>(&self, action: A) -> impl FnOnce(io::Error) -> FormatError + use<A> {
        io_error(self.current_path(), action)
    }
}

/// Wraps a system error with the file and what was attempted.
pub(crate) fn io_error<A: Into<String>>(
    path: &Path,
    action: A,
) -> impl FnOnce(io::Error) -> FormatError + use<A> {
    let (path, action) = (path.to_owned(), action.into());
    move |source| FormatError::Io { path, action, source }
}

fn part_path(path: &Path) -> PathBuf {
    let mut part = OsString::from(path);
    part.push(".part");
    part.into()
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(not(unix))]
fn write_all_at(mut file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use io::{Seek, Write};
    file.seek(io::SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    use io::{Read, Seek};
    file.seek(io::SeekFrom::Start(offset))?;
    file.read_exact(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn only_finish_gives_the_final_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.bin");
        let output = OutputFile::create(&path, 4).unwrap();
        output.write_at(2, b"cd").unwrap();
        assert_eq!(names(directory.path()), ["a.bin.part"]);
        let error = OutputFile::create(&path, 4).unwrap_err();
        assert_eq!(error.to_string(), format!("{}.part: cannot create", path.display()));
        drop(output);

        let output = OutputFile::reopen(&path, 4).unwrap();
        output.write_at(0, b"ab").unwrap();
        output.finish().unwrap();
        assert_eq!(names(directory.path()), ["a.bin"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"abcd");

        // A run interrupted after the rename finds its file finished and leaves it alone.
        let output = OutputFile::reopen(&path, 4).unwrap();
        let mut buffer = [0; 2];
        output.read_at(1, &mut buffer).unwrap();
        assert_eq!(&buffer, b"bc");
        let error = output.write_at(0, b"xy").unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{}: cannot write 2 bytes at offset 0", path.display())
        );
        output.finish().unwrap();
        let error = OutputFile::reopen(&path, 5).unwrap_err();
        assert!(error.to_string().ends_with("the file has 4 bytes, but the layout needs 5"));
    }

    #[test]
    fn abandon_removes_the_part_and_write_whole_replaces() {
        let directory = tempfile::tempdir().unwrap();
        OutputFile::create(&directory.path().join("a"), 1).unwrap().abandon().unwrap();
        assert!(names(directory.path()).is_empty());
        let path = directory.path().join("b.json");
        OutputFile::write_whole(&path, b"old and long").unwrap();
        OutputFile::write_whole(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names(directory.path()), ["b.json"]);
        OutputFile::sync_directory(directory.path()).unwrap();
    }
}

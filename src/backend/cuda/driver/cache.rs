//! Compiled kernels on disk, so that the next run need not compile them.
//!
//! A file is named by the sha256 of all that the compiler was given, in hexadecimal:
//!
//! | bytes | what |
//! |---|---|
//! | 32 | sha256 of the key and the code |
//! | rest | the machine code |
//!
//! What is read runs on the GPU, so it must be this user's: a directory or a file that somebody else owns or
//! may write to is not used. Nothing here is an error: what cannot be read is compiled, what cannot be
//! written is compiled again by the next run. Files are complete before they have their name, so any number
//! of processes may use a directory.

use std::{
    ffi::OsString,
    fs::{DirBuilder, File, Metadata, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use etcetera::BaseStrategy as _;
use rustix::fs::OFlags;
use sparsepack_formats::Digest;

/// Names the directory, or [`OFF`].
const VARIABLE: &str = "SPARSEPACK_KERNEL_CACHE";
const OFF: &str = "off";

/// Far more bytes than the kernels of a file compile to.
const MOST_BYTES: u64 = 1 << 28;

/// A directory of compiled kernels.
#[derive(Debug)]
pub(super) struct Cache {
    directory: PathBuf,
}

/// Why something on disk is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it belongs to another user")]
    Foreign,
    #[error("others may write to it; mode {0:o}")]
    Exposed(u32),
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is damaged")]
    Damaged,
}

impl Cache {
    /// The directory that `$SPARSEPACK_KERNEL_CACHE` names, else one in the user's cache directory; none if
    /// it says `off` or the directory cannot be used. It is made if it is not there.
    pub(super) fn of_user() -> Option<Self> {
        // Unit tests leave the user's files alone.
        if cfg!(test) { None } else { Self::open(directory(std::env::var_os(VARIABLE))?) }
    }

    fn open(directory: PathBuf) -> Option<Self> {
        let shown = directory.display();
        if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(&directory) {
            tracing::debug!("compiled kernels are not kept: {shown} cannot be made: {error}");
            return None;
        }
        let checked = directory.metadata().map_err(Unusable::from);
        match checked.and_then(|metadata| check_owner(&metadata, this_user())) {
            Ok(()) => Some(Self { directory }),
            Err(reason) => {
                tracing::warn!("compiled kernels are not kept: {shown} is not used: {reason}");
                None
            }
        }
    }

    fn path(&self, key: &Digest) -> PathBuf {
        self.directory.join(key.to_string())
    }

    /// The code that was put under this key; none if there is none that can be trusted.
    pub(super) fn get(&self, key: &Digest) -> Option<Vec<u8>> {
        let path = self.path(key);
        match read(&path, key) {
            Ok(code) => Some(code),
            Err(Unusable::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(reason) => {
                let shown = path.display();
                tracing::warn!("{shown} is not used, its kernels are compiled again: {reason}");
                None
            }
        }
    }

    /// Keeps code under this key, over what may be there.
    pub(super) fn put(&self, key: &Digest, code: &[u8]) {
        if let Err(error) = self.write(key, code) {
            let shown = self.directory.display();
            tracing::debug!("compiled kernels are not kept: {shown} cannot be written: {error}");
        }
    }

    fn write(&self, key: &Digest, code: &[u8]) -> io::Result<()> {
        let mut part = tempfile::Builder::new().suffix(".part").tempfile_in(&self.directory)?;
        part.write_all(seal(key, code).as_bytes())?;
        part.write_all(code)?;
        part.persist(self.path(key))?;
        Ok(())
    }
}

/// The directory that the variable's value means.
fn directory(variable: Option<OsString>) -> Option<PathBuf> {
    match variable {
        Some(value) if value == OFF => None,
        Some(value) if !value.is_empty() => Some(value.into()),
        _ => match etcetera::choose_base_strategy() {
            Ok(base) => Some(base.cache_dir().join("sparsepack/kernels")),
            Err(error) => {
                tracing::debug!("compiled kernels are not kept: {error}");
                None
            }
        },
    }
}

/// Binds code to its key: a file under another's name is as bad as a damaged one.
fn seal(key: &Digest, code: &[u8]) -> Digest {
    Digest::of_parts([key.as_bytes().as_slice(), code])
}

fn read(path: &Path, key: &Digest) -> Result<Vec<u8>, Unusable> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Unusable::NotAFile);
    }
    check_owner(&metadata, this_user())?;
    unseal(&file, key)
}

fn unseal(file: &File, key: &Digest) -> Result<Vec<u8>, Unusable> {
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes)?;
    let (found, code) = bytes.split_first_chunk::<32>().ok_or(Unusable::Damaged)?;
    if found != seal(key, code).as_bytes() {
        return Err(Unusable::Damaged);
    }
    Ok(code.to_vec())
}

fn this_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Refuses what a user other than `user` owns or may write to.
fn check_owner(metadata: &Metadata, user: u32) -> Result<(), Unusable> {
    match (metadata.uid() == user, metadata.mode() & 0o7777) {
        (false, _) => Err(Unusable::Foreign),
        (true, mode) if mode & 0o022 != 0 => Err(Unusable::Exposed(mode)),
        (true, _) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::PermissionsExt as _,
    };

    use super::*;

    const CODE: &[u8] = b"machine code";

    /// A cache that is not there yet, and what holds it.
    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("sparsepack/kernels")).unwrap();
        (dir, cache)
    }

    fn key(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    fn names(cache: &Cache) -> Vec<String> {
        let entries = fs::read_dir(&cache.directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn why(path: &Path, key: &Digest) -> String {
        read(path, key).unwrap_err().to_string()
    }

    #[test]
    fn what_was_put_is_found_under_its_key_alone() {
        let (_dir, cache) = cache();
        assert_eq!(cache.get(&key("text")), None);
        cache.put(&key("text"), CODE);
        assert_eq!(cache.get(&key("text")).as_deref(), Some(CODE));
        assert_eq!(cache.get(&key("another text")), None);
        assert_eq!(names(&cache), [key("text").to_string()]);
        cache.put(&key("text"), b"newer");
        assert_eq!(cache.get(&key("text")).as_deref(), Some(b"newer".as_slice()));
        assert_eq!(names(&cache).len(), 1);
    }

    #[test]
    fn only_the_user_may_read_what_is_made() {
        let (dir, cache) = cache();
        cache.put(&key("text"), CODE);
        assert_eq!(mode(&dir.path().join("sparsepack")), 0o700);
        assert_eq!(mode(&cache.directory), 0o700);
        assert_eq!(mode(&cache.path(&key("text"))), 0o600);
    }

    #[test]
    fn damaged_files_are_not_used_and_replaced() {
        let (_dir, cache) = cache();
        let key = key("text");
        let path = cache.path(&key);
        cache.put(&key, CODE);
        let whole = fs::read(&path).unwrap();
        let flipped = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        };
        let cut = whole[..whole.len() - 1].to_vec();
        let longer = [whole.as_slice(), b"\0"].concat();
        for bytes in [flipped(0), flipped(40), cut, longer, whole[..31].to_vec(), Vec::new()] {
            fs::write(&path, &bytes).unwrap();
            assert_eq!(why(&path, &key), "it is damaged", "{bytes:?}");
            assert_eq!(cache.get(&key), None);
        }
        cache.put(&key, CODE);
        assert_eq!(cache.get(&key).as_deref(), Some(CODE));
    }

    #[test]
    fn a_file_under_the_name_of_another_is_not_used() {
        let (_dir, cache) = cache();
        cache.put(&key("text"), CODE);
        let other = key("another text");
        fs::rename(cache.path(&key("text")), cache.path(&other)).unwrap();
        assert_eq!(why(&cache.path(&other), &other), "it is damaged");
    }

    #[test]
    fn files_that_others_may_write_to_are_not_used() {
        let (_dir, cache) = cache();
        let key = key("text");
        let path = cache.path(&key);
        cache.put(&key, CODE);
        for (exposed, shown) in [(0o620, "620"), (0o602, "602")] {
            set_mode(&path, exposed);
            assert_eq!(why(&path, &key), format!("others may write to it; mode {shown}"));
            assert_eq!(cache.get(&key), None);
        }
        set_mode(&path, 0o644);
        assert_eq!(cache.get(&key).as_deref(), Some(CODE));
    }

    #[test]
    fn what_is_not_a_file_is_not_used() {
        let (dir, cache) = cache();
        let key = key("text");
        let path = cache.path(&key);
        fs::create_dir(&path).unwrap();
        assert_eq!(why(&path, &key), "it is not a regular file");
        fs::remove_dir(&path).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        cache.put(&key, CODE);
        fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert_eq!(cache.get(&key), None);
        cache.put(&key, CODE);
        assert!(path.symlink_metadata().unwrap().is_file());
        assert_eq!(cache.get(&key).as_deref(), Some(CODE));
    }

    #[test]
    fn directories_that_others_may_write_to_are_not_used() {
        let (dir, cache) = cache();
        for exposed in [0o770, 0o1777] {
            set_mode(&cache.directory, exposed);
            assert!(Cache::open(cache.directory.clone()).is_none(), "{exposed:o}");
        }
        set_mode(&cache.directory, 0o755);
        assert!(Cache::open(cache.directory.clone()).is_some());
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(Cache::open(dir.path().join("file/kernels")).is_none());
    }

    #[test]
    fn what_another_user_owns_is_not_used() {
        let (dir, _cache) = cache();
        let metadata = dir.path().metadata().unwrap();
        assert!(check_owner(&metadata, this_user()).is_ok());
        let error = check_owner(&metadata, this_user() + 1).unwrap_err();
        assert_eq!(error.to_string(), "it belongs to another user");
    }

    #[test]
    fn several_may_write_and_read_at_a_time() {
        let (_dir, cache) = cache();
        let code = vec![7; 1 << 16];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        cache.put(&key("text"), &code);
                        assert_eq!(cache.get(&key("text")).as_ref(), Some(&code));
                    }
                });
            }
        });
        assert_eq!(names(&cache).len(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_no_error() {
        let (dir, cache) = cache();
        fs::remove_dir_all(dir.path()).unwrap();
        cache.put(&key("text"), CODE);
        assert_eq!(cache.get(&key("text")), None);
        assert!(!cache.directory.exists());
    }

    #[test]
    fn the_variable_names_the_directory_or_turns_the_cache_off() {
        assert_eq!(directory(Some("off".into())), None);
        assert_eq!(directory(Some("/somewhere".into())), Some("/somewhere".into()));
        let of_user = directory(None).unwrap();
        assert!(of_user.ends_with("sparsepack/kernels"), "{}", of_user.display());
        assert_eq!(directory(Some("".into())), Some(of_user));
    }
}

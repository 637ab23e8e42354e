//! Machine code of the kernels: compiled for the device, or what an earlier run compiled.

use std::{
    ffi::{CString, c_char, c_int},
    sync::OnceLock,
    time::Instant,
};

use cudarc::nvrtc::{
    result::{self, NvrtcError},
    sys,
};
use sparsepack_formats::Digest;

use super::{cache::Cache, kernels::KernelFile};
use crate::backend::{BackendError, Result};

const PRELUDE: &str = include_str!("../kernels/prelude.cuh");

/// Compiles for one architecture.
#[derive(Debug)]
pub(super) struct Compiler {
    arch: (i32, i32),
    /// Opened when something is compiled first.
    cache: OnceLock<Option<Cache>>,
}

/// What the compiler is given.
struct Program {
    file: KernelFile,
    text: String,
    options: Vec<String>,
}

impl Compiler {
    pub(super) fn new(arch: (i32, i32)) -> Self {
        Self { arch, cache: OnceLock::new() }
    }

    /// The code of a file of kernels, or of the one instance of them that is meant.
    ///
    /// It is machine code for just this architecture, since PTX of a newer compiler than the driver's would
    /// be refused.
    pub(super) fn code(&self, file: KernelFile, instance: Option<u32>) -> Result<Vec<u8>> {
        let program = Program::new(file, instance, self.arch);
        let cache = self.cache.get_or_init(Cache::of_user).as_ref();
        let Some(cache) = cache else { return program.compile() };
        let key = program.key(version(file)?);
        if let Some(code) = cache.get(&key) {
            tracing::debug!("{} was compiled before", program.describe());
            return Ok(code);
        }
        let code = program.compile()?;
        cache.put(&key, &code);
        Ok(code)
    }
}

impl Program {
    fn new(file: KernelFile, instance: Option<u32>, (major, minor): (i32, i32)) -> Self {
        let text = format!("{PRELUDE}\n#line 1 \"{}\"\n{}", file.name(), file.text());
        let mut options =
            vec![format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".to_owned()];
        options.extend(instance.map(|instance| format!("-DINSTANCE={instance}")));
        Self { file, text, options }
    }

    /// File and options, in words.
    fn describe(&self) -> String {
        format!("{} {}", self.file.name(), self.options.join(" "))
    }

    /// Names what this program compiles to with this version of the compiler. The architecture is one of the
    /// options.
    fn key(&self, version: (c_int, c_int)) -> Digest {
        let version = format!("NVRTC {}.{}", version.0, version.1);
        let parts = [version.as_str(), self.file.name(), self.text.as_str()];
        let parts: Vec<&[u8]> = parts
            .into_iter()
            .chain(self.options.iter().map(String::as_str))
            .map(str::as_bytes)
            .collect();
        // With its length before it, no part runs into the next.
        let lengths: Vec<[u8; 8]> =
            parts.iter().map(|part| (part.len() as u64).to_le_bytes()).collect();
        let both = lengths.iter().zip(&parts);
        Digest::of_parts(both.flat_map(|(length, part)| [length.as_slice(), part]))
    }

    fn compile(&self) -> Result<Vec<u8>> {
        let start = Instant::now();
        let failed = |log: String| BackendError::Kernels { file: self.file.name(), log };
        let text = CString::new(self.text.as_str()).map_err(|error| failed(error.to_string()))?;
        let name = CString::new(self.file.name()).map_err(|error| failed(error.to_string()))?;
        let program = result::create_program(&text, Some(&name))
            .map_err(|error| failed(format!("{error:?}")))?;
        // SAFETY: the program was made above and is destroyed once, below, after the last use; the image
        // has the size that the library asks for.
        let outcome = unsafe {
            let compiled = result::compile_program(program, &self.options);
            let outcome = compiled.and_then(|()| {
                let mut size = 0;
                sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
                let mut image = vec![0u8; size];
                sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()).result()?;
                Ok(image)
            });
            let outcome = outcome.map_err(|error| {
                let log = result::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.iter().map(|&byte| byte as u8).collect();
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
                failed(format!("{error:?}\n{log}"))
            });
            result::destroy_program(program).map_err(|error| failed(format!("{error:?}")))?;
            outcome
        };
        tracing::debug!("compiled {} in {:.1?}", self.describe(), start.elapsed());
        outcome
    }
}

/// The compiler's version, major and minor.
fn version(file: KernelFile) -> Result<(c_int, c_int)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are to live values of the type that the call writes.
    let asked = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor).result() };
    let failed = |error: NvrtcError| BackendError::Kernels {
        file: file.name(),
        log: format!("no version: {error:?}"),
    };
    asked.map_err(failed)?;
    Ok((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_the_compiler_is_given_is_in_the_key() {
        let key = |file, instance, arch, version| Program::new(file, instance, arch).key(version);
        let usual = key(KernelFile::Norm, None, (9, 0), (13, 0));
        assert_eq!(usual, key(KernelFile::Norm, None, (9, 0), (13, 0)));
        for other in [
            key(KernelFile::Rope, None, (9, 0), (13, 0)),
            key(KernelFile::Norm, Some(64), (9, 0), (13, 0)),
            key(KernelFile::Norm, None, (8, 0), (13, 0)),
            key(KernelFile::Norm, None, (9, 0), (13, 1)),
            key(KernelFile::Norm, None, (9, 0), (12, 0)),
        ] {
            assert_ne!(usual, other);
        }
        let mut changed = Program::new(KernelFile::Norm, None, (9, 0));
        changed.text.push(' ');
        assert_ne!(usual, changed.key((13, 0)));
        // What moves from one option to the next is another program.
        let with = |options: [&str; 2]| {
            let options = options.map(str::to_owned).to_vec();
            Program { options, ..Program::new(KernelFile::Norm, None, (9, 0)) }.key((13, 0))
        };
        assert_ne!(with(["-a", "-b"]), with(["-a-", "b"]));
    }
}

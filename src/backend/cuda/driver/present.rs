//! Which of NVIDIA's libraries and devices are there. cudarc panics where a library is missing, so
//! nothing else of it is called before these.

use cudarc::{cublas, cusolver, driver, nvrtc};

use crate::backend::{BackendError, Result};

/// CUDA devices, or why there is none.
pub(in super::super) fn find() -> std::result::Result<usize, String> {
    // SAFETY: opens and closes a library of NVIDIA's by its name.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err("no NVIDIA driver: libcuda is not to be found".to_owned());
    }
    driver::result::init().map_err(|error| reason(&error))?;
    match driver::result::device::get_count().map_err(|error| reason(&error))? {
        count @ 1.. => Ok(count as usize),
        _ => Err("the driver sees no device".to_owned()),
    }
}

/// CUDA devices of this machine.
pub(in super::super) fn count_devices() -> usize {
    find().unwrap_or(0)
}

fn reason(error: &driver::DriverError) -> String {
    use driver::sys::CUresult;
    match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => "the driver sees no device".to_owned(),
        _ => error.to_string(),
    }
}

/// Checks that every library this backend calls is there.
pub(super) fn libraries() -> Result<()> {
    // SAFETY: each opens and closes a library of NVIDIA's by its name.
    let present = unsafe {
        [
            ("libnvrtc", "compiles the kernels", nvrtc::sys::is_culib_present()),
            ("libcublas", "multiplies matrices", cublas::sys::is_culib_present()),
            ("libcusolver", "factorises matrices", cusolver::sys::is_culib_present()),
        ]
    };
    match present.into_iter().find(|(_, _, present)| !present) {
        Some((library, purpose, _)) => Err(BackendError::MissingLibrary { library, purpose }),
        None => Ok(()),
    }
}

//! Which of NVIDIA's libraries and devices are there. cudarc panics where a library is missing, so
//! nothing else of it is called before these.

use cudarc::{cublas, cusolver, driver, nvrtc};

use crate::backend::{BackendError, Result};

/// The oldest CUDA that a driver may be for: of the functions that are called, the newest came with it.
const OLDEST_CUDA: i32 = 12_000;

/// The name of device `index`, if it and every library this backend calls are there.
pub(in super::super) fn probe(index: usize) -> Result<String> {
    let none = |reason: String| BackendError::NoDevice { wanted: index, reason };
    // SAFETY: opens and closes a library of NVIDIA's by its name.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(none("no NVIDIA driver, libcuda is not to be found".to_owned()));
    }
    let failed = |error: driver::DriverError| none(reason(error));
    driver::result::init().map_err(failed)?;
    let count = driver::result::device::get_count().map_err(failed)?;
    if count <= 0 {
        return Err(none("the driver sees no device".to_owned()));
    }
    let mut version = 0;
    // SAFETY: the pointer is to a live variable of the type that the call has.
    let asked = unsafe { driver::sys::cuDriverGetVersion(&raw mut version) };
    asked.result().map_err(failed)?;
    if version < OLDEST_CUDA {
        let cuda = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        let (found, oldest) = (cuda(version), cuda(OLDEST_CUDA));
        return Err(none(format!("the driver is for CUDA {found}; {oldest} or newer is needed")));
    }
    let ordinal = i32::try_from(index).unwrap_or(i32::MAX);
    if ordinal >= count {
        return Err(none(format!("there are {count} devices, counted from 0")));
    }
    libraries()?;
    let device = driver::result::device::get(ordinal).map_err(failed)?;
    driver::result::device::get_name(device).map_err(failed)
}

fn reason(error: driver::DriverError) -> String {
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

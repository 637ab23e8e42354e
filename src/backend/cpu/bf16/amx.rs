//! Block products on Intel AMX tiles.
//!
//! The intrinsics are not stable yet, so the instructions are written out. Two tiles of `A` times
//! two of `B` go to four tiles of sums, which keeps each loaded tile busy twice.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

use super::{Line, TILE_LINES};

/// Whether the processor has bf16 tiles and the system lets this process use them.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| processor_has_amx() && system_permits())
}

fn processor_has_amx() -> bool {
    /// CPUID leaf 7, EDX: amx-bf16 and amx-tile.
    const AMX: u32 = 1 << 22 | 1 << 24;
    /// XCR0: tile configuration and tile data.
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    /// CPUID leaf 1, ECX: xgetbv may be used.
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that xgetbv exists and is enabled.
    let enabled = unsafe { xgetbv() };
    __cpuid_count(7, 0).edx & AMX == AMX && enabled & TILE_STATE == TILE_STATE
}

/// # Safety
/// The processor must have xgetbv.
#[target_feature(enable = "xsave")]
fn xgetbv() -> u64 {
    // SAFETY: register 0 exists wherever the instruction does.
    unsafe { _xgetbv(0) }
}

/// Linux grants tile data on request, once per process and for all its threads.
#[cfg(target_os = "linux")]
fn system_permits() -> bool {
    const SYS_ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the call takes two integers and touches no memory of ours; the kernel changes rcx
    // and r11 only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn system_permits() -> bool {
    false
}

/// Layout of the operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// Makes all eight tiles 16 rows of 64 bytes.
///
/// # Safety
/// AMX must be available.
pub(super) unsafe fn configure() {
    let mut config = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [0; 16],
        rows: [0; 16],
    };
    config.bytes_per_row[..8].fill(64);
    config.rows[..8].fill(16);
    // SAFETY: the operand is 64 readable bytes in the layout that palette 1 asks for.
    unsafe {
        asm!("ldtilecfg [{config}]", config = in(reg) &raw const config, options(nostack, readonly));
    }
}

/// Gives the tiles up.
///
/// # Safety
/// AMX must be available.
pub(super) unsafe fn release() {
    // SAFETY: only this module uses tiles.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// `out = a b`, or `out += a b`, for the 32 × 32 block at `out`, rows `stride` values apart.
///
/// # Safety
/// AMX must be available and [`configure`] called on this thread; `a` and `b` must hold the same
/// number of whole tiles; `out` must be valid for the whole block: 31 strides and 32 values.
pub(super) unsafe fn block(a: &[Line], b: &[Line], out: *mut f32, stride: usize, add: bool) {
    let tiles = a.len() / TILE_LINES;
    let row = stride * size_of::<f32>();
    // The lower half of the block starts 16 rows further down.
    let low = out.wrapping_add(16 * stride);
    if add {
        // SAFETY: both halves of the block are valid by the contract.
        unsafe {
            asm!(
                "tileloadd tmm0, [{out} + {row}]",
                "tileloadd tmm1, [{out} + {row} + 64]",
                "tileloadd tmm2, [{low} + {row}]",
                "tileloadd tmm3, [{low} + {row} + 64]",
                out = in(reg) out,
                low = in(reg) low,
                row = in(reg) row,
                options(nostack, readonly),
            );
        }
    } else {
        // SAFETY: only tile registers change.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem)
            );
        }
    }
    if tiles > 0 {
        // SAFETY: per inner tile the loop reads 2048 bytes of each operand, which is a tile's
        // TILE_LINES lines of 64 bytes. Tile registers belong to this module.
        unsafe {
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {line}]",
                "tileloadd tmm6, [{b} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {line} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {line} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {tiles}",
                "jnz 2b",
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                tiles = inout(reg) tiles => _,
                line = in(reg) 64usize,
                options(nostack, readonly),
            );
        }
    }
    // SAFETY: both halves of the block are valid by the contract.
    unsafe {
        asm!(
            "tilestored [{out} + {row}], tmm0",
            "tilestored [{out} + {row} + 64], tmm1",
            "tilestored [{low} + {row}], tmm2",
            "tilestored [{low} + {row} + 64], tmm3",
            out = in(reg) out,
            low = in(reg) low,
            row = in(reg) row,
            options(nostack),
        );
    }
}

//! The four calls of the kernel's loop driver, as safe functions.
//!
//! No kept crate offers them without bindgen, and rustix leaves them to its callers (decision 0020). The layouts are
//! those of `include/uapi/linux/loop.h`, asserted below; nothing else in the workspace is `unsafe`.

#![allow(unsafe_code, reason = "an ioctl is a promise about a driver, which only a person can check")]

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

const LOOP_CLR_FD: c_uint = 0x4C01;
const LOOP_SET_CAPACITY: c_uint = 0x4C07;
const LOOP_CONFIGURE: c_uint = 0x4C0A;
const LOOP_CTL_GET_FREE: c_uint = 0x4C82;

/// Writes are refused.
pub(super) const LO_FLAGS_READ_ONLY: u32 = 1;
/// The backing file's page cache is passed by.
pub(super) const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232);
const _: () = assert!(size_of::<LoopConfig>() == 304);

/// A call of which the driver reads `argument` and answers with a number.
struct Call<'a> {
    opcode: c_uint,
    argument: Option<&'a mut LoopConfig>,
}

// SAFETY: of the four opcodes that this module passes, LOOP_CONFIGURE reads a `loop_config`, which `argument` is, and
// the others take no argument. None writes to user memory; all answer with their return value.
unsafe impl Ioctl for Call<'_> {
    type Output = u32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        Opcode::from(self.opcode)
    }
    fn as_ptr(&mut self) -> *mut c_void {
        match &mut self.argument {
            Some(config) => std::ptr::from_mut::<LoopConfig>(config).cast(),
            None => std::ptr::null_mut(),
        }
    }
    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        u32::try_from(out as c_int).map_err(|_| rustix::io::Errno::RANGE)
    }
}

fn call(device: impl AsFd, opcode: c_uint, argument: Option<&mut LoopConfig>) -> io::Result<u32> {
    // SAFETY: `Call` says what each opcode reads; the memory lives until the call returns. On a descriptor that is no
    // loop device the kernel answers ENOTTY.
    Ok(unsafe { ioctl(device, Call { opcode, argument }) }?)
}

/// The number of a device that is not in use; asked of `/dev/loop-control`. Another process may take it first.
pub(super) fn get_free(control: impl AsFd) -> io::Result<u32> {
    call(control, LOOP_CTL_GET_FREE, None)
}

/// Binds a file to a free device. EBUSY if it has been taken meanwhile.
pub(super) fn configure(device: impl AsFd, backing: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    let fd = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
    let info = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let mut config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
    call(device, LOOP_CONFIGURE, Some(&mut config)).map(drop)
}

/// Takes over the backing file's size.
pub(super) fn set_capacity(device: impl AsFd) -> io::Result<()> {
    call(device, LOOP_SET_CAPACITY, None).map(drop)
}

/// Unbinds the device: when `device` is closed, or when the last process that has it open closes it.
pub(super) fn clear(device: impl AsFd) -> io::Result<()> {
    call(device, LOOP_CLR_FD, None).map(drop)
}

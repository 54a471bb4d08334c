//! `jetrt_copy_cast` and `jetrt_copy_batch`, the kernels that jetrt brings, done on the host with torch's casting rules.

use half::{bf16, f16};

use crate::state::reachable;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct CopyCast {
    pub dst: u64,
    pub src: u64,
    pub n: u64,
    pub dims: [i64; 8],
    pub strides: [i64; 8],
    pub ndim: i32,
    pub src_type: i32,
    pub dst_type: i32,
    pub pad: i32,
}

const _: () = assert!(std::mem::size_of::<CopyCast>() == 168);

/// Jobs in the parameter of `jetrt_copy_batch`.
pub const BATCH: usize = 24;

/// The first jobs of a batch, as many as the grid has rows. They must not cast.
pub fn run_batch(jobs: &[CopyCast], device: i32) -> Result<(), String> {
    for job in jobs {
        if job.src_type != job.dst_type {
            return Err(format!("jetrt_copy_batch casts nothing: {} -> {}", job.src_type, job.dst_type));
        }
        run(job, device)?;
    }
    Ok(())
}

fn width(code: i32) -> Option<usize> {
    Some(match code {
        2 | 4 | 5 | 6 => 1,
        1 | 7 | 101 | 102 => 2,
        0 | 3 | 103 => 4,
        8 | 100 | 104 => 8,
        _ => return None,
    })
}

#[derive(Clone, Copy)]
enum Number {
    Float(f64),
    Signed(i64),
    Unsigned(u64),
}

unsafe fn load(at: *const u8, code: i32) -> Option<Number> {
    use Number::*;
    Some(match code {
        0 => Float(f64::from(at.cast::<f32>().read_unaligned())),
        1 => Float(f16::from_bits(at.cast::<u16>().read_unaligned()).to_f64()),
        2 => Signed(i64::from(at.cast::<i8>().read())),
        3 => Signed(i64::from(at.cast::<i32>().read_unaligned())),
        4 => Signed(i64::from(at.read() != 0)),
        5 => Unsigned(u64::from(at.read())),
        7 => Float(bf16::from_bits(at.cast::<u16>().read_unaligned()).to_f64()),
        8 => Signed(at.cast::<i64>().read_unaligned()),
        100 => Float(at.cast::<f64>().read_unaligned()),
        101 => Signed(i64::from(at.cast::<i16>().read_unaligned())),
        102 => Unsigned(u64::from(at.cast::<u16>().read_unaligned())),
        103 => Unsigned(u64::from(at.cast::<u32>().read_unaligned())),
        104 => Unsigned(at.cast::<u64>().read_unaligned()),
        _ => return None,
    })
}

impl Number {
    /// To f32 in one rounding, as the 16-bit types are reached through f32.
    fn single(self) -> f32 {
        match self {
            Number::Float(x) => x as f32,
            Number::Signed(x) => x as f32,
            Number::Unsigned(x) => x as f32,
        }
    }

    /// Truncated toward zero.
    fn integer(self) -> i64 {
        match self {
            Number::Float(x) => x as i64,
            Number::Signed(x) => x,
            Number::Unsigned(x) => x as i64,
        }
    }

    fn truth(self) -> bool {
        match self {
            Number::Float(x) => x != 0.0,
            Number::Signed(x) => x != 0,
            Number::Unsigned(x) => x != 0,
        }
    }
}

unsafe fn store(at: *mut u8, code: i32, x: Number) -> bool {
    match code {
        0 => at.cast::<f32>().write_unaligned(x.single()),
        1 => at.cast::<u16>().write_unaligned(f16::from_f32(x.single()).to_bits()),
        2 => at.cast::<i8>().write(x.integer() as i8),
        3 => at.cast::<i32>().write_unaligned(match x {
            Number::Float(x) => x as i32,
            _ => x.integer() as i32,
        }),
        4 => at.write(u8::from(x.truth())),
        5 => at.write(x.integer() as u8),
        7 => at.cast::<u16>().write_unaligned(bf16::from_f32(x.single()).to_bits()),
        8 => at.cast::<i64>().write_unaligned(x.integer()),
        _ => return false,
    }
    true
}

pub fn run(p: &CopyCast, device: i32) -> Result<(), String> {
    let (Some(from), Some(to)) = (width(p.src_type), width(p.dst_type)) else {
        return Err(format!("jetrt_copy_cast: no such type: {} -> {}", p.src_type, p.dst_type));
    };
    if !(0..=8).contains(&p.ndim) {
        return Err(format!("jetrt_copy_cast: ndim {}", p.ndim));
    }
    let rank = p.ndim as usize;
    let volume: i64 = p.dims[..rank].iter().product();
    if volume != p.n as i64 {
        return Err(format!("jetrt_copy_cast: n is {} but dims hold {volume}", p.n));
    }
    if p.n == 0 {
        return Ok(());
    }
    let reach = |pick: fn(i64) -> bool| -> i64 {
        (0..rank)
            .filter(|&d| pick(p.strides[d]))
            .map(|d| (p.dims[d] - 1) * p.strides[d])
            .sum()
    };
    let (low, high) = (reach(|s| s < 0), reach(|s| s > 0));
    let first = p.src.wrapping_add_signed(low * from as i64);
    if !reachable(first, (high - low + 1) as usize * from, device) {
        return Err(format!("jetrt_copy_cast reads at {first:#x}, which device {device} cannot reach"));
    }
    if !reachable(p.dst, p.n as usize * to, device) {
        return Err(format!(
            "jetrt_copy_cast writes at {:#x}, which device {device} cannot reach",
            p.dst
        ));
    }
    if !p.src.is_multiple_of(from as u64) || !p.dst.is_multiple_of(to as u64) {
        return Err(format!("jetrt_copy_cast: misaligned address {:#x} or {:#x}", p.src, p.dst));
    }
    let mut index = [0i64; 8];
    for i in 0..p.n as usize {
        let offset: i64 = (0..rank).map(|d| index[d] * p.strides[d]).sum();
        // SAFETY: both ranges were checked above.
        unsafe {
            let src = (p.src as *const u8).offset((offset * from as i64) as isize);
            let dst = (p.dst as *mut u8).add(i * to);
            if p.src_type == p.dst_type {
                std::ptr::copy(src, dst, from);
            } else if !load(src, p.src_type).is_some_and(|x| store(dst, p.dst_type, x)) {
                return Err(format!("jetrt_copy_cast: no cast {} -> {}", p.src_type, p.dst_type));
            }
        }
        for d in (0..rank).rev() {
            index[d] += 1;
            if index[d] < p.dims[d] {
                break;
            }
            index[d] = 0;
        }
    }
    Ok(())
}

//! Tensors copied over others of the same shape and type, all in one launch: into and out of the fixed buffers of a
//! caller's graph.

use crate::cuda::kernel::{Kernel, PlainCopy};
use crate::cuda::Stream;
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::shape::{is_dense, Dims};
use crate::tensor::{Place, TensorView};
use smallvec::SmallVec;

/// A tensor of a name, and the one of the same shape and type that is copied over it.
pub struct Pair<'a> {
    pub name: &'a str,
    pub target: TensorView,
    pub source: TensorView,
}

/// Enqueues the copies on `stream`. Checks every pair before it enqueues anything.
pub fn fill(kernel: &Kernel, device: i32, pairs: &[Pair<'_>], stream: &Stream) -> Result<()> {
    let mut copies: SmallVec<[PlainCopy; 8]> = SmallVec::new();
    for pair in pairs {
        copies.push(copy_of(pair, device)?);
    }
    kernel.launch_plain(&copies, stream)
}

fn copy_of(pair: &Pair<'_>, device: i32) -> Result<PlainCopy> {
    let Pair { name, target, source } = pair;
    let refuse = |kind, found: String, allowed: String, next: &str| Err(Error::input(kind, name, found, allowed, next));
    if source.dtype != target.dtype {
        let (found, allowed) = (source.dtype.name().into(), target.dtype.name().into());
        return refuse(Kind::DType, found, allowed, "Convert it first: nothing is cast here.");
    }
    if source.dims != target.dims {
        let (found, allowed) = (source.dims.to_string(), target.dims.to_string());
        return refuse(Kind::Shape, found, allowed, "The buffer has the shape of the example.");
    }
    for view in [source, target] {
        if view.place != Place::Device(device) {
            let next = "Move the tensor to that GPU.";
            return refuse(Kind::Device, view.place.to_string(), format!("cuda:{device}"), next);
        }
        if view.ptr == 0 && view.elements() > 0 {
            let found = "a tensor without memory (null address)".into();
            return refuse(
                Kind::Layout,
                found,
                "a tensor with data".into(),
                "Fake and meta tensors have no data.",
            );
        }
    }
    let both_packed = source.contiguous && target.contiguous;
    let one_layout = !source.contiguous && !target.contiguous && source.strides == target.strides;
    if both_packed || (one_layout && is_dense(source.dims.as_slice(), source.strides.as_slice())) {
        let bytes = source.bytes().unwrap_or(0);
        return Ok(PlainCopy {
            dst: target.ptr,
            src: TensorView {
                dtype: DType::U8,
                dims: Dims::new(&[bytes as i64]).unwrap_or_default(),
                contiguous: true,
                ..*source
            },
            size: 1,
        });
    }
    match source.dtype.size() {
        Some(size) if target.contiguous => Ok(PlainCopy {
            dst: target.ptr,
            src: *source,
            size,
        }),
        None => refuse(
            Kind::Layout,
            source.to_string(),
            "row-major data, for elements of less than a byte".into(),
            "Pass .contiguous().",
        ),
        Some(_) => refuse(
            Kind::Layout,
            format!("{target} as the target of {source}"),
            "a target that is row-major, or has no gaps and the strides of its source".into(),
            "Copy into a contiguous tensor.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(dtype: DType, dims: &[i64], strides: Option<&[i64]>) -> TensorView {
        let d = |x: &[i64]| Dims::new(x).unwrap();
        TensorView::new(0x1000, dtype, d(dims), strides.map(d), Place::Device(0))
    }

    fn copied(target: TensorView, source: TensorView) -> Result<(u64, u64, bool)> {
        let pair = Pair { name: "x", target, source };
        copy_of(&pair, 0).map(|c| (c.size, c.src.elements(), c.src.contiguous))
    }

    #[test]
    fn one_layout_is_bytes_and_another_is_gathered() {
        let f32s = |strides| view(DType::F32, &[2, 3], strides);
        assert_eq!(copied(f32s(None), f32s(None)).unwrap(), (1, 24, true));
        assert_eq!(copied(f32s(Some(&[1, 2])), f32s(Some(&[1, 2]))).unwrap(), (1, 24, true));
        assert_eq!(copied(f32s(None), f32s(Some(&[1, 2]))).unwrap(), (4, 6, false));
        assert_eq!(copied(f32s(None), f32s(Some(&[0, 0]))).unwrap(), (4, 6, false));
        let halves = |strides| view(DType::Bf16, &[2, 3], strides);
        assert_eq!(copied(halves(None), halves(Some(&[8, 1]))).unwrap(), (2, 6, false));
    }

    #[test]
    fn refused() {
        let x = view(DType::F32, &[2, 3], None);
        let kind = |target, source| copied(target, source).unwrap_err().kind();
        assert_eq!(kind(x, view(DType::I32, &[2, 3], None)), Kind::DType);
        assert_eq!(kind(x, view(DType::F32, &[3, 2], None)), Kind::Shape);
        assert_eq!(kind(x, TensorView { place: Place::Host, ..x }), Kind::Device);
        assert_eq!(kind(TensorView { ptr: 0, ..x }, x), Kind::Layout);
        // Gaps, or another order, in what is written.
        assert_eq!(kind(view(DType::F32, &[2, 3], Some(&[8, 1])), x), Kind::Layout);
        let pitched = view(DType::F32, &[2, 3], Some(&[8, 1]));
        assert_eq!(kind(pitched, pitched), Kind::Layout);
        let int4 = view(DType::Int4, &[2, 4], None);
        assert_eq!(copied(int4, int4).unwrap(), (1, 4, true));
        assert_eq!(kind(int4, view(DType::Int4, &[2, 4], Some(&[1, 2]))), Kind::Layout);
    }
}

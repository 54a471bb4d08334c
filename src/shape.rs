//! Shapes, strides and profile ranges: plain functions, no GPU.

use std::fmt;

/// The most dimensions that TensorRT has (`Dims::MAX_DIMS`, abi/structs: 8 in every version).
pub const MAX_DIMS: usize = 8;

/// A shape or a list of strides, inline. Unused places are zero, so that `==` compares all.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Dims {
    len: u8,
    d: [i64; MAX_DIMS],
}

impl Dims {
    /// `None` when there are more than eight dimensions.
    pub fn new(dims: &[i64]) -> Option<Dims> {
        if dims.len() > MAX_DIMS {
            return None;
        }
        let mut d = [0; MAX_DIMS];
        d[..dims.len()].copy_from_slice(dims);
        Some(Dims { len: dims.len() as u8, d })
    }

    pub fn as_slice(&self) -> &[i64] {
        &self.d[..self.len as usize]
    }

    pub fn rank(&self) -> usize {
        self.len as usize
    }

    /// Number of elements; `None` when a dimension is negative (dynamic) or the product overflows.
    pub fn volume(&self) -> Option<u64> {
        self.as_slice().iter().try_fold(1u64, |n, &d| n.checked_mul(u64::try_from(d).ok()?))
    }

    pub fn is_static(&self) -> bool {
        self.as_slice().iter().all(|&d| d >= 0)
    }

    /// Row-major strides in elements.
    pub fn contiguous_strides(&self) -> Dims {
        let mut out = *self;
        let mut step = 1i64;
        for i in (0..self.rank()).rev() {
            out.d[i] = step;
            step = step.saturating_mul(self.d[i].max(1));
        }
        out
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_slice())
    }
}

/// Do these strides (in elements) describe row-major data without gaps? Dimensions of size one may have any stride, and
/// an empty array is contiguous.
pub fn is_contiguous(dims: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1i64;
    for (&d, &s) in dims.iter().zip(strides).rev() {
        if d == 0 {
            return true;
        }
        if d != 1 {
            if s != expected {
                // A later (outer) zero still makes the array empty.
                return dims.contains(&0);
            }
            expected = expected.saturating_mul(d);
        }
    }
    true
}

/// Do these strides (in elements) lay the elements out without gaps and without overlaps, in whatever order of dimensions?
pub fn is_dense(dims: &[i64], strides: &[i64]) -> bool {
    if dims.contains(&0) {
        return true;
    }
    // The dimension whose stride is what lies inside it, one after the other.
    let mut left: Vec<(i64, i64)> = strides.iter().copied().zip(dims.iter().copied()).filter(|&(_, d)| d != 1).collect();
    left.sort_unstable();
    let mut expected = 1i64;
    left.iter().all(|&(stride, dim)| {
        let fits = stride == expected;
        expected = expected.saturating_mul(dim);
        fits
    })
}

/// One optimisation profile's range for one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub min: Dims,
    pub opt: Dims,
    pub max: Dims,
}

impl Range {
    pub fn contains(&self, dims: &Dims) -> bool {
        dims.rank() == self.min.rank()
            && dims
                .as_slice()
                .iter()
                .zip(self.min.as_slice().iter().zip(self.max.as_slice()))
                .all(|(d, (lo, hi))| lo <= d && d <= hi)
    }
}

/// `[1..8, 64]`: fixed dimensions as one number.
impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, (lo, hi)) in self.min.as_slice().iter().zip(self.max.as_slice()).enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            if lo == hi {
                write!(f, "{lo}")?;
            } else {
                write!(f, "{lo}..{hi}")?;
            }
        }
        f.write_str("]")
    }
}

/// The first profile that every input fits, `ranges[profile][input]`; `None` when none does.
pub fn first_fitting(ranges: &[Vec<Range>], dims: &[Dims]) -> Option<usize> {
    ranges
        .iter()
        .position(|profile| profile.iter().zip(dims).all(|(r, d)| r.contains(d)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dims() -> impl Strategy<Value = Vec<i64>> {
        prop::collection::vec(0i64..6, 0..=8)
    }

    /// The definition, spelled out: element k of the row-major walk sits at offset k.
    fn contiguous_by_walking(dims: &[i64], strides: &[i64]) -> bool {
        let n: i64 = dims.iter().product();
        (0..n).all(|k| {
            let (mut rest, mut offset) = (k, 0);
            for (d, s) in dims.iter().zip(strides).rev() {
                offset += rest % d * s;
                rest /= d;
            }
            offset == k
        })
    }

    proptest! {
        #[test]
        fn contiguity_is_the_walk(d in prop::collection::vec(0i64..4, 0..5), seed in prop::collection::vec(-2i64..9, 5)) {
            let strides = &seed[..d.len()];
            prop_assert_eq!(is_contiguous(&d, strides), contiguous_by_walking(&d, strides));
        }

        #[test]
        fn dense_is_every_offset_once(d in prop::collection::vec(0i64..4, 0..4), seed in prop::collection::vec(0i64..9, 4)) {
            let strides = &seed[..d.len()];
            let n: i64 = d.iter().product();
            let mut offsets: Vec<i64> = (0..n).map(|k| {
                let (mut rest, mut at) = (k, 0);
                for (size, s) in d.iter().zip(strides).rev() { at += rest % size * s; rest /= size; }
                at
            }).collect();
            offsets.sort_unstable();
            prop_assert_eq!(is_dense(&d, strides), offsets == (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn own_strides_are_contiguous(d in dims()) {
            let dims = Dims::new(&d).unwrap();
            prop_assert!(is_contiguous(&d, dims.contiguous_strides().as_slice()));
            prop_assert_eq!(dims.volume(), Some(d.iter().product::<i64>() as u64));
        }

        #[test]
        fn range_contains_what_lies_between(lo in prop::collection::vec(0i64..5, 3), span in prop::collection::vec(0i64..5, 3), x in prop::collection::vec(0i64..10, 3)) {
            let hi: Vec<i64> = lo.iter().zip(&span).map(|(a, b)| a + b).collect();
            let r = Range { min: Dims::new(&lo).unwrap(), opt: Dims::new(&lo).unwrap(), max: Dims::new(&hi).unwrap() };
            let inside = (0..3).all(|i| lo[i] <= x[i] && x[i] <= hi[i]);
            prop_assert_eq!(r.contains(&Dims::new(&x).unwrap()), inside);
            prop_assert!(!r.contains(&Dims::new(&x[..2]).unwrap()));
        }
    }

    #[test]
    fn limits() {
        assert!(Dims::new(&[1; 9]).is_none());
        assert_eq!(Dims::new(&[]).unwrap().volume(), Some(1));
        assert_eq!(Dims::new(&[-1, 2]).unwrap().volume(), None);
        assert_eq!(Dims::new(&[i64::MAX, 3]).unwrap().volume(), None);
    }

    #[test]
    fn the_first_profile_that_fits_is_chosen() {
        let r = |lo: i64, hi: i64| Range {
            min: Dims::new(&[lo]).unwrap(),
            opt: Dims::new(&[lo]).unwrap(),
            max: Dims::new(&[hi]).unwrap(),
        };
        let ranges = vec![vec![r(1, 4), r(1, 4)], vec![r(1, 8), r(2, 8)]];
        let pick = |a: i64, b: i64| first_fitting(&ranges, &[Dims::new(&[a]).unwrap(), Dims::new(&[b]).unwrap()]);
        assert_eq!(pick(4, 4), Some(0));
        assert_eq!(pick(4, 5), Some(1));
        assert_eq!(pick(5, 1), None);
        assert_eq!(r(1, 8).to_string(), "[1..8]");
        assert_eq!(r(3, 3).to_string(), "[3]");
    }
}

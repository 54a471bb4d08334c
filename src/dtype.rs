//! Element types and their codes in TensorRT, DLPack and numpy.

use std::fmt;

/// Element types that jetrt knows. The first group can be bound to TensorRT; the second exists only as the source of
/// a cast (numpy's float64, for one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    I8,
    I32,
    Bool,
    U8,
    Fp8,
    Bf16,
    I64,
    Int4,
    Fp4,
    E8M0,
    F64,
    I16,
    U16,
    U32,
    U64,
}

/// (type, TensorRT DataType or the kernel's source code, DLPack (code, bits), name, numpy's `__array_interface__` typestr)
/// TensorRT's codes are stable in 10.x and 11.x (abi/enums.csv); codes from 100 up are the kernel's own.
type Row = (DType, i32, (u8, u8), &'static str, &'static str);
const TABLE: [Row; 17] = [
    (DType::F32, 0, (2, 32), "float32", "<f4"),
    (DType::F16, 1, (2, 16), "float16", "<f2"),
    (DType::I8, 2, (0, 8), "int8", "|i1"),
    (DType::I32, 3, (0, 32), "int32", "<i4"),
    (DType::Bool, 4, (6, 8), "bool", "|b1"),
    (DType::U8, 5, (1, 8), "uint8", "|u1"),
    (DType::Fp8, 6, (10, 8), "float8_e4m3fn", ""),
    (DType::Bf16, 7, (4, 16), "bfloat16", ""),
    (DType::I64, 8, (0, 64), "int64", "<i8"),
    (DType::Int4, 9, (0, 4), "int4", ""),
    (DType::Fp4, 10, (17, 4), "float4_e2m1fn", ""),
    (DType::E8M0, 11, (14, 8), "float8_e8m0fnu", ""),
    (DType::F64, 100, (2, 64), "float64", "<f8"),
    (DType::I16, 101, (0, 16), "int16", "<i2"),
    (DType::U16, 102, (1, 16), "uint16", "<u2"),
    (DType::U32, 103, (1, 32), "uint32", "<u4"),
    (DType::U64, 104, (1, 64), "uint64", "<u8"),
];

impl DType {
    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    pub fn from_trt(code: i32) -> Option<DType> {
        TABLE.iter().find(|r| r.1 == code && code < 100).map(|r| r.0)
    }

    /// TensorRT's code; for types that TensorRT lacks, the cast kernel's source code (100 and up).
    pub fn code(self) -> i32 {
        self.row().1
    }

    #[inline]
    pub fn from_dlpack(code: u8, bits: u8, lanes: u16) -> Option<DType> {
        // The usual ones first: this runs for every input of every call.
        match (code, bits, lanes) {
            (2, 32, 1) => Some(DType::F32),
            (4, 16, 1) => Some(DType::Bf16),
            (2, 16, 1) => Some(DType::F16),
            (0, 64, 1) => Some(DType::I64),
            (6, 8, 1) => Some(DType::Bool),
            (_, _, 1) => TABLE.iter().find(|r| r.2 == (code, bits)).map(|r| r.0),
            _ => None,
        }
    }

    /// DLPack's (code, bits).
    pub fn dlpack(self) -> (u8, u8) {
        self.row().2
    }

    pub fn name(self) -> &'static str {
        self.row().3
    }

    pub fn from_name(name: &str) -> Option<DType> {
        TABLE.iter().find(|r| r.3 == name).map(|r| r.0)
    }

    /// The array interface's type string; `None` for types that numpy lacks.
    pub fn typestr(self) -> Option<&'static str> {
        Some(self.row().4).filter(|t| !t.is_empty())
    }

    pub fn from_typestr(typestr: &str) -> Option<DType> {
        let normal = match typestr.as_bytes() {
            // '=' is native order; one-byte types carry '|' but some producers write '<'.
            [b'=', ..] | [b'<', ..] | [b'|', ..] => &typestr[1..],
            _ => return None,
        };
        TABLE.iter().find(|r| !r.4.is_empty() && &r.4[1..] == normal).map(|r| r.0)
    }

    pub fn bits(self) -> u64 {
        u64::from(self.row().2 .1)
    }

    /// Bytes of one element; `None` for the packed 4-bit types.
    pub fn size(self) -> Option<u64> {
        (self.bits() >= 8).then(|| self.bits() / 8)
    }

    /// Bytes of `n` packed elements; `None` on overflow.
    pub fn bytes(self, n: u64) -> Option<u64> {
        n.checked_mul(self.bits())?.checked_add(7).map(|b| b / 8)
    }

    /// Can the copy kernel convert from `self` into `to`? (`self == to` is a plain copy.)
    pub fn casts_to(self, to: DType) -> bool {
        let plain = |d: DType| !matches!(d, DType::Fp8 | DType::Int4 | DType::Fp4 | DType::E8M0);
        self == to || (plain(self) && plain(to) && to.code() < 100)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_order_and_codes_round_trip() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(DType::from_dlpack(row.2 .0, row.2 .1, 1), Some(row.0));
            assert_eq!(DType::from_name(row.3), Some(row.0));
            assert_eq!(DType::from_dlpack(row.2 .0, row.2 .1, 2), None);
            if row.1 < 100 {
                assert_eq!(DType::from_trt(row.1), Some(row.0));
            } else {
                assert_eq!(DType::from_trt(row.1), None);
            }
            if let Some(t) = row.0.typestr() {
                assert_eq!(DType::from_typestr(t), Some(row.0));
            }
        }
    }

    #[test]
    fn foreign_byte_order_is_unknown() {
        assert_eq!(DType::from_typestr(">f4"), None);
        assert_eq!(DType::from_typestr(""), None);
    }

    #[test]
    fn packed_types_count_bits() {
        assert_eq!(DType::Int4.bytes(3), Some(2));
        assert_eq!(DType::Int4.size(), None);
        assert_eq!(DType::Bf16.bytes(3), Some(6));
        assert_eq!(DType::I64.bytes(u64::MAX), None);
    }

    #[test]
    fn casts() {
        assert!(DType::F64.casts_to(DType::F32));
        assert!(!DType::F32.casts_to(DType::F64));
        assert!(!DType::Fp8.casts_to(DType::F32));
        assert!(DType::Fp8.casts_to(DType::Fp8));
    }
}

//! Plan files, before TensorRT sees a byte of them.
//!
//! A plan begins with a 28-byte preamble: `ftrt`, the serialization version (u32 at 4), and TensorRT's version in bytes 24
//! to 27 (what `trtexec --getPlanVersionOnly` prints). Bytes 16 to 23 hold the plan's length: seen on every plan of
//! TensorRT 10.6 (serialization version 2), documented nowhere, so it is used for that serialization version only.

use crate::error::{Error, Kind, Result};
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const PREAMBLE: usize = 28;
const MAGIC: &[u8; 4] = b"ftrt";
/// The serialization version whose length field was measured.
const MEASURED_SERIALIZATION: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanVersion {
    pub major: u8,
    pub minor: u8,
    pub patch: u8,
    pub build: u8,
}

impl fmt::Display for PlanVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}.{}", self.major, self.minor, self.patch, self.build)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: PlanVersion,
    pub serialization: u32,
    /// Where the plan begins in the file: not zero behind Ultralytics' JSON prefix.
    pub offset: usize,
    /// That prefix: `<u32 length><JSON>`.
    pub metadata: Option<String>,
}

/// Reads the header; the error is the sentence that says what the file is instead.
pub fn parse(bytes: &[u8]) -> Result<Header, String> {
    if let Some(header) = at(bytes, 0, None)? {
        return Ok(header);
    }
    if let Some((offset, json)) = json_prefix(bytes) {
        return at(bytes, offset, Some(json))?.ok_or_else(|| "a JSON prefix (as Ultralytics writes) that no TensorRT plan follows".into());
    }
    Err(what_it_is(bytes))
}

fn at(bytes: &[u8], offset: usize, metadata: Option<String>) -> Result<Option<Header>, String> {
    let plan = &bytes[offset.min(bytes.len())..];
    if !plan.starts_with(MAGIC) {
        return Ok(None);
    }
    let Some(preamble) = plan.get(..PREAMBLE) else {
        return Err(format!(
            "a truncated TensorRT plan: {} bytes, and the preamble alone has {PREAMBLE}",
            plan.len()
        ));
    };
    let word = |i: usize| u32::from_le_bytes([preamble[i], preamble[i + 1], preamble[i + 2], preamble[i + 3]]);
    let serialization = word(4);
    let length = u64::from(word(16)) | u64::from(word(20)) << 32;
    if serialization == MEASURED_SERIALIZATION && length > plan.len() as u64 {
        return Err(format!("a truncated TensorRT plan: {} bytes of {length}", plan.len()));
    }
    let version = PlanVersion {
        major: preamble[24],
        minor: preamble[25],
        patch: preamble[26],
        build: preamble[27],
    };
    Ok(Some(Header {
        version,
        serialization,
        offset,
        metadata,
    }))
}

fn json_prefix(bytes: &[u8]) -> Option<(usize, String)> {
    let length = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let json = bytes.get(4..4usize.checked_add(length)?)?;
    let text = std::str::from_utf8(json).ok()?;
    (text.starts_with('{') && text.trim_end().ends_with('}')).then(|| (4 + length, text.to_string()))
}

fn what_it_is(bytes: &[u8]) -> String {
    let starts = |m: &[u8]| bytes.starts_with(m);
    if bytes.is_empty() {
        "an empty file (an interrupted build leaves one)".into()
    } else if starts(b"PK\x03\x04") {
        "a zip archive (a torch checkpoint or .npz, perhaps)".into()
    } else if starts(b"\x7fELF") {
        "a program or shared library".into()
    } else if starts(b"version https://git-lfs") {
        "a Git LFS pointer: the file itself was not fetched (git lfs pull)".into()
    } else if starts(b"ptrt") || starts(b"trtr") || starts(b"rtrt") {
        "an inner piece of a TensorRT plan: its first bytes are missing".into()
    } else if is_onnx(bytes) {
        "an ONNX model: build a plan from it first (jetrt build --onnx … --engine …), or run it with jetrt.load(path, runtime=\"onnx_cpu\")"
            .into()
    } else if bytes.iter().all(|&b| b == 0) {
        "all zeros (an interrupted copy leaves such a file)".into()
    } else {
        format!(
            "no TensorRT plan: it begins with {:02x?} and a plan begins with 'ftrt'",
            &bytes[..bytes.len().min(8)]
        )
    }
}

/// An ONNX file is a protobuf that begins with field 1 (ir_version, a varint) and goes on with a string or the graph.
fn is_onnx(bytes: &[u8]) -> bool {
    matches!(bytes, [0x08, version, tag, ..] if (1..=30).contains(version) && matches!(tag, 0x12 | 0x1a | 0x22 | 0x28 | 0x32 | 0x3a | 0x42))
}

/// A plan file, mapped: the host holds no copy of it.
#[derive(Debug)]
pub struct PlanFile {
    pub path: PathBuf,
    pub header: Header,
    map: Mmap,
}

impl PlanFile {
    pub fn open(path: &Path) -> Result<PlanFile> {
        let refuse = |found: String| {
            Error::new(
                Kind::Plan,
                format!(
                    "{}: this is {found}. Give the path of a TensorRT plan (.engine, .plan, .trt).",
                    path.display()
                ),
            )
            .with("path", path.display().to_string())
            .with("found", found)
            .with("allowed", "a TensorRT plan file")
        };
        let file = File::open(path).map_err(|e| Error::file(path, "cannot open the plan", &e))?;
        let about = file.metadata().map_err(|e| Error::file(path, "cannot read the plan", &e))?;
        if about.is_dir() {
            let plans = plans_in(path);
            return Err(refuse(if plans.is_empty() {
                "a directory".into()
            } else {
                format!("a directory (with {})", plans.join(", "))
            }));
        }
        if about.len() == 0 {
            return Err(refuse(what_it_is(&[])));
        }
        // SAFETY: the map is read-only. A file truncated by somebody else while it is mapped would raise SIGBUS; whoever
        // replaces a plan must do so by rename, as jetrt's own writers do.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::file(path, "cannot map the plan", &e))?;
        // TensorRT reads it once, from the front.
        let _ = map.advise(memmap2::Advice::Sequential);
        let header = parse(&map).map_err(refuse)?;
        Ok(PlanFile {
            path: path.to_path_buf(),
            header,
            map,
        })
    }

    /// The plan itself, without a prefix.
    pub fn plan(&self) -> &[u8] {
        &self.map[self.header.offset..]
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Checks the `<plan>.sha256` beside the file, when there is one; says whether there was.
    pub fn verify_sidecar(&self) -> Result<bool> {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".sha256");
        let sidecar = PathBuf::from(name);
        let text = match std::fs::read_to_string(&sidecar) {
            Ok(t) => t,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::file(&sidecar, "cannot read the checksum beside the plan", &e)),
        };
        // The format of sha256sum: the digest first, perhaps a file name behind it.
        let expected = text.split_whitespace().next().unwrap_or("").to_ascii_lowercase();
        if expected.len() != 64 || !expected.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Error::new(
                Kind::Plan,
                format!(
                    "{}: no SHA-256 digest in this file. Write one with sha256sum, or remove the file.",
                    sidecar.display()
                ),
            )
            .with("path", sidecar.display().to_string()));
        }
        let found: String = Sha256::digest(&self.map[..]).iter().map(|b| format!("{b:02x}")).collect();
        if found != expected {
            return Err(Error::new(
                Kind::Plan,
                format!(
                    "{}: its SHA-256 is {found}, and {} says {expected}: the plan is damaged or was replaced. Copy or build it again; verify=\"off\" loads it anyway.",
                    self.path.display(),
                    sidecar.display()
                ),
            )
            .with("path", self.path.display().to_string())
            .with("found", found)
            .with("allowed", expected));
        }
        Ok(true)
    }
}

/// The plan files of a directory, for the error message.
fn plans_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| [".engine", ".plan", ".trt"].iter().any(|s| n.ends_with(s)))
        .collect();
    names.sort();
    names.truncate(5);
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan(length: u64, total: usize) -> Vec<u8> {
        let mut b = vec![7u8; total];
        b[..4].copy_from_slice(MAGIC);
        b[4..8].copy_from_slice(&2u32.to_le_bytes());
        b[16..24].copy_from_slice(&length.to_le_bytes());
        b[24..28].copy_from_slice(&[10, 6, 0, 26]);
        b
    }

    #[test]
    fn header_of_a_plan_and_behind_a_json_prefix() {
        let h = parse(&plan(64, 64)).unwrap();
        assert_eq!((h.version.to_string().as_str(), h.serialization, h.offset), ("10.6.0.26", 2, 0));
        let json = br#"{"stride": 32}"#;
        let mut b = (json.len() as u32).to_le_bytes().to_vec();
        b.extend_from_slice(json);
        let offset = b.len();
        b.extend(plan(64, 64));
        let h = parse(&b).unwrap();
        assert_eq!((h.offset, h.metadata.as_deref()), (offset, Some(r#"{"stride": 32}"#)));
        assert!(parse(&b[..offset]).unwrap_err().contains("JSON prefix"));
    }

    #[test]
    fn what_is_not_a_plan_is_named() {
        let say = |b: &[u8]| parse(b).unwrap_err();
        assert!(say(b"").contains("empty"));
        assert!(say(&plan(65, 64)).contains("truncated TensorRT plan: 64 bytes of 65"));
        assert!(say(b"ftrt\x02\0\0").contains("truncated"));
        assert!(say(b"\x08\x08\x12\x07pytorch").contains("ONNX"));
        assert!(say(b"\x08\x0a:\x05x").contains("ONNX"));
        assert!(say(b"PK\x03\x04rest").contains("zip"));
        assert!(say(b"\x7fELF\x02").contains("shared library"));
        assert!(say(b"version https://git-lfs.github.com/spec/v1").contains("LFS"));
        assert!(say(&[0; 100]).contains("zeros"));
        assert!(say(b"hello there").contains("begins with"));
    }

    #[test]
    fn the_length_field_is_believed_only_where_it_was_measured() {
        let mut b = plan(1 << 40, 64);
        b[4] = 0;
        assert!(parse(&b).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(b in prop::collection::vec(any::<u8>(), 0..80), magic in any::<bool>()) {
            let mut b = b;
            if magic && b.len() >= 4 { b[..4].copy_from_slice(MAGIC); }
            let _ = parse(&b);
        }
    }
}

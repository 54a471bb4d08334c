//! Small files of the kernel, below a root folder so that tests can lay out those of a board.

use std::fs::{self, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Paths are relative to the root. A trait, since no regular file answers EAGAIN as a power-gated sensor does.
pub trait Files {
    /// The text without surrounding blanks; an error where there is none.
    fn read(&self, path: &str) -> Result<String>;
    /// Names in a folder, sorted; none where it cannot be listed.
    fn names(&self, folder: &str) -> Vec<String>;
}

pub struct Root(PathBuf);

impl Root {
    pub fn new(root: impl Into<PathBuf>) -> Root {
        Root(root.into())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(Path::new(path))
    }
}

impl Files for Root {
    fn read(&self, path: &str) -> Result<String> {
        // A named pipe in a sensor's place would block both the opening and the reading.
        let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.path(path))?;
        let mut buffer = [0; 512];
        // One call, as sysfs wants it; what does not fit is no sensor's value.
        let n = file.read(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..n]);
        match text.trim_matches(|c: char| c.is_whitespace() || c == '\0') {
            "" => Err(Error::new(ErrorKind::InvalidData, "empty")),
            text => Ok(text.to_owned()),
        }
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(folder)) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("jetrt-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn what_is_there_and_what_is_not() {
        let at = folder("files");
        fs::write(at.join("b"), " 42\n").unwrap();
        fs::write(at.join("a"), "name\0\n").unwrap();
        fs::write(at.join("empty"), "\n").unwrap();
        fs::write(at.join("binary"), [0xff, 0xfe, b'1']).unwrap();
        let root = Root::new(&at);
        assert_eq!(root.read("b").unwrap(), "42");
        assert_eq!(root.read("a").unwrap(), "name");
        assert_eq!(root.read("empty").unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(root.read("binary").unwrap(), "\u{fffd}\u{fffd}1");
        assert_eq!(root.read("none").unwrap_err().kind(), ErrorKind::NotFound);
        assert!(root.read(".").is_err(), "a folder is no file");
        assert_eq!(root.names("."), ["a", "b", "binary", "empty"]);
        assert!(root.names("none").is_empty() && root.names("a").is_empty());
        fs::remove_dir_all(at).unwrap();
    }

    #[test]
    fn a_file_that_never_ends_is_read_once() {
        assert_eq!(Root::new("/").read("dev/zero").unwrap_err().kind(), ErrorKind::InvalidData);
    }
}

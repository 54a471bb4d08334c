//! TensorRT's log lines: a bounded queue that any native thread may fill and that Python drains when it holds the GIL
//! anyway. Nothing here takes the GIL or blocks on Python, so a logging worker thread of TensorRT can never deadlock.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;
use std::thread::{self, ThreadId};

/// TensorRT's severities (abi/enums.csv).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    InternalError = 0,
    Error = 1,
    Warning = 2,
    Info = 3,
    Verbose = 4,
}

impl Severity {
    pub fn from_code(code: i32) -> Severity {
        match code {
            0 => Severity::InternalError,
            1 => Severity::Error,
            2 => Severity::Warning,
            3 => Severity::Info,
            _ => Severity::Verbose,
        }
    }

    /// The level of Python's `logging`.
    pub fn python_level(self) -> i32 {
        match self {
            Severity::InternalError => 50,
            Severity::Error => 40,
            Severity::Warning => 30,
            Severity::Info => 20,
            Severity::Verbose => 10,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Line {
    pub severity: Severity,
    pub text: String,
    thread: ThreadId,
    number: u64,
}

/// Drops its oldest line when full and counts what was dropped before Python saw it.
pub struct Queue {
    inner: Mutex<Inner>,
    /// Number of the next line, and whether Python has something to read: asked at every call, so without the lock.
    next: AtomicU64,
    waiting: AtomicBool,
    capacity: usize,
}

struct Inner {
    lines: VecDeque<Line>,
    drained: u64,
    lost: u64,
}

impl Queue {
    pub const fn new(capacity: usize) -> Queue {
        let inner = Inner {
            lines: VecDeque::new(),
            drained: 0,
            lost: 0,
        };
        Queue {
            inner: Mutex::new(inner),
            next: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            capacity,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic while holding the lock leaves plain data behind: go on with it.
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn push(&self, severity: Severity, text: String) {
        let mut q = self.lock();
        if q.lines.len() == self.capacity {
            if let Some(old) = q.lines.pop_front() {
                q.lost += u64::from(old.number >= q.drained);
            }
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.waiting.store(true, Ordering::Release);
        q.lines.push_back(Line {
            severity,
            text,
            thread: thread::current().id(),
            number,
        });
    }

    /// A point in time, for [`Queue::since`].
    #[inline]
    pub fn mark(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Warnings and errors logged since the mark: those of this thread, and, when it logged none, those of any thread
    /// (TensorRT has worker threads). At most the last 32.
    pub fn since(&self, mark: u64) -> Vec<String> {
        let me = thread::current().id();
        let q = self.lock();
        let recent: Vec<&Line> = q
            .lines
            .iter()
            .filter(|l| l.number >= mark && l.severity <= Severity::Warning)
            .collect();
        let mine: Vec<&&Line> = recent.iter().filter(|l| l.thread == me).collect();
        let pick = |l: &Line| l.text.clone();
        let all: Vec<String> = if mine.is_empty() {
            recent.iter().map(|l| pick(l)).collect()
        } else {
            mine.iter().map(|l| pick(l)).collect()
        };
        all[all.len().saturating_sub(32)..].to_vec()
    }

    /// The lines that Python has not seen yet, and how many were lost before it could.
    pub fn drain(&self) -> (Vec<(Severity, String)>, u64) {
        let mut q = self.lock();
        self.waiting.store(false, Ordering::Release);
        let lost = std::mem::take(&mut q.lost);
        let from = q.drained;
        q.drained = self.next.load(Ordering::Relaxed);
        let lines = q
            .lines
            .iter()
            .filter(|l| l.number >= from)
            .map(|l| (l.severity, l.text.clone()))
            .collect();
        (lines, lost)
    }

    /// Is there anything to drain?
    #[inline]
    pub fn pending(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }
}

/// The process's one queue: TensorRT keeps the first logger it is given for the whole process.
pub static TENSORRT: Queue = Queue::new(1024);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_queue_drops_the_oldest_and_counts_it() {
        let q = Queue::new(2);
        for i in 0..5 {
            q.push(Severity::Error, i.to_string());
        }
        let (lines, lost) = q.drain();
        assert_eq!(lines.iter().map(|l| l.1.as_str()).collect::<Vec<_>>(), ["3", "4"]);
        assert_eq!(lost, 3);
        assert!(!q.pending());
        // Lines that Python has seen are not "lost" when they make room.
        q.push(Severity::Error, "5".into());
        assert_eq!(q.drain().1, 0);
    }

    #[test]
    fn since_prefers_the_own_thread_and_leaves_out_chatter() {
        let q = Queue::new(16);
        q.push(Severity::Error, "before".into());
        let mark = q.mark();
        q.push(Severity::Info, "chatter".into());
        std::thread::scope(|s| {
            s.spawn(|| q.push(Severity::Error, "other".into()));
        });
        assert_eq!(q.since(mark), ["other"]);
        q.push(Severity::Warning, "mine".into());
        assert_eq!(q.since(mark), ["mine"]);
    }
}

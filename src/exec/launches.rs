//! Launches of graphs that share memory: one at a time, each behind the one before, on whatever threads and streams.

use crate::cuda::{Device, Event, Stream, PER_THREAD};
use crate::error::{Error, Kind, Result};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread::ThreadId;

pub struct Launches {
    pub device: &'static Device,
    state: Mutex<State>,
    idle: Condvar,
}

struct State {
    /// The thread that launches now.
    running: Option<ThreadId>,
    /// The stream of the last launch; the event is recorded behind it.
    last: Option<u64>,
    event: Event,
}

impl Launches {
    pub fn new(device: &'static Device) -> Result<Launches> {
        let state = State {
            running: None,
            last: None,
            event: Event::new(device)?,
        };
        Ok(Launches {
            device,
            state: Mutex::new(state),
            idle: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until no other thread launches. Called without the GIL: that thread may need it.
    fn idle(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while let Some(thread) = state.running {
            if thread == std::thread::current().id() {
                return Err(Error::new(
                    Kind::GraphCapture,
                    "a graph of this thread is being launched, and a signal handler or a finaliser uses or closes it meanwhile. Do that after the call.",
                )
                .with("reason", "called while it is being launched"));
            }
            state = self.idle.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        Ok(state)
    }

    /// Does this very thread launch now (and a signal handler or a finaliser asks)?
    pub fn by_this_thread(&self) -> bool {
        self.lock().running == Some(std::thread::current().id())
    }

    /// This thread's turn to launch on `stream`, behind the last launch.
    pub fn turn(&self, stream: u64) -> Result<Turn<'_>> {
        let mut state = self.idle()?;
        let stream = Stream::borrowed(stream);
        // The per-thread default stream is another one in each thread, under one handle.
        if state.last.is_some_and(|last| last != stream.handle() || last == PER_THREAD) {
            stream.wait(&state.event)?;
        }
        state.running = Some(std::thread::current().id());
        Ok(Turn { launches: self, stream })
    }

    /// Blocks until nobody launches and all that was launched is done; an error when this thread itself is launching.
    pub fn wait(&self) -> Result<()> {
        let state = self.idle()?;
        match state.last {
            Some(_) => state.event.synchronize(),
            None => Ok(()),
        }
    }
}

/// One launch. When it goes, the next one may come, behind whatever this one has enqueued.
pub struct Turn<'a> {
    launches: &'a Launches,
    pub stream: Stream,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let _entered = self.launches.device.enter_anyway();
        let mut state = self.launches.lock();
        if state.event.record(&self.stream).is_err() {
            // Then the host waits: the next launch must not overtake.
            let _ = self.stream.synchronize();
        }
        state.last = Some(self.stream.handle());
        state.running = None;
        drop(state);
        self.launches.idle.notify_all();
    }
}

//! A record of one capture of the caller's: which engines took part, and whether its graph may still be launched. It keeps
//! those engines, and what they enqueued needs, until it is released.

use super::executor::{locked, Executor};
use super::launches::{Launches, Turn};
use crate::cuda::{captured_nodes, Stream};
use crate::error::{Error, Kind, Result};
use std::sync::{Arc, Mutex, Weak};

pub struct Captured {
    /// The driver's number of the capture, unique in the life of the process.
    id: u64,
    stream: u64,
    pub launches: Arc<Launches>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    engines: Vec<Arc<Executor>>,
    /// The name of an engine that was closed since.
    closed: Option<String>,
    released: bool,
}

static RECORDS: Mutex<Vec<Weak<Captured>>> = Mutex::new(Vec::new());

impl Captured {
    /// A record of the capture that runs on `stream` now.
    pub fn of_stream(stream: u64, launches: Arc<Launches>) -> Result<Arc<Captured>> {
        let _entered = launches.device.enter()?;
        let Some(id) = Stream::borrowed(stream).capture_id()? else {
            return Err(
                Error::new(Kind::GraphCapture, format!("no capture runs on stream {stream:#x}: begin it first"))
                    .with("reason", "no capture"),
            );
        };
        let record = Arc::new(Captured {
            id,
            stream,
            launches,
            state: Mutex::default(),
        });
        let mut records = locked(&RECORDS);
        records.retain(|r| r.strong_count() > 0);
        records.push(Arc::downgrade(&record));
        Ok(record)
    }

    /// The record of that capture, if somebody keeps one.
    pub(super) fn find(id: u64) -> Option<Arc<Captured>> {
        locked(&RECORDS).iter().filter_map(Weak::upgrade).find(|r| r.id == id)
    }

    /// An engine takes part. True when it did not before.
    pub(super) fn join(&self, engine: &Arc<Executor>) -> bool {
        let mut state = locked(&self.state);
        let new = !state.engines.iter().any(|e| Arc::ptr_eq(e, engine));
        if new {
            state.engines.push(Arc::clone(engine));
        }
        new
    }

    /// The names of the engines that took part.
    pub fn engines(&self) -> Vec<String> {
        locked(&self.state).engines.iter().map(|e| e.engine.label.clone()).collect()
    }

    /// How many nodes its graph has so far, while the capture runs.
    pub fn nodes(&self) -> Result<usize> {
        let _entered = self.launches.device.enter()?;
        captured_nodes(&Stream::borrowed(self.stream))
    }

    /// May the graph be launched: was it not released, and none of its engines closed?
    pub fn alive(&self) -> bool {
        let state = locked(&self.state);
        !state.released && state.closed.is_none()
    }

    /// The turn to launch the graph on `stream`. `None` when it was released.
    pub fn turn(&self, stream: u64) -> Result<Option<Turn<'_>>> {
        let turn = self.launches.turn(stream)?;
        // Asked in turn: who closes an engine marks this first and then waits for the turn to end.
        let state = locked(&self.state);
        if let Some(label) = &state.closed {
            return Err(Error::new(
                Kind::Closed,
                format!("engine '{label}' is closed, and this graph launches it. Load the engine again and capture the graph anew."),
            )
            .with("engine", label.clone()));
        }
        Ok((!state.released).then_some(turn))
    }

    /// One of the engines is being closed: no launch from here on, and those under way are over when this returns.
    pub(super) fn engine_closes(&self, label: &str) {
        locked(&self.state).closed.get_or_insert_with(|| label.into());
        let _ = self.launches.wait();
    }

    /// No launch from here on; returns when those under way are over. The graph may then be destroyed.
    pub fn stop(&self) -> Result<()> {
        let before = std::mem::replace(&mut locked(&self.state).released, true);
        self.launches.wait().inspect_err(|_| {
            // In the middle of a launch of this very thread.
            locked(&self.state).released = before;
        })
    }

    /// Stops, and gives back what the engines keep for the graph, and the engines themselves.
    pub fn release(&self) -> Result<()> {
        self.stop()?;
        let engines = std::mem::take(&mut locked(&self.state).engines);
        for engine in &engines {
            engine.release_capture(self.id);
        }
        Ok(())
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        let _ = self.release();
    }
}

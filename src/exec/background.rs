//! What a live call must not wait for: comparing a new graph with eager, and giving back what the GPU may still use.
//! One thread, started when first needed and joined by `close`.

use crate::cuda::{Device, Event, Relaxed, Stream};
use crate::error::Result;
use std::sync::mpsc::{channel, Sender};
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;
/// Things to be dropped, and the streams that may still work on them.
type Leftover = (Vec<u64>, Box<dyn Send>);

pub struct Background {
    device: &'static Device,
    worker: Mutex<Option<(Sender<Job>, JoinHandle<()>)>>,
    /// What could not be given back yet.
    leftovers: Mutex<Vec<Leftover>>,
}

impl std::fmt::Debug for Background {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Background")
    }
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Background {
    pub fn new(device: &'static Device) -> Background {
        Background {
            device,
            worker: Mutex::new(None),
            leftovers: Mutex::default(),
        }
    }

    /// Runs the job after those before it; here and now where no thread can be had.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut worker = locked(&self.worker);
        if worker.is_none() {
            let (sender, jobs) = channel::<Job>();
            let device = self.device;
            let work = move || {
                let _entered = device.enter_anyway();
                // A capture that another thread runs must not mind.
                let _relaxed = Relaxed::enter();
                jobs.into_iter().for_each(|job| job());
            };
            *worker = std::thread::Builder::new()
                .name("jetrt-background".into())
                .spawn(work)
                .ok()
                .map(|handle| (sender, handle));
        }
        let job: Job = Box::new(job);
        let refused = match &*worker {
            Some((sender, _)) => sender.send(job).err().map(|e| e.0),
            None => Some(job),
        };
        drop(worker);
        if let Some(job) = refused {
            job();
        }
    }

    /// Frees things behind the work that is enqueued on these streams by now: TensorRT must not lose a context that is at
    /// work, and freeing device memory waits for the whole GPU.
    pub fn free_after<T: Send + 'static>(&self, things: T, streams: &[u64]) {
        let point = |&handle: &u64| -> Result<Option<Event>> {
            let stream = Stream::borrowed(handle);
            if stream.capture_id()?.is_some() {
                return Ok(None);
            }
            let event = Event::new(self.device)?;
            event.record(&stream)?;
            Ok(Some(event))
        };
        match streams.iter().map(point).collect::<Result<Option<Vec<_>>>>() {
            Ok(Some(events)) => self.run(move || {
                for event in events {
                    let _ = event.synchronize();
                }
                drop(things);
            }),
            // A stream that is being captured, or a driver that refuses: kept until `close`.
            _ => locked(&self.leftovers).push((streams.to_vec(), Box::new(things))),
        }
    }

    /// Waits for the jobs so far.
    pub fn settle(&self) {
        let (done, wait) = channel::<()>();
        self.run(move || drop(done));
        let _ = wait.recv();
    }

    /// Until everything is done.
    pub fn close(&self) {
        if let Some((sender, handle)) = locked(&self.worker).take() {
            drop(sender);
            let _ = handle.join();
        }
        for (streams, things) in std::mem::take(&mut *locked(&self.leftovers)) {
            for handle in streams {
                let _ = Stream::borrowed(handle).synchronize();
            }
            drop(things);
        }
    }
}

//! The newest value of something, for readers that must not wait.
//!
//! On `arc_swap` rather than a seqlock: a seqlock's readers spin while its writer is descheduled in the middle of a write, and its
//! value cannot own memory. Here a reader gets the old value or the new one, whole, in a bounded number of steps.

use arc_swap::ArcSwapOption;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub struct Latest<T> {
    slot: ArcSwapOption<(Instant, T)>,
    max_age: Duration,
}

impl<T> Latest<T> {
    /// A value counts as long as it is not older than `max_age`.
    pub fn new(max_age: Duration) -> Latest<T> {
        Latest {
            slot: ArcSwapOption::empty(),
            max_age,
        }
    }

    pub fn publish(&self, value: T) {
        self.slot.store(Some(Arc::new((Instant::now(), value))));
    }

    pub fn clear(&self) {
        self.slot.store(None);
    }

    /// What `read` makes of the value, or `None` when there is none or it is too old.
    #[inline]
    pub fn read<R>(&self, read: impl FnOnce(&T) -> R) -> Option<R> {
        let held = self.slot.load();
        let (at, value) = held.as_deref()?;
        (at.elapsed() <= self.max_age).then(|| read(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn nothing_then_something_then_nothing() {
        let cell = Latest::new(LONG);
        assert_eq!(cell.read(|n: &u32| *n), None);
        cell.publish(1);
        cell.publish(2);
        assert_eq!(cell.read(|n| *n), Some(2));
        cell.clear();
        assert_eq!(cell.read(|n| *n), None);
    }

    #[test]
    fn an_old_value_is_none_and_a_new_one_counts_again() {
        let cell = Latest::new(Duration::from_millis(20));
        cell.publish(1);
        thread::sleep(Duration::from_millis(40));
        assert_eq!(cell.read(|n| *n), None);
        let patient = Latest::new(LONG);
        patient.publish(1);
        thread::sleep(Duration::from_millis(40));
        assert_eq!(patient.read(|n| *n), Some(1));
    }

    /// A value of many words, all of which follow from the first: a mixture of two would show.
    fn whole(n: u64) -> [u64; 32] {
        std::array::from_fn(|i| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32) ^ n)
    }

    #[test]
    fn readers_never_see_a_torn_or_an_older_value() {
        let cell = Latest::new(LONG);
        let stop = AtomicBool::new(false);
        let seen = AtomicU64::new(0);
        cell.publish((0, whole(0)));
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    let mut last = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let (n, words) = cell.read(|v| *v).expect("published before the readers started");
                        assert_eq!(words, whole(n));
                        assert!(n >= last, "{n} after {last}");
                        seen.fetch_add(u64::from(n > last), Ordering::Relaxed);
                        last = n;
                    }
                });
            }
            for n in 1..200_000 {
                cell.publish((n, whole(n)));
            }
            stop.store(true, Ordering::Relaxed);
        });
        // Otherwise the readers ran before or after the writer, and the test showed nothing.
        assert!(seen.load(Ordering::Relaxed) > 10, "readers saw {seen:?} changes");
    }

    #[test]
    fn several_writers_do_not_mix_either() {
        let cell = Latest::new(LONG);
        cell.publish((0, whole(0)));
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let writers: Vec<_> = (0..3)
                .map(|w| {
                    let cell = &cell;
                    s.spawn(move || {
                        for n in 0..50_000 {
                            if n % 97 == 0 {
                                cell.clear();
                            }
                            cell.publish((n * 3 + w, whole(n * 3 + w)));
                        }
                    })
                })
                .collect();
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if let Some((n, words)) = cell.read(|v| *v) {
                        assert_eq!(words, whole(n));
                    }
                }
            });
            for w in writers {
                w.join().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn values_are_freed_once() {
        let value = Arc::new(());
        let cell = Latest::new(LONG);
        for _ in 0..100 {
            cell.publish(value.clone());
        }
        assert_eq!(Arc::strong_count(&value), 2);
        let kept = cell.read(Arc::clone);
        cell.clear();
        assert_eq!(Arc::strong_count(&value), 2);
        drop(kept);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    proptest! {
        /// Any sequence of steps leaves what the last one of them says.
        #[test]
        fn as_a_plain_variable(steps in proptest::collection::vec(proptest::option::of(any::<u64>()), 0..50)) {
            let cell = Latest::new(LONG);
            for step in steps {
                match step {
                    Some(n) => cell.publish(n),
                    None => cell.clear(),
                }
                prop_assert_eq!(cell.read(|n| *n), step);
            }
        }
    }
}

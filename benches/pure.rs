//! What a call costs before CUDA and TensorRT are asked: shapes, strides, profiles, runs of host copies. And what it costs to ask how hot
//! the machine is.
//!
//!     cargo bench --no-default-features --bench pure

use _core::dtype::DType;
use _core::exec::plan::runs;
use _core::shape::{first_fitting, is_contiguous, Dims, Range};
use _core::telemetry::{Latest, Sample};
use _core::tensor::{Place, TensorView};
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn dims(d: &[i64]) -> Dims {
    Dims::new(d).expect("at most eight dimensions")
}

/// The five inputs of a diffusion transformer.
const DIT5: [&[i64]; 5] = [&[1, 41, 64], &[1, 122, 64], &[1], &[1, 122], &[1, 122]];

fn ranges(max: i64, inputs: usize) -> Vec<Range> {
    let whole = |d: &&[i64]| Range {
        min: dims(&vec![1; d.len()]),
        opt: dims(d),
        max: dims(&d.iter().map(|n| n * max).collect::<Vec<_>>()),
    };
    DIT5.iter().cycle().take(inputs).map(whole).collect()
}

fn shapes(c: &mut Criterion) {
    c.bench_function("five shapes read and multiplied out", |b| {
        b.iter(|| DIT5.iter().map(|d| dims(black_box(d)).volume().expect("static")).sum::<u64>())
    });
    let (packed, pitched) = ([122 * 64, 64, 1], [128 * 64, 64, 1]);
    c.bench_function("contiguity of a row-major tensor", |b| {
        b.iter(|| is_contiguous(black_box(DIT5[1]), black_box(&packed)))
    });
    c.bench_function("contiguity of a pitched tensor", |b| {
        b.iter(|| is_contiguous(black_box(&[2, 122, 64]), black_box(&pitched)))
    });
    c.bench_function("five views", |b| {
        b.iter(|| {
            for d in DIT5 {
                let d = dims(black_box(d));
                black_box(TensorView::new(
                    4096,
                    DType::Bf16,
                    d,
                    Some(d.contiguous_strides()),
                    Place::Device(0),
                ));
            }
        })
    });
}

fn profiles(c: &mut Criterion) {
    let mut group = c.benchmark_group("first profile that fits");
    // The last profile is the first that fits: the longest search.
    for (profiles, inputs) in [(1, 5), (8, 5), (8, 60)] {
        let mut table: Vec<_> = (1..profiles).map(|_| ranges(0, inputs)).collect();
        table.push(ranges(2, inputs));
        let given: Vec<Dims> = DIT5.iter().cycle().take(inputs).map(|d| dims(d)).collect();
        assert_eq!(first_fitting(&table, &given), Some(profiles - 1));
        group.bench_function(BenchmarkId::from_parameter(format!("{profiles} profiles, {inputs} inputs")), |b| {
            b.iter(|| first_fitting(black_box(&table), black_box(&given)))
        });
    }
}

fn host_copies(c: &mut Criterion) {
    let (frame, pitched) = (dims(&[3, 64, 64]), dims(&[64 * 128, 128, 1]));
    assert_eq!(runs(&frame, &pitched).map(|(_, n)| n).sum::<i64>(), 3 * 64 * 64);
    c.bench_function("runs of a pitched 3 x 64 x 64 frame", |b| {
        b.iter(|| {
            runs(black_box(&frame), black_box(&pitched))
                .map(|(at, n)| at ^ n)
                .fold(0, |a, b| a ^ b)
        })
    });
}

/// Temperatures, clocks and throttling as any thread reads them, with nobody writing and with a writer that never rests.
fn telemetry(c: &mut Criterion) {
    let latest = Latest::new(Duration::from_secs(3600));
    let sample = Sample {
        gpu_temp_c: Some(50.0),
        ..Sample::default()
    };
    let read = |s: &Sample| (s.cpu_temp_c, s.gpu_temp_c, s.throttle_active, s.gpu_clock_mhz);
    latest.publish(sample.clone());
    c.bench_function("telemetry, one reading", |b| b.iter(|| black_box(&latest).read(read)));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                latest.publish(sample.clone());
            }
        });
        c.bench_function("telemetry, one reading while another thread publishes", |b| {
            b.iter(|| black_box(&latest).read(read))
        });
        stop.store(true, Ordering::Relaxed);
    });
}

criterion_group!(benches, shapes, profiles, host_copies, telemetry);
criterion_main!(benches);

"""`jetrt.graph` on a GPU: the bits of eager runs, torch's own state after everything, memory, streams, threads."""

from __future__ import annotations

import gc
import itertools
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import exits
import pytest
import reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

LONG = 100_000_000  # cycles: some 50 ms
MODES = ("plain", "no_grad", "inference")


def mode_of(name):
    return {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[name]()


class Head(torch.nn.Module):
    """A denoising loop as GR00T's action head has it: an encoder, a DiT engine four times, random numbers."""

    def __init__(self, dit, noisy=True, steps=4):
        super().__init__()
        torch.manual_seed(11)
        self.dit, self.noisy, self.steps = dit, noisy, steps
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.encode = torch.nn.Sequential(
            torch.nn.Linear(32, 256, **options), torch.nn.SiLU(), torch.nn.Linear(256, 64, **options)
        )
        self.norm = torch.nn.LayerNorm(64, **options)
        self.decode = torch.nn.Linear(64, 32, **options)
        self.requires_grad_(False)

    def forward(self, actions, features, image_mask, attention_mask):
        if self.noisy:
            actions = actions + torch.randn_like(actions)
        for step in range(self.steps):
            timestep = torch.full((1,), step * 250, device="cuda", dtype=torch.int64)
            state = self.norm(self.encode(actions))
            velocity = self.dit(
                sa_embs=state, vl_embs=features, timestep=timestep, image_mask=image_mask,
                backbone_attention_mask=attention_mask,
            )["output"]  # fmt: skip
            actions = actions + self.decode(velocity) / self.steps
        return {"actions": actions, "features": features[:, :2]}


def arguments(seed=0, length=122):
    rng = torch.Generator("cuda").manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, device="cuda", generator=rng).to(torch.bfloat16)

    def mask():
        return torch.rand(1, length, device="cuda", generator=rng) < 0.8

    return numbers(1, 41, 32), numbers(1, length, 64), mask(), mask()


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def seeded(fn, *args, seed=7):
    torch.manual_seed(seed)
    return fn(*args)


@pytest.fixture
def graph():
    """`graph(fn, examples, …)`, closed after the test, before its engines are."""
    from jetrt.graph import graph as make

    made = []

    def capture(*args, **options):
        made.append(make(*args, **options))
        return made[-1]

    yield capture
    while made:
        made.pop().close()


@pytest.fixture
def head(load):
    return Head(load("dit5", graphs="off"))


def torch_is_well():
    """Random numbers, captures of torch's own, its allocator: all as after a start."""
    assert same_bits(seeded(torch.randn, 5), seeded(torch.randn, 5))
    first, second = (seeded(lambda: torch.randn(9, device="cuda")) for _ in range(2))
    assert same_bits(first, second)
    x, own = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(own):
        y = x + torch.rand(4, device="cuda")
    torch.manual_seed(1)
    own.replay()
    torch.manual_seed(1)
    assert same_bits(y, torch.rand(4, device="cuda"))
    # Memory that another stream used comes back: not while the allocator believes in a capture.
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    block = torch.zeros(1 << 20, device="cuda")
    block.record_stream(side)
    del block
    torch.cuda.synchronize()
    torch.zeros(1, device="cuda")
    assert torch.cuda.memory_stats()["active_bytes.all.current"] <= before + 1024
    own.reset()


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
def test_a_head_gives_the_bits_of_eager_runs(graph, head, noisy) -> None:
    head.noisy = noisy
    captured = graph(head, max_shapes=4)
    reports = captured.prepare(*(arguments(length=s) for s in (1, 122, 300, 512)))
    assert [(r["graph"], r["reason"], len(r["engines"])) for r in reports] == [(True, None, 1)] * 4
    held = []
    for seed, length in itertools.product(range(5), (122, 300, 512, 1)):
        args = arguments(seed, length)
        held.append((seeded(captured, *args, seed=seed), seeded(head, *args, seed=seed)))
    for got, wanted in held:
        assert same_bits(got, wanted)
    assert captured.stats["replays"] == 20
    assert captured.stats["eager"] == 0


@pytest.mark.parametrize("name", ["mlp", "conv_fp16"])
@pytest.mark.parametrize("options", [{"graphs": "off"}, {}, {"outputs": "fresh"}])
def test_engines_and_their_references(graph, load, engines, name, options) -> None:
    engine = load(name, **options)
    output = next(iter(engine.outputs))
    n = reference.SIZES[name][1]
    inputs = [reference.make("torch", reference.random_input(name, n, seed)) for seed in range(4)]
    captured = graph(lambda x: engine(x=x * 1)[output] + 0, (inputs[0],))
    for x in inputs:
        got = captured(x)
        assert same_bits(got, captured.fn(x))
        reference.check(name, engines, x.cpu().numpy(), got.cpu().numpy())
    assert captured.stats["replays"] == 4


def test_random_numbers_go_on_as_in_eager_runs(graph, head) -> None:
    captured = graph(head, arguments())

    def run(fn):
        torch.manual_seed(3)
        return [(fn(*arguments(k))["actions"], torch.randn(4, device="cuda")) for k in range(20)]

    assert same_bits(run(captured), run(head))
    assert captured.stats["replays"] == 20


def test_preparing_leaves_random_numbers_alone(graph, head) -> None:
    args = arguments()
    copies = [t.clone() for t in args]
    torch.manual_seed(5)
    torch.randn(7, device="cuda")
    states = torch.cuda.get_rng_state(), torch.get_rng_state()
    graph(head, args)
    assert torch.equal(states[0], torch.cuda.get_rng_state())
    assert torch.equal(states[1], torch.get_rng_state())
    assert same_bits(copies, list(args))


@pytest.mark.parametrize(("prepared", "called"), list(itertools.product(MODES, MODES)))
@pytest.mark.parametrize("outputs", ["copy", "static"])
def test_prepared_in_one_mode_and_called_in_another(graph, head, prepared, called, outputs) -> None:
    with mode_of(prepared):
        captured = graph(head, arguments(), outputs=outputs)
    for order in ((called, prepared), (prepared, called)):
        for seed, mode in enumerate(order):
            with mode_of(mode):
                args = arguments(seed)
                got = seeded(captured, *args)
                assert same_bits(got, seeded(head, *args))
                if outputs == "copy":
                    assert got["actions"].is_inference() == (mode == "inference")
                    got["actions"].add_(1)
    assert captured.stats["replays"] == 4


def test_a_capture_of_inference_mode_before(graph, head) -> None:
    """torch's seed tensors are then tensors of inference mode, which replays write."""
    x = torch.zeros(4, device="cuda")
    own = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(own):
        x + torch.rand(4, device="cuda")
    captured = graph(head, arguments())
    assert same_bits(seeded(captured, *arguments(1)), seeded(head, *arguments(1)))
    with torch.inference_mode():
        assert same_bits(seeded(captured, *arguments(1)), seeded(head, *arguments(1)))
    assert captured.stats["replays"] == 2


@pytest.mark.parametrize("prepared", MODES)
def test_results_that_need_gradients(graph, prepared) -> None:
    weight = torch.nn.Parameter(torch.full((3,), 2.0, device="cuda"))
    x = torch.ones(3, device="cuda")
    with mode_of(prepared):
        captured = graph(lambda x: x * weight, (x,))
    assert captured(x).requires_grad
    assert "results need gradients" in captured.last_reason
    with torch.inference_mode():
        assert same_bits(captured(x), torch.full((3,), 2.0, device="cuda"))
    assert captured.stats["replays"] == 1


def test_deterministic_mode(graph, head) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        captured = graph(head, arguments())
        assert same_bits(seeded(captured, *arguments(1)), seeded(head, *arguments(1)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert captured.stats["replays"] == 1


def test_autocast_and_its_cache_of_weights(graph) -> None:
    """Autocast frees the weights that it has cast when the context ends: the graph must not read them afterwards."""
    linear = torch.nn.Linear(512, 512, device="cuda")
    x = torch.randn(64, 512, device="cuda")

    def fn(x):
        return linear(linear(x)).float()

    with torch.no_grad():
        with torch.autocast("cuda", dtype=torch.float16):
            captured = graph(fn, (x,))
            wanted = fn(x)
        trash = [torch.full((512, 512), float("nan"), device="cuda", dtype=torch.float16) for _ in range(8)]
        with torch.autocast("cuda", dtype=torch.float16):
            assert same_bits(captured(x), wanted)
        captured(x)
        assert captured.last_reason == "not prepared: x float32[64, 512]"
        del trash
    assert captured.stats["replays"] == 1


def test_layouts(graph) -> None:
    conv = torch.nn.Conv2d(8, 16, 3, device="cuda").requires_grad_(False)
    image = torch.randn(2, 8, 16, 16, device="cuda")
    examples = [
        image,
        image.to(memory_format=torch.channels_last),
        torch.randn(2, 16, 16, 8, device="cuda").permute(0, 3, 1, 2)[:, :, ::2, 1:],
        torch.randn(1, 8, 16, 16, device="cuda").expand(2, -1, -1, -1),
    ]
    torch.backends.cudnn.deterministic = True
    try:
        captured = graph(lambda x: (conv(x), x * 2, x.transpose(0, 1)))
        for x, report in zip(examples, captured.prepare(*((x,) for x in examples)), strict=True):
            got, wanted = captured(x), captured.fn(x)
            assert same_bits(list(got), list(wanted)), report
            if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
                assert report["graph"]
                assert [t.stride() for t in got] == [t.stride() for t in wanted]
    finally:
        torch.backends.cudnn.deterministic = False


def test_two_copies_and_one_launch(graph, head) -> None:
    """Nothing else: no wait, no memory asked of the driver, no copy between host and device."""
    from torch.profiler import ProfilerActivity, profile

    head.noisy = False
    captured = graph(head, arguments())
    args = arguments(1)
    captured(*args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        captured(*args)
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events()]
    assert sum("jetrt_copy_batch" in name for name in names) == 2
    assert sum("GraphLaunch" in name for name in names) == 1
    assert not [name for name in names if "StreamSynchronize" in name or name.startswith(("cudaMalloc", "Memcpy HtoD"))]


def test_the_batched_copy() -> None:
    """Against torch's own: every width of element, layouts, offsets that are not aligned, sizes from none to many."""
    from jetrt import _core

    dtypes = [
        torch.float32,
        torch.bfloat16,
        torch.uint8,
        torch.int64,
        torch.bool,
        torch.float64,
        torch.int16,
        torch.int8,
    ]
    sources = []
    for k, shape in enumerate([(), (0, 3), (1,), (7,), (33, 65), (3, 5, 7), (1 << 22,), (257, 1025), (2, 3, 4, 5, 6)]):
        for j, dtype in enumerate(dtypes):
            x = (torch.rand(shape, device="cuda") * 100).to(dtype)
            turn = (k + j) % 4
            if x.dim() >= 2:
                x = [x, x.transpose(0, -1), x[:, ::2], x[:1].expand(4, *x.shape[1:]) if len(x) else x][turn]
            elif x.dim() == 1 and turn:
                x = x[turn:]  # begins inside its buffer
            sources.append(x)
    targets = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in sources]
    _core._fill(targets, sources)
    torch.cuda.synchronize()
    for target, x in zip(targets, sources, strict=True):
        assert same_bits(target.reshape(-1), x.contiguous().reshape(-1)), (x.dtype, x.shape, x.stride())
    assert _core._same_bytes(targets, [x.contiguous() for x in sources])
    nans = torch.tensor([0x7F800001, -0x400000, -0x80000000], dtype=torch.int32, device="cuda").view(torch.float32)
    copy = torch.zeros(3, device="cuda")
    _core._fill([copy], [nans])
    assert torch.equal(copy.view(torch.int32), nans.view(torch.int32))


# What cannot be a graph -----------------------------------------------------------------------------------------------


def uncapturable(load):
    count, spare = itertools.count(), torch.zeros(3, device="cuda")
    nonzero = load("nonzero")
    pinned = torch.zeros(3).pin_memory()
    generator = torch.Generator("cuda").manual_seed(0)

    def raises(x):
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("only here")
        return x + 1

    def other_stream(x):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.set_stream(torch.cuda.Stream(priority=-1))
        return x + 1

    def unjoined(x):
        side = torch.cuda.Stream(priority=-1)  # of other streams than the one of the capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return x + 1

    def host_noise(x):
        pinned.copy_(torch.randn(3))
        return x + pinned.to("cuda", non_blocking=True)

    return {
        "item": lambda x: x * x.sum().item(),
        "cpu": lambda x: x + x.cpu().sum().to("cuda"),
        "bool of a tensor": lambda x: x if x.sum() > 0 else -x,
        "nonzero": lambda x: x.nonzero() + 1,
        "a mask": lambda x: x[x > 0] + 1,
        "wait for the stream": lambda x: (torch.cuda.current_stream().synchronize(), x + 1)[1],
        "wait for all": lambda x: (torch.cuda.synchronize(), x + 1)[1],
        "an event": lambda x: (torch.cuda.current_stream().record_event().synchronize(), x + 1)[1],
        "pageable memory": lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to("cuda"),
        "a data-dependent engine": lambda x: nonzero(x=x.expand(4, 3).sum() * torch.ones(2, 4, device="cuda"))["y"],
        "a host result": lambda x: (x + 1, torch.ones(2)),
        "no work": lambda x: x,
        "an object": lambda x: SimpleNamespace(x=x + 1),
        "writes its argument": lambda x: x.add_(1),
        "a counter": lambda x: x * next(count),
        "host noise": host_noise,
        "another generator": lambda x: x + torch.randn(3, device="cuda", generator=generator),
        "own memory": lambda x: spare.copy_(x + spare),
        "raises": raises,
        "another stream": other_stream,
        "a branch that does not come back": unjoined,
        "random numbers, then a wait": lambda x: x + torch.randn(3, device="cuda") * x.sum().item(),
        "much memory, then a wait": lambda x: x + torch.zeros(1 << 22, device="cuda").sum().item(),
    }


UNCAPTURABLE = (
    "item", "cpu", "bool of a tensor", "nonzero", "a mask", "wait for the stream", "wait for all", "an event",
    "pageable memory", "a data-dependent engine", "a host result", "no work", "an object", "writes its argument",
    "a counter", "host noise", "another generator", "own memory", "raises", "another stream",
    "a branch that does not come back", "random numbers, then a wait", "much memory, then a wait",
)  # fmt: skip


@pytest.mark.parametrize("what", UNCAPTURABLE)
def test_what_cannot_be_a_graph_runs_eagerly(graph, load, what) -> None:
    """And afterwards torch is well, another function is captured, and nothing is left."""
    cases = uncapturable(load)
    assert sorted(cases) == sorted(UNCAPTURABLE)
    fn, engine = cases[what], load("mlp", graphs="off")
    images = torch.ones(8, 64, device="cuda")

    def with_engine(x):
        engine(x=images)
        return fn(x)

    stream, x = torch.cuda.current_stream(), torch.tensor([1.0, 2.0, 3.0], device="cuda")
    kept = x.clone()
    for run in (fn, with_engine):
        captured = graph(run)
        (report,) = captured.prepare((x,))
        if what != "no work" or run is fn:
            assert not report["graph"]
            assert report["reason"]
            captured(x.clone())
            assert captured.stats["reasons"] == {report["reason"]: 1}
        assert same_bits(x, kept)
        assert torch.cuda.current_stream() == stream
        torch_is_well()
        after = graph(lambda x: engine(x=images * x[0])["y"] + torch.randn(1, device="cuda"), (x,))
        assert same_bits(seeded(after, x), seeded(after.fn, x))
        assert after.stats["replays"] == 1
        after.close()
        captured.close()


def test_failures_leave_no_memory(graph, load) -> None:
    engine = load("mlp", graphs="off")
    x = torch.ones(8, 64, device="cuda")

    def fn(x):
        big = torch.zeros(1 << 22, device="cuda")
        return engine(x=x)["y"] + (big.sum() + torch.randn(1, device="cuda")).item()

    def fail(times):
        for _ in range(times):
            captured = graph(fn)
            assert not captured.prepare((x,))[0]["graph"]
            captured.close()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]

    before = fail(3)
    after = fail(20)
    assert after[0] <= before[0]
    assert after[1] >= before[1] - (4 << 20)


# Shapes and memory ----------------------------------------------------------------------------------------------------


def test_eviction_and_close_free_memory(graph, head) -> None:
    def settled():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

    captured = graph(head, arguments(length=3), max_shapes=2)
    captured.close()
    before = settled()
    captured = graph(head, max_shapes=2)
    for length in (1, 2, 3, 4, 5, 6):
        assert captured.prepare(arguments(length=length))[0]["graph"]
        captured(*arguments(length=length))
        if length == 2:
            two = settled()
    six = settled()
    assert captured.stats["evicted"] == 4
    assert six[0] <= two[0] + (1 << 20)
    assert six[1] >= two[1] - (8 << 20)
    assert [s.split("features ")[1].split(",")[1] for s in captured.stats["shapes"]] == [" 5", " 6"]
    captured.close()
    after = settled()
    assert after[0] <= before[0] + (1 << 20)
    assert after[1] >= before[1] - (8 << 20)


def test_an_eviction_waits_for_the_launch(graph, head) -> None:
    captured = graph(head, arguments(length=7), max_shapes=1)
    args = arguments(1, length=7)
    wanted = seeded(head, *args)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        got = seeded(captured, *args)
    captured.prepare(arguments(length=8))
    side.synchronize()
    assert same_bits(got, wanted)


@pytest.mark.timeout(600)
def test_ten_thousand_replays_without_growth(graph, head) -> None:
    captured = graph(head, max_shapes=4)
    sets = [arguments(k, length) for k, length in enumerate((122, 300, 64))]
    captured.prepare(*sets)

    def run(n):
        for k in range(n):
            captured(*sets[k % 3])
        torch.cuda.synchronize()
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]

    run(1000)
    host, reserved, free = run(1000)
    after = run(10_000)
    assert captured.stats["replays"] == 12_000
    assert after[0] - host <= 3 << 20
    assert after[1] == reserved
    assert after[2] >= free


# Engines --------------------------------------------------------------------------------------------------------------


def test_an_engine_closed_under_a_running_graph(graph, load) -> None:
    import jetrt

    engine = load("mlp", graphs="off")
    x = torch.ones(8, 64, device="cuda")
    captured = graph(lambda x: engine(x=x)["y"] * 1, (x,))
    wanted = captured.fn(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        results = [captured(x) for _ in range(5)]
    engine.close()
    assert side.query()  # it has waited
    for result in results:
        assert same_bits(result, wanted)
    with pytest.raises(jetrt.errors.ClosedEngineError, match="this graph launches it"):
        captured(x)
    captured.close()
    torch_is_well()


def test_an_engine_that_the_program_forgets(graph, engines) -> None:
    import jetrt

    holder = {"engine": jetrt.Engine(engines / "mlp.engine", graphs="off")}
    x = torch.ones(8, 64, device="cuda")
    captured = graph(lambda x: holder["engine"](x=x)["y"] * 1, (x,))
    wanted = captured.fn(x)
    holder.clear()
    gc.collect()
    trash = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(16)]
    assert same_bits(captured(x), wanted)
    del trash


def test_branches_inside_the_function(graph, load) -> None:
    """Two calls of one engine at the same time, again and again: each has a context of its own."""
    engine, side = load("conv_fp16", graphs="off"), torch.cuda.Stream(priority=-1)
    output = next(iter(engine.outputs))

    def fn(x):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            one = engine(x=x * 2)[output] * 1
        two = engine(x=x)[output] * 1
        current.wait_stream(side)
        return one, two

    inputs = [reference.make("torch", reference.random_input("conv_fp16", 4, seed)) for seed in range(10)]
    captured = graph(fn, (inputs[0],))
    for x in inputs * 5:
        one, two = captured(x)
        assert same_bits(one, engine(x=x * 2)[output])
        assert same_bits(two, engine(x=x)[output])
    assert captured.stats["replays"] == 50


# Streams, threads, captures of the caller's ---------------------------------------------------------------------------


def test_on_whatever_stream(graph, head) -> None:
    """Inputs are written late, on the stream of the call; the launches follow each other across streams."""
    captured = graph(head, arguments())
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    wanted = [seeded(head, *arguments(k)) for k in range(9)]
    torch.cuda.synchronize()
    got = []
    for k in range(9):
        with torch.cuda.stream(streams[k % 3]):
            args = [torch.empty_like(t) for t in arguments(k)]
            torch.cuda._sleep(LONG // 10)
            for late, t in zip(args, arguments(k), strict=True):
                late.copy_(t)
            got.append(seeded(captured, *args))
            for late in args:
                late.zero_()  # it was read by then
    torch.cuda.synchronize()
    for result, expected in zip(got, wanted, strict=True):
        assert same_bits(result, expected)
    assert captured.stats["replays"] == 9


def test_no_wait_in_a_call(graph, head) -> None:
    captured = graph(head, arguments())
    args = arguments(1)
    captured(*args)
    torch.cuda.synchronize()
    torch.cuda._sleep(40 * LONG)
    captured(*args)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_from_several_threads(graph, head) -> None:
    head.noisy = False
    captured = graph(head, max_shapes=4)
    captured.prepare(arguments(length=122), arguments(length=300))
    sets = {(length, k): arguments(k, length) for length in (122, 300) for k in range(8)}
    wanted = {key: head(*args) for key, args in sets.items()}
    torch.cuda.synchronize()

    def work(seed):
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for k in range(100):
                key = ((122, 300)[k % 2], (seed + k) % 8)
                assert same_bits(captured(*sets[key]), wanted[key])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert captured.stats["replays"] == 600


def test_random_numbers_of_two_graphs_at_the_same_time(graph) -> None:
    """torch has one place for the seed of all graphs: a launch must not change it under another that still runs."""

    def fn(x):
        for _ in range(20):
            x = x * 0.5 + torch.randn_like(x)
        return x

    x = torch.zeros(1 << 20, device="cuda")
    captured = [graph(fn, (x,)) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(10):
        torch.manual_seed(turn)
        wanted = [fn(x) for _ in range(4)]
        torch.cuda.synchronize()
        torch.manual_seed(turn)
        got = []
        for k in range(4):
            with torch.cuda.stream(streams[k % 2]):
                got.append(captured[k % 2](x))
        torch.cuda.synchronize()
        assert same_bits(got, wanted)
    assert [c.stats["replays"] for c in captured] == [20, 20]


def test_two_graphs_at_the_same_time(graph) -> None:
    """Products that use a workspace of cuBLAS, which must not be the same one for both."""
    torch.manual_seed(0)
    weights = [torch.randn(4096, 64, device="cuda", dtype=torch.float16) for _ in range(2)]
    inputs = [torch.randn(64, 4096, device="cuda", dtype=torch.float16) for _ in range(2)]

    def product(weight):
        def fn(x):
            for _ in range(8):
                y = x @ weight
            return y

        return fn

    captured = [graph(product(weight), (x,)) for weight, x in zip(weights, inputs, strict=True)]
    wanted = [c.fn(x) for c, x in zip(captured, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for c, x, stream in zip(captured, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(c(x))
        torch.cuda.synchronize()
        assert same_bits(results, wanted)


def test_calls_go_on_while_another_thread_prepares(graph, head) -> None:
    head.noisy = False
    captured = graph(head, arguments(length=9), max_shapes=8)
    args, wrong = arguments(1, length=9), []
    wanted = head(*args)

    def prepare():
        try:
            for length in (1, 2, 3, 4, 5):
                assert captured.prepare(arguments(length=length))[0]["graph"]
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=prepare)
    thread.start()
    calls = 0
    while thread.is_alive():
        if not same_bits(captured(*args), wanted):
            wrong.append(calls)
        calls += 1
    thread.join()
    assert wrong == []
    assert captured.stats["replays"] == calls


def test_inside_a_capture_of_the_callers(graph, head) -> None:
    import jetrt

    captured = graph(head, arguments())
    args = arguments()
    outer = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(outer):
        result = captured(*args)["actions"] * 2
        with pytest.raises(jetrt.errors.GraphCaptureError, match=r"prepare\(\) inside a capture"):
            captured.prepare((*args, 1))
    assert captured.last_reason == "inside a capture of the caller's"
    for seed in (1, 2):
        for mine, other in zip(args, arguments(seed), strict=True):
            mine.copy_(other)
        torch.manual_seed(3)
        outer.replay()
        assert same_bits(result, seeded(head, *arguments(seed), seed=3)["actions"] * 2)
    outer.reset()


def test_a_graph_inside_a_graph(graph, head) -> None:
    inner = graph(head, arguments())
    outer = graph(lambda *args: inner(*args)["actions"] + 1, arguments())
    assert same_bits(seeded(outer, *arguments(2)), seeded(head, *arguments(2))["actions"] + 1)
    assert outer.stats["replays"] == 1


def test_on_the_second_gpu(graph, load) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    engine = load("mlp", device=1, graphs="off")
    x = torch.randn(8, 64, device="cuda:1")
    captured = graph(lambda x: engine(x=x)["y"] + torch.randn(8, 10, device="cuda:1"), (x,))
    assert same_bits(seeded(captured, x), seeded(captured.fn, x))
    assert captured.stats["replays"] == 1
    assert torch.cuda.current_device() == 0


# Exit -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", exits.GRAPH)
def test_interpreter_exit(engines, way) -> None:
    exits.run(exits.GRAPH[way], engines / "mlp.engine", PYTHONWARNINGS="ignore")

"""GR00T's action head, 13 engine calls or 14: as the script runs it, over the bare binding, over jetrt, as one graph.

    python benches/groot/models.py BUNDLES --layers 2 32               # once; 2 layers take half a minute, 32 minutes
    python benches/groot/head.py BUNDLES --layers 2 32 --varying       # writes benches/results/groot_head.json
    python benches/groot/head.py BUNDLES --layers 2 --control 10:1000 100:200 --out groot_control
    python benches/groot/head.py BUNDLES --version n1.6 --out groot_head_n16
    python benches/groot/head.py BUNDLES --vl-self-attention --out groot_head_vl     # 14 calls

Before anything is timed, variants that do the same are compared: from one seed they must give the same bits; one that
does not is not timed. Then, in one process, every variant runs once a round, rounds in a new order each time, with one
wait at the end of each action:

host       µs until the call returns; device: ms on the GPU when all is enqueued behind a pause (events around it; where
           the variant waits by itself, its waits are in it); done: ms from the call until the actions are there.

Counted besides: engine calls, launches, waits, allocations, fills; by callbacks of CUDA's driver, by torch.profiler and
by torch's allocator. `--varying` changes S with every observation. `--control` is a robot's view: so many ms of idling
before each of so many actions.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import counting  # noqa: E402
import ways  # noqa: E402
from common import clocks, machine, nvinfer_path, plain, print_targets, summary, write  # noqa: E402
from sources import Checkpoint, StandIn  # noqa: E402
from tables import judge, show  # noqa: E402
from variants import Observation, Stages, Variant, Workshop, binding_or_jetrt  # noqa: E402
from versions import VERSIONS  # noqa: E402

COUNTED_ACTIONS, PROFILED_ACTIONS, STAGED_ACTIONS, DEVICE_ACTIONS = 10, 3, 30, 50


def wait() -> None:
    torch.cuda.current_stream().synchronize()


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The names in a new order each round, the same in every run."""
    shuffle, order = random.Random(0).shuffle, list(names)
    for _ in range(rounds):
        shuffle(order)
        yield list(order)


# Checked before it is timed -------------------------------------------------------------------------------------------


def same_bits(built: dict[str, Variant], observations: Sequence[Observation]) -> dict[str, Any]:
    """Compares the variants of each group, from the same seeds: `differences` says by name what is wrong with one."""
    found: dict[str, Any] = {"groups": {}, "differences": {}}
    first: dict[str, dict[int, torch.Tensor]] = {}
    for group, names in ways.GROUPS.items():
        present = [name for name in names if name in built]
        for name in present:
            results: dict[int, torch.Tensor] = {}
            try:
                for seed, observation in enumerate([*observations, *observations]):
                    if built[name].takes(observation):
                        torch.manual_seed(seed)
                        results[seed] = built[name].act(observation).clone()
                        wait()
            except Exception as error:
                found["differences"][name] = f"{type(error).__name__}: {error}"
                traceback.print_exc(limit=-3)
                continue
            reason = None
            for seed, one in first.setdefault(group, results).items():
                other = results[seed]
                if not torch.isfinite(other).all():
                    reason = f"action {seed} is not finite"
                elif not torch.equal(one.view(torch.int16), other.view(torch.int16)):
                    worst = (one.float() - other.float()).abs().max().item()
                    reason = f"action {seed} is not that of «{present[0]}»: they differ by up to {worst:.3g}"
            if reason:
                found["differences"][name] = reason
        found["groups"][group] = {"variants": present, "actions": len(first.get(group, []))}
    compare_groups(first, found)
    return found


def compare_groups(results: dict[str, dict[int, torch.Tensor]], found: dict[str, Any]) -> None:
    """Other kernels give other bits: between groups the actions must be near, by their cosine."""
    if not results:
        return
    reference, expected = next(iter(results.items()))
    for group, actions in list(results.items())[1:]:
        cosine = min(
            torch.nn.functional.cosine_similarity(
                expected[seed].double().flatten(), action.double().flatten(), dim=0
            ).item()
            for seed, action in actions.items()
        )
        found[f"least cosine of {reference} and {group}"] = cosine
        if not cosine > 0.99:
            for name in found["groups"][group]["variants"]:
                found["differences"].setdefault(name, f"cosine {cosine:.5f} with the {reference}")


# Times ----------------------------------------------------------------------------------------------------------------


def measure(
    built: dict[str, Variant], observations: Sequence[Observation], actions: int, warmup: int, idle: float = 0.0
) -> dict[str, Any]:
    """host (µs) and done (ms) of each variant; `idle`: seconds of sleep before each action."""
    clock = time.perf_counter_ns
    host: dict[str, list[float]] = {name: [] for name in built}
    done: dict[str, list[float]] = {name: [] for name in built}
    gc.collect()
    gc.freeze()  # what exists now is not walked again in the midst of an action
    before = clocks()
    for turn, order in enumerate(orders(list(built), warmup + actions)):
        observation = observations[turn % len(observations)]
        for name in order:
            act = built[name].act
            wait()
            if idle:
                time.sleep(idle)
            begin = clock()
            result = act(observation)
            enqueued = clock()
            wait()
            finished = clock()
            del result
            if turn >= warmup:
                host[name].append((enqueued - begin) / 1e3)
                done[name].append((finished - begin) / 1e6)
    return {
        "rows": {
            name: {
                "host_us": summary(host[name]),
                "done_ms": summary(done[name]) | {"worst": max(done[name]), "jitter": statistics.pstdev(done[name])},
            }
            for name in built
        },
        "clocks": {"before": before, "after": clocks()},
    }


def device_times(built: dict[str, Variant], observation: Observation, host_us: dict[str, float]) -> dict[str, Any]:
    """ms between events around an action that was enqueued while the GPU paused."""
    kilohertz = getattr(torch.cuda.get_device_properties(0), "clock_rate", 2_000_000)
    found: dict[str, list[float]] = {name: [] for name in built}
    for order in orders(list(built), DEVICE_ACTIONS):
        for name in order:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            wait()
            torch.cuda._sleep(int((1.5 * host_us[name] / 1000 + 0.3) * kilohertz))
            first.record()
            result = built[name].act(observation)
            last.record()
            wait()
            del result
            found[name].append(first.elapsed_time(last))
    return {name: summary(samples) for name, samples in found.items()}


def one_call(built: dict[str, Variant], observation: Observation, actions: int, warmup: int) -> dict[str, Any]:
    """A single DiT call through each path, with the shapes set where the script sets them."""
    heads = [variant.head for variant in built.values() if variant.head is not None]
    if not heads:
        return {}
    config = heads[0].config
    tokens = torch.randn(1, 1 + config.action_horizon, config.input_embedding_dim, device="cuda", dtype=torch.bfloat16)
    timestep = torch.tensor([500], device="cuda")
    masks = {"image_mask": observation.image_mask, "backbone_attention_mask": observation.attention_mask}
    given = {"sa_embs": tokens, "vl_embs": observation.features, "timestep": timestep}
    shapes = {name: tensor.shape for name, tensor in {**given, **masks}.items()}

    def engine_call(engine: Any) -> Callable[[Observation], Any]:
        def act(_: Observation) -> Any:
            for name, shape in shapes.items():
                engine.set_runtime_tensor_shape(name, shape)
            return engine(*given.values(), **masks)["output"]

        return act

    def module_call(module: Any) -> Callable[[Observation], Any]:
        return lambda _: module(
            hidden_states=tokens, encoder_hidden_states=observation.features, timestep=timestep, **masks
        )

    calls: dict[str, Variant] = {}
    for name in (ways.SCRIPT, ways.BARE, ways.JETRT):
        if name in built:
            calls[name] = Variant(name, engine_call(built[name].head.dit_engine))
    for name in (ways.SCRIPT_DIT, ways.JETRT_DIT, ways.TORCH, ways.COMPILED):
        if name in built:
            calls[name] = Variant(name, module_call(built[name].head.model))
    return measure(calls, [observation], actions, warmup)


# Counts and stages ----------------------------------------------------------------------------------------------------


def repeated(act: Callable[[Observation], Any], observation: Observation, actions: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(actions):
            act(observation)

    return work


def driver_counts(built: dict[str, Variant], observation: Observation) -> dict[str, Any]:
    """Calls of the driver per action; to be done before torch.profiler, which takes CUPTI for good."""
    try:
        driver = counting.DriverCalls()
    except OSError as error:
        return {"not available": str(error)}
    found = {}
    for name, variant in built.items():
        repeated(variant.act, observation, 3)()
        wait()
        calls = driver.during(repeated(variant.act, observation, COUNTED_ACTIONS))
        wait()
        found[name] = counting.driver_figures(calls, COUNTED_ACTIONS)
    driver.close()
    return found


def other_counts(built: dict[str, Variant], observation: Observation) -> dict[str, Any]:
    """By torch's allocator and profiler, per action."""
    found: dict[str, Any] = {}
    for name, variant in built.items():
        wait()
        work = repeated(variant.act, observation, COUNTED_ACTIONS)
        found[name] = {"torch_allocations": counting.torch_allocations(work, COUNTED_ACTIONS)}
        work = repeated(variant.act, observation, PROFILED_ACTIONS)
        try:
            found[name]["profiler"] = counting.profile_figures(work, PROFILED_ACTIONS)
        except Exception as error:
            found[name]["profiler"] = {"not available": f"{type(error).__name__}: {error}"}
    return found


def stage_times(workshop: Workshop, names: Sequence[str], observation: Observation) -> dict[str, Any]:
    """Medians of ms by stage on the GPU's timeline, gaps included; engine calls of an action, in a graph or not."""
    found: dict[str, Any] = {}
    for name in names:
        stages = Stages()
        try:
            variant = workshop.build(name, stages)
            variant.prepare([observation])
            samples: dict[str, list[float]] = {}
            for turn in range(5 + STAGED_ACTIONS):
                wait()
                stages.live.clear()
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                variant.act(observation)
                last.record()
                wait()
                if turn < 5:
                    continue
                spent: dict[str, float] = {}
                for span in [*stages.captured, *stages.live]:
                    spent[span.stage] = spent.get(span.stage, 0.0) + span.begin.elapsed_time(span.end)
                spent["between"] = first.elapsed_time(last) - sum(spent.values())
                for stage, ms in spent.items():
                    samples.setdefault(stage, []).append(ms)
            found[name] = {
                "ms": {stage: statistics.median(values) for stage, values in samples.items()},
                "engine_calls": sum(span.engine for span in stages.live),
                "engine_calls_in_the_graph": sum(span.engine for span in stages.captured),
            }
            variant.close()
        except Exception as error:
            found[name] = {"not measured": f"{type(error).__name__}: {error}"}
        finally:
            stages.close()
    return found


# One bundle -----------------------------------------------------------------------------------------------------------


def wanted(options: argparse.Namespace) -> list[str]:
    names = [name for name in ways.NAMES if name != ways.COMPILED or options.compile]
    if options.only:
        names = [name for name in names if any(part.lower() in name.lower() for part in options.only)]
    return names


class Bench:
    """All figures of one bundle, in `result`."""

    def __init__(self, layers: int, source: Any, options: argparse.Namespace) -> None:
        self.layers, self.options = layers, options
        self.workshop = Workshop(source, options.compile or "", options.compile_timeout)
        self.fixed = fixed = Observation.random(source.config, source.s, 0)
        self.lengths = [source.s + 8 * k for k in range(-2, 3)] if options.varying else []
        self.varying = [fixed if s == source.s else Observation.random(source.config, s, s) for s in self.lengths]
        self.observations = self.varying or [fixed]
        self.built: dict[str, Variant] = {}
        self.result: dict[str, Any] = {"s": source.s, "skipped": {}, "prepare_seconds": {}}

    def build(self) -> None:
        """What cannot be built, or gives other actions, is a line in the result and is not timed."""
        for name in wanted(self.options):
            start = time.monotonic()
            try:
                variant = self.workshop.build(name)
                variant.prepare([observation for observation in self.observations if variant.takes(observation)])
                wait()
                self.built[name] = variant
            except Exception as error:
                self.result["skipped"][name] = f"{type(error).__name__}: {error}"
                traceback.print_exc(limit=-3)
            self.result["prepare_seconds"][name] = round(time.monotonic() - start, 2)
        self.result["same_bits"] = same_bits(self.built, self.observations)
        for name, reason in self.result["same_bits"]["differences"].items():
            self.result["skipped"][name] = reason
            self.built.pop(name).close()

    def time(self) -> None:
        built, fixed, options, result = self.built, self.fixed, self.options, self.result
        result["fixed"] = measure(built, [fixed], options.actions, options.warmup)
        medians = {name: row["host_us"]["median"] for name, row in result["fixed"]["rows"].items()}
        for name, row in device_times(built, fixed, medians).items():
            result["fixed"]["rows"][name]["device_ms"] = row
        if self.varying:
            any_s = {name: variant for name, variant in built.items() if variant.s is None}
            result["varying"] = measure(any_s, self.varying, options.actions, options.warmup) | {"s": self.lengths}
        result["one_dit_call"] = one_call(built, fixed, options.actions, options.warmup)
        if options.control:
            shown = {name: built[name] for name in ways.CONTROL if name in built}
            result["control"] = {
                f"{ms:g} ms idle": measure(shown, [fixed], actions, options.warmup, ms / 1000) | {"actions": actions}
                for ms, actions in options.control
            }

    def count_driver_calls(self) -> None:
        self.result["driver"] = driver_counts(self.built, self.fixed)

    def count_the_rest(self) -> None:
        self.result["counts"] = other_counts(self.built, self.fixed)
        staged = [name for name in ways.STAGED if name in self.built]
        self.result["stages"] = stage_times(self.workshop, staged, self.fixed)

    def finish(self) -> bool:
        """Compares again, and frees everything; false where something of jetrt's was wrong or not there."""
        self.result["same_bits_afterwards"] = same_bits(self.built, self.observations)
        self.result["stats"] = {name: plain(variant.stats()) for name, variant in self.built.items()}
        for variant in self.built.values():
            variant.close()
        self.built.clear()
        self.workshop.close()
        missing = any(name.startswith("jetrt") for name in self.result["skipped"])
        return not missing and not self.result["same_bits_afterwards"]["differences"]


# The command line -----------------------------------------------------------------------------------------------------


def idling(text: str) -> tuple[float, int]:
    ms, _, actions = text.partition(":")
    return float(ms), int(actions or 1000)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, help="the folder that models.py filled")
    parser.add_argument("--version", choices=("n1.6", "n1.7"), default="n1.7")
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--vl-self-attention", action="store_true", help="N1.7's, as an engine: 14 calls")
    parser.add_argument("--actions", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--varying", action="store_true", help="and with S changing per observation, 5 lengths in turn")
    parser.add_argument("--control", type=idling, nargs="+", metavar="MS[:ACTIONS]", help="10:1000 100:200")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="max-autotune",
        metavar="MODE",
        help="torch.compile of the DiT too, for the usual S alone; by default in the scripts' mode, max-autotune",
    )
    parser.add_argument(
        "--compile-timeout", type=int, default=120, metavar="SECONDS", help="of a bundle; what takes longer is not run"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="torch's deterministic mode, which fills torch.empty"
    )
    parser.add_argument(
        "--side-stream", action="store_true", help="not on the legacy default stream, as the scripts run"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="variants whose name contains one of these")
    parser.add_argument("--no-counts", action="store_true", help="times alone")
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="NVIDIA's package and this checkpoint; BUNDLES: its engines"
    )
    parser.add_argument("--embodiment-tag", default="LIBERO_PANDA")
    parser.add_argument("--scripts", type=Path, help="its folder scripts/deployment")
    parser.add_argument("--out", default="groot_head")
    options = parser.parse_args(words)
    if options.checkpoint and not options.scripts:
        parser.error("--checkpoint needs --scripts, the folder scripts/deployment of Isaac-GR00T")
    if options.vl_self_attention and options.version == "n1.6":
        parser.error("N1.6 has no self-attention over the vision-language tokens")
    return options


def sources(options: argparse.Namespace) -> Iterator[tuple[int, Any]]:
    """The number of layers and where its policies come from."""
    if options.checkpoint:
        source = Checkpoint(options.bundles, options.checkpoint, options.embodiment_tag, options.scripts)
        yield source.config.diffusion_model_cfg["num_layers"], source
        return
    for layers in options.layers:
        attention = 4 if options.vl_self_attention else 0
        config = replace(VERSIONS[options.version], num_layers=layers, vl_self_attention_layers=attention)
        bundle = options.bundles / config.name
        if not (bundle / "export_metadata.json").is_file():
            words = f"{options.bundles} --version {options.version} --layers {layers}"
            words += " --vl-self-attention" if attention else ""
            raise SystemExit(f"{bundle} is no bundle: python benches/groot/models.py {words}")
        yield layers, StandIn(bundle)


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: these figures need one")
    nvinfer_path()  # jetrt's libnvinfer first: the binding then uses the same
    without_binding = binding_or_jetrt()
    if options.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    result: dict[str, Any] = {"machine": machine(), "without_binding": without_binding}
    settings = ("version", "actions", "warmup", "deterministic", "side_stream", "compile")
    result["settings"] = {key: getattr(options, key) for key in settings}
    stream = torch.cuda.Stream() if options.side_stream else torch.cuda.default_stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        benches = [Bench(layers, source, options) for layers, source in sources(options)]
        result["bundles"] = {str(bench.layers): bench.result for bench in benches}
        # One kind of figures after the other; the file is written in between, for a hook could end the process.
        for bench in benches:
            bench.build()
            if bench.built:
                bench.time()
            write(options.out, result)
        if not options.no_counts:
            for bench in benches:
                bench.count_driver_calls()
            write(options.out, result)
            for bench in benches:
                bench.count_the_rest()
        right = [bench.finish() for bench in benches]
    judged = [judge(bench.layers, bench.result) for bench in benches if "fixed" in bench.result]
    result["targets"] = [one for targets, _ in judged for one in targets]
    result["not_judged"] = [name for _, unknown in judged for name in unknown]
    path = write(options.out, result)
    for bench in benches:
        show(bench.layers, bench.result)
    print_targets(result["targets"])
    for name in result["not_judged"]:
        print(f"not judged: {name}")
    print(f"\nwrote {path}")
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())

"""The ways to run one action head that `head.py` compares; what they share is loaded once."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from ways import (
    BARE,
    BARE_GRAPH,
    BARE_GRAPH_COPIED,
    BARE_GRAPH_HOISTED,
    COMPILED,
    JETRT,
    JETRT_DIT,
    JETRT_DIT_LOOP,
    JETRT_GRAPH,
    JETRT_LOOP,
    NAMES,
    SCRIPT,
    SCRIPT_DIT,
    TORCH,
)


@dataclass
class Observation:
    """What the head is given for one action, on the GPU."""

    features: torch.Tensor
    image_mask: torch.Tensor
    attention_mask: torch.Tensor
    state: torch.Tensor
    embodiment_id: torch.Tensor

    @classmethod
    def random(cls, config: Any, s: int, seed: int) -> Observation:
        """S tokens, an image in the midst of the text, a few of padding at the end."""
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

        place = torch.arange(s, device="cuda")[None]
        return cls(
            features=normal(1, s, config.backbone_embedding_dim),
            image_mask=(place >= s // 8) & (place < s // 2),
            attention_mask=place < max(s - s // 10, 1),
            state=normal(1, getattr(config, "state_history_length", 1), config.max_state_dim),
            embodiment_id=torch.tensor([3], device="cuda"),
        )

    @property
    def s(self) -> int:
        return self.features.shape[1]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.features, self.image_mask, self.attention_mask, self.state, self.embodiment_id)

    def arguments(self, batch_feature: Any) -> tuple[Any, Any]:
        """Of `get_action`: made anew for each call, because the heads write into them."""
        output = {
            "backbone_features": self.features,
            "backbone_attention_mask": self.attention_mask,
            "image_mask": self.image_mask,
        }
        return batch_feature(data=output), batch_feature(
            data={"state": self.state, "embodiment_id": self.embodiment_id}
        )


@dataclass
class Variant:
    """act: enqueues one action and returns it, [1,H,D]. prepare: warms up and captures for these observations."""

    name: str
    act: Callable[[Observation], torch.Tensor]
    prepare: Callable[[Sequence[Observation]], None] = lambda _: None
    #: whose `*_engine` attributes, or DiT module, do the work; for stage times
    head: Any = None
    #: figures of its own, for the record
    stats: Callable[[], Any] = lambda: None
    close: Callable[[], None] = lambda: None
    #: the only S that it is for; None: any that it was prepared for
    s: int | None = None

    def takes(self, observation: Observation) -> bool:
        return self.s in (None, observation.s)


# Engines --------------------------------------------------------------------------------------------------------------


class BareEngine:
    """What NVIDIA's binding needs and nothing more: shapes, addresses, a new output, enqueue; return codes checked."""

    def __init__(self, engine: Any) -> None:
        self.handle = engine.handle
        self.context = self.handle.create_execution_context()
        self.names = [name for name, *_ in engine.in_meta]
        self.dtype = engine.out_meta[0][2]

    def set_runtime_tensor_shape(self, name: str, shape: Any) -> None:
        """The call sets it."""

    def __call__(self, *args: torch.Tensor, **named: torch.Tensor) -> dict[str, torch.Tensor]:
        context = self.context
        done = True
        for name, tensor in [*zip(self.names, args, strict=False), *named.items()]:
            done &= context.set_input_shape(name, tuple(tensor.shape))
            done &= context.set_tensor_address(name, tensor.data_ptr())
        output = torch.empty(tuple(context.get_tensor_shape("output")), dtype=self.dtype, device="cuda")
        done &= context.set_tensor_address("output", output.data_ptr())
        if not (done and context.execute_async_v3(torch.cuda.current_stream().cuda_stream)):
            raise RuntimeError("the binding refused a call")
        return {"output": output}


@dataclass
class Span:
    """A call of one of the head's networks, between two events; `engine`: not a torch module."""

    stage: str
    begin: Any
    end: Any
    engine: bool


class Stages:
    """Events around the calls of a head's networks: where the time of an action goes on the GPU's timeline."""

    def __init__(self) -> None:
        self.live: list[Span] = []
        #: those within a graph, which its replays record
        self.captured: list[Span] = []
        self.handles: list[Any] = []

    def event(self) -> Any:
        capturing = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, **({"external": True} if capturing else {}))
        event.record()
        return event

    def keep(self, stage: str, begin: Any, engine: bool) -> None:
        spans = self.captured if torch.cuda.is_current_stream_capturing() else self.live
        spans.append(Span(stage, begin, self.event(), engine))

    def wrap(self, stage: str, engine: Any) -> Any:
        return Staged(self, stage, engine)

    def hook(self, stage: str, module: torch.nn.Module) -> None:
        begun: list[Any] = []
        engine = "forward" in vars(module)  # was replaced
        self.handles += [
            module.register_forward_pre_hook(lambda *_: begun.append(self.event())),
            module.register_forward_hook(lambda *_: self.keep(stage, begun.pop(), engine)),
        ]

    def close(self) -> None:
        """Takes the hooks away: the modules serve others too."""
        for handle in self.handles:
            handle.remove()


class Staged:
    """An engine between two events."""

    def __init__(self, stages: Stages, stage: str, engine: Any) -> None:
        self.stages, self.stage, self.engine = stages, stage, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = self.stages.event()
        result = self.engine(*args, **kwargs)
        self.stages.keep(self.stage, begin, engine=True)
        return result


STAGES = {
    "state_encoder": "state encoder",
    "action_encoder": "action encoder",
    "dit": "DiT",
    "action_decoder": "action decoder",
    "vl_sa": "VL self-attention",
    "vl_self_attention": "VL self-attention",
}


# Variants -------------------------------------------------------------------------------------------------------------


@dataclass
class Workshop:
    """Builds variants over one bundle. Engines are loaded once for each library and used by all of its variants."""

    source: Any
    compile_mode: str = ""
    compile_timeout: int = 120
    loaded: dict[tuple[str, str], Any] = field(default_factory=dict)

    def load(self, library: str, path: str) -> Any:
        key = (library, path)
        if key not in self.loaded:
            if library == "binding":
                import script_paths  # noqa: F401  (says that the binding is missing, if it is)
                import trt_torch

                self.loaded[key] = trt_torch.Engine(path)
            elif library == "wrapper":
                import jetrt.groot

                self.loaded[key] = jetrt.groot.TensorRTDiTWrapper(path)
            else:
                import jetrt.trt_torch

                self.loaded[key] = jetrt.trt_torch.Engine(path)
        return self.loaded[key]

    def engines_head(self, library: str, stages: Stages | None = None) -> Any:
        """A head that the scripts' set-up has given engines of this library ("bare": the binding without the class)."""
        scripts = self.source.scripts()

        def engine(path: str, plugins: Any = ()) -> Any:  # noqa: ARG001 (the class's signature)
            loaded = self.load("binding" if library == "bare" else library, str(path))
            return BareEngine(loaded) if library == "bare" else loaded

        policy = self.source.policy(without=self.source.engines)
        kept, scripts.Engine = scripts.Engine, engine
        try:
            self.source.setup(policy, self.source.mode)
        finally:
            scripts.Engine = kept
        head = policy.model.action_head
        if stages is not None:
            for part, name in STAGES.items():
                if getattr(head, f"{part}_engine", None) is not None:
                    setattr(head, f"{part}_engine", stages.wrap(name, getattr(head, f"{part}_engine")))
        head.policy_of_bench = [policy]  # in a list: a module must not become its own child
        return head

    def get_action(self, head: Any) -> Callable[[Observation], torch.Tensor]:
        batch_feature = self.source.batch_feature

        def act(observation: Observation) -> torch.Tensor:
            actions: torch.Tensor = head.get_action(*observation.arguments(batch_feature))["action_pred"]
            return actions

        return act

    def build(self, name: str, stages: Stages | None = None) -> Variant:
        if name in (SCRIPT, BARE, JETRT):
            library = {SCRIPT: "binding", BARE: "bare", JETRT: "jetrt"}[name]
            head = self.engines_head(library, stages)
            return Variant(name, self.get_action(head), head=head)
        if name in (BARE_GRAPH, BARE_GRAPH_COPIED, BARE_GRAPH_HOISTED):
            return BareGraphs(self, name, stages).variant()
        if name == JETRT_LOOP:
            return self.optimized(name, self.engines_head("jetrt", stages))
        if name == JETRT_GRAPH:
            return self.graphed(name, self.engines_head("jetrt", stages))
        if name in (SCRIPT_DIT, JETRT_DIT, JETRT_DIT_LOOP):
            policy = self.source.policy(without=("dit",))
            path = self.source.plan("dit")
            if name == SCRIPT_DIT:
                import script

                script.replace_dit_with_tensorrt(policy, path)
            else:
                import jetrt.groot

                wrapper = self.load("wrapper", path)
                jetrt.groot.replace_dit_with_tensorrt(policy, path, preloaded_trt=wrapper)
            head = policy.model.action_head
            head.policy_of_bench = [policy]
            if name == JETRT_DIT_LOOP:
                return self.optimized(name, head)
            self.hook(head, stages)
            return Variant(name, self.get_action(head), head=head)
        if name in (TORCH, COMPILED):
            policy = self.source.policy()
            head = policy.model.action_head
            head.policy_of_bench = [policy]
            variant = Variant(name, self.get_action(head), head=head)
            if name == COMPILED:
                # For one S, with the kernels for just that: what has seen others is compiled again, for any S.
                head.model = torch.compile(head.model, mode=self.compile_mode, dynamic=False)
                variant.s = self.source.s
                variant.prepare = lambda observations: self.compile(variant, observations)
            self.hook(head, stages)
            return variant
        raise ValueError(f"no variant {name!r}; there are {', '.join(NAMES)}")

    def hook(self, head: Any, stages: Stages | None) -> None:
        if stages is None:
            return
        for part, name in STAGES.items():
            module = getattr(head, "model" if part == "dit" else part, None)
            if isinstance(module, torch.nn.Module) and (part == "dit" or not isinstance(module, torch.nn.Identity)):
                stages.hook(name, module)

    def optimized(self, name: str, head: Any) -> Variant:
        from jetrt.groot import optimize

        (policy,) = head.policy_of_bench
        handle = optimize(policy)

        def prepare(observations: Sequence[Observation]) -> None:
            for s in sorted({observation.s for observation in observations}):
                (done,) = handle.prepare(s)
                if not done["captured"]:
                    raise RuntimeError(f"groot.optimize did not capture S = {s}: {done['reason']}")

        return Variant(name, self.get_action(head), prepare, head=head, stats=lambda: handle.stats, close=handle.undo)

    def graphed(self, name: str, head: Any) -> Variant:
        from jetrt.graph import graph

        batch_feature = self.source.batch_feature

        def actions(*tensors: torch.Tensor) -> torch.Tensor:
            return head.get_action(*Observation(*tensors).arguments(batch_feature))["action_pred"]

        captured = graph(actions, name="action head")

        def prepare(observations: Sequence[Observation]) -> None:
            for observation in {o.s: o for o in observations}.values():
                captured.prepare(observation.tensors())
            if captured.stats["captures"] < len({o.s for o in observations}):
                raise RuntimeError(f"jetrt.graph did not capture every shape: {captured.stats}")

        return Variant(
            name,
            lambda observation: captured(*observation.tensors()),
            prepare,
            head=head,
            stats=lambda: captured.stats,
            close=captured.close,
        )

    def compile(self, variant: Variant, observations: Sequence[Observation]) -> None:
        """Three actions: with CUDA graphs, torch.compile warms up in one call and captures in the next."""
        try:
            with time_limit(self.compile_timeout, "torch.compile"):
                for _ in range(3):
                    for observation in observations:
                        variant.act(observation)
                torch.cuda.synchronize()
        except TimeoutError:
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()  # what they have still to do would disturb the timing of the others
            raise

    def close(self) -> None:
        for engine in self.loaded.values():
            if hasattr(engine, "close"):
                engine.close()
        self.loaded.clear()


class _Late(BaseException):
    """No Exception, which a compiler may take for a kernel that does not work and go on."""


@contextlib.contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Raises TimeoutError in the midst of Python code that takes longer; again and again, should it be caught there."""

    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    except _Late:
        raise TimeoutError(f"{what} took more than {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# One graph without jetrt ----------------------------------------------------------------------------------------------


class BareGraph:
    """An action for one S as one `torch.cuda.CUDAGraph` over the binding; contexts and buffers of its own."""

    def __init__(self, workshop: Workshop, observation: Observation, hoisted: bool, stages: Stages | None) -> None:
        self.head = head = workshop.engines_head("bare", stages)
        self.inputs = Observation(*(tensor.clone() for tensor in observation.tensors()))
        self.noise = torch.zeros((1, head.config.action_horizon, head.action_dim), dtype=torch.bfloat16, device="cuda")
        head.init_actions = self.noise  # the scripts' own way to hand noise in
        # Kept: what it made beforehand is not the graph's memory, and must live as long as the graph.
        self.run = run = self.hoisted() if hoisted else lambda: workshop.get_action(head)(self.inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # TensorRT and torch do things once that a capture must not see
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.actions = run()

    def hoisted(self) -> Callable[[], torch.Tensor]:
        """The same arithmetic; timesteps and positions, the same in every action, made before the capture."""
        head, inputs = self.head, self.inputs
        steps = head.num_inference_timesteps
        buckets = [int(step / float(steps) * head.num_timestep_buckets) for step in range(steps)]
        timesteps = [torch.tensor([bucket], device="cuda") for bucket in buckets]
        places = head.position_embedding(torch.arange(head.config.action_horizon, device="cuda")).unsqueeze(0)

        def run() -> torch.Tensor:
            vl_embs = head.vlln(inputs.features)
            if getattr(head, "vl_sa_engine", None) is not None:
                vl_embs = head.vl_sa_engine(vl_embs)["output"]
            else:
                vl_embs = head.vl_self_attention(vl_embs)
            state = head.state_encoder_engine(inputs.state.view(1, 1, -1), inputs.embodiment_id)["output"]
            masks = {"image_mask": inputs.image_mask, "backbone_attention_mask": inputs.attention_mask}
            actions = self.noise
            for timestep in timesteps:
                features = head.action_encoder_engine(actions, timestep, inputs.embodiment_id)["output"]
                tokens = torch.cat((state, features + places), dim=1)
                moved = head.dit_engine(tokens, vl_embs, timestep, **masks)["output"]
                move = head.action_decoder_engine(moved, inputs.embodiment_id)["output"][:, -head.action_horizon :]
                actions = actions + 1.0 / steps * move
            return actions

        return run


class BareGraphs:
    """A `BareGraph` for each S. "copied in": new inputs are copied to the graph's; else they lie there already."""

    def __init__(self, workshop: Workshop, name: str, stages: Stages | None) -> None:
        self.workshop, self.name, self.stages = workshop, name, stages
        self.graphs: dict[int, BareGraph] = {}
        self.held: dict[int, Observation] = {}

    def prepare(self, observations: Sequence[Observation]) -> None:
        hoisted = self.name == BARE_GRAPH_HOISTED
        for observation in observations:
            if observation.s not in self.graphs:
                self.graphs[observation.s] = BareGraph(self.workshop, observation, hoisted, self.stages)

    def act(self, observation: Observation) -> torch.Tensor:
        graph = self.graphs[observation.s]
        if self.name == BARE_GRAPH_COPIED:
            for place, tensor in zip(graph.inputs.tensors(), observation.tensors(), strict=True):
                place.copy_(tensor)
        elif self.held.get(observation.s) is not observation:  # once per observation, outside what is timed
            for place, tensor in zip(graph.inputs.tensors(), observation.tensors(), strict=True):
                place.copy_(tensor)
            self.held[observation.s] = observation
        graph.noise.normal_()
        graph.graph.replay()
        return graph.actions

    def close(self) -> None:
        self.graphs.clear()

    def variant(self) -> Variant:
        return Variant(self.name, self.act, self.prepare, close=self.close)


def binding_or_jetrt() -> str | None:
    """Makes `trt_torch` importable: over NVIDIA's binding, or jetrt's where there is none; the reason if so."""
    try:
        import trt_torch  # noqa: F401
    except ImportError as error:
        import jetrt.trt_torch

        sys.modules["trt_torch"] = jetrt.trt_torch
        return str(error)
    return None

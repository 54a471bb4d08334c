"""ONNX files and plans of GR00T's action head with random weights: a bundle as the scripts load it.

    python benches/groot/models.py FOLDER --layers 2 32            # FOLDER/n1.7-2 and FOLDER/n1.7-32
    python benches/groot/models.py FOLDER --layers 2 --vl-self-attention     # FOLDER/n1.7-2-vl: one engine more
    python benches/groot/models.py FOLDER --version n1.6 --layers 2 --onnx-only

A bundle has state_encoder, action_encoder, dit_bf16 and action_decoder (ONNX and plan) and export_metadata.json. Names,
types, shapes and profiles are those of NVIDIA's export; bfloat16, strongly typed. Writing needs the package onnx;
building a GPU, and either jetrt (the default) or NVIDIA's binding (`--builder binding`). What exists is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from versions import FILES, INTEGERS, MASKS, N1_7, VERSIONS, Config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import workloads  # noqa: E402

Dims = Sequence[int | str]


class Graph(workloads.Graph):
    """What the head's small networks are made of, besides the DiT's."""

    def category_linear(self, name: str, x: str, sizes: tuple[int, int, int], result: str = "") -> str:
        """x [B,T,inputs] · weight[embodiment_id] + bias[embodiment_id]."""
        categories, _, outputs = sizes
        weight = self.op("Gather", self.weight(f"{name}.weight", *sizes), "embodiment_id", axis=0)
        bias = self.op("Gather", self.weight(f"{name}.bias", categories, outputs), "embodiment_id", axis=0)
        row = self.op("Unsqueeze", bias, self.constant([1], np.int64))
        return self.op("Add", self.op("MatMul", x, weight), row, result=result)

    def category_mlp(self, x: str, categories: int, inputs: int, hidden: int, outputs: int) -> None:
        middle = self.op("Relu", self.category_linear("layer1", x, (categories, inputs, hidden)))
        self.category_linear("layer2", middle, (categories, hidden, outputs), result="output")

    def action_encoder(self, categories: int, inputs: int, width: int, horizon: int) -> None:
        x = self.category_linear("layer1", "actions", (categories, inputs, width))
        half = width // 2
        rate = np.exp(np.arange(half) * (-math.log(10000) / half))[None, None]
        column = self.op("Unsqueeze", "timesteps", self.constant([1, 2], np.int64))
        time = self.op("Cast", column, to=self.onnx.TensorProto.FLOAT)
        angles = self.op("Mul", time, self.constant(rate, np.float32))  # fp32 until the end, as torch has it
        wave = self.op("Concat", self.op("Sin", angles), self.op("Cos", angles), axis=-1)
        wave = self.op("Expand", self.op("Cast", wave, to=self.type), self.constant([1, horizon, 1], np.int64))
        x = self.op("Concat", x, wave, axis=-1)
        x = self.silu(self.category_linear("layer2", x, (categories, 2 * width, width)))
        self.category_linear("layer3", x, (categories, width, width), result="output")

    def affine_norm(self, name: str, x: str, width: int) -> str:
        scale, bias = self.weight(f"{name}.weight", width), self.weight(f"{name}.bias", width)
        return self.op("LayerNormalization", x, scale, bias, epsilon=1e-5)

    def vl_self_attention(self, layers: int, width: int) -> None:
        size = workloads.Dit(width=width, heads=32)
        x = "hidden_states"
        for i in range(layers):
            y = self.affine_norm(f"{i}.norm1", x, width)
            q, k, v = (self.linear(f"{i}.{name}", y, width, width) for name in "qkv")
            x = self.op("Add", self.linear(f"{i}.out", self.attention(q, k, v, size, None), width, width), x)
            up = self.gelu(self.linear(f"{i}.up", self.affine_norm(f"{i}.norm2", x, width), width, 4 * width))
            last = "output" if i == layers - 1 else ""
            x = self.op("Add", self.linear(f"{i}.down", up, 4 * width, width), x, result=last)


def dims(config: Config, shape: tuple[int, ...], tensor: str) -> Dims:
    """The shape as the ONNX file declares it: S by name, and N1.6's batch and action tokens too."""
    named: list[int | str] = list(shape)
    if tensor in ("vl_embs", "hidden_states") or tensor in MASKS:
        named[1] = "S"
    if config.max_batch > 1:
        named[0] = "B"
        if tensor == "sa_embs":
            named[1] = "T"
    return named


def write(config: Config, engine: str, folder: Path, *, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Writes the ONNX file of one engine (opset 19), weights normal with deviation 0.02."""
    import onnx

    path = folder / FILES[engine][0]
    if engine == "dit":
        write_dit(config, path, dtype, seed)
        return path
    graph = Graph(dtype, np.random.default_rng([seed, *engine.encode()]), None)
    kinds, width, hidden = config.max_num_embodiments, config.input_embedding_dim, config.hidden_size
    if engine == "state_encoder":
        graph.category_mlp("state", kinds, config.state_width, hidden, width)
    elif engine == "action_encoder":
        graph.action_encoder(kinds, config.max_action_dim, width, config.action_horizon)
    elif engine == "action_decoder":
        graph.category_mlp("model_output", kinds, hidden, hidden, config.max_action_dim)
    else:
        graph.vl_self_attention(config.vl_self_attention_layers, config.backbone_embedding_dim)
    value = onnx.helper.make_tensor_value_info
    types = dict.fromkeys(INTEGERS, onnx.TensorProto.INT64)
    inputs = [
        value(name, types.get(name, graph.type), dims(config, shape, name))
        for name, shape in config.engine_inputs()[engine].items()
    ]
    shape = dims(config, config.engine_output(engine), "hidden_states" if engine == "vl_self_attention" else "output")
    made = onnx.helper.make_graph(graph.nodes, engine, inputs, [value("output", graph.type, shape)], graph.weights)
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def write_dit(config: Config, path: Path, dtype: str, seed: int) -> None:
    """The DiT of tests/gpu/workloads.py; its batch and action tokens made dynamic where the version has them so."""
    import onnx

    model = workloads.Dit(
        layers=config.num_layers,
        width=config.input_embedding_dim,
        heads=config.num_attention_heads,
        vl_width=config.backbone_embedding_dim,
        output_width=config.hidden_size,
        tokens=config.sa_tokens,
    )
    model.write(path, dtype=dtype, seed=seed)
    if config.max_batch == 1:
        return
    loaded = onnx.load(path, load_external_data=False)
    for weight in loaded.graph.initializer:
        # The Reshapes around attention begin with a batch of 1; 0 keeps what comes in.
        if weight.data_type == onnx.TensorProto.INT64:
            values = onnx.numpy_helper.to_array(weight)
            if values.ndim == 1 and values.size >= 3 and values[0] == 1 and values[1] == -1:
                changed = np.concatenate([[0], values[1:]])
                weight.CopyFrom(onnx.numpy_helper.from_array(changed.astype(np.int64), weight.name))
    for tensor in [*loaded.graph.input, *loaded.graph.output]:
        sizes = tensor.type.tensor_type.shape.dim
        sizes[0].dim_param = "B"
        if tensor.name in ("sa_embs", "output"):
            sizes[1].dim_param = "T"
    path.write_bytes(loaded.SerializeToString())


def profile(config: Config, engine: str) -> dict[str, list[tuple[int, ...]]]:
    """min, opt and max of each input of the engine's one optimisation profile."""
    bounds = zip((1, 1, config.max_batch), config.vl_lengths, strict=True)
    shapes = [config.engine_inputs(batch, s)[engine] for batch, s in bounds]
    return {name: [point[name] for point in shapes] for name in shapes[0]}


def metadata(config: Config) -> dict[str, Any]:
    """export_metadata.json: what a build and a check of the bundle need to know."""
    return {
        "model_version": config.version,
        "batch_size": 1,
        "sa_seq_len": config.sa_tokens,
        "vl_seq_len": config.vl_lengths[1],
        "llm_seq_len": config.vl_lengths[1],
        "num_patches": 256,
        "num_merged_patches": 64,
        "num_vis_tokens": 64,
        "action_horizon": config.action_horizon,
        "max_action_dim": config.max_action_dim,
        "max_state_dim": config.max_state_dim,
        "state_history_length": config.state_history_length,
        "num_layers": config.num_layers,
        "vl_self_attention_layers": config.vl_self_attention_layers,
        "precision": "bf16",
    }


def build_by_jetrt(config: Config, engine: str, onnx: Path, plan: Path, options: argparse.Namespace) -> None:
    words = ["build", "--onnx", str(onnx), "--engine", str(plan), "--strongly-typed", "--progress", "plain"]
    for bound, flag in enumerate(("--min", "--opt", "--max")):
        shapes = (f"{name}:{'x'.join(map(str, p[bound]))}" for name, p in profile(config, engine).items())
        words += [flag, ",".join(shapes)]
    if not options.parity:
        words += ["--no-parity", "--no-audit"]
    if options.opt_level is not None:
        words += ["--opt-level", str(options.opt_level)]
    done = subprocess.run([sys.executable, "-m", "jetrt", *words, *options.jetrt_option], check=False)
    if done.returncode:
        raise SystemExit(f"jetrt build of {onnx} gave status {done.returncode}")


def build_by_binding(config: Config, engine: str, onnx: Path, plan: Path, options: argparse.Namespace) -> None:
    try:
        import tensorrt as trt
    except ImportError:
        import tensorrt_bindings as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise SystemExit(f"{onnx.name}: {parser.get_error(0)}")
    settings = builder.create_builder_config()
    if options.opt_level is not None:
        settings.builder_optimization_level = options.opt_level
    shapes = builder.create_optimization_profile()
    for name, points in profile(config, engine).items():
        shapes.set_shape(name, *points)
    settings.add_optimization_profile(shapes)
    data = builder.build_serialized_network(network, settings)
    if data is None:
        raise SystemExit(f"{onnx.name}: TensorRT's builder gave no plan")
    part = plan.with_suffix(".part")
    part.write_bytes(data)
    part.replace(plan)


BUILDERS = {"jetrt": build_by_jetrt, "binding": build_by_binding}


def share(source: Path, target: Path) -> None:
    """The same file in another bundle, without a second copy where the file system allows."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def bundle(
    config: Config, folder: Path, options: argparse.Namespace, twins: Sequence[Path] = ()
) -> list[dict[str, Any]]:
    """Makes what is missing of a bundle; `twins`: of other numbers of layers, where the engines are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {twin: json.loads((twin / "export_metadata.json").read_text())["num_layers"] for twin in twins}
    done = []
    for engine in config.engines:
        onnx, plan = folder / FILES[engine][0], folder / FILES[engine][1][0]
        row: dict[str, Any] = {"bundle": folder.name, "engine": engine}
        for twin in twins:
            if engine != "dit" or layers[twin] == config.num_layers:
                for file in twin.glob(f"{onnx.stem}.*"):
                    if not (folder / file.name).exists():
                        share(file, folder / file.name)
        if not onnx.exists():
            start = time.monotonic()
            write(config, engine, folder)
            row["write_seconds"] = round(time.monotonic() - start, 2)
        if not options.onnx_only and not plan.exists():
            start = time.monotonic()
            BUILDERS[options.builder](config, engine, onnx, plan, options)
            row["build_seconds"] = round(time.monotonic() - start, 2)
        if plan.exists():
            row["plan_bytes"] = plan.stat().st_size
        print(json.dumps(row), flush=True)
        done.append(row)
    (folder / "export_metadata.json").write_text(json.dumps(metadata(config), indent=1) + "\n")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", choices=VERSIONS, default=N1_7.version)
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--vl-self-attention", action="store_true", help="N1.7's 4 layers over the vision-language tokens too"
    )
    parser.add_argument("--onnx-only", action="store_true", help="no plans")
    parser.add_argument("--builder", choices=BUILDERS, default="jetrt")
    parser.add_argument("--opt-level", type=int, choices=range(6), help="TensorRT's optimisation level")
    parser.add_argument("--parity", action="store_true", help="compare each plan with the model on the CPU (slow)")
    parser.add_argument(
        "--jetrt-option", action="append", default=[], metavar="WORD", help="one more word for jetrt build"
    )
    options = parser.parse_args()
    if options.vl_self_attention and options.version == "n1.6":
        parser.error("N1.6 has no self-attention over the vision-language tokens")
    for layers in options.layers:
        config = replace(
            VERSIONS[options.version],
            num_layers=layers,
            vl_self_attention_layers=4 if options.vl_self_attention else 0,
        )
        folder = options.folder / config.name
        made = (path.parent for path in options.folder.glob(f"{config.version}-*/export_metadata.json"))
        bundle(config, folder, options, sorted(path for path in made if path != folder))


if __name__ == "__main__":
    main()

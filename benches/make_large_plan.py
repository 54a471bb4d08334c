"""Build a plan with about 2 GB of weights, with NVIDIA's binding and the full TensorRT library.

    python benches/make_large_plan.py large.engine --gigabytes 2

A chain of 4096 x 4096 products in fp32. It is there to be loaded, so it is built at optimisation level 0, quickly.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

try:
    import tensorrt as trt
except ImportError:
    import tensorrt_bindings as trt

WIDTH = 4096


def build(layers: int) -> Any:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    config = builder.create_builder_config()
    config.builder_optimization_level = 0
    x = network.add_input("x", trt.float32, (-1, WIDTH))
    random = np.random.default_rng(0)
    kept = []  # the builder reads the weights in place
    for _ in range(layers):
        weights = random.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5
        kept.append(weights)
        constant = network.add_constant((WIDTH, WIDTH), trt.Weights(weights)).get_output(0)
        product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, constant, trt.MatrixOperation.NONE)
        x = network.add_activation(product.get_output(0), trt.ActivationType.RELU).get_output(0)
    x.name = "y"
    network.mark_output(x)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, WIDTH), (1, WIDTH), (8, WIDTH))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit("TensorRT built nothing; its log is above")
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    args = parser.parse_args()
    start = time.perf_counter()
    plan = build(max(1, round(args.gigabytes * 1e9 / (WIDTH * WIDTH * 4))))
    args.path.write_bytes(memoryview(plan))
    size = args.path.stat().st_size / 1e9
    print(f"{args.path.name}: {size:.2f} GB in {time.perf_counter() - start:.0f} s, TensorRT {trt.__version__}")


if __name__ == "__main__":
    main()

"""Stands for NVIDIA's `standalone_inference_script.py`: the same seams, flags and loop, without its package.

    python benches/groot/script.py --model-path BUNDLE --inference-mode tensorrt --trt-engine-path BUNDLE
    python -m jetrt.groot benches/groot/script.py --model-path BUNDLE --inference-mode tensorrt --trt-engine-path BUNDLE

BUNDLE is a folder of `models.py` (its weights are used), or a version such as `n1.7` (random weights). As in the
original, the wrapper's class lives here, in what runs as `__main__`, and takes NVIDIA's binding when it is made; times
are taken by the clock, without a wait, and end where the actions are read on the host.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from versions import VERSIONS


def set_seed(seed: int = 0) -> None:
    """Deterministic mode too, which makes torch fill what `torch.empty` gives."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


class TensorRTDiTWrapper:
    """Inputs moved and made contiguous, all shapes and addresses set, a new bfloat16 output, no wait: in every call."""

    def __init__(self, engine_path: str, device: int = 0) -> None:
        try:
            import tensorrt as trt
        except ImportError:
            import tensorrt_bindings as trt  # the same module without the wheel that brings the libraries

        self.device = device
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA not available for TensorRT")
        torch.cuda.init()
        torch.cuda.set_device(device)
        # The original logs warnings too: on the default stream that can be a line for every call.
        self.trt_logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.trt_logger)
        self.engine = self.runtime.deserialize_cuda_engine(Path(engine_path).read_bytes())
        if self.engine is None:
            raise RuntimeError(f"Failed to load TensorRT engine from {engine_path}")
        self.context = self.engine.create_execution_context()

    def __call__(
        self, sa_embs: Any, vl_embs: Any, timestep: Any, image_mask: Any = None, backbone_attention_mask: Any = None
    ) -> Any:
        place = f"cuda:{self.device}"
        given = {"sa_embs": sa_embs, "vl_embs": vl_embs, "timestep": timestep}
        given |= {"image_mask": image_mask, "backbone_attention_mask": backbone_attention_mask}
        given = {name: value.to(place).contiguous() for name, value in given.items() if value is not None}
        for name, tensor in given.items():
            self.context.set_input_shape(name, tensor.shape)
        for name, tensor in given.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        shape = tuple(self.context.get_tensor_shape("output"))
        output = torch.empty(shape, dtype=torch.bfloat16, device=place)
        self.context.set_tensor_address("output", output.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT inference failed")
        return output


def replace_dit_with_tensorrt(policy: Any, trt_engine_path: str, device: int = 0) -> None:
    wrapper = TensorRTDiTWrapper(trt_engine_path, device=device)

    def trt_forward(
        hidden_states: Any,
        encoder_hidden_states: Any,
        timestep: Any,
        encoder_attention_mask: Any = None,  # noqa: ARG001 (part of the signature, not used by the engine)
        return_all_hidden_states: bool = False,
        image_mask: Any = None,
        backbone_attention_mask: Any = None,
    ) -> Any:
        output = wrapper(
            sa_embs=hidden_states,
            vl_embs=encoder_hidden_states,
            timestep=timestep,
            image_mask=image_mask,
            backbone_attention_mask=backbone_attention_mask,
        )
        if return_all_hidden_states:
            raise RuntimeError("TensorRT only returns the final output. Check inference config")
        return output

    policy.model.action_head.model.forward = trt_forward


def config_of(model_path: str, layers: int | None) -> tuple[Any, Path | None]:
    """The model's numbers, and the folder of its weights if it has any."""
    if model_path in VERSIONS:
        return replace(VERSIONS[model_path], num_layers=layers or 2), None
    metadata = json.loads((Path(model_path) / "export_metadata.json").read_text())
    return replace(
        VERSIONS[metadata["model_version"]],
        num_layers=metadata["num_layers"],
        vl_self_attention_layers=metadata["vl_self_attention_layers"],
    ), Path(model_path)


def prepare_observation(step: int, seed: int) -> dict[str, Any]:
    """What a camera, joints and an operator would give at this step; the text's length changes now and then."""
    draw = np.random.default_rng([seed, step])
    text = "put the red cube into the drawer".ljust(216 - 8 * (step // 32 % 3), ".")
    return {
        "video": {"front": draw.integers(0, 256, (1, 1, 64, 64, 3), np.uint8)},
        "state": {"joints": draw.standard_normal((1, 1, 7), np.float32)},
        "language": {"task": [[text]]},
    }


def run_single_trajectory(policy: Any, args: argparse.Namespace, traj_id: int) -> tuple[np.ndarray, list[float]]:
    """The actions, and the seconds of each inference; the next observation is prepared meanwhile."""
    executor = ThreadPoolExecutor(max_workers=1)
    steps = list(range(0, args.steps, args.action_horizon))
    future = executor.submit(prepare_observation, steps[0], args.seed + traj_id)
    actions, seconds = [], []
    for index in range(len(steps)):
        observation = future.result()
        if index + 1 < len(steps):
            future = executor.submit(prepare_observation, steps[index + 1], args.seed + traj_id)
        start = time.time()
        chunk, _ = policy.get_action(observation)
        if index >= args.skip_timing_steps:
            seconds.append(time.time() - start)
        actions.append(chunk["joints"][0, : args.action_horizon])
    executor.shutdown(wait=True)
    return np.concatenate(actions), seconds


def main(args: argparse.Namespace) -> np.ndarray:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(args.seed)
    config, weights = config_of(args.model_path, args.layers)
    if args.inference_mode == "trt_full_pipeline" and config.version != "n1.7":
        raise ValueError("--inference-mode trt_full_pipeline: the script of N1.7 has it, that of N1.6 has not")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.time()
    policy = networks.policy(config, device=device, weights=weights)
    if args.inference_mode == "trt_full_pipeline":
        from trt_model_forward import setup_tensorrt_engines

        setup_tensorrt_engines(policy, args.trt_engine_path, mode="n17_full_pipeline")
    elif args.inference_mode == "tensorrt":
        path = args.trt_engine_path
        if os.path.isdir(path):  # noqa: PTH112 (as the script has it)
            path = os.path.join(path, "dit_bf16.engine")  # noqa: PTH118
        replace_dit_with_tensorrt(policy, path)
    logging.info(f"Model loading time: {time.time() - start:.4f} seconds")
    found, times = [], []
    for traj_id in args.traj_ids:
        actions, seconds = run_single_trajectory(policy, args, traj_id)
        found.append(actions)
        times += seconds
    if times:
        logging.info(f"Total inference steps: {len(times)}")
        logging.info(f"Avg inference time per step: {sum(times) / len(times):.4f}s")
        logging.info(f"P90 inference time: {np.percentile(times, 90):.4f}s")
    if args.inference_mode == "trt_full_pipeline":
        from trt_model_forward import close_tensorrt_engines

        close_tensorrt_engines(policy)
    result = np.concatenate(found)
    if args.save_actions:
        np.save(args.save_actions, result)
    logging.info("Done")
    return result


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="n1.7")
    parser.add_argument("--layers", type=int, help="of the DiT, where --model-path is a version (2)")
    parser.add_argument("--inference-mode", choices=("pytorch", "tensorrt", "trt_full_pipeline"), default="pytorch")
    parser.add_argument("--trt-engine-path", default="./gr00t_n1d7_engines")
    parser.add_argument("--denoising-steps", type=int, default=4, help="read by nobody, as in the original")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--traj-ids", type=int, nargs="+", default=[0])
    parser.add_argument("--action-horizon", type=int, default=16)
    parser.add_argument("--skip-timing-steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--save-actions", metavar="FILE.npy", help="float32 [steps, joints]")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))

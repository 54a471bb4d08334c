"""Where policies come from: the stand-ins of this folder, or NVIDIA's package with a checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
from standin import BatchFeature
from versions import FILES, VERSIONS


def plan(bundle: Path, engine: str) -> str:
    """The file that the scripts would load."""
    candidates = [bundle / name for name in FILES[engine][1]]
    return str(next((path for path in candidates if path.exists()), candidates[0]))


class StandIn:
    """The policy of `networks.py` with the weights of a bundle of `models.py`."""

    def __init__(self, bundle: Path) -> None:
        metadata = json.loads((bundle / "export_metadata.json").read_text())
        self.bundle = bundle
        self.config = replace(
            VERSIONS[metadata["model_version"]],
            num_layers=metadata["num_layers"],
            vl_self_attention_layers=metadata["vl_self_attention_layers"],
        )
        self.batch_feature: Any = BatchFeature
        self.s = self.config.vl_lengths[1]
        self.engines = self.config.engines
        #: of the set-up: what loads all of these
        self.mode = "n17_full_pipeline" if "vl_self_attention" in self.engines else "action_head"
        self.networks: dict[str, Any] = {}  # large, and the same in every policy

    def policy(self, without: Collection[str] = ()) -> Any:
        return networks.policy(self.config, device="cuda", weights=self.bundle, without=without, shared=self.networks)

    def scripts(self) -> Any:
        """The module `trt_model_forward`; `trt_torch` must be importable by then."""
        return importlib.import_module("trt_model_forward")

    def plan(self, engine: str) -> str:
        return plan(self.bundle, engine)

    def setup(self, policy: Any, mode: str) -> None:
        self.scripts().setup_tensorrt_engines(policy, str(self.bundle), mode=mode)


class Checkpoint:
    """`Gr00tPolicy` of NVIDIA's package; `scripts` is its folder scripts/deployment, `bundle` its engines.

    The head gets random features of the checkpoint's sizes, as the stand-in's does.
    """

    mode = "action_head"
    engines = ("state_encoder", "action_encoder", "dit", "action_decoder")

    def __init__(self, bundle: Path, model: str, tag: str, scripts: Path) -> None:
        from transformers.feature_extraction_utils import BatchFeature as TransformersBatchFeature

        self.bundle, self.model, self.tag = bundle, model, tag
        sys.path.insert(0, str(scripts))
        self.batch_feature = TransformersBatchFeature
        self.config = self.policy().model.action_head.config
        self.s = json.loads((bundle / "export_metadata.json").read_text())["vl_seq_len"]

    def policy(self, without: Collection[str] = ()) -> Any:  # noqa: ARG002 (a checkpoint is loaded whole)
        from gr00t.data.embodiment_tags import EmbodimentTag
        from gr00t.policy.gr00t_policy import Gr00tPolicy

        return Gr00tPolicy(embodiment_tag=EmbodimentTag[self.tag], model_path=self.model, device="cuda")

    def scripts(self) -> Any:
        return importlib.import_module("trt_model_forward")

    def plan(self, engine: str) -> str:
        return plan(self.bundle, engine)

    def setup(self, policy: Any, mode: str) -> None:
        with contextlib.suppress(ImportError, AttributeError):  # the newest scripts have an enum
            mode = importlib.import_module("gr00t.deployment.modes").InferenceMode(mode)
        self.scripts().setup_tensorrt_engines(policy, str(self.bundle), mode=mode)

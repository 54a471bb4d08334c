"""The calibration of one build: which data it reads, which cache it takes or writes, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BuildOptionError, EngineBuildError
from ..provenance import Machine
from . import calibration, calibration_cache
from .arrays import Array
from .onnx_file import OnnxFile
from .options import BuildOptions
from .preprocessing import Preprocessing
from .process import Answer, Ask
from .profiles import resolve
from .trying import network_inputs

__all__ = ["Calibration", "opened"]


@dataclass
class Calibration:
    data: calibration.CalibrationData
    options: BuildOptions
    #: Of the model.
    model_sha256: str
    tensorrt: tuple[int, ...]
    #: What was made of it, for the manifest.
    record: dict[str, Any] = field(default_factory=dict)
    #: Coverage, for the terminal.
    table: str = ""
    _cache: bytes | None = None
    _from_file: bool = False

    @property
    def key(self) -> str:
        """What a plan's key has of it."""
        return f"{self.data.sha256}:{self.options.calib_algorithm}"

    def prepare(self, say: Callable[[str], None]) -> None:
        """Takes the cache that is there, if it fits, or reads all data once. Raises `CalibrationCacheError`, and
        `BuildOptionError` for data that are no good."""
        path = self.options.calib_cache
        if path is not None and Path(path).exists() and not self.options.recalibrate:
            calibration_cache.check_cache(path, **self._identity())
            self._cache, self._from_file = Path(path).read_bytes(), True
            say(f"the calibration cache {path} fits and is used: TensorRT reads no data")
        else:
            self.data.check()
        for finding in self.data.findings:
            say(finding)

    def request(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """For the job that builds: its "calibration", and its arrays."""
        first = next(iter(self.data.shapes.values()))
        request = {
            "algorithm": self.options.calib_algorithm,
            "batch_size": int(first[0]) if first else 1,
            "shapes": {name: list(shape) for name, shape in self.data.shapes.items()},
        }
        return request, {} if self._cache is None else {"calibration_cache": np.frombuffer(self._cache, np.uint8)}

    def batches(self) -> Ask:
        """Answers the questions of a job that builds."""
        batches: Iterator[Mapping[str, Array]] = iter(self.data)

        def answer(question: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Array]]:
            batch = next(batches, None)
            if batch is None:
                return {"more": False}, {}
            return {"more": True}, {name: batch[name] for name in question["names"]}

        return answer

    def read(self, answer: Answer) -> None:
        """What a build did with it. Later builds (levels of auto) take the ranges of the first one.

        Raises `CalibrationCacheError` where TensorRT rejected the cache, `EngineBuildError` where it did not calibrate
        or most tensors are without a range.
        """
        path, given = self.options.calib_cache, self._cache
        calls = answer.result["calibration_batches"]
        name = path or "the calibration of the level before"
        calibration_cache.check_calls(calls, batches=self.data.batches, cached=None if given is None else name)
        content = answer.arrays.get("calibration_cache")
        written = given if given is not None else None if content is None else content.tobytes()
        if written is None:
            raise EngineBuildError(
                "TensorRT read the calibration data and wrote no cache, so nothing says what ranges the plan has. "
                "Try another TensorRT version, or a model with Q/DQ nodes."
            )
        cache = calibration_cache.parse_cache(written, path or "TensorRT's calibration cache")
        if given is None and path is not None:
            calibration_cache.save_cache(path, written, **self._identity())
        self._cache = written
        tensors = calibration_cache.network_tensors(network_inputs(answer), answer.result["layers"])
        covered = calibration_cache.coverage(cache, tensors)
        self.table = covered.text()
        self.record = {
            **self.data.to_mapping(),
            "algorithm": self.options.calib_algorithm,
            "cache": {"sha256": hashlib.sha256(written).hexdigest(), "used": self._from_file},
            "coverage": covered.to_mapping(),
            "without_range": calibration_cache.check_log(answer.log, tensors),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.model_sha256,
            "data": self.data,
            "algorithm": self.options.calib_algorithm,
            "tensorrt": self.tensorrt,
        }


def opened(
    model: OnnxFile, model_sha256: str, options: BuildOptions, given: Any, machine: Machine
) -> Calibration | None:
    """The calibration that is asked for; ``None`` without data. Raises `BuildOptionError`."""
    if given is not None and options.calib_data is not None:
        raise BuildOptionError("--calib-data and calibration_data are both given: use one.", option="--calib-data")
    source = given if given is not None else options.calib_data
    if source is None:
        if options.calib_cache is not None:
            raise BuildOptionError(
                f"--calib-cache {options.calib_cache}: the data set that it came from is needed too (--calib-data): "
                "without it nothing says that the cache fits.",
                option="--calib-cache",
            )
        return None
    inputs = model.network_inputs()
    text = options.calib_preprocess
    data = calibration.load(
        source,
        inputs,
        resolve(inputs, options.hints())[0],
        preprocessing=None if text is None else Preprocessing.parse(text),
        batch_size=options.calib_batch,
        minimum=options.calib_min_samples,
    )
    version = tuple(map(int, machine.tensorrt.split(".")[:3]))
    return Calibration(data, options, model_sha256, version)

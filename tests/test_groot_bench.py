"""The workload generator of benches/groot/, on the CPU: sizes, names, formulas, counts and tables."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

GROOT = Path(__file__).resolve().parent.parent / "benches" / "groot"
sys.path[:0] = [str(GROOT), str(GROOT.parent)]


def small(config, **changes):
    """A head of the same structure that takes no time; 5 embodiments, 4 layers."""
    return replace(
        config,
        num_layers=4,
        input_embedding_dim=96,
        num_attention_heads=4,
        backbone_embedding_dim=64,
        hidden_size=32,
        max_num_embodiments=5,
        **changes,
    )


def random_inputs(config, engine, batch, s, seed=0):
    from versions import INTEGERS, MASKS

    draw = np.random.default_rng(seed)
    found = {}
    for name, shape in config.engine_inputs(batch, s)[engine].items():
        if name == "embodiment_id":
            found[name] = draw.integers(0, config.max_num_embodiments, shape)
        elif name in INTEGERS:
            found[name] = draw.integers(0, 1000, shape)
        elif name in MASKS:
            mask = draw.random(shape) < 0.7
            mask[:, 0], mask[:, 1] = True, name != "image_mask"  # an image's token and a text's are attended
            found[name] = mask
        else:
            found[name] = draw.standard_normal(shape, np.float32)
    return found


# Without a graph to write --------------------------------------------------------------------------------------------


def test_the_two_versions():
    from versions import N1_6, N1_7

    assert (N1_6.sa_tokens, N1_7.sa_tokens) == (51, 41)
    assert N1_7.engine_inputs()["dit"] == {
        "sa_embs": (1, 41, 1536),
        "vl_embs": (1, 280, 2048),
        "timestep": (1,),
        "image_mask": (1, 280),
        "backbone_attention_mask": (1, 280),
    }
    assert N1_6.engine_inputs()["dit"]["sa_embs"] == (1, 51, 1536)
    assert N1_6.engine_output("action_decoder") == (1, 51, 128)
    assert N1_7.engine_output("dit") == (1, 41, 1024)
    assert N1_7.engine_inputs()["action_encoder"]["actions"] == (1, 40, 132)
    assert replace(N1_7, state_history_length=3).engine_inputs()["state_encoder"]["state"] == (1, 1, 396)


def test_an_action_has_13_engine_calls():
    from versions import N1_6, N1_7

    assert N1_6.engine_calls == N1_7.engine_calls == 13
    assert replace(N1_7, vl_self_attention_layers=4).engine_calls == 14
    assert replace(N1_7, num_inference_timesteps=2).engine_calls == 7


def test_the_first_plan_that_exists_is_loaded(tmp_path):
    """The order of names is part of the contract."""
    from versions import FILES

    assert FILES["dit"][1] == ("dit_bf16.engine", "dit_model_bf16.engine", "dit_model_bf16.trt")
    assert len({file for file, _ in FILES.values()}) == len(FILES)


# ONNX ----------------------------------------------------------------------------------------------------------------

CONTRACT = {
    ("n1.7", "state_encoder"): {
        "state": ("BFLOAT16", [1, 1, 132]),
        "embodiment_id": ("INT64", [1]),
        "output": ("BFLOAT16", [1, 1, 1536]),
    },
    ("n1.7", "action_encoder"): {
        "actions": ("BFLOAT16", [1, 40, 132]),
        "timesteps": ("INT64", [1]),
        "embodiment_id": ("INT64", [1]),
        "output": ("BFLOAT16", [1, 40, 1536]),
    },
    ("n1.7", "action_decoder"): {
        "model_output": ("BFLOAT16", [1, 41, 1024]),
        "embodiment_id": ("INT64", [1]),
        "output": ("BFLOAT16", [1, 41, 132]),
    },
    ("n1.7", "dit"): {
        "sa_embs": ("BFLOAT16", [1, 41, 1536]),
        "vl_embs": ("BFLOAT16", [1, "S", 2048]),
        "timestep": ("INT64", [1]),
        "image_mask": ("BOOL", [1, "S"]),
        "backbone_attention_mask": ("BOOL", [1, "S"]),
        "output": ("BFLOAT16", [1, 41, 1024]),
    },
    ("n1.7", "vl_self_attention"): {
        "hidden_states": ("BFLOAT16", [1, "S", 2048]),
        "output": ("BFLOAT16", [1, "S", 2048]),
    },
    ("n1.6", "state_encoder"): {
        "state": ("BFLOAT16", ["B", 1, 128]),
        "embodiment_id": ("INT64", ["B"]),
        "output": ("BFLOAT16", ["B", 1, 1536]),
    },
    ("n1.6", "action_encoder"): {
        "actions": ("BFLOAT16", ["B", 50, 128]),
        "timesteps": ("INT64", ["B"]),
        "embodiment_id": ("INT64", ["B"]),
        "output": ("BFLOAT16", ["B", 50, 1536]),
    },
    ("n1.6", "action_decoder"): {
        "model_output": ("BFLOAT16", ["B", 51, 1024]),
        "embodiment_id": ("INT64", ["B"]),
        "output": ("BFLOAT16", ["B", 51, 128]),
    },
    ("n1.6", "dit"): {
        "sa_embs": ("BFLOAT16", ["B", "T", 1536]),
        "vl_embs": ("BFLOAT16", ["B", "S", 2048]),
        "timestep": ("INT64", ["B"]),
        "image_mask": ("BOOL", ["B", "S"]),
        "backbone_attention_mask": ("BOOL", ["B", "S"]),
        "output": ("BFLOAT16", ["B", "T", 1024]),
    },
}

#: Parameters of each network, as published or computed from the published sizes.
PARAMETERS = {
    "state_encoder": 54_738_944,
    "action_encoder": 233_127_936,
    "action_decoder": 37_916_800,
    "vl_self_attention": 201_433_088,
}


@pytest.fixture
def weightless(monkeypatch):
    """Weights of the small networks are counted instead of made: {name: shape}."""
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed (it does not take numpy 1.21)")
    import models

    shapes = {}

    def weight(self, name, *shape):
        shapes[name] = shape
        self.weights.append(onnx.TensorProto(name=name, dims=shape, data_type=self.type))
        return name

    monkeypatch.setattr(models.Graph, "weight", weight)
    return shapes


@pytest.mark.parametrize(("version", "engine"), CONTRACT)
def test_names_types_and_shapes(version, engine, tmp_path, weightless):
    import models
    import onnx
    from versions import VERSIONS

    layers = 4 if engine == "vl_self_attention" else 0
    config = replace(VERSIONS[version], num_layers=1, vl_self_attention_layers=layers)
    path = models.write(config, engine, tmp_path)
    graph = onnx.load(path).graph
    found = {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in [*graph.input, *graph.output]
    }
    assert found == CONTRACT[version, engine]
    assert [value.name for value in graph.input] == list(config.engine_inputs()[engine])
    if version == "n1.7" and engine in PARAMETERS:
        assert sum(int(np.prod(shape)) for shape in weightless.values()) == PARAMETERS[engine]
    # Strongly typed: nothing wider than bfloat16 inside, but for the timestep's sinusoid.
    assert sum(w.data_type == onnx.TensorProto.FLOAT for w in graph.initializer) == (
        engine in ("dit", "action_encoder")
    )


def test_profiles():
    import models
    from versions import N1_6, N1_7

    assert models.profile(N1_7, "dit") == {
        "sa_embs": [(1, 41, 1536)] * 3,
        "vl_embs": [(1, 1, 2048), (1, 280, 2048), (1, 560, 2048)],
        "timestep": [(1,)] * 3,
        "image_mask": [(1, 1), (1, 280), (1, 560)],
        "backbone_attention_mask": [(1, 1), (1, 280), (1, 560)],
    }
    assert models.profile(N1_6, "dit")["vl_embs"] == [(1, 1, 2048), (1, 122, 2048), (8, 512, 2048)]
    assert models.profile(N1_7, "action_encoder")["timesteps"] == [(1,)] * 3


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """(version, engine) to a function that runs the small network in fp32, and its weights."""
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed (it does not take numpy 1.21)")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    import models
    from versions import N1_6, N1_7

    found = {}
    for config in (small(N1_6), small(N1_7, vl_self_attention_layers=2)):
        folder = tmp_path_factory.mktemp(config.version)
        for engine in config.engines:
            path = models.write(config, engine, folder, dtype="float32")
            onnx.checker.check_model(path, full_check=True)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer}

            def run(inputs, session=session):
                (output,) = session.run(["output"], inputs)
                return output

            found[config.version, engine] = config, run, weights
    return found


def category_linear(weights, name, x, ids):
    return np.einsum("bti,bio->bto", x, weights[f"{name}.weight"][ids]) + weights[f"{name}.bias"][ids][:, None]


@pytest.mark.parametrize(("version", "batch"), [("n1.7", 1), ("n1.6", 3)])
def test_encoders_and_decoder_against_numpy(networks, version, batch):
    for engine, first in (("state_encoder", "state"), ("action_decoder", "model_output")):
        config, run, weights = networks[version, engine]
        given = random_inputs(config, engine, batch, 40)
        ids = given["embodiment_id"]
        middle = np.maximum(category_linear(weights, "layer1", given[first], ids), 0)
        expected = category_linear(weights, "layer2", middle, ids)
        assert expected.shape == config.engine_output(engine, batch)
        np.testing.assert_allclose(run(given), expected, rtol=1e-4, atol=1e-6)

    config, run, weights = networks[version, "action_encoder"]
    given = random_inputs(config, "action_encoder", batch, 40)
    ids, half = given["embodiment_id"], config.input_embedding_dim // 2
    x = category_linear(weights, "layer1", given["actions"], ids)
    angles = given["timesteps"][:, None, None] * np.exp(-np.log(10000) * np.arange(half) / half)
    wave = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).repeat(config.action_horizon, axis=1)
    x = category_linear(weights, "layer2", np.concatenate([x, wave], axis=-1), ids)
    expected = category_linear(weights, "layer3", x / (1 + np.exp(-x)), ids)
    np.testing.assert_allclose(run(given), expected, rtol=1e-3, atol=1e-5)


def test_vl_self_attention_against_numpy(networks):
    config, run, weights = networks["n1.7", "vl_self_attention"]
    given = random_inputs(config, "vl_self_attention", 1, 23)

    def linear(name, x):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = given["hidden_states"].astype(np.float64)
    for i in range(2):
        y = norm(f"{i}.norm1", x)
        q, k, v = (linear(f"{i}.{n}", y).reshape(1, 23, 32, -1).transpose(0, 2, 1, 3) for n in "qkv")
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        x = x + linear(f"{i}.out", mixed.transpose(0, 2, 1, 3).reshape(x.shape))
        up = linear(f"{i}.up", norm(f"{i}.norm2", x))
        x = x + linear(f"{i}.down", 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))))
    np.testing.assert_allclose(run(given), x, rtol=1e-3, atol=1e-4)


def test_the_dit_of_n16_takes_batches_and_other_numbers_of_tokens(networks):
    """Each row of a batch is what it would be alone."""
    config, run, _ = networks["n1.6", "dit"]
    given = random_inputs(config, "dit", 3, 40)
    whole = run(given)
    assert whole.shape == config.engine_output("dit", 3)
    assert whole.std() > 0.05
    for row in range(3):
        alone = run({name: value[row : row + 1] for name, value in given.items()})
        np.testing.assert_allclose(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    fewer = run(given | {"sa_embs": given["sa_embs"][:, :17]})
    assert fewer.shape == (3, 17, config.hidden_size)


# Bundles -------------------------------------------------------------------------------------------------------------


def options(**changes):
    given = {"onnx_only": True, "builder": "jetrt", "parity": False, "opt_level": None, "jetrt_option": []}
    return argparse.Namespace(**(given | changes))


def test_a_bundle_and_its_twin(tmp_path, monkeypatch, capsys):
    """What exists is kept; the small engines are the same files in a bundle of more layers; the DiT is not."""
    pytest.importorskip("onnx", reason="the package onnx is not installed (it does not take numpy 1.21)")
    import models
    from versions import FILES, N1_7

    built = []

    def build(config, engine, onnx, plan, given):
        assert onnx.exists()
        built.append((config.num_layers, engine))
        plan.write_bytes(b"plan of " + engine.encode())

    monkeypatch.setitem(models.BUILDERS, "jetrt", build)
    first, second = tmp_path / "n1.7-4", tmp_path / "n1.7-6"
    config = small(N1_7)
    models.bundle(config, first, options(onnx_only=False))
    assert built == [(4, name) for name in ("state_encoder", "action_encoder", "dit", "action_decoder")]
    assert {file.name for file in first.iterdir()} == {
        "export_metadata.json",
        *(FILES[name][0] for name in config.engines),
        *(FILES[name][1][0] for name in config.engines),
    }
    models.bundle(config, first, options(onnx_only=False))
    assert len(built) == 4
    rows = models.bundle(replace(config, num_layers=6), second, options(onnx_only=False), [first])
    assert built[4:] == [(6, "dit")]
    assert [row["engine"] for row in rows if "write_seconds" in row] == ["dit"]
    third = tmp_path / "n1.7-4-vl"
    more = replace(config, vl_self_attention_layers=2)
    assert (config.name, more.name) == ("n1.7-4", third.name)
    models.bundle(more, third, options(onnx_only=False), [second, first])
    assert built[5:] == [(4, "vl_self_attention")]
    assert (third / "dit_bf16.onnx").read_bytes() == (first / "dit_bf16.onnx").read_bytes()
    assert json.loads((third / "export_metadata.json").read_text())["vl_self_attention_layers"] == 2
    assert (second / "action_encoder.onnx").read_bytes() == (first / "action_encoder.onnx").read_bytes()
    assert (second / "dit_bf16.onnx").read_bytes() != (first / "dit_bf16.onnx").read_bytes()
    metadata = json.loads((second / "export_metadata.json").read_text())
    assert {key: metadata[key] for key in ("model_version", "num_layers", "sa_seq_len", "batch_size", "precision")} == {
        "model_version": "n1.7",
        "num_layers": 6,
        "sa_seq_len": 41,
        "batch_size": 1,
        "precision": "bf16",
    }
    assert metadata["vl_seq_len"] == metadata["llm_seq_len"] == 280
    assert capsys.readouterr().out.count("\n") == 17


def test_the_words_that_jetrt_build_gets(tmp_path, monkeypatch):
    """As the command line knows them; a build that fails ends the program."""
    import models
    from versions import N1_7

    seen = []

    def run(words, check):
        seen.append(words)
        return subprocess.CompletedProcess(words, 3)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", run)
        with pytest.raises(SystemExit, match="status 3"):
            models.build_by_jetrt(N1_7, "dit", tmp_path / "dit.onnx", tmp_path / "dit.engine", options(opt_level=2))
    (words,) = seen
    assert words[1:4] == ["-m", "jetrt", "build"]
    assert words[words.index("--opt-level") + 1] == "2"
    assert words[words.index("--max") + 1] == (
        "sa_embs:1x41x1536,vl_embs:1x560x2048,timestep:1,image_mask:1x560,backbone_attention_mask:1x560"
    )
    help_text = subprocess.run(
        [sys.executable, "-m", "jetrt", "build", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(word in help_text for word in words if word.startswith("--"))


# Counting ------------------------------------------------------------------------------------------------------------

FAKE_CUPTI = r"""
#include <stdint.h>
typedef struct { int site; const char *function; } Call;
static void (*callback)(void *, int, uint32_t, const Call *);
static int on;
int cuptiSubscribe(void **s, void (*f)(void *, int, uint32_t, const Call *), void *u)
    { if (callback) return 39; callback = f; *s = (void *)7; (void)u; return 0; }
int cuptiEnableDomain(uint32_t enable, void *s, int domain) { on = enable && s == (void *)7 && domain == 1; return 0; }
int cuptiUnsubscribe(void *s) { callback = 0; return s != (void *)7; }
void happen(int domain, int site, uint32_t id, const char *name)
    { Call call = {site, name}; if (on) callback(0, domain, id, &call); }
"""


@pytest.fixture(scope="module")
def fake_cupti(tmp_path_factory):
    if not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("cupti")
    (folder / "fake.c").write_text(FAKE_CUPTI)
    path = folder / "libcupti.so.13"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", str(path), str(folder / "fake.c")]
    subprocess.run(command, check=True)
    return path


def test_driver_calls_are_counted(fake_cupti):
    import ctypes

    import counting

    happen = ctypes.CDLL(str(fake_cupti)).happen

    def work():
        for _ in range(3):
            happen(1, 0, 307, b"cuLaunchKernel")
            happen(1, 1, 307, b"cuLaunchKernel")  # the return of the same call
        happen(1, 0, 440, b"cuStreamSynchronize_ptsz")
        happen(1, 0, 126, b"cuStreamSynchronize")
        happen(2, 0, 131, b"cudaStreamSynchronize")  # the runtime's: its driver call is counted

    work()  # before the start: not seen
    calls = counting.DriverCalls(str(fake_cupti))
    expected = {"cuLaunchKernel": 3, "cuStreamSynchronize": 1, "cuStreamSynchronize_ptsz": 1}
    assert calls.during(work) == expected
    work()
    assert calls.during(work) == expected  # counted anew
    figures = counting.driver_figures(expected, 2)
    assert figures["waits"] == 1.0
    assert figures["kernel_launches"] == 1.5
    assert figures["graph_launches"] == figures["allocations"] == 0
    assert figures["calls"] == {"cuLaunchKernel": 1.5, "cuStreamSynchronize": 1.0}
    with pytest.raises(OSError, match=r"CUPTI: subscribe with .* gave 39"):
        counting.DriverCalls(str(fake_cupti))
    calls.close()
    counting.DriverCalls(str(fake_cupti)).close()


def test_where_calls_cannot_be_counted(tmp_path, monkeypatch):
    import counting

    loaded = {"libcupti.so": ["/usr/lib/libcupti.so.13"], "libcuda.so": []}
    monkeypatch.setattr(counting, "mapped", loaded.get)
    with pytest.raises(OSError, match="no libcuda in this process"):
        counting.DriverCalls()
    loaded["libcupti.so"] = []
    with pytest.raises(OSError, match="no libcupti in this process"):
        counting.DriverCalls()
    if shutil.which(os.environ.get("CC", "cc")):
        with pytest.raises(OSError, match="gave -1"):
            counting.DriverCalls(str(tmp_path / "absent.so"))


def test_kinds_of_gpu_work():
    import counting

    fill = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<c10::BFloat16>, std::array<char*>>"
    )
    assert counting.kernel_kind(fill) == "fill"
    assert counting.kernel_kind("Memset (Device)") == "fill"
    assert counting.kernel_kind("Memcpy DtoD (Device -> Device)") == "copy"
    assert counting.kernel_kind("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n") == "kernel"
    assert counting.plain_name("cuMemAlloc_v2") == "cuMemAlloc"
    assert counting.plain_name("cuLaunchKernelEx_ptsz") == "cuLaunchKernelEx"


# Tables and picture --------------------------------------------------------------------------------------------------


def figures():
    """As head.py writes them for one bundle; the figures are made up."""
    import ways

    done = {
        ways.SCRIPT: 3.12,
        ways.BARE: 2.15,
        ways.BARE_GRAPH: 0.985,
        ways.JETRT: 2.20,
        ways.JETRT_LOOP: 1.0,
        ways.JETRT_GRAPH: 1.2,
    }

    def row(ms):
        ends = {"min": ms, "median": ms, "p99": ms, "samples": 200}
        return {"host_us": {**ends, "median": 1000 * ms}, "done_ms": {**ends, "worst": ms, "jitter": 0.0}}

    counts = {name: {"torch_allocations": 9.0, "profiler": {"fills": 4.0, "waits": 0.0}} for name in done}
    counts[ways.SCRIPT]["profiler"] = {"fills": 17.0, "waits": 13.0}
    driver = {name: {"waits": 13.0 if name == ways.SCRIPT else 0.0, "graph_launches": 0.0} for name in done}
    stages = {name: {"ms": {"DiT": 0.6 * ms, "between": 0.4 * ms}, "engine_calls": 13} for name, ms in done.items()}
    return {
        "s": 280,
        "skipped": {},
        "fixed": {"rows": {name: row(ms) for name, ms in done.items()}},
        "driver": driver,
        "counts": counts,
        "stages": stages,
    }


def judged(result, layers=2):
    import tables

    found, unknown = tables.judge(layers, result)
    return {t["target"].split(": ", 1)[1]: t["met"] for t in found}, unknown


def test_targets_are_judged():
    import ways

    found, unknown = judged(figures())
    assert unknown == []
    assert found == {
        "the unchanged script is 1.3 x faster over jetrt than over its own Engine": True,
        f"«{ways.JETRT_LOOP}» within 1.03 x of «{ways.BARE_GRAPH}»": True,
        f"«{ways.JETRT_GRAPH}» within 1.03 x of «{ways.BARE_GRAPH}»": False,
        "no wait in the unchanged script": True,
        "no fill by engine calls in the unchanged script": True,
    }


def test_a_target_that_is_missed():
    import ways

    worse = figures()
    worse["fixed"]["rows"][ways.JETRT]["done_ms"]["median"] = 2.5  # 3.12 / 1.3 = 2.4
    worse["driver"][ways.JETRT]["waits"] = 0.1
    worse["counts"][ways.JETRT]["profiler"]["fills"] = 5.0
    found, _ = judged(worse)
    assert [met for name, met in found.items() if "unchanged script" in name] == [False, False, False]


def test_what_was_not_measured_is_not_judged():
    """Waits that only the profiler looked for are not known: it does not see those that go past the runtime."""
    import ways

    less = copy.deepcopy(figures())
    less["driver"] = {"not available": "no CUPTI"}
    del less["fixed"]["rows"][ways.JETRT_LOOP]
    found, unknown = judged(less, layers=32)
    assert [name.split(": ", 1)[1] for name in unknown] == [
        f"«{ways.JETRT_LOOP}» within 1.02 x of «{ways.BARE_GRAPH}»",
        "no wait in the unchanged script",
    ]
    assert not any("1.3 x" in name for name in found)  # of the 2-layer head alone


def test_tables_are_shown(capsys):
    import tables
    import ways

    result = figures()
    result["skipped"] = {ways.TORCH: "no room"}
    tables.show(2, result)
    text = capsys.readouterr().out
    assert f"| {ways.SCRIPT} | 3120 |" in text
    assert f"| {ways.SCRIPT} | 13 |" in text
    assert "not run: «torch eager»: no room" in text
    assert "callbacks not available" not in text
    result["driver"] = {"not available": "no CUPTI"}
    tables.show(2, result)
    assert "driver callbacks not available: no CUPTI" in capsys.readouterr().out


def test_the_bars_of_the_picture():
    import picture
    import ways

    result = figures()
    result["stages"][ways.TORCH] = {"not measured": "no room"}
    rows = dict(picture.bars(result))
    assert ways.TORCH not in rows
    assert rows[ways.SCRIPT] == pytest.approx({"DiT": 1.872, "between": 1.248})
    assert list(rows[ways.SCRIPT]) == ["DiT", "between"]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'jetrt[plot]')")
    import picture

    machine = {"gpu": "a GPU", "libraries": {"tensorrt": "10.6"}, "versions": {"torch": "2.11"}}
    path = tmp_path / "bars.png"
    picture.draw({"bundles": {"2": figures(), "32": figures()}, "machine": machine}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no stages"):
        picture.draw({"bundles": {"2": {"s": 280}}, "machine": machine}, path)


# With torch ----------------------------------------------------------------------------------------------------------


def test_the_stand_ins_in_torch(tmp_path):
    """Runs what is below in a process of its own: torch must not ask the stand-in driver for its GPUs."""
    for name in ("torch", "onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LD_", "JETRT_"))}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all agree"


def in_torch(folder):
    """The modules give what the ONNX files give, the policy's loop what its formula says, weights what they should."""
    import models
    import networks
    import onnxruntime
    import torch
    from standin import BatchFeature
    from versions import FILES, N1_6, N1_7

    torch.set_num_threads(1)
    for base in (N1_6, N1_7):
        config = small(base, vl_self_attention_layers=2 if base is N1_7 else 0)
        bundle = folder / config.version
        bundle.mkdir()
        for engine in config.engines:
            models.write(config, engine, bundle, dtype="float32")
        policy = networks.policy(config, dtype=torch.float32, weights=bundle)
        head = policy.model.action_head
        parts = {name: getattr(head, "model" if name == "dit" else name) for name in config.engines}
        for engine, module in parts.items():
            session = onnxruntime.InferenceSession(bundle / FILES[engine][0], providers=["CPUExecutionProvider"])
            for batch in (1, 3) if config.max_batch > 1 else (1,):
                given = random_inputs(config, engine, batch, 40)
                (expected,) = session.run(["output"], given)
                tensors = {name: torch.from_numpy(value) for name, value in given.items()}
                with torch.inference_mode():
                    if engine == "dit":
                        names = ("sa_embs", "vl_embs", "timestep")
                        masks = {name: value for name, value in tensors.items() if name not in names}
                        found = module(*(tensors[name] for name in names), **masks)
                    else:
                        found = module(*tensors.values())
                np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)

        draw = np.random.default_rng(0)
        observation = {
            "video": {"front": draw.integers(0, 256, (1, 1, 16, 32, 3), np.uint8)},
            "state": {"joints": draw.standard_normal((1, 1, 7), np.float32)},
            "language": {"task": [["take the cube"]]},
        }
        calls = []
        for module in parts.values():
            module.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        torch.manual_seed(1)
        actions = policy.get_action(observation)[0]["joints"]
        assert actions.shape == (1, config.action_horizon, 7)
        assert len(calls) == config.engine_calls
        torch.manual_seed(1)
        assert np.array_equal(policy.get_action(observation)[0]["joints"], actions)
        assert not np.array_equal(policy.get_action(observation)[0]["joints"], actions)

        # The loop, written a second time.
        with torch.inference_mode():
            backbone_input, action_input = policy.model.prepare_input(policy.collate(observation))
            output = policy.model.backbone(backbone_input)
            assert output.image_mask.sum() == 8
            assert output.backbone_features.shape == (1, 8 + 13, config.backbone_embedding_dim)
            again = BatchFeature(data=dict(output))
            features = head._encode_features(output, action_input)
            torch.manual_seed(1)
            x = torch.randn(1, config.action_horizon, config.max_action_dim)
            for bucket in (0, 250, 500, 750):
                time = torch.tensor([bucket])
                encoded = head.action_encoder(x, time, action_input.embodiment_id)
                encoded = encoded + head.position_embedding.weight[: config.action_horizon]
                tokens = torch.cat([features.state_features, encoded], dim=1)
                masks = {"image_mask": output.image_mask, "backbone_attention_mask": output.backbone_attention_mask}
                moved = head.model(tokens, features.backbone_features, time, **masks)
                x = x + 0.25 * head.action_decoder(moved, action_input.embodiment_id)[:, 1:]
        np.testing.assert_allclose(x[:, :, :7].numpy(), actions, rtol=1e-5, atol=1e-6)

        if base is N1_7:  # real-time chunking: the first actions are those of the last chunk
            chunk = torch.ones(1, config.action_horizon, config.max_action_dim)
            chunking = {"action_horizon": 16, "rtc_overlap_steps": 8, "rtc_frozen_steps": 3, "rtc_ramp_rate": 6.0}
            with torch.inference_mode():
                given = BatchFeature(data={**action_input, "action": chunk})
                found = head.get_action(again, given, chunking)["action_pred"]
            assert torch.equal(found[:, :3], chunk[:, :3])
            assert not torch.equal(found[:, 8:], chunk[:, 8:])

        shared = {}
        one = networks.policy(config, weights=bundle, shared=shared, without=("dit",))
        other = networks.policy(config, weights=bundle, shared=shared, without=("dit",))
        assert one.model.action_head.state_encoder is other.model.action_head.state_encoder
        assert "dit" not in shared
        random_weights = [networks.policy(config).model.action_head.state_dict() for _ in range(2)]
        assert all(torch.equal(value, random_weights[1][name]) for name, value in random_weights[0].items())
        assert all(torch.isfinite(value.float()).all() for value in random_weights[0].values())
        with pytest.raises(ValueError, match=r"layer1\.weight"):
            networks.load_weights(parts["state_encoder"], bundle / FILES["action_decoder"][0])


def of_the_bench():
    """Other kernels' actions must be near; a limit of time is kept where the code catches everything."""
    import time

    import head
    import torch
    import variants
    import ways

    a, b = torch.randn(2, 40, 132, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = {"groups": {"torch": {"variants": [ways.TORCH]}, "compiled": {"variants": [ways.COMPILED]}}}
    found["differences"] = {}
    head.compare_groups({"engines": {0: a, 1: b}, "torch": {0: a, 1: b * 1.001}, "compiled": {1: a}}, found)
    assert list(found["differences"]) == [ways.COMPILED]
    assert found["least cosine of engines and torch"] > 0.9999
    found["differences"] = {}
    head.compare_groups({"compiled": {1: a}}, found)
    assert found["differences"] == {}

    def stubborn():
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                raise AssertionError("caught what must go through") from None

    start = time.monotonic()
    with pytest.raises(TimeoutError, match="a loop took more than 1 s"), variants.time_limit(1, "a loop"):
        stubborn()
    assert 1 <= time.monotonic() - start < 4
    with variants.time_limit(1, "nothing"):
        pass
    time.sleep(1.2)  # no alarm is left


if __name__ == "__main__":
    of_the_bench()
    in_torch(Path(sys.argv[1]))
    print("all agree")

"""From options to the builder's configuration: every rule with its message, and the version table against abi/."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetrt.builder import versions
from jetrt.builder.configure import IoFormat, native_config, parse_io_format, precision_layers
from jetrt.builder.io_formats import _FORMATS
from jetrt.builder.options import PRECISIONS, BuildOptions
from jetrt.errors import BuildOptionError

ABI = Path(__file__).parent.parent / "abi"
MIB = 1 << 20


def config(tensorrt=(10, 6, 0), sm=90, quantization=(), dtypes=("float32",), machine=None, calibrator=False, **options):
    machine = {"integrated": False, "jetson": False, "available_memory": None, **(machine or {})}
    return native_config(
        BuildOptions(**options),
        tensorrt=tensorrt,
        quantization=set(quantization),
        sm=sm,
        model_dtypes=set(dtypes),
        calibrator=calibrator,
        **machine,
    )


def refused(*texts, **given):
    with pytest.raises(BuildOptionError) as caught:
        config(**given)
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.option.startswith("--")
    return str(caught.value)


ORIN = {"machine": {"integrated": True, "jetson": True, "available_memory": 12_000 * MIB}, "sm": 87}


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("precision", "quantization", "on", "off"),
    [
        (None, [], [], ["TF32"]),
        ("fp32", [], [], ["TF32"]),
        ("tf32", [], ["TF32"], []),
        ("fp16", [], ["FP16"], []),
        ("bf16", [], ["BF16"], []),
        ("int8", ["int8"], ["INT8", "FP16"], []),
        ("fp8", ["fp8"], ["FP8", "BF16"], []),
        ("mixed", [], ["FP16", "BF16"], []),
        ("mixed", ["int8"], ["FP16", "BF16", "INT8"], []),
        ("mixed", ["fp8"], ["FP16", "BF16", "FP8"], []),
        ("fp16", ["int4"], ["FP16", "INT4"], []),
    ],
)
def test_flags_of_each_precision(precision, quantization, on, off):
    found = config(precision=precision, quantization=quantization)
    assert (list(found.flags_on), list(found.flags_off)) == (on, off)
    assert found.precision == (precision or "fp32")
    assert not found.strongly_typed


def test_int8_takes_fp16_with_it_unless_told_not_to():
    assert config(precision="int8", calib_data="d.npz").flags_on == ("INT8", "FP16")
    assert config(precision="int8", calib_data="d.npz", int8_only=True).flags_on == ("INT8",)
    assert config(precision="int8", calibrator=True).flags_on == ("INT8", "FP16")
    assert config(precision="mixed", calibrator=True).flags_on == ("FP16", "BF16", "INT8")


def test_int8_needs_ranges():
    refused("int8 needs ranges", "--calib-data", "Ranges are never made up", precision="int8")


def test_calibration_of_a_model_that_is_quantised_already():
    refused("would ignore the calibration", precision="int8", quantization=["int8"], calib_data="d.npz")
    refused("would ignore the calibration", precision="mixed", quantization=["int8"], calibrator=True)


def test_calibrator_for_another_precision():
    refused("--precision fp16", "only int8 and mixed use", precision="fp16", calibrator=True)


def test_fp8_without_its_nodes():
    refused(
        "fp8 needs fp8 QuantizeLinear/DequantizeLinear nodes",
        "python -m modelopt.onnx.quantization --onnx_path MODEL.onnx --quantize_mode fp8",
        precision="fp8",
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_quantised_model_in_a_precision_without_it(kind, precision):
    refused(
        f"--precision {precision}",
        f"the model has {kind} QuantizeLinear/DequantizeLinear nodes; build it with --precision {kind}",
        precision=precision,
        quantization=[kind],
    )


def test_int8_and_fp8_together():
    text = "no weakly typed plan with both int8 and fp8"
    refused(text, precision="mixed", quantization=["int8", "fp8"])
    refused(text, precision="mixed", quantization=["fp8"], calibrator=True)
    assert config(strongly_typed=True, quantization=["int8", "fp8"]).precision == "mixed"


@pytest.mark.parametrize(
    ("precision", "sm", "least"), [("bf16", 75, 80), ("tf32", 75, 80), ("fp8", 87, 89), ("fp8", 80, 89)]
)
def test_precisions_that_the_gpu_lacks(precision, sm, least):
    refused(
        f"--precision {precision}",
        f"needs a GPU of sm_{least} or later; this one is sm_{sm}",
        precision=precision,
        sm=sm,
    )


def test_models_that_the_gpu_cannot_compute():
    refused("quantised to fp8", "sm_89", sm=87, quantization=["fp8"], precision="mixed")
    refused("quantised to fp4", "sm_100", sm=90, quantization=["fp4"], strongly_typed=True)
    refused("the model is in bf16", "sm_80", sm=75, dtypes=["bfloat16"], strongly_typed=True)
    assert config(precision="mixed", sm=75).flags_on == ("FP16",)


def test_flags_that_only_a_newer_library_has():
    refused(
        "TensorRT 10.0.1 does not have the flag INT4; TensorRT 10.1 up to the last 10 has it",
        tensorrt=(10, 0, 1),
        precision="fp16",
        quantization=["int4"],
    )
    refused("does not have the flag FP4; TensorRT 10.8", sm=100, precision="fp16", quantization=["fp4"])


def test_a_model_with_types_of_its_own_is_said():
    (note,) = config(precision="fp32", dtypes=["float16"]).notes
    assert note == "--precision fp32: the model itself has float16 tensors; --strongly-typed builds it as it is."
    assert config(precision="fp16", dtypes=["float16"]).notes == ()


# ----------------------------------------------------------------------------------------------------- strong typing


@pytest.mark.parametrize("tensorrt", [(10, 3, 0), (11, 1, 0)])
@pytest.mark.parametrize(
    ("dtypes", "quantization", "own"),
    [
        (["float32", "int64"], [], "fp32"),
        (["float32", "float16"], [], "fp16"),
        (["float32", "bfloat16"], [], "bf16"),
        (["float16", "bfloat16"], [], "mixed"),
        (["float32"], ["int8"], "int8"),
        (["bfloat16"], ["fp8"], "fp8"),
        (["float16"], ["int4"], "mixed"),
    ],
)
def test_strong_typing_takes_the_models_precision(tensorrt, dtypes, quantization, own):
    given = {"tensorrt": tensorrt, "dtypes": dtypes, "quantization": quantization, "strongly_typed": True}
    found = config(**given)
    assert found.precision == own
    assert found.strongly_typed
    assert found.flags_on == ()
    assert found.flags_off == (("TF32",) if own == "fp32" else ())
    if own != "mixed":
        assert config(**given, precision=own) == found


def test_tensorrt_11_is_always_strongly_typed():
    assert config(tensorrt=(11, 0, 0)).strongly_typed
    assert config(tensorrt=(11, 0, 0), precision="tf32").flags_on == ("TF32",)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weak_precision_on_tensorrt_11_prints_the_conversion(precision):
    refused(
        "TensorRT 11 has strong typing alone",
        "the model is fp32. Give --precision fp32, or convert the model: "
        f"python -m modelopt.onnx.autocast --onnx_path MODEL.onnx --low_precision_type {precision}",
        tensorrt=(11, 1, 0),
        precision=precision,
    )


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantisation_on_tensorrt_11_prints_the_command(precision):
    refused(
        f"python -m modelopt.onnx.quantization --onnx_path MODEL.onnx --quantize_mode {precision}",
        tensorrt=(11, 1, 0),
        precision=precision,
    )


def test_what_tensorrt_11_no_longer_has():
    eleven = {"tensorrt": (11, 1, 0)}
    refused("takes no calibrator (those are for TensorRT 10", **eleven, precision="int8", calib_data="d.npz")
    refused("--int8-only", "every type is the model's own", **eleven, precision="int8", int8_only=True)
    refused("--precision mixed", "every type is the model's own", **eleven, precision="mixed")
    half = {"dtypes": ["float16"], "precision": "fp16"}
    for option in ({"fp32_patterns": ["*norm*"]}, {"fp32_norms": True}):
        refused("TensorRT 11 has no precision of single layers", "--nodes_to_exclude", **eleven, **half, **option)
    refused("--tactic-sources CUDNN", "TensorRT 11.1.0 does not have", **eleven, tactic_sources="CUDNN")
    refused("PREFER_PRECISION_CONSTRAINTS", "up to the last 10", **eleven, set_flags="PREFER_PRECISION_CONSTRAINTS")


def test_strong_typing_and_another_precision_than_the_models():
    message = refused(
        "--precision bf16: the network is strongly typed",
        "the model is fp32. Give --precision fp32, leave --strongly-typed out, or convert the model",
        strongly_typed=True,
        precision="bf16",
    )
    assert "--low_precision_type bf16" in message
    refused("the model is bf16", strongly_typed=True, precision="fp32", dtypes=["float32", "bfloat16"])
    refused("the model is fp8", strongly_typed=True, precision="bf16", dtypes=["bfloat16"], quantization=["fp8"])
    refused("Leave --precision out", strongly_typed=True, precision="fp32", dtypes=["float16", "bfloat16"])
    refused("takes no calibrator", strongly_typed=True, calibrator=True)


# -------------------------------------------------------------------------------------------------- layers in fp32


def test_fp32_layers_are_obeyed():
    assert config(precision="fp16", fp32_patterns=["*"]).flags_on == ("FP16", "OBEY_PRECISION_CONSTRAINTS")
    assert "OBEY_PRECISION_CONSTRAINTS" in config(precision="fp16", fp32_norms=True).flags_on


def layer(index, name, kind, inputs=(), outputs=None, dtype="float32"):
    outputs = [f"{name}_out"] if outputs is None else outputs
    return {
        "index": index,
        "name": name,
        "type": kind,
        "inputs": list(inputs),
        "outputs": outputs,
        "output_dtypes": [dtype] * len(outputs),
    }


NETWORK = [
    layer(0, "conv1", "CONVOLUTION", ["x"]),
    layer(1, "ln", "NORMALIZATION", ["conv1_out"]),
    layer(2, "shape_of_ln", "SHAPE", ["ln_out"], dtype="int64"),
    layer(3, "softmax", "SOFTMAX", ["ln_out"], ["attention"]),
    layer(4, "count", "ELEMENTWISE", ["shape_of_ln_out"], dtype="int64"),
]


def test_patterns_match_layers_and_outputs():
    assert precision_layers(["conv*"], NETWORK) == (0,)
    assert precision_layers(["attention", "*ln*"], NETWORK) == (1, 3)
    assert precision_layers(["*"], NETWORK) == (0, 1, 3)
    assert precision_layers([], NETWORK, norms=True) == (1,)
    assert precision_layers(["conv1"], NETWORK, norms=True) == (0, 1)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("shape*", "it matches only layers that do not compute in floating point"),
        ("soft", "'soft' is within 'softmax': write '*soft*'"),
        ("konv1", "no layer and no output of one matches; --dump-layers lists them. Did you mean 'conv1'?"),
    ],
)
def test_patterns_that_match_nothing(pattern, text):
    with pytest.raises(BuildOptionError, match=r"^--fp32-patterns ") as caught:
        precision_layers(["*", pattern], NETWORK)
    assert text in str(caught.value)


def chain(*parts):
    """Layers from (name, type, inputs); inputs that no layer makes are the network's, or constants."""
    return [layer(i, name, kind, inputs, [name]) for i, (name, kind, inputs) in enumerate(parts)]


CONSTANTS = [("two", "CONSTANT", []), ("epsilon", "CONSTANT", []), ("eps", "SHUFFLE", ["epsilon"])]


def test_decomposed_layer_norm():
    network = chain(
        *CONSTANTS,
        ("residual", "ELEMENTWISE", ["a", "b"]),
        ("mean", "REDUCE", ["residual"]),
        ("difference", "ELEMENTWISE", ["residual", "mean"]),
        ("square", "ELEMENTWISE", ["difference", "two"]),
        ("variance", "REDUCE", ["square"]),
        ("add", "ELEMENTWISE", ["variance", "eps"]),
        ("root", "UNARY", ["add"]),
        ("divide", "ELEMENTWISE", ["difference", "root"]),
        ("scale", "ELEMENTWISE", ["divide", "gamma"]),
    )
    names = {network[i]["name"] for i in precision_layers([], network, norms=True)}
    assert names == {"mean", "difference", "square", "variance", "add", "root", "divide"}


def test_decomposed_rms_norm():
    network = chain(
        *CONSTANTS,
        ("residual", "ELEMENTWISE", ["a", "b"]),
        ("square", "ELEMENTWISE", ["residual", "two"]),
        ("mean", "REDUCE", ["square"]),
        ("add", "ELEMENTWISE", ["mean", "eps"]),
        ("root", "UNARY", ["add"]),
        ("inverse", "UNARY", ["root"]),
        ("multiply", "ELEMENTWISE", ["residual", "inverse"]),
    )
    names = {network[i]["name"] for i in precision_layers([], network, norms=True)}
    assert names == {"square", "mean", "add", "root", "inverse", "multiply"}


def test_a_softmax_in_parts_is_no_norm():
    network = chain(
        ("largest", "REDUCE", ["x"]),
        ("less", "ELEMENTWISE", ["x", "largest"]),
        ("exp", "UNARY", ["less"]),
        ("sum", "REDUCE", ["exp"]),
        ("divide", "ELEMENTWISE", ["exp", "sum"]),
    )
    with pytest.raises(BuildOptionError, match="the network has no normalisation layer, and none in parts"):
        precision_layers([], network, norms=True)


# ---------------------------------------------------------------------------------------------------- kinds of plan


def test_stripped_and_refittable():
    stripped = config(strip_plan=True)
    assert stripped.flags_on == ("STRIP_PLAN", "REFIT_IDENTICAL")
    assert "the weights of this very ONNX file" in stripped.notes[0]
    assert config(strip_plan=True, refittable=True).flags_on == ("STRIP_PLAN", "REFIT")
    assert config(refittable=True).flags_on == ("REFIT",)


def test_weight_streaming_needs_strong_typing():
    refused("--weight-streaming", "Give --strongly-typed as well", weight_streaming=True)
    assert "WEIGHT_STREAMING" in config(weight_streaming=True, strongly_typed=True).flags_on
    assert "WEIGHT_STREAMING" in config(weight_streaming=True, tensorrt=(11, 0, 0)).flags_on


def test_version_compatible():
    found = config(version_compatible=True, exclude_lean_runtime=True)
    assert found.flags_on == ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
    assert found.parser_flags == ("NATIVE_INSTANCENORM",)


def test_hardware_compatibility():
    assert config(hardware_compatibility="ampere_plus").settings["hardware_compatibility_level"] == "AMPERE_PLUS"
    same = {"hardware_compatibility": "same_compute_capability"}
    refused("SAME_COMPUTE_CAPABILITY; TensorRT 10.9 and later has it", **same)
    found = config(**same, tensorrt=(10, 9, 0))
    assert found.settings["hardware_compatibility_level"] == "SAME_COMPUTE_CAPABILITY"
    assert "hardware_compatibility_level" not in config().settings
    refused(
        "no hardware-compatible plan with fp8",
        hardware_compatibility="ampere_plus",
        precision="fp8",
        quantization=["fp8"],
    )
    refused(
        "JetPack has no hardware compatibility",
        "a developer kit that emulates it",
        hardware_compatibility="ampere_plus",
        **ORIN,
    )
    refused("sm_80 or later; this one is sm_75", hardware_compatibility="ampere_plus", sm=75)
    assert config(hardware_compatibility="ampere_plus", sm=80).settings
    assert config(**same, tensorrt=(10, 9, 0), sm=75).settings


def test_sparse_weights():
    assert "SPARSE_WEIGHTS" in config(sparse_weights=True).flags_on
    refused("--sparse-weights", "sm_80", sparse_weights=True, sm=75)


@pytest.mark.parametrize("tensorrt", [(10, 8, 0), (10, 16, 2), (11, 0, 0), (11, 4, 0)])
def test_dla_in_versions_without_it(tensorrt):
    version = ".".join(map(str, tensorrt))
    refused(
        f"TensorRT {version} has no DLA; TensorRT 10.0 to 10.7 and 11.4.1 and later have it",
        tensorrt=tensorrt,
        dla_core=0,
        dtypes=["float16"],
        precision="fp16",
        **ORIN,
    )


def test_dla():
    ten = {"tensorrt": (10, 3, 0), "dla_core": 0, **ORIN}
    found = config(**ten, precision="fp16", gpu_fallback=True)
    assert (found.dla_core, found.flags_on) == (0, ("FP16", "GPU_FALLBACK"))
    assert any(
        "--gpu-fallback lets it run on the GPU" in note
        for note in config(**ten, precision="int8", calibrator=True).notes
    )
    refused("the DLA computes in fp16 and int8; the precision is fp32", **ten)
    refused("takes no strongly typed network", **ten, strongly_typed=True, dtypes=["float16"])
    refused("DLA is on Jetson Xavier and Orin alone", **{**ten, "sm": 110}, precision="fp16")
    refused("this machine is no Jetson with sm_87", tensorrt=(10, 3, 0), dla_core=0, sm=87, precision="fp16")
    assert config(**{**ten, "tensorrt": (11, 4, 1)}, dtypes=["float16"]).dla_core == 0


# ------------------------------------------------------------------------------------------------------ the builder


def test_low_memory_mode():
    found = config(low_memory_mode=True)
    assert found.memory_limits == {"WORKSPACE": 256 * MIB, "TACTIC_DRAM": 512 * MIB}
    assert found.settings["builder_optimization_level"] == 0
    assert found.tactic_sources == ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
    assert found.environment == {"CUDA_MODULE_LOADING": "LAZY"}
    assert found.flags_on == ()  # above all not STRIP_PLAN
    own = config(low_memory_mode=True, workspace="1G", opt_level=2, tactic_sources=["CUBLAS_LT"])
    assert own.memory_limits["WORKSPACE"] == 1 << 30
    assert own.settings["builder_optimization_level"] == 2
    assert own.tactic_sources == ("CUBLAS_LT",)


def test_memory_on_a_discrete_gpu_is_the_librarys():
    assert config(machine={"available_memory": 1 << 40}).memory_limits == {}
    assert config(workspace="2G", tactic_memory=512 * MIB).memory_limits == {
        "WORKSPACE": 2 << 30,
        "TACTIC_DRAM": 512 * MIB,
    }


def test_memory_on_an_integrated_gpu_is_derived_and_said():
    found = config(**ORIN)
    assert found.memory_limits == {"WORKSPACE": 3000 * MIB, "TACTIC_DRAM": 6000 * MIB}
    assert found.notes == ("memory: WORKSPACE 3000 MiB and TACTIC_DRAM 6000 MiB, from 12000 MiB available.",)
    given = config(**ORIN, workspace="8G")
    assert given.memory_limits == {"WORKSPACE": 8 << 30, "TACTIC_DRAM": 6000 * MIB}
    assert "--workspace: 8192 MiB is much of the 12000 MiB available" in given.notes[1]
    unknown = config(machine={"integrated": True}, sm=87)
    assert unknown.memory_limits == {}
    assert "MemAvailable is unknown" in unknown.notes[0]


def test_shared_memory_of_the_scripts():
    assert config(tactic_shared_memory="48K").memory_limits == {"TACTIC_SHARED_MEMORY": 48 << 10}
    found = config(tactic_shared_memory="256")
    assert found.memory_limits == {}
    assert "no GPU has a MiB of shared memory" in found.notes[0]


def test_settings():
    assert config().settings == {"profiling_verbosity": "DETAILED"}
    found = config(opt_level=5, aux_streams=0, profiling_verbosity="layer_names_only")
    assert found.settings == {
        "profiling_verbosity": "LAYER_NAMES_ONLY",
        "builder_optimization_level": 5,
        "max_aux_streams": 0,
    }
    assert "builder_optimization_level" not in config(opt_level="auto").settings


def test_tactic_sources():
    assert config().tactic_sources is None
    assert config(tactic_sources=[]).tactic_sources == ()
    assert config(tactic_sources="kCUDNN,cublas").tactic_sources == ("CUDNN", "CUBLAS")
    refused("there is no such source", "Did you mean 'CUDNN'", tactic_sources="CUDN")


def test_set():
    found = config(set_flags=["STRICT_NANS", "kDEBUG", "TF32=off", "max_nb_tactics=4"])
    assert found.flags_on == ("STRICT_NANS", "DEBUG")
    assert found.flags_off == ("TF32",)
    assert found.settings["max_nb_tactics"] == 4
    tiled = config(set_flags=["tiling_optimization_level=full"], tensorrt=(10, 8, 0))
    assert tiled.settings["tiling_optimization_level"] == "FULL"
    assert config(precision="fp16", set_flags="TF32=off").flags_off == ("TF32",)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("STRICT_NAN", "STRICT_NANS: TensorRT 10.6 and later."),
        ("STRICT_NAN", "there is no flag or setting STRICT_NAN. Did you mean 'STRICT_NANS'"),
        (
            "EDITABLE_TIMING_CACHE",
            "TensorRT 10.6.0 does not have the flag EDITABLE_TIMING_CACHE; TensorRT 10.8 and later",
        ),
        ("FP16", "FP16 is not set by itself; use --precision"),
        ("INT4", "use a model with such QuantizeLinear/DequantizeLinear nodes, which sets it"),
        ("STRIP_PLAN", "use --strip-plan"),
        ("TF32", "--precision fp32 has decided TF32 already"),
        (
            "tiling_optimization_level=full",
            "TensorRT 10.6.0 does not have the setting tiling_optimization_level; TensorRT 10.8",
        ),
        ("max_nb_tactics=many", "max_nb_tactics takes a whole number above 0"),
        ("runtime_platform=mac", "takes one of SAME_AS_BUILD, WINDOWS_AMD64"),
        ("max_nb_tactic=3", "Did you mean 'max_nb_tactics'"),
    ],
)
def test_set_refused(item, text):
    refused(f"--set {item}", text, set_flags=item if "=" in item else f"{item}=on")


def test_as_plain_json():
    found = config(precision="fp16", io_formats="x:fp16:chw", low_memory_mode=True).to_mapping()
    assert json.loads(json.dumps(found))["io_formats"] == [{"name": "x", "dtype": "float16", "formats": ["LINEAR"]}]


# --------------------------------------------------------------------------------------------------------- I/O formats


def test_io_formats():
    assert parse_io_format("x:fp16:chw16+HWC8") == IoFormat("x", "float16", ("CHW16", "HWC8"))
    assert parse_io_format("a:b:any:chw") == IoFormat("a:b", None, ("LINEAR",))
    assert parse_io_format("x:int8") == IoFormat("x", "int8")
    assert config(io_formats="x:fp16").io_formats == (IoFormat("x", "float16"),)
    refused("write any in its place", strongly_typed=True, io_formats="x:fp16")
    assert config(strongly_typed=True, io_formats="x:any:hwc").io_formats[0].formats == ("HWC",)


@pytest.mark.parametrize(
    ("text", "message"),
    [("x", "is not NAME:TYPE:FORMAT+FORMAT. Types: fp32"), ("x:fp16:chw7", "there is no format 'CHW7'. Did you mean")],
)
def test_io_formats_refused(text, message):
    refused(f"--io-formats '{text}'", message, io_formats=text)


# -------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=300, deadline=None)
@given(
    precision=st.sampled_from([None, *PRECISIONS]),
    quantization=st.sets(st.sampled_from(["int8", "fp8", "int4", "fp4"])),
    tensorrt=st.sampled_from([(10, 0, 0), (10, 3, 0), (10, 6, 0), (10, 9, 0), (10, 16, 2), (11, 1, 0), (11, 4, 1)]),
    sm=st.sampled_from([75, 80, 87, 89, 90, 100, 110, 120]),
    dtypes=st.sets(st.sampled_from(["float32", "float16", "bfloat16"]), min_size=1),
    strong=st.booleans(),
    calibrator=st.booleans(),
)
def test_whatever_comes_out_exists_and_says_what_it_is(
    precision, quantization, tensorrt, sm, dtypes, strong, calibrator
):
    """Refused, or: flags that this version has, the precision that was asked for, and no flag of weak typing on a
    strongly typed network."""
    try:
        found = config(
            tensorrt,
            sm,
            quantization,
            dtypes,
            calibrator=calibrator,
            precision=precision,
            strongly_typed=strong,
        )
    except BuildOptionError:
        return
    for name in found.flags_on + found.flags_off:
        assert versions.FLAGS[name].there(tensorrt)
    assert found.strongly_typed == (strong or tensorrt[0] >= 11)
    if precision is not None:
        assert found.precision == precision
    lowering = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"} & set(found.flags_on)
    if found.strongly_typed:
        assert not lowering
    else:
        assert {kind.upper() for kind in quantization} <= lowering  # else TensorRT would drop the nodes' meaning
        assert not {"INT8", "FP8"} <= lowering
        assert ("INT8" in lowering) == (calibrator or "int8" in quantization)
        assert ("TF32" in found.flags_off) == (found.precision == "fp32")


# -------------------------------------------------------------------------------------------- the table against abi/


def rows(file):
    with (ABI / file).open(newline="") as handle:
        return list(csv.DictReader(handle))


def presence(row):
    """What a row of abi/ says, as `Presence`."""
    since = row["since"].removeprefix("<=")
    first = tuple(map(int, since.split(".")[:2]))
    return versions.Presence(max(first, (10, 0)), in_11=row["last_in"] == "")


def members(enum):
    found = {r["member"][1:]: presence(r) for r in rows("enums.csv") if r["enum"] == enum}
    return {name: there for name, there in found.items() if there.since[0] >= 10}


def test_flags_are_those_of_the_abi():
    known = {r["member"][1:]: r for r in rows("enums.csv") if r["enum"] == "BuilderFlag"}
    only_8 = {name for name, row in known.items() if row["last_in"].startswith("8")}
    expected = {name: there for name, there in members("BuilderFlag").items() if name not in only_8}
    assert expected == versions.FLAGS


@pytest.mark.parametrize(
    ("table", "enum"),
    [
        (versions.TACTIC_SOURCES, "TacticSource"),
        ({"NONE": versions.Presence(), **versions.HARDWARE_LEVELS}, "HardwareCompatibilityLevel"),
        (versions.TILING_LEVELS, "TilingOptimizationLevel"),
        (versions.PLATFORMS, "RuntimePlatform"),
    ],
)
def test_words_are_those_of_the_abi(table, enum):
    assert members(enum) == table


def test_formats_are_those_of_the_abi():
    assert [r["member"][1:] for r in rows("enums.csv") if r["enum"] == "TensorFormat"] == list(_FORMATS)


def test_settings_are_those_of_the_abi():
    methods = {r["method"]: presence(r) for r in rows("vtables.csv") if r["class"] == "VBuilderConfig"}
    for name, (method, there, _) in versions.SETTINGS.items():
        assert methods[method] == there, name

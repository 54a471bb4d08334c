"""Build options: every way in and out, the contradictions, and the flags of the scripts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetrt.builder import options as module
from jetrt.builder.hints import Bound
from jetrt.builder.options import PRECISIONS, BuildOptions, from_arguments
from jetrt.builder.targets import PIPELINE, add_build_arguments, targets
from jetrt.errors import BuildOptionError


def parsed(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_build_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def options(*words):
    return from_arguments(parsed(*words))


def refused(*texts, **given):
    with pytest.raises(BuildOptionError) as caught:
        BuildOptions(**given)
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.option.startswith("--")


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("given_", "bytes_"),
    [
        ("512", 512 << 20),
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("2GiB", 2 << 30),
        ("64kb", 64 << 10),
        ("77B", 77),
        (77, 77),
    ],
)
def test_sizes(given_, bytes_):
    assert BuildOptions(workspace=given_).workspace == bytes_
    if isinstance(given_, str):
        assert options("--workspace", given_).workspace == bytes_


@pytest.mark.parametrize(("given_", "seconds"), [("90", 90), ("1.5s", 1.5), ("10m", 600), ("2h", 7200), (3, 3)])
def test_times(given_, seconds):
    assert BuildOptions(timeout=given_).timeout == seconds


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("workspace", "2X", "a size such as 512M or 2G; a number alone is MiB"),
        ("workspace", 0, "a size such as"),
        ("workspace", -1, "a size such as"),
        ("precision", "fp61", "fp32, tf32, fp16, bf16, int8, mixed, fp8. Did you mean"),
        ("opt_level", 6, "0 to 5, or auto"),
        ("opt_level", "fast", "0 to 5, or auto"),
        ("levels", "2-7", "levels from 0 to 5, as 2-5 or 2,3,5"),
        ("levels", [], "levels from 0 to 5"),
        ("levels", [6], "levels from 0 to 5"),
        (
            "require_precision",
            "0.95",
            "a share such as 95%, above 0% and up to 100%; with the sign where it is 1 or less",
        ),
        ("require_precision", 101, "a share such as 95%"),
        ("timeout", "soon", "seconds above 0, or a number with s, m or h"),
        ("timeout", float("inf"), "seconds above 0"),
        ("max_seq_len", 0, "a whole number from 1"),
        ("max_seq_len", True, "a whole number from 1"),
        ("dla_core", 16, "a whole number from 0 to 15"),
        ("strict", "yes", "true or false"),
        ("plugins", 3, "a list of texts"),
        ("inputs", "", "a text"),
        ("set_flags", "A B", "FLAG, FLAG=off or SETTING=VALUE"),
        ("tactic_sources", "a-b", "names of TensorRT's enumeration"),
    ],
)
def test_values_refused(name, value, allowed):
    refused(f"is {value!r}" if not isinstance(value, list) else "", f"allowed: {allowed}", **{name: value})


def test_values_are_kept_in_one_form():
    o = BuildOptions(
        min={"x": [1, 3]},
        opt=["x:2x3", {"x": [4, 3]}],
        set_flags=["kSTRICT_NANS", "tf32=off", "MAX_NB_TACTICS=4"],
        tactic_sources="kCUBLAS_LT,cudnn",
        opt_level="auto",
        levels="2-4",
        require_precision="95%",
        timeout="10m",
        calib_data=None,
        timing_cache=Path("t.cache"),
    )
    assert o.min == ("x:1x3",)
    assert o.opt == ("x:2x3", "x:4x3")
    assert o.set_flags == ("STRICT_NANS=on", "TF32=off", "max_nb_tactics=4")
    assert o.tactic_sources == ("CUBLAS_LT", "CUDNN")
    assert (o.levels, o.require_precision, o.timeout, o.timing_cache) == ((2, 3, 4), 95.0, 600.0, "t.cache")
    assert BuildOptions(tactic_sources="none").tactic_sources == ()
    assert BuildOptions().tactic_sources is None
    assert BuildOptions(seed=None) == BuildOptions()
    assert hash(o) == hash(replace(o))


def test_hints(tmp_path):
    (tmp_path / "export_metadata.json").write_text('{"vl_seq_len": 122}')
    found = BuildOptions(min="x:1", opt=["x:2", "x:3"], max_seq_len=9, metadata=tmp_path).hints()
    assert found.min == (Bound({"x": (1,)}),)
    assert [bound.shapes["x"] for bound in found.opt] == [(2,), (3,)]
    assert (found.max, found.max_seq_len, found.metadata) == ((), 9, {"vl_seq_len": 122})


def test_thresholds():
    o = options("--precision", "fp16", "--cosine", "0.9", "--max-abs", "a=b=3", "--parity-limit", "y:max_rel=0.5")
    found = o.thresholds("fp16")
    assert found.default.cosine == 0.9
    assert found.for_output("a=b").max_abs == 3
    assert found.for_output("y").max_rel == 0.5


# ---------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("given_", "texts"),
    [
        ({"strongly_typed": True, "precision": "mixed"}, ["--precision mixed and --strongly-typed contradict"]),
        ({"strongly_typed": True, "fp32_patterns": "*"}, ["--fp32-patterns and --strongly-typed contradict"]),
        ({"strongly_typed": True, "fp32_norms": True}, ["--fp32-norms and --strongly-typed contradict"]),
        ({"strongly_typed": True, "int8_only": True}, ["--int8-only and --strongly-typed contradict"]),
        ({"strongly_typed": True, "calib_data": "d"}, ["--calib-data and --strongly-typed contradict"]),
        ({"precision": "fp16", "calib_data": "d"}, ["--calib-data is for --precision int8 or mixed", "is fp16"]),
        ({"calib_cache": "d"}, ["--calib-cache is for --precision int8 or mixed; the precision is fp32"]),
        ({"precision": "bf16", "recalibrate": True}, ["--recalibrate is for --precision int8"]),
        ({"precision": "fp16", "int8_only": True}, ["--int8-only is for --precision int8"]),
        ({"fp32_patterns": "*"}, ["--fp32-patterns keeps layers from a lower precision; the precision is fp32"]),
        ({"precision": "tf32", "fp32_norms": True}, ["--fp32-norms keeps layers", "is tf32"]),
        ({"exclude_lean_runtime": True}, ["--exclude-lean-runtime is for plans that are --version-compatible"]),
        ({"gpu_fallback": True}, ["--gpu-fallback is for builds with --dla-core"]),
        ({"dla_core": 0, "strip_plan": True}, ["--strip-plan and --dla-core contradict"]),
        ({"dla_core": 0, "refittable": True}, ["--refittable and --dla-core contradict"]),
        (
            {"dla_core": 0, "precision": "int8", "calib_data": "d", "calib_algorithm": "minmax"},
            ["--calib-algorithm minmax and --dla-core contradict"],
        ),
        ({"levels": "2-3"}, ["--levels is for --opt-level auto"]),
        ({"opt_level": 3, "level_timeout": 5}, ["--level-timeout is for --opt-level auto"]),
        ({"retry_levels": True}, ["--retry-levels is for --opt-level auto"]),
        ({"require_precision": 95, "audit": False}, ["--require-precision and --no-audit contradict"]),
        (
            {"require_precision": 95, "profiling_verbosity": "none"},
            ["needs --profiling-verbosity detailed; it is none"],
        ),
        ({"parity": False, "reference": "r.npz"}, ["--reference and --no-parity contradict"]),
        ({"parity": False, "parity_limit": "cosine=0.9"}, ["--parity-limit and --no-parity contradict"]),
        ({"parity_limit": "cosinus=0.9"}, ["--parity-limit", "cosinus"]),
        ({"set_flags": ["DEBUG", "DEBUG=off"]}, ["--set gives DEBUG the values on and off"]),
        ({"min": "x:1x4", "opt": "x:2x3"}, ["--min x:1x4 and --opt x:2x3: 'x', axis 1 is 4 in min and 3 in opt"]),
        ({"min": "n=[5]", "max": "n=[4]"}, ["'n', value 0 is 5 in min and 4 in max; min <= opt <= max must hold"]),
        (
            {"opt": "s=5", "max": ["s=9", "s=4"]},
            ["--opt s=5 and --max s=4: the dimension 's' is 5 in opt and 4 in max"],
        ),
        ({"dla_core": 0, "weight_streaming": True}, ["--weight-streaming and --dla-core contradict"]),
        ({"fp32_patterns": [""], "precision": "fp16"}, ["--fp32-patterns is ['']"]),
        ({"fp32_patterns": [" "], "precision": "fp16"}, ["allowed: shell patterns of layer or tensor names"]),
        ({"min": "x"}, ["--min x: cannot be read from 'x' on"]),
    ],
)
def test_contradictions(given_, texts):
    refused(*texts, **given_)


def test_strong_typing_with_a_precision_is_an_expectation():
    """Checked against the model by `configure`; it sets no flag."""
    assert BuildOptions(strongly_typed=True, precision="bf16").precision == "bf16"


# --------------------------------------------------------------------------------------------------------- ways in


def test_command_line():
    o = options(
        *("--precision", "fp16", "--min", "x:1x3", "y:2", "--opt", "x:2x3,y:2", "--opt", "x:3x3,y:2"),
        *("--fp32-patterns", "*norm*,*soft*", "*embed*", "--no-parity", "--opt-level", "auto", "--levels", "2,3"),
        *("--set", "STRICT_NANS", "--set", "TF32=off", "--dump-layers"),
    )
    assert o.min == ("x:1x3,y:2",)  # words of one flag are one profile
    assert o.opt == ("x:2x3,y:2", "x:3x3,y:2")
    assert o.fp32_patterns == ("*norm*", "*soft*", "*embed*")
    assert (o.parity, o.opt_level, o.levels, o.dump_layers) == (False, "auto", (2, 3), "-")
    assert o.set_flags == ("STRICT_NANS=on", "TF32=off")


def test_precedence(tmp_path):
    """Command line over manifest over configuration file over defaults."""
    config = tmp_path / "b.toml"
    config.write_text('workspace = 256\ndevice = 1\nopt-level = 2\nmin = [{x = [1, 3]}, "x:2x3"]\nset = ["DEBUG"]\n')
    assert options("--config", config) == BuildOptions(
        workspace="256M", device=1, opt_level=2, min=["x:1x3", "x:2x3"], set_flags="DEBUG"
    )
    assert BuildOptions.from_toml(config) == options("--config", config)
    assert options("--config", config, "--device", "0").device == 0
    manifest = tmp_path / "m.engine.json"
    manifest.write_text(json.dumps({"options": {"device": 2, "workspace": 5 << 20}}))
    merged = options("--config", config, "--from-manifest", manifest, "--workspace", "7")
    assert (merged.workspace, merged.device, merged.opt_level) == (7 << 20, 2, 2)


def test_every_boolean_can_be_taken_back(tmp_path):
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"options": BuildOptions(strongly_typed=True, parity=False).to_mapping()}))
    o = options("--from-manifest", manifest, "--no-strongly-typed", "--parity")
    assert o == BuildOptions()


def test_manifest():
    o = BuildOptions(precision="int8", calib_data="d.npz", min="x:1", opt="x:1")
    assert BuildOptions.from_manifest({"options": json.loads(json.dumps(o.to_mapping()))}) == o
    with pytest.raises(BuildOptionError, match=r"^--from-manifest has no build options; .* stamped here has none\.$"):
        BuildOptions.from_manifest({"options": None})


def test_manifest_beside_the_engine(tmp_path):
    (tmp_path / "x.engine.json").write_text(json.dumps({"options": {"device": 3}}))
    assert BuildOptions.from_manifest(tmp_path / "x.engine").device == 3
    assert BuildOptions.from_manifest(tmp_path / "x.engine.json").device == 3
    with pytest.raises(BuildOptionError, match=r"--from-manifest .*y\.engine\.json: No such file"):
        BuildOptions.from_manifest(tmp_path / "y.engine")
    (tmp_path / "x.engine.json").write_text("{")
    with pytest.raises(BuildOptionError, match="is not JSON"):
        BuildOptions.from_manifest(tmp_path / "x.engine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("precison = 'fp16'", r"b\.toml: there is no option 'precison'\. Did you mean 'precision'"),
        ("workspace = 5\n", None),
        ("workspace = -5", "--workspace is '-5'; allowed: a size"),
        ("opt-level = 3\nbuilder_opt_level = 4", r"b\.toml: 'opt_level' is given twice\."),
        ("a = [", r"b\.toml is not TOML"),
        ("set = 3", "--set is 3"),
    ],
)
def test_toml(tmp_path, content, message):
    path = tmp_path / "b.toml"
    path.write_text(content)
    if message is None:
        assert BuildOptions.from_toml(path).workspace == 5 << 20
        return
    with pytest.raises(BuildOptionError, match=message):
        BuildOptions.from_toml(path)


def test_toml_missing(tmp_path):
    with pytest.raises(BuildOptionError, match=r"^--config .*none\.toml: No such file"):
        BuildOptions.from_toml(tmp_path / "none.toml")


def test_toml_without_a_reader(tmp_path, monkeypatch):
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BuildOptionError, match=r"needs the package tomli: pip install 'jetrt\[build\]'"):
        BuildOptions.from_toml(tmp_path / "b.toml")


def test_mapping_with_a_name_that_is_none():
    with pytest.raises(BuildOptionError, match=r"options: there is no option 'presicion'\. Did you mean 'precision'"):
        BuildOptions.from_mapping({"presicion": "fp16"})


# --------------------------------------------------------------------------------------------------------- ways out


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
# argparse itself drops a word that is "--", in Python 3.10 also in --flag=--
WORD = TEXT.filter(lambda text: text != "--")
SIZES = st.lists(st.integers(0, 9), max_size=3)
BOUNDS = st.lists(st.dictionaries(TEXT, SIZES, min_size=1, max_size=3), max_size=3)
VALUES = {
    "precision": st.sampled_from([None, *PRECISIONS]),
    "fp32_patterns": st.lists(WORD.filter(lambda t: "," not in t and t.strip() and t == t.strip()), max_size=3),
    "io_formats": st.lists(WORD, max_size=3),
    "min": BOUNDS,
    "opt": BOUNDS,
    "max": BOUNDS,
    "max_seq_len": st.integers(1, 10**9),
    "opt_sa_seq": st.integers(1, 10**9),
    "model_type": st.sampled_from(["dit", "backbone"]),
    "opt_level": st.sampled_from([0, 3, 5, "auto"]),
    "levels": st.lists(st.integers(0, 5), min_size=1),
    "tactic_sources": st.lists(st.sampled_from(["CUDNN", "CUBLAS_LT"]), max_size=2),
    "aux_streams": st.integers(0, 100),
    "profiling_verbosity": st.sampled_from(["detailed", "none"]),
    "plugins": st.lists(WORD, max_size=3),
    "set_flags": st.lists(st.sampled_from(["DEBUG", "STRICT_NANS=off", "max_nb_tactics=3"]), max_size=3),
    "hardware_compatibility": st.sampled_from(["none", "ampere_plus"]),
    "dla_core": st.integers(0, 15),
    "calib_algorithm": st.sampled_from(["entropy", "minmax"]),
    "calib_batch": st.integers(1, 100),
    "parity_limit": st.lists(st.sampled_from(["cosine=0.5", "y:max_rel=0.1,max_abs=none"]), max_size=2),
    "seed": st.integers(0, 2**31 - 1),
    "require_precision": st.floats(0.001, 100),
    "device": st.integers(0, 9),
}
for _name in ("workspace", "tactic_memory", "tactic_shared_memory"):
    VALUES[_name] = st.integers(1, 2**40)
for _name in ("timeout", "level_timeout", "levels_timeout"):
    VALUES[_name] = st.floats(1e-3, 1e6)
for _name in [
    "metadata",
    "calib_data",
    "calib_cache",
    "calib_preprocess",
    "reference",
    "inputs",
    "timing_cache",
    "dump_layers",
]:
    VALUES[_name] = WORD
for _entry in fields(BuildOptions):
    VALUES.setdefault(_entry.name, st.booleans())


def reconciled(draw):
    """Options that do not contradict themselves: what is refused is left out, until nothing is."""
    names = draw(st.sets(st.sampled_from(sorted(VALUES))))
    given_ = {name: draw(VALUES[name], label=name) for name in sorted(names)}
    while True:
        try:
            return BuildOptions(**given_)
        except BuildOptionError as error:
            name = error.option[2:].replace("-", "_")
            given_.pop({"set": "set_flags", "precision mixed": "precision"}.get(name, name))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_every_way_out_leads_back(data):
    o = reconciled(data.draw)
    onnx, engine = data.draw(WORD), data.draw(WORD)
    mapping = json.loads(json.dumps(o.to_mapping()))
    assert BuildOptions.from_mapping(mapping) == o
    assert BuildOptions.from_manifest({"options": mapping}) == o
    command = o.command(onnx, engine)
    assert command[:2] == ["jetrt", "build"]
    arguments = parsed(*command[2:])
    assert from_arguments(arguments) == o
    assert (str(arguments.onnx), str(arguments.engine)) == (str(Path(onnx)), str(Path(engine)))


def test_command_is_as_short_as_it_can_be():
    assert BuildOptions().command("m.onnx") == ["jetrt", "build", "--onnx", "m.onnx"]
    o = BuildOptions(precision="fp16", workspace="2G", parity=False, tactic_sources=[], plugins=["-a.so"], timeout=90)
    assert o.command("m.onnx", "e.engine")[2:] == [
        *("--onnx", "m.onnx", "--engine", "e.engine", "--precision", "fp16", "--workspace", "2048M"),
        *("--tactic-sources", "none", "--plugins=-a.so", "--no-parity", "--timeout", "90.0"),
    ]


def test_shaping_has_what_makes_another_plan(tmp_path):
    base = BuildOptions(precision="int8", calib_data="a.npz")
    same = {"calib_data": "b.npz", "timing_cache": "t", "device": 1, "strict": True, "timeout": 5, "seed": 4}
    assert replace(base, **same).shaping() == base.shaping()
    for change in ({"workspace": "1G"}, {"opt": "x:1"}, {"fp32_norms": True}, {"calib_algorithm": "minmax"}):
        assert replace(base, **change).shaping() != base.shaping()
    assert json.dumps(base.shaping())
    assert BuildOptions(opt_level="auto").shaping() == BuildOptions(opt_level="auto", levels="2-5").shaping()

    for folder, size in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "export_metadata.json").write_text(json.dumps({"vl_seq_len": size}))
        (tmp_path / folder / "p.so").write_text(str(size))
    a, b, c = (
        BuildOptions(metadata=tmp_path / f, plugins=[tmp_path / f / "p.so", "libelse.so"]).shaping() for f in "abc"
    )
    assert a == b != c
    assert a["plugins"][1] == {"file": "libelse.so"}


def test_every_option_is_described_and_sorted():
    for entry in fields(BuildOptions):
        assert entry.metadata["help"]
        assert entry.name in VALUES
    assert {"workspace", "precision", "plugins", "set_flags"}.isdisjoint(module._RUN)
    assert {"timing_cache", "calib_data", "strict", "device"} <= module._RUN


# ---------------------------------------------------------------------------------------------- flags of the scripts


def test_flags_of_the_forks_script():
    (target,) = targets(
        parsed(
            *("--onnx", "m.onnx", "--engine", "e.trt", "--precision", "int8", "--workspace", "2048"),
            *("--calib-data", "d.npz", "--calib-cache", "./int8_calib.cache", "--sparse-weights"),
            *(
                "--timing-cache",
                "t.cache",
                "--max-seq-len",
                "256",
                "--tactic-memory",
                "4096",
                "--builder-opt-level",
                "3",
            ),
            *("--low-memory-mode", "--prepare-system", "--refittable", "--strip-plan", "--opt-sa-seq", "17"),
            *("--tactic-shared-memory", "256", "--memory-monitor", "--disable-external-tactics"),
        )
    )
    o = target.options
    assert (target.onnx, target.engine) == (Path("m.onnx"), Path("e.trt"))
    assert (o.workspace, o.tactic_memory, o.opt_level) == (2048 << 20, 4096 << 20, 3)
    assert (o.calib_cache, o.max_seq_len, o.opt_sa_seq) == ("./int8_calib.cache", 256, 17)
    assert o.tactic_sources == ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
    assert target.notes == ("--memory-monitor: the peak of memory is always measured and stands in the report.",)
    assert options("--precision", "int8", "--calib-dir", "d").calib_data == "d"
    assert options("--model-type", "backbone").model_type == "backbone"


def test_heuristic_build_is_a_level():
    (target,) = targets(parsed("--onnx", "m.onnx", "--heuristic-build"))
    assert target.options.opt_level == 2
    assert "TensorRT 10 has optimisation levels up to 2 in its place" in target.notes[0]
    (low,) = targets(parsed("--onnx", "m.onnx", "--heuristic-build", "--low-memory-mode"))
    assert low.options.opt_level is None
    for level in (0, 1, 2):
        (own,) = targets(parsed("--onnx", "m.onnx", "--heuristic-build", "--opt-level", level))
        assert own.options.opt_level == level
    with pytest.raises(BuildOptionError, match="--heuristic-build and --opt-level 3 contradict each other"):
        targets(parsed("--onnx", "m.onnx", "--heuristic-build", "--opt-level", "3"))


def test_nothing_to_build():
    with pytest.raises(BuildOptionError, match=r"^--onnx MODEL\.onnx is missing"):
        targets(parsed())
    with pytest.raises(BuildOptionError, match="--onnx-dir is for --mode full_pipeline"):
        targets(parsed("--onnx", "m", "--onnx-dir", "d"))


def pipeline(folder, *, without=(), metadata=True):
    folder.mkdir()
    for models, _ in PIPELINE.values():
        if models[0] not in without:
            (folder / models[0]).write_bytes(b"x")
    if metadata:
        (folder / "export_metadata.json").write_text('{"vl_seq_len": 122}')
    return folder


def test_full_pipeline(tmp_path):
    folder = pipeline(tmp_path / "onnx", without=["vit_fp32.onnx"])
    (folder / "vit_bf16.onnx").write_bytes(b"x")
    found = targets(parsed("--mode", "full_pipeline", "--onnx-dir", folder, "--engine-dir", "out", "--memory-monitor"))
    assert [t.engine.name for t in found] == [
        "vit.engine",
        "llm_bf16.engine",
        "vl_self_attention.engine",
        "state_encoder.engine",
        "action_encoder.engine",
        "dit_bf16.engine",
        "action_decoder.engine",
    ]
    assert all(t.options.strongly_typed and t.options.precision == "bf16" for t in found)
    assert found[0].options.metadata == str(folder / "export_metadata.json")
    assert [len(t.notes) for t in found] == [1, 0, 0, 0, 0, 0, 0]
    (folder / "vit_fp32.onnx").write_bytes(b"x")
    first, *_ = targets(parsed("--mode", "full_pipeline", "--onnx-dir", folder))
    assert (first.onnx.name, first.options.precision) == ("vit_fp32.onnx", "fp32")


def test_full_pipeline_incomplete(tmp_path):
    arguments = ["--mode", "full_pipeline", "--onnx-dir"]
    folder = pipeline(tmp_path / "a", without=["dit_bf16.onnx", "vit_fp32.onnx"])
    with pytest.raises(BuildOptionError, match=r"lacks ViT \(vit_fp32.onnx or vit_bf16.onnx\), DiT \(dit_bf16.onnx\)"):
        targets(parsed(*arguments, folder))
    bare = pipeline(tmp_path / "b", metadata=False)
    with pytest.raises(BuildOptionError, match=r"has no export_metadata\.json .* --allow-default-hints"):
        targets(parsed(*arguments, bare))
    assert len(targets(parsed(*arguments, bare, "--allow-default-hints"))) == 7
    with pytest.raises(BuildOptionError, match="--onnx is for one model; --mode full_pipeline takes --onnx-dir"):
        targets(parsed(*arguments, folder, "--onnx", "m"))

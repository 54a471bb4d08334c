"""`python -m jetrt.groot SCRIPT`: a script that is not edited, in a process of its own, without `tensorrt`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import groot_rig
import pytest
from groot_rig import dit_io, write_bundle

from jetrt.groot.script import _flags, engines_of, split

HERE = Path(__file__).resolve().parent

#: As the scripts are made: the class inside, which wants NVIDIA's package; the seams looked up as globals; a guard.
SCRIPT = '''
"""A script."""
from __future__ import annotations

import argparse
import os
import sys

import torch

import groot_rig

LOADED = []


class TensorRTDiTWrapper:
    def __init__(self, engine_path: str, device: int = 0):
        import tensorrt as trt

        raise AssertionError("the script's own class was used")


class Observation:
    """Pickled as __main__.Observation."""

    def __init__(self, number: int | None):
        self.number = number


def replace_dit_with_tensorrt(policy, trt_engine_path: str, device: int = 0):
    dit = TensorRTDiTWrapper(trt_engine_path, device=device)

    def trt_forward(sa, vl, timestep, mask=None, hidden=False, image_mask=None, backbone_attention_mask=None):
        masks = {"image_mask": image_mask, "backbone_attention_mask": backbone_attention_mask}
        return dit(sa_embs=sa, vl_embs=vl, timestep=timestep, **masks)

    policy.model.action_head.model.forward = trt_forward


def main(args):
    policy = groot_rig.policy()
    if args.inference_mode == "trt_full_pipeline":
        from trt_model_forward import setup_tensorrt_engines

        setup_tensorrt_engines(policy, args.trt_engine_path, mode="action_head")
    elif args.inference_mode == "tensorrt":
        replace_dit_with_tensorrt(policy, args.trt_engine_path)
    given = groot_rig.dit_inputs(s=20, sa=5)
    with torch.inference_mode():
        found = policy.model.action_head.model(*list(given)[:3], None, False, *list(given)[3:])
    print("same", groot_rig.same(found, given.expected()))
    from jetrt.groot import load_report

    print("loads", len(load_report()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inference-mode", default="pytorch")
    parser.add_argument("--trt-engine-path", default="./somewhere")
    parser.add_argument("--backbone-trt-engine-path", default="")
    main(parser.parse_args())
'''


def alone(command: list[Any], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def run(arguments: list[Any], *, folder: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m jetrt.groot ARGUMENTS`."""
    done = alone(["-m", "jetrt.groot", *arguments], folder=folder)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """`script(text)` writes it into a folder of its own."""

    def write(text: str = SCRIPT, name: str = "script.py") -> Path:
        folder = tmp_path / "scripts"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
        return folder / name

    return write


@pytest.fixture
def dit(plan: groot_rig.Write) -> Path:
    return plan("dit5", name="dit_bf16.engine", io=dit_io(sa=5, lengths=(1, 20, 64)))


# The seams ------------------------------------------------------------------------------------------------------------


def test_seam_a_without_an_edit_and_without_tensorrt(script: Any, dit: Path) -> None:
    done = run([script(), "--inference-mode", "tensorrt", "--trt-engine-path", dit])
    assert done.stdout.splitlines() == ["same True", "loads 1"]
    # The same script by itself uses its own class, and fails for want of the package.
    done = alone([script(), "--inference-mode", "tensorrt", "--trt-engine-path", dit])
    assert "No module named 'tensorrt'" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "import jetrt.groot; jetrt.groot.install()",
        "from jetrt.groot import TensorRTDiTWrapper",  # the script's own replace_* looks the class up when it is called
        "from jetrt.groot import replace_dit_with_tensorrt",
    ],
)
def test_one_line_below_the_classes_instead_of_the_runner(script: Any, dit: Path, line: str) -> None:
    path = script(SCRIPT.replace("\ndef main(args):", f"\n{line}\n\n\ndef main(args):"))
    done = alone([path, "--inference-mode", "tensorrt", "--trt-engine-path", dit])
    assert done.stdout.splitlines() == ["same True", "loads 1"], done.stderr


def test_the_same_line_above_them_does_nothing(script: Any, dit: Path) -> None:
    """The script's own `class` statements bind the names again."""
    path = script(SCRIPT.replace("LOADED = []", "from jetrt.groot import TensorRTDiTWrapper"))
    done = alone([path, "--inference-mode", "tensorrt", "--trt-engine-path", dit])
    assert "No module named 'tensorrt'" in done.stderr


def test_seams_b_and_c_without_an_edit(script: Any, tmp_path: Path) -> None:
    text = SCRIPT.replace("found = policy.model.action_head.model(", "found = dit_of(policy.model.action_head)(")
    path = script(text.replace("def main(args):", DIT_OF + "\n\ndef main(args):"))
    script(FORWARD, "trt_model_forward.py")
    script("raise ImportError('No module named tensorrt')", "trt_torch.py")
    bundle = write_bundle(tmp_path / "bundle")
    done = run([path, "--inference-mode", "trt_full_pipeline", "--trt-engine-path", bundle])
    assert "same True" in done.stdout
    assert "loads 4" in done.stdout  # preloaded, checked, and taken


DIT_OF = """
def dit_of(head):
    def call(sa, vl, timestep, _, __, image, attended):
        given = dict(zip(("sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask"),
                         (sa, vl, timestep, image, attended)))
        for name, value in given.items():
            head.dit_engine.set_runtime_tensor_shape(name, value.shape)
        return head.dit_engine(**given)["output"]

    return call
"""

FORWARD = """
import os

from trt_torch import Engine


def setup_tensorrt_engines(policy, trt_engine_path, mode="n17_full_pipeline"):
    head = policy.model.action_head
    del head.model
    for name in ("state_encoder", "action_encoder", "action_decoder"):
        setattr(head, name + "_engine", Engine(os.path.join(trt_engine_path, name + ".engine")))
    head.dit_engine = Engine(os.path.join(trt_engine_path, "dit_bf16.engine"))
"""


def test_pytorch_mode_loads_nothing(script: Any, dit: Path) -> None:
    text = SCRIPT.replace('print("same", groot_rig.same(found, given.expected()))', "")
    done = run([script(text), "--trt-engine-path", dit])
    assert done.stdout.splitlines() == ["loads 0"]


def test_a_script_without_a_guard(script: Any, dit: Path) -> None:
    """Then jetrt's names are put one line below the last definition that they replace."""
    head, _, tail = SCRIPT.partition('if __name__ == "__main__":')
    text = head + textwrap.dedent(tail)
    done = run([script(text), "--inference-mode", "tensorrt", "--trt-engine-path", dit])
    assert "same True" in done.stdout


def test_a_benchmark_that_imports_the_script(script: Any, dit: Path) -> None:
    script(SCRIPT, "standalone_inference_script.py")
    path = script(
        """
        import sys
        import groot_rig

        def main(engine):
            from standalone_inference_script import replace_dit_with_tensorrt
            policy = groot_rig.policy()
            replace_dit_with_tensorrt(policy, engine)
            given = groot_rig.dit_inputs(s=20, sa=5)
            found = policy.model.action_head.model(*list(given)[:3], None, False, *list(given)[3:])
            print("same", groot_rig.same(found, given.expected()))

        if __name__ == "__main__":
            main(sys.argv[1])
        """,
        "benchmark_inference.py",
    )
    assert run([path, dit]).stdout.splitlines() == ["same True"]


# As `python SCRIPT` would ---------------------------------------------------------------------------------------------


def test_main_argv_file_path_and_doc(script: Any) -> None:
    path = script(
        """
        \"\"\"What it is.\"\"\"
        import sys
        from pathlib import Path
        import helper

        def where():
            return __file__

        if __name__ == "__main__":
            main = sys.modules["__main__"]
            print(__name__, sys.argv[0] == __file__ == where(), sys.argv[1:])
            print(main.__doc__, main.where is where, main.__spec__)
            print(Path(sys.path[0]) == Path(__file__).resolve().parent, helper.VALUE)
        """
    )
    (path.parent / "helper.py").write_text("VALUE = 'beside the script'\n")
    done = run([path, "--flag", "-x", "--", "--report", "z"])
    assert done.stdout.splitlines() == [
        "__main__ True ['--flag', '-x', '--', '--report', 'z']",
        "What it is. True None",
        "True beside the script",
    ]


def test_a_relative_name_and_a_link(script: Any) -> None:
    """As python does: `__file__` is absolute and keeps the link, sys.argv[0] is as typed, sys.path[0] the target's."""
    path = script(
        """
        import sys
        if __name__ == "__main__":
            print(sys.argv[0], __file__, sys.path[0], sep="\\n")
        """
    )
    (path.parent / "links").mkdir()
    (path.parent / "links" / "link.py").symlink_to(path)
    found = run(["links/link.py"], folder=path.parent).stdout.splitlines()
    assert found == ["links/link.py", str(path.parent / "links" / "link.py"), str(path.parent)]
    plain = [sys.executable, "links/link.py"]
    alone = subprocess.run(plain, cwd=path.parent, capture_output=True, text=True, check=True)
    assert alone.stdout.splitlines() == found


@pytest.mark.parametrize(
    ("body", "code", "printed"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('told')", 1, "told"),
        ("sys.exit()", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise KeyError('x')", 1, "KeyError: 'x'"),
        ("pass", 0, ""),
    ],
)
def test_exit_codes(script: Any, body: str, code: int, printed: str) -> None:
    done = run([script(f"import sys\n\nif __name__ == '__main__':\n    {body}\n")], code=code)
    assert printed in done.stderr


def test_tracebacks_have_the_scripts_lines(script: Any) -> None:
    path = script(
        """
        import sys


        def fails():
            raise ValueError("line seven")


        if __name__ == "__main__":
            fails()
        """
    )
    done = run([path], code=1)
    for line, text in ((6, 'raise ValueError("line seven")'), (10, "fails()")):
        assert f'File "{path}", line {line}' in done.stderr
        assert text in done.stderr


def test_definitions_that_fail(script: Any) -> None:
    done = run([script("import nothing_of_that_name\n")], code=1)
    assert "No module named 'nothing_of_that_name'" in done.stderr
    bad = script("def f(:\n", "bad.py")
    done = run([bad], code=1)
    assert f'File "{bad}", line 1' in done.stderr
    assert "SyntaxError" in done.stderr
    assert "nowhere.py" in run(["/nowhere.py"], code=1).stderr


def test_classes_of_main_are_pickled_and_pools_work(script: Any) -> None:
    path = script(
        """
        import pickle
        from concurrent.futures import ThreadPoolExecutor

        class Observation:
            def __init__(self, number):
                self.number = number

        def double(observation):
            return Observation(observation.number * 2)

        if __name__ == "__main__":
            import inspect
            print(inspect.getsource(Observation).splitlines()[0])  # where the scripts' parser finds its help texts
            copy = pickle.loads(pickle.dumps(Observation(3)))
            print(type(copy) is Observation, copy.number)
            with ThreadPoolExecutor(1) as pool:
                print(pool.submit(double, copy).result().number)
            import multiprocessing
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                print([o.number for o in pool.map(double, [Observation(1), Observation(2)])])
        """
    )
    assert run([path]).stdout.splitlines() == ["class Observation:", "True 3", "6", "[2, 4]"]


def test_names_after_the_guard_and_a_second_guard(script: Any) -> None:
    """The order of the statements stays."""
    path = script(
        """
        events = ["top"]
        if __name__ == "__main__":
            events.append("first")
        else:
            events.append("never")
        events.append("between")
        if "__main__" == __name__ and events:
            events.append("second")
        print(events)
        """
    )
    assert run([path]).stdout.strip() == "['top', 'first', 'between', 'second']"


def test_future_imports_hold_in_both_parts(script: Any) -> None:
    path = script(
        """
        from __future__ import annotations

        def f(x: Undefined): ...

        if __name__ == "__main__":
            def g(x: AlsoUndefined): ...
            print(f.__annotations__, g.__annotations__)
        """
    )
    assert run([path]).stdout.strip() == "{'x': 'Undefined'} {'x': 'AlsoUndefined'}"
    without = script("if __name__ == '__main__':\n    def g(x: Undefined): ...\n", "without.py")
    assert "NameError" in run([without], code=1).stderr


# Options --------------------------------------------------------------------------------------------------------------


def test_options_come_before_the_script(script: Any, dit: Path, tmp_path: Path) -> None:
    path = script(
        """
        import os, sys
        if __name__ == "__main__":
            print(os.environ["JETRT_GRAPHS"], os.environ["JETRT_TRT_SYNCHRONIZE"], sys.argv[1:])
        """
    )
    report = tmp_path / "report.json"
    done = run(["--graphs", "auto", "--synchronize", "--report", report, path, "--graphs", "mine"])
    assert done.stdout.strip() == "auto 1 ['--graphs', 'mine']"
    assert json.loads(report.read_text()) == {"loads": [], "loops": []}
    done = run(["--graphs=off", "--synchronize", "--", path, "--", "--report", "mine"])
    assert done.stdout.strip() == "off 1 ['--', '--report', 'mine']"
    done = run(["--graphs", "off", "--synchronize", path, "--", "x", "--"])
    assert done.stdout.strip() == "off 1 ['--', 'x', '--']"
    assert "SCRIPT is missing" in run(["--synchronize"], code=2).stderr
    assert "usage: python -m jetrt.groot [OPTIONS] SCRIPT [ARGUMENTS]" in run(["--help"]).stdout
    assert "invalid choice: 'sometimes'" in run(["--graphs", "sometimes", path], code=2).stderr
    assert "SCRIPT" in run([], code=2).stderr
    assert "--grap=auto" in run(["--grap=auto", path], code=2).stderr


def test_the_report_is_written_whatever_happens(script: Any, dit: Path, tmp_path: Path) -> None:
    text = SCRIPT.replace('print("loads", len(load_report()))', "sys.exit(5)")
    report = tmp_path / "report.json"
    arguments = ["--inference-mode", "tensorrt", "--trt-engine-path", dit]
    run(["--report", report, script(text), *arguments], code=5)
    (load,) = json.loads(report.read_text())["loads"]
    assert load["path"].endswith("dit_bf16.engine")
    done = run(["--report", "-", script(), *arguments])
    assert '"loads": [' in done.stderr


def test_free_torch(script: Any, dit: Path) -> None:
    text = SCRIPT.replace(
        'print("same"', 'print("layers", len(list(policy.model.action_head.model.children())))\n    print("same"'
    )
    arguments = [script(text), "--inference-mode", "tensorrt", "--trt-engine-path", dit]
    assert run(["--free-torch", *arguments]).stdout.splitlines()[:2] == ["layers 0", "same True"]
    assert run(arguments).stdout.splitlines()[:2] == ["layers 1", "same True"]


def test_a_budget_that_is_too_small_ends_before_the_policy(script: Any, dit: Path) -> None:
    text = SCRIPT.replace("policy = groot_rig.policy()", 'print("policy")\n    policy = groot_rig.policy()')
    arguments = [script(text), "--inference-mode", "tensorrt", "--trt-engine-path", dit]
    done = run(["--memory-budget", "100B", *arguments], code=1)
    assert "these engines do not fit: dit_bf16.engine" in done.stderr
    assert "policy" not in done.stdout
    assert "policy" in run(["--memory-budget", "1G", *arguments]).stdout


def test_the_report_names_engines_largest_first(script: Any, dit: Path, plan: groot_rig.Write, tmp_path: Path) -> None:
    from test_wrappers import one_output

    backbone = plan({**one_output(), "filler": "x" * 100_000}, name="backbone_int8.trt")
    report = tmp_path / "report.json"
    arguments = ["--inference-mode", "tensorrt", "--trt-engine-path", dit, "--backbone-trt-engine-path", backbone]
    run(["--report", report, script(), *arguments])
    assert [Path(load["path"]).name for load in json.loads(report.read_text())["loads"]] == [backbone.name, dit.name]


# Parts ----------------------------------------------------------------------------------------------------------------


def test_the_guard_is_found_in_its_forms() -> None:
    for guard in (
        'if __name__ == "__main__":',
        "if '__main__' == __name__:",
        "if __name__ == '__main__' and True:",
        "if (__name__) == ('__main__'):",
    ):
        first, second = split(f"x = 1\n{guard}\n    y = 2\nz = 3\n".encode(), "s.py")
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(first, names)
        assert names.keys() & {"x", "y", "z"} == {"x"}
        exec(second, names)
        assert names["y"] == 2
        assert names["z"] == 3
    for other in ("if __name__ == 'other':", "if name == '__main__':", "if __name__ != '__main__':", "if True:"):
        first, second = split(f"x = 1\n{other}\n    y = 2\nz = 3\n".encode(), "s.py")
        assert second.co_names.count("z") == 1
        assert "x" not in first.co_names  # nothing to put anything below: it all runs after install()


def test_flags_of_the_scripts() -> None:
    found = _flags(["--inference_mode", "tensorrt", "--trt-engine-path=a=b", "-x", "--traj-ids", "0", "1", "--last"])
    assert found == {"inference-mode": "tensorrt", "trt-engine-path": "a=b", "traj-ids": "0", "last": ""}


def test_engines_of_the_arguments(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    dit = bundle / "dit_bf16.engine"
    for name in ("tensorrt", "int8"):
        for path in (dit, bundle):
            assert engines_of(["--inference-mode", name, "--trt-engine-path", str(path)]) == [([dit], "wrapper")]
    (tmp_path / "backbone.trt").write_bytes(b"plan")
    for flag in ("--backbone-trt-engine-path", "--trt-backbone-path", "--trt_backbone_path"):
        found = engines_of(
            ["--inference-mode=tensorrt", "--trt_engine_path", str(dit), flag, str(tmp_path / "backbone.trt")]
        )
        assert found == [([dit, tmp_path / "backbone.trt"], "wrapper")]
    ((plans, seam),) = engines_of(["--inference-mode", "trt_full_pipeline", "--trt-engine-path", str(bundle)])
    assert seam == "engine"
    assert sorted(p.name for p in plans) == sorted(groot_rig.head_plans())
    for nothing in (
        ["--trt-engine-path", str(dit)],
        ["--inference-mode", "pytorch", "--trt-engine-path", str(dit)],
        ["--inference-mode", "tensorrt"],
        ["--inference-mode", "tensorrt", "--trt-engine-path", "/nowhere"],
        ["--inference-mode", "trt_full_pipeline", "--trt-engine-path", str(dit)],
    ):
        assert engines_of(nothing) == []


def test_importing_jetrt_imports_neither_torch_nor_these() -> None:
    code = "import sys, jetrt; print(sorted(m for m in sys.modules if 'torch' in m or 'groot' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, jetrt.groot; print('torch' in sys.modules); jetrt.groot.preload; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

"""What is said about the figures of `head.py`: Markdown tables, and which targets were met."""

from __future__ import annotations

from typing import Any

import ways
from common import markdown, target


def waits(result: dict[str, Any], name: str) -> float | None:
    """By the driver's callbacks, which see everybody's; else by the profiler, which sees those of the runtime."""
    driver = result.get("driver", {}).get(name)
    return (driver or result["counts"].get(name, {}).get("profiler", {})).get("waits")


def judge(layers: int, result: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Targets that could be judged, and those that could not."""
    rows, found, unknown = result["fixed"]["rows"], [], []
    done = {name: row["done_ms"]["median"] for name, row in rows.items()}

    def add(name: str, measured: float | None, limit: float | None, unit: str) -> None:
        if measured is None or limit is None:
            unknown.append(name)
        else:
            found.append(target(name, measured, limit, unit))

    if layers <= 2:
        script = done.get(ways.SCRIPT)
        name = f"{layers} layers: the unchanged script is 1.3 x faster over jetrt than over its own Engine"
        add(name, done.get(ways.JETRT), script and script / 1.3, "ms")
    share = 1.03 if layers <= 2 else 1.02
    for name in (ways.JETRT_LOOP, ways.JETRT_GRAPH):
        bare = done.get(ways.BARE_GRAPH)
        add(
            f"{layers} layers: «{name}» within {share} x of «{ways.BARE_GRAPH}»",
            done.get(name),
            bare and share * bare,
            "ms",
        )
    if "counts" in result:
        # The profiler would not see waits that go past the runtime.
        by_driver = result["driver"].get(ways.JETRT, {}).get("waits")
        add(f"{layers} layers: no wait in the unchanged script", by_driver, 0.0, "waits per action")
        rows = [result["counts"].get(name, {}) for name in (ways.JETRT, ways.BARE)]
        fills = [row.get("profiler", {}).get("fills") for row in rows]
        extra = None if None in fills else fills[0] - fills[1]
        add(f"{layers} layers: no fill by engine calls in the unchanged script", extra, 0.0, "fills per action")
    return found, unknown


def show(layers: int, result: dict[str, Any]) -> None:
    def times(title: str, rows: dict[str, Any]) -> None:
        table = []
        for name, row in rows.items():
            host, done, device = row["host_us"], row["done_ms"], row.get("device_ms")
            table.append(
                [
                    name,
                    f"{host['median']:.0f}",
                    f"{host['p99']:.0f}",
                    f"{device['median']:.3f}" if device else "",
                    f"{done['median']:.3f}",
                    f"{done['p99']:.3f}",
                    f"{done['worst']:.3f}",
                    f"{done['jitter']:.3f}",
                ]
            )
        header = ["", "host µs p50", "p99", "device ms p50", "done ms p50", "p99", "worst", "jitter"]
        print(f"\n### {layers} layers: {title}\n\n{markdown(header, table)}")

    if "fixed" in result:
        times(f"an action, S = {result['s']}", result["fixed"]["rows"])
    if "varying" in result:
        times(f"an action, S changing among {result['varying']['s']}", result["varying"]["rows"])
    if result.get("one_dit_call"):
        times("one call of the DiT", result["one_dit_call"]["rows"])
    for title, table in result.get("control", {}).items():
        times(f"control loop, {title}, {table['actions']} actions", table["rows"])
    if "counts" in result:
        header = ["per action", "engine calls", "in the graph", "graph launches", "waits", "torch allocations", "fills"]
        header += ["copies", "kernels", "GPU busy ms"]
        table = []
        for name, row in result["counts"].items():
            profiler, stage = row.get("profiler", {}), result["stages"].get(name, {})
            driver = result["driver"].get(name, profiler)

            def text(value: Any) -> str:
                return "" if value is None else f"{value:g}"

            table.append(
                [
                    name,
                    text(stage.get("engine_calls")),
                    text(stage.get("engine_calls_in_the_graph")),
                    text(driver.get("graph_launches")),
                    text(waits(result, name)),
                    text(row.get("torch_allocations")),
                    *(text(profiler.get(key)) for key in ("fills", "copies", "kernels")),
                    f"{profiler['busy_ms']:.3f}" if "busy_ms" in profiler else "",
                ]
            )
        print(f"\n### {layers} layers: counted\n\n{markdown(header, table)}")
        if "not available" in result["driver"]:
            print(
                f"\ndriver callbacks not available: {result['driver']['not available']}; waits are the runtime's alone"
            )
        names = list(dict.fromkeys(stage for row in result["stages"].values() for stage in row.get("ms", {})))
        rows = [
            [name, *(f"{row['ms'].get(stage, 0.0):.3f}" for stage in names)]
            for name, row in result["stages"].items()
            if "ms" in row
        ]
        print(f"\n### {layers} layers: ms by stage, gaps included\n\n{markdown(['', *names], rows)}")
        for name, row in result["stages"].items():
            if "ms" not in row:
                print(f"\nstages of «{name}» not measured: {row['not measured']}")
    for name, reason in result["skipped"].items():
        print(f"\nnot run: «{name}»: {reason}")
    for name, reason in result.get("same_bits_afterwards", {}).get("differences", {}).items():
        print(f"\nWRONG at the end: «{name}»: {reason}")

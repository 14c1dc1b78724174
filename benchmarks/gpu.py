"""How near `batchvl run` comes to what the GPU can do, and how far LMDeploy's own loop is from it.

    python benchmarks/gpu.py 2b-13tiles                     # TurboMind; about four minutes on an H200
    python benchmarks/gpu.py 2b-1tile --only run --option image_workers=12 --option engine_option=max_batch_size=1024
    python benchmarks/gpu.py --out results                  # nothing but the table of results that lie there

Three systems answer the same questions about distinct pictures, greedily, in 16 to 128 tokens, 72 on average:

ceiling  LMDeploy's engine alone, with pixels that were prepared beforehand
loop     `pipe(list of 32)`, one list after another, of files on disk
run      the command `batchvl run`, of URLs on this machine

Rates are over the span from the first rows that an engine was handed to the last answer: its start is not in it, its
last rows are. Checkpoints have real sizes and random weights (benchmarks/internvl.py), and stay where --models says.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batchvl.config.options import RunOptions  # noqa: E402
from batchvl.engines.registry import engine_spec  # noqa: E402
from batchvl.errors import OptionError  # noqa: E402
from batchvl.hardware import gpus as nvidia  # noqa: E402
from batchvl.hardware.limits import cpus  # noqa: E402
from benchmarks.scenarios import SCENARIOS, Options, Row, Scenario, shown  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.measure import Result

SYSTEMS = ("ceiling", "loop", "run")
MODELS = Path(tempfile.gettempdir()) / "batchvl-internvl"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=f"Scenarios: {', '.join(SCENARIOS)}"
    )
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help="what to measure")
    parser.add_argument("--backend", choices=("turbomind", "pytorch"), default="turbomind")
    parser.add_argument("--rows", type=int, metavar="N", help="a GPU's, for ceiling and run; the loop has its share")
    parser.add_argument("--only", default=",".join(SYSTEMS), metavar="SYSTEMS", help="of ceiling,loop,run")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of `batchvl run`, for all three, such as engine_option=max_batch_size=1024; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results as JSON, a file each")
    parser.add_argument("--models", type=Path, default=MODELS, metavar="DIR", help=f"for checkpoints [{MODELS}]")
    parser.add_argument("--timeout", type=float, default=400, metavar="SECONDS", help="for one system, start included")
    told = parser.parse_args()
    if unknown := set(told.only.split(",")) - set(SYSTEMS):
        parser.error(f"--only {', '.join(unknown)}: want some of {','.join(SYSTEMS)}")
    if unknown := set(told.scenario) - set(SCENARIOS):
        parser.error(f"{', '.join(unknown)}: want some of {', '.join(SCENARIOS)}")
    if not told.scenario:
        if told.out is None:
            parser.error(f"name what to measure: {', '.join(SCENARIOS)}")
        print(table(kept(told.out)))
        return 0
    if reason := missing():
        parser.exit(2, f"gpu.py: {reason}\n")
    options = [named(option) for option in told.option]
    try:
        check(told.backend, options)
    except (OptionError, ValueError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the `finally`s
    results, faults = compare(told, options)
    print("", table(results), *(["", "Not as it should be:", *faults] if faults else []), sep="\n")
    return 1 if faults else 0


def missing() -> str | None:
    """What this machine lacks."""
    if find_spec("lmdeploy") is None:
        return "needs LMDeploy, which is not installed here: pip install '.[lmdeploy]'"
    try:
        nvidia.list_gpus()
    except nvidia.NoGpu as error:
        return f"needs an NVIDIA GPU: {error}"
    return None


def named(option: str) -> tuple[str, str]:
    """An --option.

    >>> named("image-workers=12"), named("engine_option=a=1"), named("trust-remote-code")
    (('image_workers', '12'), ('engine_option', 'a=1'), ('trust_remote_code', 'true'))
    """
    name, equals, value = option.partition("=")
    return name.replace("-", "_"), value if equals else "true"


def check(backend: str, options: Options) -> None:
    """Raises OptionError or ValueError for options that batchvl does not take."""
    from benchmarks.measure import values

    engine_spec(RunOptions.of(engine="lmdeploy", **{**values(options), "backend": backend}))


def compare(told: argparse.Namespace, options: Options) -> tuple[list[Result], list[str]]:
    """Measures all that is asked for, saying so; results and what is wrong with them."""
    from benchmarks.measure import Bench, Failed

    found: list[Result] = []
    faults: list[str] = []
    systems = [system for system in SYSTEMS if system in told.only.split(",")]
    gpus = visible()
    print(f"{len(gpus)} x {nvidia.list_gpus()[0].name}, {cpus()} CPUs, LMDeploy {version('lmdeploy')}", flush=True)
    for scenario in dict.fromkeys(scenario for name in told.scenario for scenario in SCENARIOS[name]):
        if scenario.gpu_count > len(gpus):
            print(f"{scenario.name}: left out, it needs {scenario.gpu_count} GPUs, and there are {len(gpus)}")
            continue
        model = checkpoint(scenario, told.models)
        of_scenario: list[Result] = []
        for system in systems:
            print(f"{scenario.name}, {system}: ", end="", flush=True)
            with tempfile.TemporaryDirectory(prefix="batchvl-gpu-") as folder:
                bench = Bench(scenario, model, told.backend, options, gpus, Path(folder), told.timeout)
                try:
                    result = bench.measure(system, rows_of(scenario, system, told.rows))
                except Failed as error:
                    print("failed")
                    faults.append(f"{scenario.name}, {system}: {error}")
                    continue
            print(f"{result.rate:.1f} rows/s over {result.seconds:.1f} s, begun after {result.start_seconds:.1f} s")
            of_scenario.append(result)
            if told.out:
                told.out.mkdir(parents=True, exist_ok=True)
                name = re.sub(r"[^\w.]+", "-", "-".join([scenario.name, told.backend, system, *map(shown, options)]))
                (told.out / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
        faults += unequal(of_scenario)
        found += of_scenario
    return found, faults


def visible() -> list[str]:
    """CUDA's names of the GPUs that may be used."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(gpu.index) for gpu in nvidia.list_gpus()] if told is None else [name for name in told.split(",") if name]


def checkpoint(scenario: Scenario, folder: Path) -> Path:
    """The scenario's model, made unless it is there. In a process of its own, whose GPU memory is free afterwards."""
    made = folder / "-".join([scenario.size, str(scenario.max_tiles), *["fp8"] * scenario.fp8])
    if not made.is_dir():
        print(f"{made}: being made", flush=True)
        command = [sys.executable, str(ROOT / "benchmarks" / "internvl.py"), scenario.size, str(made)]
        subprocess.run([*command, "--max-tiles", str(scenario.max_tiles), *["--fp8"] * scenario.fp8], check=True)
    return made


def rows_of(scenario: Scenario, system: str, rows: int | None) -> list[Row]:
    """Rows for all GPUs, of each picture all questions."""
    count = scenario.loop_rows if system == "loop" else scenario.rows
    if rows is not None:
        count = count * rows // scenario.rows
    pictures = max(1, count // scenario.questions) * scenario.gpu_count
    return scenario.make_rows(pictures * scenario.questions)


def unequal(results: Sequence[Result]) -> list[str]:
    """Why results of one scenario cannot be compared."""
    found = [
        f"{result.scenario}, {result.system}: {result.wrong} of {result.rows} answers are not as long as they should be"
        for result in results
        if result.wrong
    ]
    lengths = {result.system: result.input_tokens / result.rows for result in results}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{system} {tokens:.2f}" for system, tokens in lengths.items())
        found.append(f"{results[0].scenario}: prompts differ in their tokens: {said}")
    return found


def kept(folder: Path) -> list[Result]:
    """Results that lie in a folder, in the scenarios' order."""
    from benchmarks.measure import Result

    found = [msgspec.json.decode(path.read_bytes(), type=Result) for path in sorted(folder.glob("*.json"))]
    order = list(SCENARIOS)
    return sorted(found, key=lambda result: order.index(result.scenario))


def table(results: Sequence[Result]) -> str:
    """Two tables in Markdown: the rates, and what they took."""
    lines: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        lines.setdefault((f"{result.title}, {result.backend}", result.backend), {})[result.system] = result
    systems = ("ceiling", "LMDeploy `pipe(list of 32)` loop", "batchvl run")
    rates: list[tuple[str, ...]] = [("model, pictures", *systems, "batchvl / ceiling")]
    took: list[tuple[str, ...]] = [(
        "model, pictures", "what", "rows/s", "rows", "seconds", "GPU busy", "CPU cores", "peak host memory",
        "peak GPU memory", "GPU waits for rows",
    )]  # fmt: skip
    for (title, _), found in lines.items():
        ceiling, run = found.get("ceiling"), found.get("run")
        share = f"{run.rate / ceiling.rate:.1%}" if ceiling and run else ""
        rates.append((title, *(_rate(found.get(system)) for system in SYSTEMS), share))
        for result in (found[system] for system in SYSTEMS if system in found):
            took.append((
                title, result.system, _rate(result), f"{result.rows:,}", f"{result.seconds:.1f}",
                _shown(result.gpu_busy, "{:.0%}"), _shown(result.cores, "{:.1f}"),
                _shown(result.host_bytes, "{:.1f} GiB", 2**30), _shown(result.gpu_bytes, "{:.1f} GiB", 2**30),
                _shown(result.gpu_wait, "{:.1%}"),
            ))  # fmt: skip
    return "\n".join([*_markdown(rates), "", *_markdown(took)])


def _rate(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.rate:.1f}"


def _shown(number: float | None, form: str, unit: int = 1) -> str:
    return "" if number is None else form.format(number / unit)


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return [rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]]


if __name__ == "__main__":
    sys.exit(main())

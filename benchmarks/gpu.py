"""Throughput of `batchvl run` on a GPU, compared with its engine's own ceiling and with a plain LMDeploy loop.

    python benchmarks/gpu.py 2b-13tiles                     # TurboMind; about four minutes on an H200
    python benchmarks/gpu.py 2b-1tile --only run --option image_workers=12 --option engine_option=max_batch_size=1024
    python benchmarks/gpu.py --out results                  # only print the table of the results in a directory

Three systems answer the same questions about distinct images, greedily, in 16 to 128 tokens, 72 on average:

ceiling  LMDeploy's engine alone, with pixels prepared beforehand
loop     `pipe(batch of 32)`, one batch after another, with files on disk
run      the command `batchvl run`, with URLs on this machine

Rates are measured from the first rows that the engine was handed to the last answer: they include the last rows, when
the engine is no longer full, and not the engine's start. Checkpoints have real sizes and random weights
(benchmarks/internvl.py); they are kept in the directory given by --models.
"""

from __future__ import annotations

import argparse
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
from batchvl.hardware import gpus  # noqa: E402
from batchvl.hardware.limits import cpus  # noqa: E402
from benchmarks.scenarios import SCENARIOS, Options, Row, Scenario, format_option  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.measure import Result

SYSTEMS = ("ceiling", "loop", "run")
MODELS = Path(tempfile.gettempdir()) / "batchvl-internvl"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=f"Scenarios: {', '.join(SCENARIOS)}"
    )
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help="scenario to measure")
    parser.add_argument("--backend", choices=("turbomind", "pytorch"), default="turbomind")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="rows per GPU for ceiling and run; the loop has fewer in proportion"
    )
    parser.add_argument(
        "--only", default=",".join(SYSTEMS), metavar="SYSTEMS", help="comma-separated subset of ceiling,loop,run"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of `batchvl run` for all systems, such as engine_option=max_batch_size=1024; may be repeated",
    )
    parser.add_argument(
        "--web",
        action="store_true",
        help="run: images from a synthetic open web with slow answers and faults (benchmarks/web_server.py)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory for the results, one JSON file each")
    parser.add_argument(
        "--models", type=Path, default=MODELS, metavar="DIR", help=f"directory for checkpoints [{MODELS}]"
    )
    parser.add_argument(
        "--timeout", type=float, default=400, metavar="SECONDS", help="time limit of one system, including its start"
    )
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(SYSTEMS):
        parser.error(f"--only {', '.join(unknown)}: want a subset of {','.join(SYSTEMS)}")
    if unknown := set(args.scenario) - set(SCENARIOS):
        parser.error(f"unknown scenario {', '.join(unknown)}: want {', '.join(SCENARIOS)}")
    if not args.scenario:
        if args.out is None:
            parser.error(f"no scenario: want one or more of {', '.join(SCENARIOS)}")
        print(table(load_results(args.out)))
        return 0
    if requirement := missing_requirement():
        parser.exit(2, f"gpu.py: {requirement}\n")
    options = [parse_option(option) for option in args.option]
    try:
        check_options(args.backend, options)
    except (OptionError, ValueError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` clauses run
    results, faults = compare(args, options)
    print("", table(results), *(["", "Problems:", *faults] if faults else []), sep="\n")
    return 1 if faults else 0


def missing_requirement() -> str | None:
    """Return what this machine lacks, None if it has all that is needed."""
    if find_spec("lmdeploy") is None:
        return "needs LMDeploy, which is not installed: pip install '.[lmdeploy]'"
    try:
        gpus.list_gpus()
    except gpus.NoGpu as error:
        return f"needs an NVIDIA GPU: {error}"
    return None


def parse_option(option: str) -> tuple[str, str]:
    """Parse the value of an --option.

    >>> parse_option("image-workers=12"), parse_option("engine_option=a=1"), parse_option("trust-remote-code")
    (('image_workers', '12'), ('engine_option', 'a=1'), ('trust_remote_code', 'true'))
    """
    name, equals, value = option.partition("=")
    return name.replace("-", "_"), value if equals else "true"


def check_options(backend: str, options: Options) -> None:
    """Raise OptionError or ValueError for options that batchvl does not accept."""
    from benchmarks.measure import option_values

    engine_spec(RunOptions.of(engine="lmdeploy", **{**option_values(options), "backend": backend}))


def compare(args: argparse.Namespace, options: Options) -> tuple[list[Result], list[str]]:
    """Measure the scenarios and systems, print progress, and return results and problems."""
    from benchmarks.measure import Bench, MeasurementFailed

    results: list[Result] = []
    faults: list[str] = []
    systems = [system for system in SYSTEMS if system in args.only.split(",")]
    names = visible_gpus()
    print(f"{len(names)} x {gpus.list_gpus()[0].name}, {cpus()} CPUs, LMDeploy {version('lmdeploy')}", flush=True)
    for scenario in dict.fromkeys(scenario for name in args.scenario for scenario in SCENARIOS[name]):
        if scenario.gpu_count > len(names):
            print(f"{scenario.name}: skipped, needs {scenario.gpu_count} GPUs, found {len(names)}")
            continue
        model = checkpoint(scenario, args.models)
        scenario_results: list[Result] = []
        for system in systems:
            print(f"{scenario.name}, {system}: ", end="", flush=True)
            with tempfile.TemporaryDirectory(prefix="batchvl-gpu-") as directory:
                bench = Bench(scenario, model, args.backend, options, names, Path(directory), args.timeout, args.web)
                try:
                    result = bench.measure(system, make_rows(scenario, system, args.rows))
                except MeasurementFailed as error:
                    print("failed")
                    faults.append(f"{scenario.name}, {system}: {error}")
                    continue
            print(f"{result.rate:.1f} rows/s over {result.seconds:.1f} s, started after {result.start_seconds:.1f} s")
            scenario_results.append(result)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                parts = [scenario.name, *["web"] * args.web, args.backend, system, *map(format_option, options)]
                name = re.sub(r"[^\w.]+", "-", "-".join(parts))
                (args.out / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
        faults += find_faults(scenario_results)
        results += scenario_results
    return results, faults


def visible_gpus() -> list[str]:
    """Return CUDA's names of the GPUs that may be used."""
    visible = gpus.parse_visible_devices()
    return [str(gpu.index) for gpu in gpus.list_gpus()] if visible is None else visible


def checkpoint(scenario: Scenario, directory: Path) -> Path:
    """Return the scenario's model, created if it does not exist yet.

    Another process creates it, so that its GPU memory is free afterwards.
    """
    path = directory / "-".join([scenario.size, str(scenario.max_tiles), *["fp8"] * scenario.fp8])
    if not path.is_dir():
        print(f"{path}: creating the checkpoint", flush=True)
        command = [sys.executable, str(ROOT / "benchmarks" / "internvl.py"), scenario.size, str(path)]
        subprocess.run([*command, "--max-tiles", str(scenario.max_tiles), *["--fp8"] * scenario.fp8], check=True)
    return path


def make_rows(scenario: Scenario, system: str, rows: int | None) -> list[Row]:
    """Return rows for all GPUs, with all questions about each image."""
    count = scenario.loop_rows if system == "loop" else scenario.rows
    if rows is not None:
        count = count * rows // scenario.rows
    images = max(1, count // scenario.questions) * scenario.gpu_count
    return scenario.make_rows(images * scenario.questions)


def find_faults(results: Sequence[Result]) -> list[str]:
    """Return the reasons why results of one scenario cannot be compared."""
    faults = [
        f"{result.scenario}, {result.system}: {result.wrong} of {result.rows} answers have the wrong length"
        for result in results
        if result.wrong
    ]
    lengths = {result.system: result.input_tokens / result.rows for result in results}
    if len(set(lengths.values())) > 1:
        tokens_by_system = ", ".join(f"{system} {tokens:.2f}" for system, tokens in lengths.items())
        faults.append(f"{results[0].scenario}: prompts differ in their mean number of tokens: {tokens_by_system}")
    return faults


def load_results(directory: Path) -> list[Result]:
    """Return the results in a directory, in the order of the scenarios."""
    from benchmarks.measure import Result

    results = [msgspec.json.decode(path.read_bytes(), type=Result) for path in sorted(directory.glob("*.json"))]
    order = list(SCENARIOS)
    return sorted(results, key=lambda result: order.index(result.scenario))


def table(results: Sequence[Result]) -> str:
    """Return two tables in Markdown: the rates, and the resource usage."""
    lines: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        lines.setdefault((f"{result.title}, {result.backend}", result.backend), {})[result.system] = result
    systems = ("ceiling", "LMDeploy `pipe(batch of 32)` loop", "batchvl run")
    rates: list[tuple[str, ...]] = [("model, images", *systems, "batchvl / ceiling")]
    usage = [("model, images", *USAGE_COLUMNS)]
    for (title, _), by_system in lines.items():
        ceiling, run = by_system.get("ceiling"), by_system.get("run")
        share = f"{run.rate / ceiling.rate:.1%}" if ceiling and run else ""
        rates.append((title, *(_rate(by_system.get(system)) for system in SYSTEMS), share))
        usage += [(title, *_usage_cells(by_system[system])) for system in SYSTEMS if system in by_system]
    return "\n".join([*_markdown(rates), "", *_markdown(usage)])


USAGE_COLUMNS = (
    "system",
    "rows/s",
    "rows",
    "seconds",
    "GPU busy",
    "CPU cores",
    "peak host memory",
    "peak GPU memory",
    "GPU waits for rows",
)


def _usage_cells(result: Result) -> tuple[str, ...]:
    return (
        result.system,
        _rate(result),
        f"{result.rows:,}",
        f"{result.seconds:.1f}",
        _format(result.gpu_busy, "{:.0%}"),
        _format(result.cores, "{:.1f}"),
        _format(result.host_bytes, "{:.1f} GiB", 2**30),
        _format(result.gpu_bytes, "{:.1f} GiB", 2**30),
        _format(result.gpu_wait, "{:.1%}"),
    )


def _rate(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.rate:.1f}"


def _format(number: float | None, template: str, unit: int = 1) -> str:
    return "" if number is None else template.format(number / unit)


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return [rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]]


if __name__ == "__main__":
    sys.exit(main())

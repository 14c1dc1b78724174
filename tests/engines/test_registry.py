"""The registry of engines: every entry is complete, and a run chooses the right one."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from typing import get_args

import pytest

from batchvl.config.options import OPTION_TYPES, RunOptions
from batchvl.engines import registry
from batchvl.engines.base import EngineSpec
from batchvl.engines.registry import ENGINE_TYPES, LIBRARIES, EngineType, choose_engine, engine_spec, parse_key_value
from batchvl.errors import EngineUnavailable, OptionError
from batchvl.ipc.arena import Arena, ArenaView


@pytest.fixture
def machine(monkeypatch):
    """Set what a machine has: `machine(gpus, *packages)`."""

    def set_up(gpus: int, *packages: str) -> None:
        monkeypatch.setattr(registry, "visible_gpus", lambda: [str(number) for number in range(gpus)])
        monkeypatch.setattr(registry, "find_spec", lambda package: package if package in packages else None)

    return set_up


# ------------------------------------------------------------------------------------------------------------- entries


def test_the_option_engine_takes_exactly_the_registered_names():
    assert set(get_args(OPTION_TYPES["engine"])) == {"auto", *ENGINE_TYPES}


@pytest.mark.parametrize("engine", ENGINE_TYPES.values(), ids=lambda engine: engine.name)
def test_an_entry_names_what_exists(engine: EngineType):
    module, _, attribute = engine.factory.partition(":")
    assert callable(getattr(import_module(module), attribute))
    assert engine.preload is None or find_spec(engine.preload)
    assert engine.option_group in (None, *(field.name for field in fields(RunOptions)))
    assert all(LIBRARIES[library.name] is library for library in engine.libraries)
    assert engine.description
    assert engine.gpu_memory_advice
    assert engine.gpus_per_replica(RunOptions.of()) in (0, 1)


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=lambda library: library.name)
def test_a_library_names_a_probe_that_exists(library):
    module, _, function = library.probe.partition(":")
    assert callable(getattr(import_module(module), function))


def test_lmdeploy_uses_as_many_gpus_per_replica_as_share_a_model():
    assert ENGINE_TYPES["lmdeploy"].gpus_per_replica(RunOptions.of(tp=4)) == 4


def test_an_entry_is_all_that_it_takes_to_construct_an_engine():
    class Toy:
        def __init__(self, spec: EngineSpec, arena: ArenaView) -> None:
            self.spec, self.arena = spec, arena

    globals()["Toy"] = Toy
    arena, spec = Arena(1), EngineSpec("toy")
    try:
        engine = EngineType("toy", f"{__name__}:Toy", "does nothing").create(spec, arena)
    finally:
        del globals()["Toy"]
        arena.close()
    assert (engine.spec, engine.arena) == (spec, arena)


# ------------------------------------------------------------------------------------------------------------- choices


def test_auto_is_the_first_engine_that_can_run(machine):
    machine(1, "torch", "lmdeploy", "transformers")
    assert choose_engine("auto") == "lmdeploy"
    assert choose_engine("auto", "cuda") == "lmdeploy"
    assert choose_engine("auto", "cpu") == "transformers"
    machine(0, "torch", "lmdeploy", "transformers")
    assert choose_engine("auto") == "transformers"
    machine(1, "torch", "transformers")
    assert choose_engine("auto") == "transformers"


@pytest.mark.parametrize(("packages", "missing"), [((), "torch and transformers are"), (("torch",), "transformers is")])
def test_without_libraries_it_says_what_to_install(machine, packages, missing):
    machine(0, *packages)
    with pytest.raises(EngineUnavailable) as refused:
        choose_engine("auto")
    first, *ways = str(refused.value).splitlines()
    assert f"{missing} not installed" in first
    assert [way.split("   ")[0].strip() for way in ways] == [
        "pip install 'batchvl[lmdeploy]'",
        "pip install 'batchvl[transformers]'",
        "--engine fake",
    ]


def test_an_engine_by_name_is_not_questioned(machine):
    machine(0)
    assert [choose_engine(name) for name in ENGINE_TYPES] == list(ENGINE_TYPES)


# --------------------------------------------------------------------------------------------------------------- specs


def test_the_options_of_an_engine_reach_it():
    spec = engine_spec(RunOptions.of(engine="lmdeploy", tp=2, engine_option=("max_batch_size=7", "dtype=x")))
    assert (spec.engine, spec.flags["tp"], spec.flags["backend"]) == ("lmdeploy", 2, "auto")
    assert spec.options == {"max_batch_size": 7, "dtype": "x"}
    assert engine_spec(RunOptions.of(engine="fake")).flags == {}


def test_options_of_another_engine_are_refused():
    with pytest.raises(OptionError, match="--tp: applies only to --engine lmdeploy; this run uses fake"):
        engine_spec(RunOptions.of(engine="fake", tp=2))


@pytest.mark.parametrize("option", ["rows", "=7", ""])
def test_an_engine_option_without_key_or_value_is_refused(option):
    with pytest.raises(OptionError, match="expected KEY=VALUE"):
        parse_key_value(option)

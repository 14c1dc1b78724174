"""How a death is told, and what is advised."""

import pytest

from batchvl.errors import EngineLost, EngineUnavailable
from batchvl.hardware.limits import oom_kills
from batchvl.serving import exits as death
from batchvl.serving.exits import EngineExited, ExitDiagnoser, RestartPolicy, RestartRefused

GPU = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
TURBOMIND = "[TM][ERROR] CUDA runtime error: out of memory /src/allocator.h:217"
STACKS = "\n".join(f'  File "engine.py", line {n} in wait' for n in range(900))


@pytest.fixture
def died(tmp_path):
    def tell(words="", code=-9, ended_for=None, how="", engine="lmdeploy"):
        log = tmp_path / "engine.log"
        log.write_text("CUDA out of memory, of the process before\n")
        witness = ExitDiagnoser(engine, log, log.stat().st_size)
        with log.open("a") as file:
            file.write(words)
        return witness.died(code, ended_for, how)

    return tell


def test_how_it_ended(died, tmp_path):
    assert died("goodbye\n", -11).args[0] == (
        f"the engine process was killed by SIGSEGV\nits last words, from {tmp_path}/engine.log:\ngoodbye"
    )
    assert died(code=3).args[0] == "the engine process ended with exit code 3"
    assert died(code=3).how == "ended with exit code 3"
    ended = died(ended_for="it was slow", how="was ended, being slow,")
    assert (str(ended), ended.how) == ("the engine process was ended: it was slow", "was ended, being slow,")
    assert isinstance(ended, EngineExited)
    assert len(str(died("x" * 10_000))) < 2500


@pytest.mark.parametrize("words", [GPU, TURBOMIND, "cudaErrorMemoryAllocation", GPU + "\n" + STACKS])
def test_a_full_gpu(died, words):
    for code, ended_for in ((1, None), (-6, None), (-9, "it made no progress")):
        advice = died(words, code, ended_for).advice
        assert "the GPU's memory was full: lower --cache-max-entry-count" in advice
        assert "max_batch_size=N" in advice
        assert advice in str(died(words, code, ended_for)).splitlines()
    assert "--cache-max-entry-count" not in died(words, 1, engine="transformers").advice
    assert "--batch-size" in died(words, 1, engine="transformers").advice


def test_a_full_host(died, monkeypatch):
    assert died().advice.startswith("perhaps it was the kernel, for lack of memory: give the job more memory (--mem)")
    assert not died(ended_for="the run is stopping").advice
    assert not died(code=-11).advice
    assert died("MemoryError\n", 1).advice.startswith("it had too little memory: give the job more memory (--mem)")
    counts = iter((4, 5))
    monkeypatch.setattr(death, "oom_kills", lambda: next(counts))
    assert died().advice.startswith("the kernel killed it for lack of memory: give the job more memory (--mem)")


def test_the_kernels_count(tmp_path):
    assert oom_kills(tmp_path) == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert oom_kills(tmp_path) == 2, "version 1"
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 7\noom_group_kill 0\n")
    assert oom_kills(tmp_path) == 7
    assert oom_kills() >= 0


def test_a_refusal_before_the_first_answer_is_no_configuration_error(tmp_path, logged):
    refused = RestartRefused(EngineUnavailable("no memory\nadvice"))
    deaths = RestartPolicy("the engine", tmp_path / "log")
    deaths.add(EngineExited("it died", "died"), 0, 0)
    for pause in (15, 30, 60):
        deaths.add(refused, 0, None)
        assert deaths.pause == pause
        assert logged[-1] == f"the engine refuses to start again: no memory; it is tried again in {pause} s"
    with pytest.raises(EngineLost, match=r"5 times .* no memory\nadvice"):
        deaths.add(refused, 0, None)
    assert logged[:2] == [
        "the engine died with 0 rows in it; it is started again", f"note: its last words are in {tmp_path}/log"
    ]  # fmt: skip

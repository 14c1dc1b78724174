"""Diagnosis of a process's exit, advice, and the restart policy."""

import pytest

from batchvl.errors import EngineLost, EngineUnavailable
from batchvl.hardware.limits import oom_kills
from batchvl.serving import exits
from batchvl.serving.exits import EngineExited, ExitDiagnoser, RestartPolicy, RestartRefused

GPU = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
TURBOMIND = "[TM][ERROR] CUDA runtime error: out of memory /src/allocator.h:217"
STACKS = "\n".join(f'  File "engine.py", line {n} in wait' for n in range(900))


@pytest.fixture
def diagnose(tmp_path):
    """Diagnose the exit of a process that wrote `output` to a log which an earlier process had used."""

    def diagnose(output="", code=-9, kill_reason=None, summary="", engine="lmdeploy"):
        log = tmp_path / "engine.log"
        log.write_text("CUDA out of memory, of the process before\n")
        diagnoser = ExitDiagnoser(engine, log, log.stat().st_size)
        with log.open("a") as file:
            file.write(output)
        return diagnoser.diagnose(code, kill_reason, summary)

    return diagnose


def test_the_message_says_how_the_process_exited(diagnose, tmp_path):
    assert diagnose("goodbye\n", -11).args[0] == (
        f"the engine process was killed by SIGSEGV\nits last output, from {tmp_path}/engine.log:\ngoodbye"
    )
    assert diagnose(code=3).args[0] == "the engine process exited with code 3"
    assert diagnose(code=3).summary == "exited with code 3"
    killed = diagnose(kill_reason="it was slow", summary="was killed for being slow,")
    assert (str(killed), killed.summary) == ("the engine process was killed: it was slow", "was killed for being slow,")
    assert isinstance(killed, EngineExited)
    assert len(str(diagnose("x" * 10_000))) < 2500


@pytest.mark.parametrize("output", [GPU, TURBOMIND, "cudaErrorMemoryAllocation", GPU + "\n" + STACKS])
def test_advice_for_a_full_gpu(diagnose, output):
    for code, kill_reason in ((1, None), (-6, None), (-9, "it made no progress")):
        advice = diagnose(output, code, kill_reason).advice
        assert "it ran out of GPU memory: lower --cache-max-entry-count" in advice
        assert "max_batch_size=N" in advice
        assert advice in str(diagnose(output, code, kill_reason)).splitlines()
    assert "--cache-max-entry-count" not in diagnose(output, 1, engine="transformers").advice
    assert "--batch-size" in diagnose(output, 1, engine="transformers").advice


def test_advice_for_a_full_host(diagnose, monkeypatch):
    give_more = "memory ran out: give the job more memory (--mem)"
    assert diagnose().advice.startswith(f"the kernel may have killed it because {give_more}")
    assert not diagnose(kill_reason="the run is stopping").advice
    assert not diagnose(code=-11).advice
    assert diagnose("MemoryError\n", 1).advice.startswith("it ran out of memory: give the job more memory (--mem)")
    counts = iter((4, 5))
    monkeypatch.setattr(exits, "oom_kills", lambda: next(counts))
    assert diagnose().advice.startswith(f"the kernel killed it because {give_more}")


def test_the_kernels_count(tmp_path):
    assert oom_kills(tmp_path) == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert oom_kills(tmp_path) == 2, "cgroup version 1"
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 7\noom_group_kill 0\n")
    assert oom_kills(tmp_path) == 7
    assert oom_kills() >= 0


def test_a_refusal_before_the_first_answer_is_no_configuration_error(tmp_path, logged):
    refused = RestartRefused(EngineUnavailable("no memory\nadvice"))
    policy = RestartPolicy("the engine", tmp_path / "log")
    policy.record(EngineExited("it died", "died"), any_answers=False, was_up=True)
    for pause in (15, 30, 60):
        policy.record(refused, any_answers=False, was_up=False)
        assert policy.pause == pause
        assert logged[-1] == f"the engine refuses to restart: no memory; restarting it in {pause} s"
    with pytest.raises(EngineLost, match=r"5 times .* no memory\nadvice"):
        policy.record(refused, any_answers=False, was_up=False)
    assert logged[:2] == [
        "the engine died with 0 rows in flight; restarting it",
        f"see {tmp_path}/log for its last output",
    ]

"""How many threads are chosen on which machine, and what is said about settings that do not fit it."""

import pytest
import torch

from minirksc import LLM
from minirksc.cli.generate import SPIN_COUNT, let_threads_sleep
from minirksc.engine.host import Cpus
from minirksc.engine.threads import choose_threads
from minirksc.errors import CheckpointError


def machine(num_cores, ways=1, allowed=None, quota=None):
    """Numbered as Linux does: CPU c and c + num_cores are on one core."""
    cores = {cpu: frozenset(range(cpu % num_cores, num_cores * ways, num_cores)) for cpu in range(num_cores * ways)}
    return Cpus(frozenset(cores if allowed is None else allowed), cores, quota)


def chosen(cpus, current=1024, **environ):
    plan = choose_threads(None, current, cpus, environ)
    assert plan.warnings == ()
    return plan.threads


@pytest.mark.parametrize(
    ("cpus", "threads"),
    [
        (machine(4), 4), (machine(4, ways=2), 4), (machine(1), 1), (machine(1, ways=2), 1),
        (machine(4, ways=2, allowed={0, 4}), 1), (machine(4, ways=2, allowed={0, 1, 4}), 2),
        (machine(4, ways=2, allowed={5, 6, 7}), 3), (machine(64, allowed={3}), 1),
        (machine(8, quota=2.0), 2), (machine(8, quota=2.5), 3), (machine(8, quota=0.2), 1), (machine(2, quota=9.0), 2),
        (machine(4, ways=2, allowed={0, 1, 4, 5}, quota=3.0), 2),
        (Cpus(frozenset({0, 1, 2})), 3), (Cpus(frozenset()), 1),  # nothing is known about cores, or at all
    ],
)  # fmt: skip
def test_one_thread_a_physical_core_that_may_be_used(cpus, threads):
    assert chosen(cpus) == threads


def test_fewer_where_torch_was_told_so():
    cpus = machine(4, ways=2)
    assert chosen(cpus, current=1) == 1
    assert chosen(cpus, current=3, OMP_NUM_THREADS="3") == 3
    assert chosen(cpus, current=2, OMP_NUM_THREADS="8") == 2  # set in the program, after OpenMP had read its variable


def test_two_a_core_where_openmp_was_told_so():
    cpus = machine(4, ways=2)
    assert chosen(cpus, current=4, OMP_NUM_THREADS="8") == 8
    assert chosen(cpus, current=8, OMP_NUM_THREADS="6,2") == 6
    assert chosen(cpus, current=8, OMP_NUM_THREADS="many") == chosen(cpus, current=8, OMP_NUM_THREADS="0") == 4


def test_what_is_asked_for_is_done_and_too_much_of_it_is_said():
    cpus = machine(2, ways=2, quota=3.0)
    for asked in (1, 2, 3):
        assert choose_threads(asked, 1, cpus, {}) == choose_threads(asked, 64, cpus, {"OMP_NUM_THREADS": "64"})
        assert choose_threads(asked, 1, cpus, {}).threads == asked and not choose_threads(asked, 1, cpus, {}).warnings
    plan = choose_threads(4, 1, cpus, {})
    (warning,) = plan.warnings
    assert plan.threads == 4 and "threads 4" in warning and "3 CPUs" in warning and "threads=2" in warning


def test_an_openmp_that_was_told_too_many_is_named():
    plan = choose_threads(None, 8, machine(2), {"OMP_NUM_THREADS": "8"})
    (warning,) = plan.warnings
    assert plan.threads == 2 and "OMP_NUM_THREADS=8" in warning and "2 CPUs" in warning and "unset it" in warning


@pytest.mark.parametrize(
    ("variable", "value", "limit"),
    [
        ("OMP_THREAD_LIMIT", "2", 2), ("OMP_PROC_BIND", "master", 1), ("OMP_PROC_BIND", "PRIMARY,close", 1),
        ("GOMP_CPU_AFFINITY", "0", 1), ("GOMP_CPU_AFFINITY", "0 3 5", 3), ("GOMP_CPU_AFFINITY", "0-3:2", 2),
        ("KMP_AFFINITY", "granularity=fine,proclist=[0,1],explicit", 2), ("OMP_PLACES", "{0},{2}", 2),
    ],
)  # fmt: skip
def test_settings_that_hold_openmp_back_are_named(variable, value, limit):
    cpus = machine(4)
    plan = choose_threads(None, 4, cpus, {variable: value})
    (warning,) = plan.warnings
    assert plan.threads == limit and f"{variable}={value}" in warning and "4 to use" in warning
    assert "unset it" in warning and f"threads={limit}" in warning
    plan = choose_threads(4, 4, cpus, {variable: value})
    assert plan.threads == 4 and plan.warnings == (warning,)
    assert choose_threads(limit, 4, cpus, {variable: value}).warnings == ()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OMP_THREAD_LIMIT", "4"), ("OMP_THREAD_LIMIT", ""), ("OMP_PROC_BIND", "true"), ("OMP_PROC_BIND", "close"),
        ("OMP_PLACES", "cores"), ("OMP_PLACES", "{0:4}"), ("OMP_PLACES", "{0}:4"), ("GOMP_CPU_AFFINITY", "0-3"),
        ("KMP_AFFINITY", "compact"), ("GOMP_CPU_AFFINITY", "no list"), ("GOMP_CPU_AFFINITY", "0-99999999999"),
    ],
)  # fmt: skip
def test_settings_that_hold_nothing_back_are_left_alone(variable, value):
    assert chosen(machine(4), current=4, **{variable: value}) == 4


def test_a_thread_that_openmp_has_bound_does_not_count_for_the_process():
    bound = machine(4, ways=2, allowed={0})
    assert chosen(bound, current=4, OMP_PROC_BIND="true") == chosen(bound, current=4, OMP_PLACES="cores") == 4
    assert chosen(bound, current=2, OMP_PROC_BIND="true") == 2  # OpenMP has counted before it bound
    for binding in ("false", ""):
        assert chosen(bound, current=4, OMP_PROC_BIND=binding) == 1


@pytest.fixture()
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cpus", "threads"), [(machine(1), 1), (machine(2), 2), (machine(8), 2)])
def test_an_engine_computes_with_them_and_leaves_torch_as_it_was(two_threads, monkeypatch, tiny_llama, cpus, threads):
    monkeypatch.setattr("minirksc.llm.read_cpus", lambda: cpus)
    with LLM(tiny_llama(), kv_cache_bytes="1MiB") as llm:
        assert torch.get_num_threads() == llm.stats()["threads"] == threads
    assert torch.get_num_threads() == 2


def test_an_engine_that_cannot_be_made_leaves_torch_as_it_was(two_threads, monkeypatch, tmp_path):
    monkeypatch.setattr("minirksc.llm.read_cpus", lambda: machine(1))
    for options in ({}, {"threads": 1}):
        with pytest.raises(CheckpointError):
            LLM(tmp_path, **options)
        assert torch.get_num_threads() == 2


def test_what_an_engine_is_told_too_much_of_is_a_warning_at_the_callers_line(two_threads, monkeypatch, tiny_llama):
    monkeypatch.setattr("minirksc.llm.read_cpus", lambda: machine(2))
    with pytest.warns(UserWarning, match="threads 3 is more than the 2 CPUs") as caught:
        llm = LLM(tiny_llama(), kv_cache_bytes="1MiB", threads=3)
    assert caught[0].filename == __file__ and torch.get_num_threads() == 3
    llm.close()
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    with pytest.warns(UserWarning, match="OMP_THREAD_LIMIT=1"), LLM(tiny_llama(), kv_cache_bytes="1MiB"):
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("told", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "2"}])
def test_the_command_line_lets_waiting_threads_sleep_unless_told_how_they_should_wait(told):
    environ = dict(told)
    let_threads_sleep(environ)
    is_told = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & told.keys()
    assert environ == (told if is_told else {**told, "GOMP_SPINCOUNT": SPIN_COUNT})

"""Signals in the main process, and processes that end with their parent."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from nst_det.cli.command import COMMANDS, Command
from nst_det.engine.signals import EXIT_RESUME, Preempted, preemptible, whole_steps


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_between_loops_a_signal_ends_at_once(signum):
    before = handlers()
    with pytest.raises(Preempted, match=signum.name), preemptible():  # noqa: PT012
        os.kill(os.getpid(), signum)
        pytest.fail("not ended")
    assert handlers() == before


def test_in_a_loop_the_first_is_kept_and_the_second_ends_at_once():
    before, done = handlers(), []
    with pytest.raises(Preempted), whole_steps() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(stop.signum)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("not reached")
    assert done == [signal.SIGTERM]
    assert handlers() == before


def test_a_signal_in_the_last_step_counts():
    with pytest.raises(Preempted), preemptible(), whole_steps():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_loader_that_the_signal_ended_is_no_fault_of_the_program():
    with pytest.raises(Preempted), whole_steps():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
    with pytest.raises(RuntimeError, match="real"), whole_steps():
        raise RuntimeError("real")


def test_a_thread_sets_no_handlers():
    before, found = handlers(), []

    def work():
        with preemptible(), whole_steps() as stop:
            found.append((handlers() == before, stop.signum))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, 0)]


def test_a_command_that_was_stopped_exits_with_75(cli, monkeypatch, capsys):
    def run(args):
        """Train."""
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(COMMANDS, "some-name", Command(run, (), "", True))
    assert cli("some-name") == EXIT_RESUME == os.EX_TEMPFAIL
    line = capsys.readouterr().err
    assert line.startswith("nst-det: stopped by SIGTERM; ")
    assert line.count("\n") == 1


PARENT = """
import os, subprocess, sys
child = "import os, sys, time; from nst_det.engine.signals import end_with_parent; "
child += "end_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-c", child, str(os.getpid())])
"""


def test_a_child_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.status() != psutil.STATUS_ZOMBIE
    parent.kill()
    parent.wait()
    latest = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < latest, "the child is still there"
        time.sleep(0.05)


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    code = "from nst_det.engine.signals import end_with_parent; end_with_parent(1); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (1, "")

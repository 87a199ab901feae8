import os
import signal
import threading

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
        pytest.fail("went on")
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


def test_the_command_says_that_it_can_go_on(cli, monkeypatch, capsys):
    def run(args):
        """Train."""
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(COMMANDS, "some-name", Command(run, (), "", True))
    assert cli("some-name") == EXIT_RESUME == os.EX_TEMPFAIL
    assert capsys.readouterr().err == (
        "nst-det: stopped by SIGTERM; what is done is saved, the same command goes on from here\n"
    )

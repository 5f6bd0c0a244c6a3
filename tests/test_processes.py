"""What processes tell each other, tried with one, two and three of them on gloo."""

import pickle
import signal

import pytest
import torch
from spmd import in_processes

from comfy_dancegrpo import processes
from comfy_dancegrpo.errors import Interrupted, RunError, WorkflowError
from comfy_dancegrpo.trainer.console import StoppedAtOnce
from comfy_dancegrpo.workflow.host import Host, use


def collectives():
    rank, count = processes.rank(), processes.count()
    mine = processes.share(list(range(7)))
    rows = torch.tensor([[place, place * 10.0] for place in mine]).view(len(mine), 2) if mine else torch.zeros(0)
    few = processes.share([0, 1])  # the third of three has none
    tensors = [torch.full((3,), rank + 1.0), torch.full((2, 2), 10.0 * (rank + 1)), torch.full((5,), rank + 1.0, dtype=torch.float64)]
    processes.sum_over_all(tensors)
    return {
        "count": count, "rank": rank, "mine": mine, "broadcast": processes.broadcast({"of": rank}), "all": processes.all_of(rank),
        "gathered": processes.gathered(rows, torch.tensor(mine), 7),
        "few": processes.gathered(torch.tensor([float(p) for p in few]), torch.tensor(few, dtype=torch.int64), 2),
        "to_first": processes.gathered(rows, torch.tensor(mine), 7, everywhere=False),
        "sums": tensors, "first": processes.on_first(lambda: rank), "untold": processes.on_first(lambda: "mine", told=False),
        "errors": [caught(kind) for kind in ("run", "workflow", "other", "key", "odd")],
        "stopped": stopped(3), "not stopped": stopped(9),
        "twice": refused(rows, mine if rank < count - 1 else processes.share(list(range(7)))[:-1] + [0]),
    }


def stopped(at):
    """At which of five calls this process stopped; the last is told to at one of them."""
    made = []

    class Told(Host):
        def check_interrupt(self):  # of one process; of several, check_together calls it
            made.append(None)
            if len(made) == at and processes.rank() == processes.count() - 1:
                raise Interrupted("stopped")

    with use(Told({})):
        try:
            for call in range(1, 6):
                processes.check_interrupt()
        except Interrupted:
            return call


class Odd(RunError):
    """Made of another argument than it keeps."""

    def __init__(self, trouble):
        super().__init__(trouble["said"])


def refused(rows, places):
    """What is said where one place is held by none."""
    try:
        processes.gathered(rows, torch.tensor(places, dtype=torch.int64), 7)
    except RunError as error:
        return str(error)


def caught(kind):
    def fail():
        raise {"run": RunError("no reward").at('node 3 "Score"'), "workflow": WorkflowError("one", "two"), "other": ValueError("a\nb"),
               "key": KeyboardInterrupt(), "odd": Odd({"said": "no answer"})}[kind]

    try:
        processes.on_first(fail)
    except BaseException as error:
        return type(error).__name__, str(error), getattr(error, "problems", None)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_collectives(count, tmp_path):
    every = in_processes(count, collectives, tmp_path)
    assert [found["rank"] for found in every] == list(range(count)) and {found["count"] for found in every} == {count}
    assert sorted(sum((found["mine"] for found in every), [])) == list(range(7))
    for found in every:
        assert found["broadcast"] == {"of": 0} and found["all"] == list(range(count)) and found["first"] == 0
        assert torch.equal(found["gathered"], torch.tensor([[p, p * 10.0] for p in range(7)]))
        assert torch.equal(found["few"], torch.tensor([0.0, 1.0]))
        to_first = found["to_first"]
        assert torch.equal(to_first, found["gathered"]) if found["rank"] == 0 else to_first is None
        total = sum(range(1, count + 1))
        assert [t.unique().tolist() for t in found["sums"]] == [[total], [10 * total], [total]]
        assert [t.shape for t in found["sums"]] == [(3,), (2, 2), (5,)] and found["sums"][2].dtype == torch.float64
        assert found["untold"] == ("mine" if found["rank"] == 0 else None)
        run, workflow, other, key, odd = found["errors"]
        assert run == ("RunError", 'node 3 "Score": no reward', None) and workflow == ("WorkflowError", "one\ntwo", ["one", "two"])
        assert other == (("ValueError", "a\nb", None) if found["rank"] == 0 else ("RunError", "ValueError: a b", None))
        assert key[0] == "KeyboardInterrupt"
        assert found["stopped"] == 3 and found["not stopped"] is None
        assert odd == ("Odd" if found["rank"] == 0 else "RunError", "no answer", None)
        if count > 1:  # one alone takes its rows for what it says they are
            assert found["twice"] == "of 7 samples the processes hold 7, 6 different ones; accepted: each in one of them"


def test_what_stops_the_program_can_be_told_to_other_processes():
    told = pickle.loads(pickle.dumps(StoppedAtOnce(signal.SIGTERM)))
    assert isinstance(told, StoppedAtOnce) and told.exit_status == 143

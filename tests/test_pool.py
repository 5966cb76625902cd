"""The pool of ranks itself: results in order, failures that name the rank, nothing left behind."""

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator

import parallel_work as work
import pytest

from storm_ref.parallel.mesh import Mesh
from storm_ref.parallel.pool import Pool, RankError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Three ranks with a short timeout: only a rank that hangs makes others wait so long."""
    with Pool(3, timeout=20.0) as three:
        yield three


def pids(pool: Pool) -> list[int]:
    return [pid for *_, pid in pool.run(work.rank_and_size, 1)]


def gone(processes: list[int]) -> bool:
    """Return True when none of these processes exists, not even as a zombie."""
    return not any(os.path.exists(f"/proc/{pid}") for pid in processes)


def test_run_in_order_of_ranks(pool: Pool) -> None:
    """Arguments arrive, values come rank by rank, and the ranks of two runs are the same processes."""
    first, second = pool.run(work.rank_and_size, 1), pool.run(work.rank_and_size, 2)
    assert [(rank, size) for rank, size, _ in first] == [(0, 3), (1, 3), (2, 3)]
    assert [2 * pid for *_, pid in first] == [pid for *_, pid in second]
    assert len({pid for *_, pid in first}) == 3 and os.getpid() not in pids(pool)


@pytest.mark.parametrize(
    ("kind", "rank", "how", "text"),
    [
        ("raise", 2, "raised", "ValueError: this rank has had enough"),
        ("raise", 0, "raised", "ValueError: this rank has had enough"),
        ("die", 1, "died", "killed by SIGKILL"),
        ("die", 0, "died", "killed by SIGKILL"),
        ("exit", 1, "died", "ended with exit code 3"),
        ("unpicklable", 1, "raised", "Unpicklable: "),
        ("value", 1, "raised", "function"),
    ],
)
def test_run_names_the_rank_that_failed(pool: Pool, kind: str, rank: int, how: str, text: str) -> None:
    """And not one that waited for it; the world is gone, all of it, and the next one works."""
    before = pids(pool)
    with pytest.raises(RankError, match=f"rank {rank} {how}") as caught:
        pool.run(work.fails, kind, rank)
    assert (caught.value.rank, caught.value.kind) == (rank, how)
    assert text in caught.value.text
    assert gone(before)
    assert pool.run(work.fails, "no", 0) == [3, 3, 3]


def test_run_names_the_rank_that_hangs(pool: Pool) -> None:
    """Others wait for it until their patience ends: that tells who hangs."""
    before = pids(pool)
    with pytest.raises(RankError, match=r"rank 1 hung: no answer; rank [02] waited for it: ") as caught:
        pool.run(work.fails, "hang", 1)
    assert (caught.value.rank, caught.value.kind) == (1, "hung")
    assert gone(before)
    assert pool.run(work.fails, "no", 0) == [3, 3, 3]


def test_run_names_the_rank_that_hangs_in_a_subgroup() -> None:
    """[PAR-19] The timeout also limits collectives of one axis of a mesh, not only those of all ranks."""
    with Pool(4, timeout=10.0) as four:
        with pytest.raises(RankError, match=r"rank 1 hung: no answer; rank 0 waited for it: "):
            four.run(work.hangs_on_axis, Mesh(tile=2, tp=2), "tp", 1)
        assert four.run(work.fails, "no", 0) == [4, 4, 4, 4]


def test_run_ends_at_the_deadline(pool: Pool) -> None:
    """Before any patience ends all are silent, and nobody knows more than that."""
    before = pids(pool)
    with pytest.raises(RankError, match=r"hung: no answer within 0\.5 s"):
        pool.run(work.fails, "hang", 1, deadline=0.5)
    assert gone(before)
    assert pool.run(work.fails, "no", 0) == [3, 3, 3]


def test_run_ends_when_shapes_disagree(pool: Pool) -> None:
    """gloo may give some rank the wrong bytes before it notices: somebody says so, long before the deadline."""
    before, began = pids(pool), time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(work.fails, "shapes", 1, deadline=1200.0)
    assert caught.value.rank in (0, 1, 2)
    assert time.monotonic() - began < 600  # not the deadline
    assert gone(before)
    assert pool.run(work.fails, "no", 0) == [3, 3, 3]


def test_run_after_a_rank_was_killed(pool: Pool) -> None:
    """Between two runs: the next one says which."""
    before = pids(pool)
    victim = pool._live[2].process
    victim.kill()
    victim.join()
    with pytest.raises(RankError, match="rank 2 died: killed by SIGKILL"):
        pool.run(work.rank_and_size, 1)
    assert gone(before)
    assert pool.run(work.fails, "no", 0) == [3, 3, 3]


def test_run_invalid_work_leaves_the_world_alone(pool: Pool) -> None:
    """Work that cannot be sent is refused before any rank hears of it."""
    before = pids(pool)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match=r"pickle|local object"):
        pool.run(lambda: 0)
    assert pids(pool) == before


def test_close_twice() -> None:
    """After which nothing is left; a pool that is used again starts again."""
    pool = Pool(2)
    pool.close()
    assert pool.run(work.fails, "no", 0) == [2, 2]
    before, folder = pids(pool), pool._folder.name
    pool.close()
    pool.close()
    assert gone(before) and not os.path.exists(folder)
    assert not [p for p in multiprocessing.active_children() if p.pid in before]
    with pool:
        assert pool.run(work.fails, "no", 0) == [2, 2]
        again = pids(pool)
    assert gone(again)


def test_pools_side_by_side(pools: Callable[..., Pool], pool: Pool) -> None:
    """Two worlds know nothing of each other."""
    assert pools(2).run(work.fails, "no", 0) == [2, 2]
    assert pool.run(work.fails, "no", 0) == [3, 3, 3]


def test_start_by_fork_runs_what_this_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches included."""
    monkeypatch.setattr(work, "rank_and_size", _patched)
    with Pool(2, method="fork") as forked:
        assert forked.run(work.gelu_of, 0.0) == [0.0, 0.0]
        assert forked.run(_calls, 4) == [4, 4]


def _patched(value: int) -> int:
    return value


def _calls(value: int) -> int:
    return int(work.rank_and_size(value))  # type: ignore[call-overload]


def test_world_invalid_size(pool: Pool) -> None:
    """[PAR-4]: in words, with the remedy, on every rank."""
    said = pool.run(work.wrong_world, Mesh(tile=2))
    assert len(set(said)) == 1
    assert "the mesh ddp=1,fsdp=1,tile=2,tp=1 has 2 ranks, but 3 were started: change the mesh, or start" in said[0]
    assert "--nproc-per-node 2" in said[0]


def test_rank_error_survives_pickling() -> None:
    """It may have to go through a pipe itself."""
    error = pickle.loads(pickle.dumps(RankError(3, "died", "killed by SIGKILL")))
    assert (error.rank, error.kind, error.text) == (3, "died", "killed by SIGKILL")
    assert str(error) == "rank 3 died: killed by SIGKILL"

"""Fixtures of every test: checked shapes, one thread, and repeatable examples."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

# Before torch and numpy start their thread pools: one and two threads differ in the last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping

# Before storm_ref is imported, else its signatures stay unchecked. The handle is left open: it lasts the session.
jaxtyping.install_import_hook("storm_ref", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from storm_ref.parallel.pool import Pool  # noqa: E402

torch.set_num_threads(1)

# No deadline: a busy machine is not a failure. Derandomised: the same examples in every run.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ci")


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator with a fixed seed for each test."""
    return torch.Generator().manual_seed(20260417)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Signatures unchecked, as users run the code: for shapes that a function itself must refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def preload() -> None:
    """Import the work of ranks once, in the process that all of them are forked from, unless it is there already."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    modules = ["parallel_work", "torch.distributed.fsdp", "torch._dynamo", "storm_ref.workbench.run.training"]
    multiprocessing.set_forkserver_preload(modules)
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[..., Pool]]:
    """Worlds of so many ranks, each started when it is first asked for and kept warm for the tests of a module. Not
    longer: every process group of gloo has a thread that wakes a hundred times a second.
    """
    made: dict[tuple[int, str], Pool] = {}
    preload()

    def pool(ranks: int, device: str = "cpu") -> Pool:
        return made.setdefault((ranks, device), Pool(ranks, timeout=600.0, device=device))

    yield pool
    for each in made.values():
        each.close()

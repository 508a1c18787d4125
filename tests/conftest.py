"""Hostile settings for all tests: eight fake CPU devices, warnings as errors (pyproject.toml), and no network."""

import logging
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny models spend their time in the compiler: half of it is saved without LLVM's expensive passes
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax
import pytest
from absl import flags

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.devices()  # from here on no command that a test calls in this process changes their number
CACHE = jax.config.jax_compilation_cache_dir
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which only a command's entry point parses


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="tests/faults: break things as often as docs/reliability.md says, not just a few times")


def forget_commands() -> None:
    """Undoes what commands set for their whole process: where messages go (one test's standard error), warnings as messages, the compiler's cache."""
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(False)
    jax.config.update("jax_compilation_cache_dir", CACHE)


@pytest.fixture(autouse=True)
def commands_end():
    """A command that a test or one of its fixtures calls in this process changes nothing for the next test."""
    yield
    forget_commands()


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether tests that repeat something at random shall repeat it many times (minutes to an hour)."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real videos and images that is not part of the project: VIDJOINT_SHARED_DATA, or ../shared/data beside the clone."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VIDJOINT_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"needs real videos: {folder} does not exist (set VIDJOINT_SHARED_DATA)")
    return folder

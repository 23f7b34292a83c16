"""FLOPs, memory, interleaved timing, paired ratios and peak memory. No duration is asserted."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.evaluation import cost

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("rows", "inner", "columns"), [(64, 32, 48), (8, 128, 16)])
def test_flops_of_a_product(rows, inner, columns):
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, inner), (inner, columns))]
    assert cost.flops(jnp.matmul, *abstract) == 2 * rows * inner * columns
    concrete = [jnp.ones(leaf.shape) for leaf in abstract]
    assert cost.flops(jnp.matmul, *concrete) == 2 * rows * inner * columns
    twice = cost.flops(lambda a, b: (a @ b, (a + 1.0) @ b), *abstract)
    assert twice >= 4 * rows * inner * columns


def test_flops_take_pytrees():
    params = {"w": jax.ShapeDtypeStruct((5, 7), jnp.float32)}
    assert cost.flops(lambda p, x: x @ p["w"], params, jax.ShapeDtypeStruct((3, 5), jnp.float32)) == 2 * 3 * 5 * 7


def test_memory_of_a_product():
    found = cost.memory(lambda a, b: jnp.tanh(a @ b) @ b, jnp.ones((256, 64)), jnp.ones((64, 64)))
    assert found["argument"] == 4 * (256 * 64 + 64 * 64)
    assert found["output"] == 4 * 256 * 64
    assert found["temporary"] >= 4 * 256 * 64  # what lies between the two products
    assert cost.memory(lambda a: a, jnp.ones(3))["temporary"] == 0


def test_interleaved_rotates_the_order_and_waits():
    calls = []

    class Result:
        def __init__(self, name):
            self.name = name

        def block_until_ready(self):
            calls.append(f"wait {self.name}")
            return self

    def side(name):
        def run():
            calls.append(name)
            return {"out": Result(name)}

        return run

    times = cost.interleaved({name: side(name) for name in "abc"}, rounds=4, warmup=2)
    order = [call for call in calls if not call.startswith("wait")]
    assert "".join(order) == "abcabc" + "abc" + "bca" + "cab" + "abc"
    assert [f"wait {name}" for name in order] == calls[1::2]  # each waits before the next begins
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(value >= 0 for values in times.values() for value in values)


def test_warmup_is_not_timed():
    count = {"calls": 0}

    def run():
        count["calls"] += 1
        return count["calls"]

    assert len(cost.interleaved({"only": run}, rounds=3, warmup=0)["only"]) == count["calls"] == 3
    assert len(cost.interleaved({"only": run}, rounds=1, warmup=5)["only"]) == 1
    assert count["calls"] == 9


def test_ratios_are_paired_by_round():
    """The machine slows down tenfold in the second half: the ratio of medians would be off, the paired ratio is not."""
    drift = np.array([1.0, 1.0, 1.0, 10.0, 10.0])
    times = {"base": [*drift], "other": [*(drift * np.array([1.4, 1.5, 1.6, 1.5, 9.0]))]}
    assert cost.ratios(times, "base") == pytest.approx({"base": 1.0, "other": 1.5})
    assert cost.ratios(times, "other")["base"] == pytest.approx(1 / 1.5)
    with pytest.raises(ValueError, match="zip"):
        cost.ratios({"base": [1.0], "other": [1.0, 2.0]}, "base")


def test_peak_memory_is_in_bytes_and_keeps_the_peak():
    """In a fresh process: 256 MB of ones raise the peak by that much, and freeing them does not lower it."""
    program = (
        "import numpy as np; from drep_jax.evaluation.cost import peak_memory; before = peak_memory(); "
        "x = np.ones(32_000_000); "
        "held = peak_memory(); del x; print(before, held, peak_memory())"
    )
    size = 32_000_000 * 8
    ballast = np.ones(2 * size // 8)  # a child must not take over the peak of the process that started it
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    before, held, after = map(int, out.split())
    assert 0.9 * size < held - before < 1.2 * size
    assert after > 0.99 * held  # the kernel counts pages in batches
    if sys.platform == "linux":
        assert before < ballast.nbytes

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from flax_pref.models.attention import attention
from flax_pref.parallel.mesh import make_mesh
from flax_pref.planning.hlo import Cost, Instruction, Module
from flax_pref.planning.kernels import kernel_cost, known
from flax_pref.planning.plan import planned_seconds
from flax_pref.planning.topologies import CHIPS, Topology, topology
from flax_pref.verification import checks

V5E = Topology("v5e:2x2", [], CHIPS["v5e"], 197e12)
BATCH, LENGTH, HEADS, SIZE = 4, 1024, 2, 40


def test_a_kernel_that_tells_its_cost_is_believed():
    told = '"cost_estimate":{"flops":"197000","transcendentals":"0","bytes_accessed":"10"}'
    one = Instruction("mine.1", "custom-call", (), (), f'custom_call_target="tpu_custom_call", {told}')
    # 197e12 FLOP/s at 1.5 GHz.
    assert kernel_cost(one, [], V5E) == Cost(1.5, 197000, 197000, bytes=10, touched=10)
    assert known(one)


def test_a_kernel_that_nobody_knows_is_told():
    one = Instruction("mine.1", "custom-call", (), (), 'custom_call_target="tpu_custom_call"')
    assert not known(one) and kernel_cost(one, [], V5E) == Cost()


@pytest.fixture(scope="module")
def mesh():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: make plan-check")
    cached = jax.config.jax_enable_compilation_cache
    yield make_mesh("data=4", topology("v5e:2x2").devices)
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()


def read(mesh, kernel):
    """Attention and its gradients, compiled for a TPU."""
    shape = jax.ShapeDtypeStruct(
        (BATCH, LENGTH, HEADS, SIZE), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )

    def run(q, k, v, g):
        out, back = jax.vjp(lambda *qkv: attention(*qkv, kernel=kernel), q, k, v)
        return out, back(g)

    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(shape, shape, shape, shape).compile()
    return compiled, list(Module(compiled.as_text()).executed(lambda one, given: kernel_cost(one, given, V5E)))


@pytest.mark.plan
def test_kernels_of_attention_count_what_its_xla_form_does_and_what_they_compute_again(mesh):
    compiled, xla = read(mesh, "xla")
    _, flash = read(mesh, "flash")
    counted, in_kernels = (sum(one.cost.flops for one in executed) for executed in (xla, flash))
    product = 2 * BATCH // 4 * HEADS * LENGTH**2 * SIZE
    assert counted == 6 * product, "two forward, four backward"
    softmax = compiled.cost_analysis()["flops"] - counted
    assert 0 <= softmax < 0.3 * counted, "XLA's own count has the softmax, too"
    assert in_kernels - counted == product, "scores twice"
    assert not [one for one in flash if not known(one.instruction)]


@pytest.mark.plan
def test_kernels_take_the_time_of_the_padded_heads(mesh):
    _, flash = read(mesh, "flash")
    cycles = sum(one.cost.cycles for one in flash if one.instruction.opcode == "custom-call")
    product = 2 * BATCH // 4 * HEADS * LENGTH**2 * 128
    assert cycles >= 7 * product / V5E.peak * V5E.chip.clock


@pytest.mark.plan
def test_a_kernel_that_a_machine_is_verified_with_compiles_for_a_tpu_and_is_planned(mesh):
    alone = NamedSharding(mesh, PartitionSpec())
    length, keys, size = max(checks.ATTENTION)
    q, k = (jax.ShapeDtypeStruct((2, n, 2, size), jnp.bfloat16, sharding=alone) for n in (length, keys))
    with jax.set_mesh(mesh):
        compiled = checks.with_gradients(attention).lower(q, k, k).compile()
    least = 12 * 2 * 2 * length * keys * size / V5E.peak  # two products forward, four backward
    assert least < planned_seconds(compiled.as_text(), V5E) < 20 * least

import json
import os
import subprocess
import sys

import jax
import pytest
import tiny_step
from collectives import collectives

from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh

TEXT = """
  %all-reduce.1 = (f32[2,4]{1,0}, /*index=1*/bf16[8]{0:T(8,128)}) all-reduce(%a, %b), replica_groups={{0,1}}
  ROOT %all-reduce.2 = f32[] all-reduce(%all-reduce.1), to_apply=%sum
  %all-gather-start = (f32[2]{0}, f32[16]{0}) all-gather-start(%c), dimensions={0}
  %all-gather-done = f32[16]{0} all-gather-done(%all-gather-start)
  %fusion.1 = f32[99]{0} fusion(%all-gather-done), metadata={op_name="all-gather"}
  %permute = pred[5]{0} collective-permute(%fusion.1), source_target_pairs={{0,1}}
"""


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    assert collectives(TEXT) == {"all-gather": (1, 64), "all-reduce": (2, 52), "collective-permute": (1, 5)}
    assert collectives("") == {}


# ----------------------------------------------------------------------------------------------------------------------
# Steps compiled for many devices


DEVICES = (8, 64, 256)
CASES = {"lora": ("data=-1",), "full": ("data=-1", "data=-1,fsdp=4")}


def compiled() -> dict:
    """What devices send each other, by what is trained, mesh and number of devices, as JSON knows it."""
    jax.config.update("jax_disable_most_optimizations", True)  # the compiler takes a third of the time
    found: dict = {}
    for what, texts in CASES.items():
        step = tiny_step.Step(lora=what == "lora")
        found[what] = {"bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(step.trained))}
        for text in texts:
            meshes = [make_mesh(text, jax.devices()[:n], TRAINING_AXES) for n in DEVICES]
            # Three pairs: on CPUs networks convolve batches of fewer positions in another way, which would differ here.
            found[what][text] = [collectives(step.compile(mesh, 3 * mesh.size).as_text()) for mesh in meshes]
    return found


@pytest.fixture(scope="module")
def found():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(DEVICES)}"
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.program
@pytest.mark.parametrize("what", ["lora", "full"])
def test_devices_that_share_a_batch_send_each_other_gradients_and_metrics_and_nothing_else(found, what):
    gradients = found[what]["bytes"]
    for sent in found[what]["data=-1"]:
        print(sent)
        assert set(sent) == {"all-reduce"}
        assert gradients <= sent["all-reduce"][1] <= gradients + 4 * 4, "loss and metrics are four scalars"


@pytest.mark.program
@pytest.mark.parametrize(("what", "mesh"), [(what, mesh) for what, meshes in CASES.items() for mesh in meshes])
def test_what_a_device_sends_does_not_grow_with_the_replicas(found, what, mesh):
    first, *others = found[what][mesh]
    assert others == [first] * len(others)


if __name__ == "__main__":
    print(json.dumps(compiled()))

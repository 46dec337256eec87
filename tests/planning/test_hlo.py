import jax
import jax.numpy as jnp
import pytest
from jax import lax

from flax_pref.models.attention import REORDERED
from flax_pref.planning.hlo import Module
from flax_pref.planning.plan import CALL_CODE, code_bytes

SQUARE = jnp.ones((64, 64))
PRODUCT = 2 * 64**3  # FLOP


def module(function, *arguments):
    return Module(jax.jit(function).lower(*arguments).compile().as_text())


def flops(function, *arguments):
    return sum(one.cost.flops for one in module(function, *arguments).executed())


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x):
        return lax.scan(lambda x, _: (x @ SQUARE, None), x, None, length=7)[0]

    assert flops(loop, SQUARE) == 7 * PRODUCT


def test_a_loop_in_a_loop_counts_as_often_as_both_run():
    def inner(x, _):
        return lax.fori_loop(0, 5, lambda _, x: x @ SQUARE, x), None

    assert flops(lambda x: lax.scan(inner, x, None, length=3)[0] @ SQUARE, SQUARE) == 16 * PRODUCT


def test_a_product_that_only_reorders_takes_time_but_is_no_work():
    def reordered(x):
        with jax.named_scope(REORDERED):
            return x @ jnp.eye(64)

    (product,) = [one for one in module(lambda x: reordered(x + 1), SQUARE).executed() if one.cost.padded_flops]
    assert product.cost.flops == 0
    assert flops(lambda x: reordered(x @ SQUARE), SQUARE) == PRODUCT


def test_a_loop_of_unknown_length_is_told():
    def loop(x):
        return lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ SQUARE, x)

    read = module(loop, SQUARE)
    assert sum(one.cost.flops for one in read.executed()) == PRODUCT
    assert len(read.unknown_loops) == 1


def test_of_a_conditional_the_slower_branch_counts():
    def choose(x, which):
        return lax.cond(which, lambda x: x @ SQUARE @ SQUARE, lambda x: x @ SQUARE, x)

    assert flops(choose, SQUARE, True) == 2 * PRODUCT


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (2, 2)},
        {"padding": ((1, 1), (1, 1))},
        {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))},
        {"rhs_dilation": (2, 1)},
        {"feature_group_count": 4},
    ],
)
def test_convolutions_count_as_xla_counts_them(options):
    images = jnp.ones((2, 16, 12, 8))
    kernel = jnp.ones((3, 3, 8 // options.get("feature_group_count", 1), 24))

    def convolve(images, kernel):
        settings = {"window_strides": (1, 1), "padding": "VALID", **options}
        return lax.conv_general_dilated(images, kernel, **settings, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    compiled = jax.jit(convolve).lower(images, kernel).compile()
    counted = sum(one.cost.flops for one in Module(compiled.as_text()).executed())
    expected = jax.jit(convolve).lower(images, kernel).cost_analysis()["flops"]
    assert counted == pytest.approx(expected, rel=1e-6)


TEXT = """
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%fused (p.0: bf16[4,256,256], p.1: s32[]) -> bf16[1,256,256] {
  %p.0 = bf16[4,256,256]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %slice.1 = bf16[1,256,256]{2,1,0} dynamic-slice(%p.0, %p.1, %p.1, %p.1), dynamic_slice_sizes={1,256,256}
}

%body (loop: (s32[], bf16[4,256,256])) -> (s32[], bf16[4,256,256]) {
  %loop = (s32[], bf16[4,256,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %stack = bf16[4,256,256]{2,1,0} get-tuple-element(%loop), index=1
  %fusion.1 = bf16[1,256,256]{2,1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/mid_block/dynamic_slice"}, backend_config={"window_config":{"estimated_cycles":"700"}}
  %all-reduce.1 = bf16[1,256,256]{2,1,0} all-reduce(%fusion.1), to_apply=%sum
  ROOT %next = (s32[], bf16[4,256,256]{2,1,0}) tuple(%i, %stack)
}

%condition (loop.1: (s32[], bf16[4,256,256])) -> pred[] {
  %loop.1 = (s32[], bf16[4,256,256]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%loop.1), index=0
  %steps = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i.1, %steps), direction=LT
}

ENTRY %main (x: (s32[], bf16[4,256,256])) -> (s32[], bf16[4,256,256]) {
  %x = (s32[], bf16[4,256,256]{2,1,0}) parameter(0)
  ROOT %while.1 = (s32[], /*index=1*/bf16[4,256,256]{2,1,0}) while(%x), condition=%condition, body=%body
}
"""


FUSED_AGAIN = """%fused.2 (q.0: bf16[4,256,256], q.1: s32[]) -> bf16[1,256,256] {
  %q.0 = bf16[4,256,256]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  ROOT %slice.2 = bf16[1,256,256]{2,1,0} dynamic-slice(%q.0, %q.1, %q.1, %q.1), dynamic_slice_sizes={1,256,256}
}

"""


def test_cycles_traffic_and_collectives_of_a_loop_are_those_of_all_its_runs():
    cut, sent = Module(TEXT).executed()
    assert (cut.runs, cut.cost.cycles) == (4, 2800)
    # It reads a quarter of the stack (and its two indices) from main memory and writes it to the chip's own.
    assert cut.cost.bytes == 4 * (2 * 256 * 256 + 4)
    assert (sent.sends, sent.cost.sent) == ("all-reduce", 4 * 2 * 256 * 256)
    assert cut.instruction.op_name == "jit(step)/mid_block/dynamic_slice"


# As the compiler of TPUs writes down an all-gather that goes on beside a product, and a reduction of which each chip
# keeps its part.
ASYNCHRONOUS = """
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%begin (p.0: bf16[64,512]) -> (bf16[64,512], bf16[512,512], u32[]) {
  %p.0 = bf16[64,512]{1,0} parameter(0)
  %gather.0 = bf16[512,512]{1,0} all-gather(%p.0), channel_id=7, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %start = (bf16[64,512]{1,0}, bf16[512,512]{1,0}, u32[]) custom-call(%gather.0), \
custom_call_target="AsyncCollectiveStart"
}

%beside (q.0: bf16[64,512], q.1: bf16[512,512], q.2: u32[], q.3: bf16[128,128]) -> \
(bf16[128,128], bf16[64,512], bf16[512,512], u32[]) {
  %q.0 = bf16[64,512]{1,0} parameter(0)
  %q.1 = bf16[512,512]{1,0} parameter(1)
  %q.2 = u32[] parameter(2)
  %q.3 = bf16[128,128]{1,0} parameter(3)
  %gather.1 = bf16[512,512]{1,0} all-gather(%q.0), channel_id=7, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %product = bf16[128,128]{1,0} convolution(%q.3, %q.3), dim_labels=bf_io->bf
  ROOT %all = (bf16[128,128]{1,0}, bf16[64,512]{1,0}, bf16[512,512]{1,0}, u32[]) tuple(%product, %q.0, %gather.1, %q.2)
}

%end (r.0: bf16[64,512], r.1: bf16[512,512], r.2: u32[]) -> bf16[512,512] {
  %r.0 = bf16[64,512]{1,0} parameter(0)
  %r.1 = bf16[512,512]{1,0} parameter(1)
  %r.2 = u32[] parameter(2)
  %gather.2 = bf16[512,512]{1,0} all-gather(%r.0), channel_id=7, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %done = bf16[512,512]{1,0} custom-call(%r.0, %r.1, %gather.2, %r.2), custom_call_target="AsyncCollectiveDone"
}

%scatter (s.0: bf16[512,512], s.1: s32[]) -> bf16[64,512] {
  %s.0 = bf16[512,512]{1,0} parameter(0)
  %s.1 = s32[] parameter(1)
  %reduced = bf16[512,512]{1,0} all-reduce(%s.0), channel_id=9, to_apply=%sum
  ROOT %part = bf16[64,512]{1,0} dynamic-slice(%reduced, %s.1, %s.1), dynamic_slice_sizes={64,512}
}

ENTRY %main (x: bf16[64,512], y: bf16[128,128], i: s32[]) -> bf16[64,512] {
  %x = bf16[64,512]{1,0} parameter(0)
  %y = bf16[128,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %started = (bf16[64,512]{1,0}, bf16[512,512]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%begin
  %local = bf16[64,512]{1,0} get-tuple-element(%started), index=0
  %whole = bf16[512,512]{1,0} get-tuple-element(%started), index=1
  %flag = u32[] get-tuple-element(%started), index=2
  %worked = (bf16[128,128]{1,0}, bf16[64,512]{1,0}, bf16[512,512]{1,0}, u32[]) \
fusion(%local, %whole, %flag, %y), kind=kOutput, calls=%beside
  %local.1 = bf16[64,512]{1,0} get-tuple-element(%worked), index=1
  %whole.1 = bf16[512,512]{1,0} get-tuple-element(%worked), index=2
  %flag.1 = u32[] get-tuple-element(%worked), index=3
  %gathered = bf16[512,512]{1,0} fusion(%local.1, %whole.1, %flag.1), kind=kCustom, calls=%end
  ROOT %share = bf16[64,512]{1,0} fusion(%gathered, %i), kind=kCustom, calls=%scatter
}
"""


def test_a_collective_that_goes_on_beside_other_work_counts_once_and_that_work_does_not_touch_its_arrays():
    begun, worked, ended, _ = Module(ASYNCHRONOUS).executed()
    assert [one.sends for one in (begun, worked, ended)] == [None, None, "all-gather"]
    assert ended.cost.sent == 2 * 512 * 512
    assert begun.cost.touched == 0
    assert worked.cost.touched == 2 * 2 * 128 * 128  # the product reads one array and gives another
    assert worked.cost.flops == 2 * 128**3


def test_a_reduction_of_which_every_chip_keeps_a_part_is_a_reduce_scatter_of_the_whole():
    *_, scattered = Module(ASYNCHRONOUS).executed()
    assert (scattered.sends, scattered.cost.sent) == ("reduce-scatter", 2 * 512 * 512)


def test_instructions_that_differ_in_names_alone_need_one_code():
    again = "  %fusion.2 = bf16[1,256,256]{2,1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%fused.2\n"
    twice = TEXT.replace("  %all-reduce.1", again + "  %all-reduce.1").replace("%body (", FUSED_AGAIN + "%body (")
    first, second, other = Module(twice).executed()
    assert first.code == second.code != other.code
    assert code_bytes([first, second, other]) == code_bytes([first, other]) + CALL_CODE


def test_of_a_collective_in_two_instructions_the_one_that_waits_tells_what_was_sent():
    pair = """  %begun = (bf16[1,256,256]{2,1,0}, bf16[4,256,256]{2,1,0}) all-gather-start(%fusion.1), dimensions={0}
  %ended = bf16[4,256,256]{2,1,0} all-gather-done(%begun)
  ROOT %next"""
    *_, ended = Module(TEXT.replace("  ROOT %next", pair)).executed()
    assert (ended.sends, ended.cost.sent) == ("all-gather", 4 * 2 * 4 * 256 * 256)


def test_a_reduce_scatter_sends_what_it_takes():
    scatter = """  %scattered = bf16[1,64,256]{2,1,0} reduce-scatter(%fusion.1), dimensions={1}, to_apply=%sum
  ROOT %next"""
    *_, scattered = Module(TEXT.replace("  ROOT %next", scatter)).executed()
    assert (scattered.sends, scattered.cost.sent) == ("reduce-scatter", 4 * 2 * 256 * 256)

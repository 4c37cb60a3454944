"""What a Pallas kernel does, read from the body in its call: counted by hand."""

import base64
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from stem_jax.planning import hlo
from stem_jax.planning.kernel_body import KernelWork, kernel_work
from stem_jax.planning.topology import Topology

pytestmark = pytest.mark.optimized

# As libtpu holds it: a grid of 3 x 4; blocks of the left operand move with the first dimension
# alone, those of the right and of the result with both; the bias stays.
BODY = """
module {
  "stable_mosaic.func.func"() ({
  ^bb0(%i: i32, %j: i32, %l: memref<8x16xbf16, #tpu.memory_space<vmem>>,
       %r: memref<16x128xbf16, #tpu.memory_space<vmem>>,
       %b: memref<1x128xf32, #tpu.memory_space<vmem>>,
       %o: memref<8x128xf32, #tpu.memory_space<vmem>>):
    %z = "stable_mosaic.arith.constant"() {value = 0 : index} : () -> index
    %x = "stable_mosaic.vector.load"(%l, %z, %z) : (memref<8x16xbf16, #tpu.memory_space<vmem>>, index, index) -> vector<8x16xbf16>
    %y = "stable_mosaic.vector.load"(%r, %z, %z) : (memref<16x128xbf16, #tpu.memory_space<vmem>>, index, index) -> vector<16x128xbf16>
    %c = "stable_mosaic.arith.constant"() {value = dense<0.0> : vector<8x128xf32>} : () -> vector<8x128xf32>
    %m = "stable_mosaic.tpu.matmul"(%x, %y, %c) {PRECISION} : (vector<8x16xbf16>, vector<16x128xbf16>, vector<8x128xf32>) -> vector<8x128xf32>
    %n0 = "stable_mosaic.arith.constant"() {value = 0 : i32} : () -> i32
    %n5 = "stable_mosaic.arith.constant"() {value = 5 : i32} : () -> i32
    %n1 = "stable_mosaic.arith.constant"() {value = 1 : i32} : () -> i32
    %e = "stable_mosaic.scf.for"(%n0, %n5, %n1, %m) ({
    ^bb0(%k: i32, %a: vector<8x128xf32>):
      %s = "stable_mosaic.math.exp"(%a) : (vector<8x128xf32>) -> vector<8x128xf32>
      "stable_mosaic.scf.yield"(%s) : (vector<8x128xf32>) -> ()
    }) : (i32, i32, i32, vector<8x128xf32>) -> vector<8x128xf32>
    %t = "stable_mosaic.arith.addi"(%i, %j) : (i32, i32) -> i32
    %u = "stable_mosaic.vector.multi_reduction"(%e, %e) : (vector<8x128xf32>, vector<8x128xf32>) -> vector<8xf32>
    "stable_mosaic.tpu.vector_store"(%e, %o, %z, %z) : (vector<8x128xf32>, memref<8x128xf32, #tpu.memory_space<vmem>>, index, index) -> ()
    "stable_mosaic.func.return"() : () -> ()
  }) {iteration_bounds = array<i64: 3, 4>, scalar_prefetch = 0 : i64, sym_name = "main", window_params = [{transform_indices = @rows}, {transform_indices = @both}, {transform_indices = @none}, {transform_indices = @both}]} : () -> ()
  "stable_mosaic.func.func"() ({
  ^bb0(%i: i32, %j: i32):
    %z = "stable_mosaic.arith.constant"() {value = 0 : i32} : () -> i32
    "stable_mosaic.func.return"(%i, %z) : (i32, i32) -> ()
  }) {sym_name = "rows"} : () -> ()
  "stable_mosaic.func.func"() ({
  ^bb0(%i: i32, %j: i32):
    %s = "stable_mosaic.arith.addi"(%i, %j) : (i32, i32) -> i32
    "stable_mosaic.func.return"(%s, %s) : (i32, i32) -> ()
  }) {sym_name = "both"} : () -> ()
  "stable_mosaic.func.func"() ({
  ^bb0(%i: i32, %j: i32):
    %z = "stable_mosaic.arith.constant"() {value = 0 : i32} : () -> i32
    "stable_mosaic.func.return"(%z, %z) : (i32, i32) -> ()
  }) {sym_name = "none"} : () -> ()
}
"""  # noqa: E501


# Each step copies 8 rows of 128, and those with an even sum 8 more.
COPIES = """
module {
  "stable_mosaic.func.func"() ({
  ^bb0(%i: i32, %f: memref<64x128xf32, #tpu.memory_space<any>>,
       %o: memref<8x128xf32, #tpu.memory_space<vmem>>,
       %s: memref<1x!tpu.dma_semaphore, #tpu.memory_space<semaphore_mem>>):
    "stable_mosaic.tpu.enqueue_dma"(%o, %f, %s) : (memref<8x128xf32, #tpu.memory_space<vmem>>, memref<64x128xf32, #tpu.memory_space<any>>, memref<1x!tpu.dma_semaphore, #tpu.memory_space<semaphore_mem>>) -> ()
    %e = "stable_mosaic.arith.constant"() {value = true} : () -> i1
    "stable_mosaic.scf.if"(%e) ({
      "stable_mosaic.tpu.enqueue_dma"(%o, %f, %s) : (memref<8x128xf32, #tpu.memory_space<vmem>>, memref<64x128xf32, #tpu.memory_space<any>>, memref<1x!tpu.dma_semaphore, #tpu.memory_space<semaphore_mem>>) -> ()
      "stable_mosaic.scf.yield"() : () -> ()
    }, {
    }) : (i1) -> ()
    "stable_mosaic.func.return"() : () -> ()
  }) {iteration_bounds = array<i64: 5>, scalar_prefetch = 0 : i64, sym_name = "main", window_params = []} : () -> ()
}
"""  # noqa: E501


def call_of(body: str, declared_bytes: int | None = None) -> str:
    """Attributes of a call that holds this body."""
    encoded = base64.b64encode(body.encode()).decode()
    cost = f',"cost_estimate":{{"flops":"1","bytes_accessed":"{declared_bytes}"}}'
    cost = "" if declared_bytes is None else cost
    return f'custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{"body":"{encoded}"{cost}}}}}'  # noqa: E501


def test_the_work_of_a_body_times_its_grid():
    work = kernel_work(call_of(BODY.replace("PRECISION", "transpose_lhs = false")))
    steps = 3 * 4
    # Five exponentials in the loop and one reduction of what it reads; scalars are another unit's.
    windows = 3 * 8 * 16 * 2 + steps * (16 * 128 * 2 + 8 * 128 * 4) + 128 * 4
    assert work == KernelWork(steps * 2 * 8 * 128 * 16, steps * 6 * 8 * 128, windows)


def test_a_product_at_the_highest_precision_is_six():
    attribute = "precision = #tpu.contract_precision<fp32>"
    work = kernel_work(call_of(BODY.replace("PRECISION", attribute)))
    assert work.flops == 6 * 3 * 4 * 2 * 8 * 128 * 16


@pytest.mark.parametrize(
    ("declared", "blocks"), [(None, 10), (7 * 4096, 7), (3 * 4096, 5), (0, 5), (99 * 4096, 10)]
)
def test_what_a_branch_copies_is_what_the_kernel_says(declared, blocks):
    """Never less than is copied without a branch, nor more than if all were taken."""
    assert kernel_work(call_of(COPIES, declared)).bytes == blocks * 8 * 128 * 4


def test_windows_are_counted_whatever_the_kernel_says():
    body = BODY.replace("PRECISION", "transpose_lhs = false")
    assert kernel_work(call_of(body, 1)) == kernel_work(call_of(body))


def test_a_body_that_cannot_be_read_is_none():
    assert kernel_work(call_of("no program")) is None
    assert kernel_work('custom_call_target="tpu_custom_call"') is None


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)
def test_a_kernel_that_the_compiler_holds():
    """Blocks of 128 x 256 by 256 x 128 on a grid of 2 x 4, and copies of its own in each step."""

    def kernel(left, right, far, out, scratch, semaphore):
        copy = pltpu.make_async_copy(far.at[pl.ds(0, 128)], scratch, semaphore)
        copy.start()
        copy.wait()
        product = jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)
        out[...] = jnp.exp(product) + scratch[...]

    def run(left, right, far):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((256, 512), jnp.float32),
            grid=(2, 4),
            in_specs=[
                pl.BlockSpec((128, 256), lambda i, j: (i, 0)),
                pl.BlockSpec((256, 128), lambda i, j: (0, j)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, j)),
            scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )(left, right, far)

    sharding = SingleDeviceSharding(Topology.parse("v5e:1x1").devices()[0])
    sizes = [((256, 256), jnp.bfloat16), ((256, 512), jnp.bfloat16), ((1024, 128), jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in sizes]
    module = hlo.parse(jax.jit(run).lower(*shapes).compile().as_text())
    [call] = [i for i, _ in module.scheduled() if i.target == "tpu_custom_call"]
    work = kernel_work(call.attributes)
    steps, block = 8, 128 * 128
    assert work.flops == 2 * math.prod((256, 512, 256))
    assert work.operations == steps * 2 * block
    moved = 2 * 128 * 256 * 2 + steps * (256 * 128 * 2 + block * 4)
    assert work.bytes == moved + steps * block * 4

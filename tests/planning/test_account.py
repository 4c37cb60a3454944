"""The account of a step: every instruction in one part, what has no estimate charged, by hand."""

import collections

import pytest

from stem_jax.hardware import CHIPS
from stem_jax.planning import hlo
from stem_jax.planning.account import make_account
from stem_jax.planning.assignment import parts_by_instruction
from stem_jax.planning.charges import charge
from stem_jax.planning.collectives import collectives_of
from stem_jax.planning.topology import Topology
from tests.planning.test_kernel_body import BODY, call_of

CHIP = next(chip for chip in CHIPS if chip.name == "TPU v5 lite")
TOPOLOGY = Topology.parse("v5e:2x2")
BLOCK = "jit(_update)/jvp()/while/body/closed_call/part.block_rest"
BACK = "jit(_update)/transpose(jvp())/while/body/closed_call/checkpoint/part.block_rest"


def named(op_name: str = "", cycles: int | None = None) -> str:
    """Attributes as libtpu prints them."""
    text = f', metadata={{op_name="{op_name}"}}' if op_name else ""
    estimate = f'"estimated_cycles":"{cycles}",' if cycles is not None else ""
    return f'{text}, backend_config={{"flag_configs":[],{estimate}"scoped_memory_configs":[]}}'


# A step as libtpu leaves it, cut down: two blocks in a scan whose rows are sliced for them and
# whose row gradients are stacked; an exchange in rounds; the head's gradient summed at the end.
STEP = f"""HloModule jit__update, is_scheduled=true

%matmul (a: bf16[64,64], b: bf16[64,64]) -> f32[64] {{
  %a = bf16[64,64]{{1,0}} parameter(0)
  %b = bf16[64,64]{{1,0}} parameter(1)
  %product = bf16[64,64]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf{named(BLOCK + "/part.rotary/part.block_matmuls/dot_general")}
  %zero = f32[] constant(0)
  ROOT %norm = f32[64]{{0}} reduce(%product, %zero), dimensions={{1}}{named(BLOCK + "/reduce_sum")}
}}

%unnamed (c: bf16[64,64]) -> bf16[64,64] {{
  %c = bf16[64,64]{{1,0}} parameter(0)
  %small = bf16[8]{{0}} constant(0){named("jit(_update)/part.optimizer/mul")}
  ROOT %silu = bf16[64,64]{{1,0}} logistic(%c){named(BLOCK + "/logistic")}
}}

%gathered (d: bf16[128,64], e: s32[64]) -> bf16[64,64] {{
  %d = bf16[128,64]{{1,0}} parameter(0)
  %e = s32[64]{{0}} parameter(1)
  ROOT %rows = bf16[64,64]{{1,0}} gather(%d, %e){named(BLOCK + "/part.row_lookup/shard_map/gather")}
}}

%cut (f: bf16[2,128,64], g: s32[]) -> bf16[128,64] {{
  %f = bf16[2,128,64]{{2,1,0}} parameter(0)
  %g = s32[] parameter(1)
  ROOT %layer = bf16[128,64]{{1,0}} dynamic-slice(%f, %g){named("jit(_update)/jvp()/while/body/squeeze")}
}}

%body (p: (s32[], bf16[2,128,64], bf16[2,128,64], bf16[64,64])) -> (s32[], bf16[2,128,64], bf16[2,128,64], bf16[64,64]) {{
  %p = (s32[], bf16[2,128,64]{{2,1,0}}, bf16[2,128,64]{{2,1,0}}, bf16[64,64]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %all_rows = bf16[2,128,64]{{2,1,0}} get-tuple-element(%p), index=1
  %stack = bf16[2,128,64]{{2,1,0}} get-tuple-element(%p), index=2
  %x = bf16[64,64]{{1,0}} get-tuple-element(%p), index=3
  %slice_rows = bf16[128,64]{{1,0}} fusion(%all_rows, %i), kind=kLoop, calls=%cut{named("jit(_update)/jvp()/while/body/squeeze", 11)}
  %lookup = bf16[64,64]{{1,0}} fusion(%slice_rows, %i), kind=kCustom, calls=%gathered{named(BLOCK + "/part.row_lookup/shard_map/gather")}
  %project = f32[64]{{0}} fusion(%x, %lookup), kind=kOutput, calls=%matmul{named(BLOCK + "/reduce_sum", 1000)}
  %turn = bf16[64,64]{{0,1}} copy(%project){named("", 13)}
  %kernel = bf16[64,64]{{1,0}} custom-call(%turn), {call_of(BODY.replace("PRECISION", ""))}, metadata={{op_name="{BLOCK}/part.rotary/shard_map/part.attention/vmap(splash)/pallas_call"}}
  %di = f32[64]{{0}} multiply(%x, %x){named(BACK + "/part.rotary/shard_map/part.attention/vmap(splash)/dot_general", 17)}
  %gate = bf16[64,64]{{1,0}} fusion(%kernel), kind=kLoop, calls=%unnamed{named("", 19)}
  %sums = bf16[1024,64]{{1,0}} sort(%gate){named(BACK + "/part.row_gradient/shard_map/sort")}
  %stacked = bf16[2,128,64]{{2,1,0}} dynamic-update-slice(%stack, %sums, %i){named("jit(_update)/transpose(jvp())/while/body/dynamic_update_slice", 23)}
  ROOT %next = (s32[], bf16[2,128,64]{{2,1,0}}, bf16[2,128,64]{{2,1,0}}, bf16[64,64]{{1,0}}) tuple(%i, %all_rows, %stacked, %gate)
}}

%condition (q: (s32[], bf16[2,128,64], bf16[2,128,64], bf16[64,64])) -> pred[] {{
  %q = (s32[], bf16[2,128,64]{{2,1,0}}, bf16[2,128,64]{{2,1,0}}, bf16[64,64]{{1,0}}) parameter(0)
  ROOT %more = pred[] constant(true)
}}

%round (r: (s32[], s32[])) -> (s32[], s32[]) {{
  %r = (s32[], s32[]) parameter(0)
  %swapped = s32[4]{{0}} all-to-all(%r), replica_groups={{}}, dimensions={{0}}{named("jit(_update)/part.exchange/shard_map/while/body/all_to_all")}
  %inside = f32[8]{{0}} broadcast(%swapped){named("", 29)}
  ROOT %same = (s32[], s32[]) tuple(%swapped, %inside)
}}

%until (s: (s32[], s32[])) -> pred[] {{
  %s = (s32[], s32[]) parameter(0)
  ROOT %go = pred[] constant(true)
}}

ENTRY %main (rows: bf16[2,128,64], hidden: bf16[64,64], k: s32[]) -> f32[64] {{
  %rows_in = bf16[2,128,64]{{2,1,0}} parameter(0)
  %hidden = bf16[64,64]{{1,0}} parameter(1)
  %k = s32[] parameter(2)
  %asked = (s32[], s32[]) tuple(%k, %k)
  %rounds = (s32[], s32[]) while(%asked), condition=%until, body=%round{named("jit(_update)/part.exchange/shard_map/while")}
  %counted = s32[] get-tuple-element(%rounds), index=1
  %fetched = bf16[2,128,64]{{2,1,0}} add(%rows_in, %rounds){named("jit(_update)/part.exchange/shard_map/select_n", 31)}
  %nothing = bf16[] constant(0)
  %fill = bf16[2,128,64]{{2,1,0}} broadcast(%nothing), dimensions={{}}{named("jit(_update)/transpose(jvp())/broadcast_in_dim", 37)}
  %start = (s32[], bf16[2,128,64]{{2,1,0}}, bf16[2,128,64]{{2,1,0}}, bf16[64,64]{{1,0}}) tuple(%k, %fetched, %fill, %hidden)
  %scan = (s32[], bf16[2,128,64]{{2,1,0}}, bf16[2,128,64]{{2,1,0}}, bf16[64,64]{{1,0}}) while(%start), condition=%condition, body=%body, metadata={{op_name="jit(_update)/jvp()/while"}}, backend_config={{"known_trip_count":{{"n":"2"}}}}
  %gradients = bf16[2,128,64]{{2,1,0}} get-tuple-element(%scan), index=2
  %pushed = bf16[2,128,64]{{2,1,0}} negate(%gradients){named("jit(_update)/part.exchange/shard_map/neg", 41)}
  %out = bf16[64,64]{{1,0}} get-tuple-element(%scan), index=3
  %loss = f32[64]{{0}} exponential(%out){named("jit(_update)/jvp(part.head_loss)/shard_map/exp", 43)}
  %summed = f32[64]{{0}} all-reduce(%loss), replica_groups={{}}, to_apply=%add
  %odd = f32[64]{{0}} negate(%hidden), backend_config={{"estimated_cycles":"47"}}
  ROOT %moved = f32[64]{{0}} add(%summed, %odd, %counted){named("jit(_update)/part.optimizer/add", 53)}
}}
"""  # noqa: E501

PARTS = {
    # By the matmul in a fusion that is named after its norm.
    "project": "block_matmuls",
    # A fusion without a name: by the largest of what it was made from.
    "gate": "block_rest",
    "lookup": "row_lookup",
    "sums": "row_gradient",
    # Kernel calls alone are attention; what is computed around them is the part outside.
    "kernel": "attention",
    "di": "rotary",
    # Without a mark, between a projection and the kernel.
    "turn": "rotary",
    # Rows for a layer out of the block, their gradients into it, and its fill before the scan.
    "slice_rows": "row_copies",
    "stacked": "row_copies",
    "fill": "row_copies",
    # Without a mark in a loop that has one, whoever reads it afterwards.
    "inside": "exchange",
    "swapped": "exchange",
    "fetched": "exchange",
    "loss": "head_loss",
    # A sum of gradients without a mark goes with what made them, not with what reads it.
    "summed": "head_loss",
    "moved": "optimizer",
    # Used by the optimizer alone.
    "odd": "optimizer",
}


def _account(text: str = STEP, rounds: int = 3):
    module = hlo.parse(text, rounds)
    return module, make_account(module, collectives_of(module, [0] * 4), TOPOLOGY, CHIP)


def _part(account, name: str):
    return next(part for part in account.parts if part.name == name)


@pytest.mark.parametrize("name", PARTS)
def test_the_part_of_an_instruction(name):
    assert parts_by_instruction(hlo.parse(STEP))[name] == PARTS[name]


def test_every_scheduled_instruction_has_one_part():
    module = hlo.parse(STEP)
    names = {instruction.name for instruction, _ in module.scheduled()}
    assert parts_by_instruction(module).keys() == names


def test_parts_sum_to_the_whole():
    module, account = _account()
    estimated = sum((i.estimated_cycles or 0) * times for i, times in module.scheduled())
    # Twice around the scan, three rounds of the exchange, the rest once.
    assert estimated == 2 * (11 + 1000 + 13 + 17 + 19 + 23) + 3 * 29 + 31 + 37 + 41 + 43 + 47 + 53
    assert sum(part.cycles for part in account.parts) == estimated
    assert sum(part.charged for part in account.parts) == sum(c.cycles for c in account.charges)
    charged = sum(part.charged for part in account.parts)
    assert account.total_cycles == estimated + charged
    uncovered = sum(part.wire_seconds - part.covered_seconds for part in account.parts)
    assert account.seconds == pytest.approx(account.total_cycles / CHIP.clock + uncovered)


def test_cycles_by_part():
    _, account = _account()
    found = {part.name: part.cycles for part in account.parts if part.cycles}
    assert found == {
        "block_matmuls": 2 * 1000,
        "rotary": 2 * (13 + 17),
        "block_rest": 2 * 19,
        "row_copies": 2 * (11 + 23) + 37,
        "exchange": 3 * 29 + 31 + 41,
        "head_loss": 43,
        "optimizer": 47 + 53,
    }


def test_a_new_scope_is_a_new_part():
    _, account = _account(STEP.replace("part.head_loss", "part.engram"))
    assert _part(account, "engram").cycles == 43
    assert _part(account, "head_loss").cycles == 0


def test_plain_attention_is_all_of_its_scope():
    plain = STEP.replace("/part.attention/vmap(splash)/pallas_call", "/part.rotary/pallas_call")
    assert parts_by_instruction(hlo.parse(plain))["di"] == "attention"


def test_what_has_no_estimate_is_charged_the_longest():
    module, account = _account()
    charges = {i.name: charge(module, i, CHIP) for i, _ in module.scheduled()}
    found = {name: c.kind for name, c in charges.items() if c}
    assert found == {"lookup": "gather", "kernel": "kernel", "sums": "sort"}
    seconds_of = CHIP.clock / (0.8 * CHIP.hbm_bandwidth)
    # 64 rows of 128 bytes read and written, and their indices.
    assert charges["lookup"].cycles == pytest.approx((2 * 64 * 64 * 2 + 4) * seconds_of)
    # 12 steps with six operations on 8 x 128 elements; 100 KB of windows take longer.
    assert charges["kernel"].cycles == pytest.approx(99_584 * seconds_of)
    # 1024 values in 10 x 11 / 2 stages, 64 sorts beside each other.
    assert charges["sums"].cycles == pytest.approx(55 * 1024 * 64 / 4096)
    listed = {(c.part, c.kind): (c.count, c.cycles) for c in account.charges}
    assert listed["attention", "kernel"] == (2, round(2 * charges["kernel"].cycles))
    assert listed["row_gradient", "sort"] == (2, 2 * 880)
    assert listed["row_lookup", "gather"][0] == 2


def test_matmuls_without_an_estimate_are_charged_by_flops():
    text = STEP.replace('"estimated_cycles":"1000",', "").replace("bf16[64,64]", "bf16[4096,4096]")
    module = hlo.parse(text)
    found = charge(module, module.instructions["project"], CHIP)
    assert found.cycles == pytest.approx(2 * 4096**3 / (0.7 * CHIP.flops) * CHIP.clock)


def test_a_second_core_halves_the_vector_work():
    megacore = next(chip for chip in CHIPS if chip.name == "TPU v5")
    module = hlo.parse(STEP)
    one, two = (charge(module, module.instructions["sums"], chip) for chip in (CHIP, megacore))
    assert two.cycles == one.cycles / 2


def test_rounds_of_the_exchange_count_as_often_as_expected():
    _, once = _account(rounds=1)
    _, often = _account(rounds=9)
    more = _part(often, "exchange").cycles - _part(once, "exchange").cycles
    assert (more, often.open_rounds) == (8 * 29, 9)
    ratio = _part(often, "exchange").wire_seconds / _part(once, "exchange").wire_seconds
    assert ratio == pytest.approx(9)


def test_collectives_are_seconds_and_no_cycles():
    module, account = _account()
    sent = {part.name for part in account.parts if part.wire_seconds}
    assert sent == {"exchange", "head_loss"}
    # All of it is waited for: nothing was started before.
    assert all(part.covered_seconds == 0 for part in account.parts)
    assert charge(module, module.instructions["summed"], CHIP) is None


def test_a_step_without_marks_is_the_rest():
    text = STEP.replace("part.", "")
    assert collections.Counter(parts_by_instruction(hlo.parse(text)).values()).keys() == {"rest"}

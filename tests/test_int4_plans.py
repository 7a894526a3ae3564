"""Run: python -m pytest tests/test_int4_plans.py; needs neither Triton nor a GPU."""

import heapq
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from qat.kernels import int4_candidates, int4_plans
from qat.kernels.int4_plans import Batch, Decode, Dequantize, Few, Int8, Stream

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (704, 2112), (151936, 896), (1, 16), (33, 80)]


def assert_runs(plan, tokens, inputs, capability):
    """Check what the kernels rely on, and what a multiprocessor has room for."""
    if isinstance(plan, Dequantize):
        return
    assert plan.early in ((0, 1, 2, 3) if isinstance(plan, Stream | Few) else (0, 1, 2) if capability >= 90 else (0,))
    if isinstance(plan, Decode):
        assert plan.block_m >= tokens
        x = plan.stages * plan.tiles * plan.warps * plan.block_m * 64 * 2
        sums = plan.warps * plan.blocks * 16 * plan.block_m * 4
        assert plan.stages != 1 and max(x, sums) <= SHARED_MEMORY[capability]
    elif isinstance(plan, Stream):
        assert tokens == 1 and capability == 90 and plan.warps == 8 and plan.tiles in (1, 2, 4, 8) and plan.stages >= 2
    elif isinstance(plan, Few):
        assert tokens <= 8 and capability == 90 and plan.stages >= 2
        in_registers = plan.tiles * 64 * 8 // 32 // 2  # x of a warp, two numbers a register, 32 lanes
        assert 65536 // (32 * plan.warps) >= 2 * in_registers
        assert plan.split * plan.warps * plan.tiles >= -(-inputs // 64)
        # Words, and in float32 two scales an output and tile; sums of a row block; x on its way into registers.
        ring = plan.stages * plan.warps * plan.tiles * (512 + 128)
        assert ring + plan.warps * 16 * 8 * 4 <= SHARED_MEMORY[90]
    else:
        assert isinstance(plan, Batch) and capability == 90
        # A slot of x is filled again two steps on, when the multiplications of one tile at most are unfinished.
        assert plan.warps in (4, 8) and plan.stages >= 3 and plan.tiles % (plan.step * plan.stages) == 0
        assert plan.programs >= 0 and plan.unsplit >= 0 and plan.split <= math.ceil(inputs / (64 * plan.tiles))
        x = plan.stages * plan.step * plan.block_m * 64 * 2
        # Beside x, and an output on its way to memory, which takes turns in a few KiB.
        assert x + 8 * plan.stages * plan.step + 8192 <= SHARED_MEMORY[capability]
        assert plan.block_m <= 256  # in 128 registers


@given(
    tokens=st.integers(1, 10000),
    shape=st.sampled_from(SHAPES) | st.tuples(st.integers(1, 200000), st.integers(1, 2000).map(lambda k: 16 * k)),
    capability=st.sampled_from(list(SHARED_MEMORY)),
    multiprocessors=st.integers(20, 200),
)
@example(tokens=32, shape=(4096, 1280), capability=90, multiprocessors=132)  # 20 tiles, too few for two parts
def test_every_plan_of_the_heuristic_runs(tokens, shape, capability, multiprocessors):
    plan = int4_plans.heuristic(tokens, *shape, capability, multiprocessors)
    assert_runs(plan, tokens, shape[1], capability)
    if isinstance(plan, Batch) and plan.split > 1:
        assert math.ceil(shape[1] / 64) >= 16 * plan.split  # tiles: fewer are not worth a sum


@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
def test_plans_for_few_tokens_run(capability):
    for tokens in range(1, 34):
        for shape in SHAPES:
            assert_runs(int4_plans.heuristic(tokens, *shape, capability, 100), tokens, shape[1], capability)


@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_candidate_runs(shape, capability):
    for tokens in (1, 8, 9, 16, 33, 64, 128, 200, 1024, 4096):
        plans = int4_candidates.candidates(tokens, *shape, capability, 132)
        assert plans and len(set(plans)) == len(plans)
        for plan in plans:
            if capability == 90:
                assert_runs(plan, tokens, shape[1], capability)


@given(row_blocks=st.integers(1, 10000), tiles=st.integers(1, 1000), multiprocessors=st.integers(20, 200))
@example(row_blocks=3584, tiles=128, multiprocessors=132)  # as for the others, but a program reads 3,584 tiles
@example(row_blocks=640, tiles=128, multiprocessors=132)  # 640
@example(row_blocks=3584, tiles=900, multiprocessors=132)  # x and a deep ring do not fit
def test_the_plan_of_one_token_leaves_room_for_the_next(row_blocks, tiles, multiprocessors):
    plan = int4_plans.heuristic(1, 16 * row_blocks, 64 * tiles, 90, multiprocessors)
    if not isinstance(plan, Stream):
        assert tiles > 512  # x of so many inputs takes more than half of a program's shared memory
        return
    span = plan.warps * plan.tiles
    steps = -(-tiles // span)
    # A ring of words of 512 bytes a tile and 16 scales of two, x, and 16 sums of each warp.
    shared = plan.stages * span * (512 + 32) + steps * span * 128 + plan.warps * 64
    assert shared == plan.shared_bytes(tiles)
    fits = 3 * 64 * (512 + 32) + -(-tiles // 64) * 64 * 128 + 8 * 64 <= 208 * 1024
    if fits and tiles > 32 and -(-row_blocks // multiprocessors) * tiles >= 1000:
        # It takes all that there is, with two scales a tile in float32.
        assert plan.tiles == 8 and shared + plan.stages * span * 96 <= SHARED_MEMORY[90]
    else:
        assert 2 * (shared + 1024) <= 228 * 1024
        everything = -(-row_blocks // multiprocessors) * steps
        assert (plan.early == 3) == (everything <= plan.stages)
    assert plan.programs == multiprocessors


@given(tokens=st.integers(2, 8), row_blocks=st.integers(1, 10000), tiles=st.integers(1, 1500), gpu=st.integers(20, 200))
@example(tokens=8, row_blocks=256, tiles=64, gpu=132)  # two row blocks a program, which the ring holds
@example(tokens=8, row_blocks=256, tiles=1025, gpu=132)  # nine parts
def test_the_plan_of_few_tokens_takes_the_fewest_tiles_in_a_row(tokens, row_blocks, tiles, gpu):
    plan = int4_plans.heuristic(tokens, 16 * row_blocks, 64 * tiles, 90, gpu)
    if not isinstance(plan, Few):
        assert tiles > 1024  # more parts than sums are worth
        return
    assert plan.programs * plan.split <= gpu and plan.split <= 8

    def in_a_row(span):
        return -(-row_blocks // (gpu // -(-tiles // span))) * span

    mine = plan.warps * plan.tiles
    assert plan.split == -(-tiles // mine)
    for span in (8, 16, 32, 64, 128):  # none is much better, but for what a block and a sum cost
        if -(-tiles // span) <= 8:
            assert in_a_row(mine) <= in_a_row(span) * (1 + 10 / span) + 8 * span + 200
    assert (plan.early == 3) == (-(-row_blocks // plan.programs) <= plan.stages)


@given(
    kind=st.sampled_from([(4, 128, 8, 2, 4), (8, 128, 8, 2, 4), (8, 256, 4, 1, 4)]),
    tokens=st.integers(65, 5000),
    blocks=st.integers(1, 4000),
    steps=st.integers(1, 120),
    gpu=st.integers(20, 200),
)
@example(
    kind=(8, 128, 8, 2, 4), tokens=256, blocks=640, steps=16, gpu=132
)  # 160 programs, of which 28 start a second round
@example(kind=(4, 128, 8, 2, 4), tokens=128, blocks=48, steps=16, gpu=23)  # 24 parts of two would be one too many
def test_what_is_shared_out_ends_when_it_says(kind, tokens, blocks, steps, gpu):
    """Simulated: programs start in their order, each where a multiprocessor is free; K is whole rounds."""
    plan = Batch(*kind, 1, 2)
    tiles, along_m, along_n = steps * plan.tiles, -(-tokens // plan.block_m), -(-blocks // plan.warps)
    options = int4_plans.shared_out(plan, tokens, blocks, tiles, gpu)
    assert options[0][0].split == 1 and all(one.split > 1 for one, *_ in options[1:])
    for one, programs, in_a_row in options:
        unsplit = along_m * (one.unsplit if one.split > 1 else along_n)
        parts = [(part + 1) * steps // one.split - part * steps // one.split for part in range(one.split)]
        work = [steps] * unsplit + [part for part in parts for _ in range(along_m * along_n - unsplit)]
        assert min(work) > 0 and sum(work) == along_m * along_n * steps
        free = [0] * gpu
        for length in work:
            heapq.heappush(free, heapq.heappop(free) + length)
        assert max(free) * plan.tiles <= in_a_row <= max(free) * plan.tiles + plan.tiles * one.split
        assert programs == -(-len(work) // gpu)
        assert one.programs in (0, gpu) and (one.split == 1 or 0 <= one.unsplit < along_n)


@pytest.mark.parametrize("tokens", [16, 64, 128, 256, 512])
def test_the_heuristic_for_many_tokens_is_what_was_measured(tokens):
    """On an H200: how many tokens and outputs a program takes and in how many parts, which a model of costs chooses."""
    by_shape = int4_plans._read(Path(int4_plans.__file__).with_name("int4_plans.json"))["NVIDIA H200"]
    listed = {name: plans[str(tokens)] for name, plans in by_shape.items() if str(tokens) in plans}
    assert len(listed) == 8
    chosen = {name: int4_plans.heuristic(tokens, *map(int, name.split("x")), 90, 132) for name in listed}
    others = [name for name in listed if chosen[name] != int4_plans.plan_from_json(listed[name])]
    assert len(others) <= (4 if tokens == 64 else 1), others  # those were within an eighth of what is listed


@pytest.mark.parametrize("inputs", [64, 896, 4096, 14336, 28672, 10**6])
@pytest.mark.parametrize("block_m", [16, 64, 128, 256])
def test_a_band_has_a_block_at_least_and_stays_in_the_cache(inputs, block_m):
    band = int4_plans.band(inputs, block_m)
    assert band >= 1 and (band == 1 or band * block_m * inputs * 2 <= 16 * 2**20)


def assert_int8_runs(plan):
    assert plan.block_m in (64, 128) and plan.programs >= 1
    slot = plan.block_m * 128 + 2 * (4096 + 2 * 64 * (4 + 1))  # codes; words, scales in float32, zero points
    assert plan.stages >= 3 and plan.stages * (slot + 16) + plan.block_m * 128 * 4 <= SHARED_MEMORY[90]


@given(tokens=st.integers(1, 10000), outputs=st.integers(1, 200000), multiprocessors=st.integers(20, 200))
def test_int8_plans_run(tokens, outputs, multiprocessors):
    chosen = int4_plans.int8_heuristic(tokens, outputs, multiprocessors)
    plans = int4_candidates.int8_candidates(tokens, multiprocessors)
    assert len(set(plans)) == len(plans) and chosen in int4_candidates.int8_candidates(10000, multiprocessors)
    for plan in (chosen, *plans):
        assert_int8_runs(plan)


@pytest.mark.parametrize(
    ("tokens", "outputs", "block_m"),
    # As measured on an H200 (benchmarks/NOTES.md): 160 and 192 items of 128 tokens would leave 132 programs a bad rest.
    [
        *((64, 28672, 64), (128, 4096, 64), (128, 28672, 128), (256, 4096, 64), (256, 6144, 128), (256, 10240, 64)),
        *((512, 6144, 64), (512, 10240, 128), (1024, 4096, 128), (4096, 57344, 128)),
    ],
)
def test_int8_items_are_narrow_where_that_fills_the_gpu(tokens, outputs, block_m):
    assert int4_plans.int8_heuristic(tokens, outputs, 132).block_m == block_m


def test_every_shipped_plan_runs():
    shipped = json.loads(Path(int4_plans.__file__).with_name("int4_plans.json").read_text())
    plans = [
        (name, int(m), plan)
        for shapes in shipped.values()
        for name, by_tokens in shapes.items()
        for m, plan in by_tokens.items()
    ]
    assert len(plans) > 50
    for name, tokens, values in plans:
        plan = int4_plans.plan_from_json(values)
        if isinstance(plan, Int8):
            assert_int8_runs(plan)
        else:
            assert_runs(plan, tokens, int(name.split("x")[1].split()[0]), 90)


@dataclass
class Tables:
    user: dict
    shipped: dict


@pytest.fixture
def tables(monkeypatch):
    found = Tables({}, {})
    monkeypatch.setattr(int4_plans, "_user_table", lambda: found.user)
    monkeypatch.setattr(int4_plans, "_shipped_table", lambda: found.shipped)
    return found


def test_the_tuned_table_goes_before_the_shipped_one_and_that_before_the_heuristic(tables):
    def choose(tokens):
        return int4_plans.choose(tokens, 64, 128, "a GPU", 90, 132)

    one, other = Decode(4, 1, 8, 1, 2, 0), Batch(4, 64, 4, 2, 4, 1, 0)
    assert choose(3) == int4_plans.heuristic(3, 64, 128, 90, 132)
    tables.shipped = {"a GPU": {"64x128": {"8": int4_plans.plan_to_json(one), "64": int4_plans.plan_to_json(other)}}}
    assert [choose(m) for m in (2, 8, 9, 64)] == [one, one, other, other]
    assert choose(1) == int4_plans.heuristic(1, 64, 128, 90, 132)  # a kernel of its own: by itself or not at all
    tables.shipped["a GPU"]["64x128"] = {"64": int4_plans.plan_to_json(other)}
    assert [choose(m) for m in (8, 9)] == [int4_plans.heuristic(8, 64, 128, 90, 132), other]  # so have 2 to 8
    tables.shipped["a GPU"]["64x128"]["8"] = int4_plans.plan_to_json(one)
    tables.shipped["a GPU"]["64x128"]["1"] = ["dequantize"]
    assert choose(1) == Dequantize() and choose(2) == one
    assert choose(65) == int4_plans.heuristic(65, 64, 128, 90, 132)
    tables.shipped["a GPU"]["64x128 float16"] = {"3": ["dequantize"]}
    in_fp16 = [int4_plans.choose(m, 64, 128, "a GPU", 90, 132, "float16") for m in (3, 4)]
    assert in_fp16 == [Dequantize(), one] and choose(3) == one
    int8 = Int8(64, 4, 8)
    assert int4_plans.choose_int8(3, 64, 128, "a GPU", 132) == int4_plans.int8_heuristic(3, 64, 132)
    tables.shipped["a GPU"]["64x128 int8"] = {"8": int4_plans.plan_to_json(int8)}
    assert int4_plans.choose_int8(3, 64, 128, "a GPU", 132) == int8
    tables.user = {"a GPU": {"64x128": {"8": ["dequantize"]}}, "another": {"64x128": {"64": ["dequantize"]}}}
    assert [choose(m) for m in (8, 9)] == [Dequantize(), other]


def test_the_tuned_table_is_read_from_where_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    assert int4_plans._read(int4_plans.cache_path()) == {}
    int4_plans.cache_path().write_text('{"a GPU": {}}')
    assert int4_plans._read(int4_plans.cache_path()) == {"a GPU": {}}


@pytest.mark.parametrize(
    "plan",
    [
        Decode(1, 2, 3, 4, 5, 6),
        Stream(1, 2, 3, 4, 5),
        Few(1, 2, 3, 4, 5, 6),
        Batch(1, 2, 3, 4, 5, 6, 7, 8, 9),
        Dequantize(),
        Int8(1, 2, 3),
    ],
)
def test_plans_as_json(plan):
    again = int4_plans.plan_from_json(json.loads(json.dumps(int4_plans.plan_to_json(plan))))
    assert type(again) is type(plan) and again == plan

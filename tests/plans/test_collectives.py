"""Collectives read from programs as libtpu prints them: kinds, axes, bytes, counts, links, and what runs beside them."""

import pytest

from transformer.benchmarks.hlo import parse
from transformer.plans.collectives import Collective, MeshShape, collectives_of, groups_of, trip_count
from transformer.plans.compilation import stacked_bytes

SIZES = {"replica": 1, "stage": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
MESH = MeshShape(SIZES, (0,) * 8)

CHAIN = """
HloModule jit_train_step, is_scheduled=true

%begin (p: bf16[16,64]) -> (bf16[16,64], bf16[64,64], u32[]) {
  %p = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %c = (bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0}, u32[]{:S(2)}) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[16,64], x: bf16[64,64]) -> (bf16[64,64], bf16[64,64]) {
  %p = bf16[16,64]{1,0} parameter(0)
  %x = bf16[64,64]{1,0} parameter(1)
  %ag.1 = bf16[64,64]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
  %conv = bf16[64,64]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %t = (bf16[64,64]{1,0}, bf16[64,64]{1,0}) tuple(%conv, %ag.1)
}

%end (p: bf16[16,64]) -> bf16[64,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  %ag.2 = bf16[64,64]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %d = bf16[64,64]{1,0} custom-call(%p, %ag.2), custom_call_target="AsyncCollectiveDone"
}

%scattered (p: bf16[64,64]) -> bf16[16,64] {
  %p = bf16[64,64]{1,0} parameter(0)
  %ar = bf16[64,64]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %ds = bf16[16,64]{1,0} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={16,64}
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%condition (state: (s32[], bf16[16,64], bf16[64,64])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  %number = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%number, %limit), direction=LT
}

%body (state.1: (s32[], bf16[16,64], bf16[64,64])) -> (s32[], bf16[16,64], bf16[64,64]) {
  %state.1 = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state.1), index=0
  %w = bf16[16,64]{1,0} get-tuple-element(%state.1), index=1
  %x = bf16[64,64]{1,0} get-tuple-element(%state.1), index=2
  %f0 = (bf16[16,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%begin
  %g0 = bf16[16,64]{1,0} get-tuple-element(%f0), index=0
  %f1 = (bf16[64,64]{1,0}, bf16[64,64]{1,0}) fusion(%g0, %x), kind=kOutput, calls=%beside
  %g1 = bf16[64,64]{1,0} get-tuple-element(%f1), index=0
  %f2 = bf16[64,64]{1,0} fusion(%g0), kind=kCustom, calls=%end
  %f3 = bf16[16,64]{1,0} fusion(%g1), kind=kCustom, calls=%scattered
  ROOT %r = (s32[], bf16[16,64]{1,0}, bf16[64,64]{1,0}) tuple(%n, %f3, %f2)
}

ENTRY %main (w: bf16[16,64], x: bf16[64,64]) -> bf16[64,64] {
  %w = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %tuple = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[64,64]{1,0}) tuple(%start, %w, %x)
  %loop = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[64,64]{1,0}) while(%tuple), condition=%condition, body=%body, metadata={op_name="jit(train_step)/jvp()/while"}
  %y = bf16[64,64]{1,0} get-tuple-element(%loop), index=2
  %permuted = (bf16[64,64]{1,0}, bf16[64,64]{1,0}, u32[], u32[]) collective-permute-start(%y), channel_id=4, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %done = bf16[64,64]{1,0} collective-permute-done(%permuted)
  ROOT %total = bf16[64,64]{1,0} all-reduce(%done), channel_id=5, replica_groups=[1,8]<=[8], to_apply=%sum, metadata={op_name="jit(train_step)/transpose(jvp(logits))/dot_general"}
}
"""


def test_the_collectives_of_a_program() -> None:
    gather, scatter, permute, reduce = collectives_of(CHAIN, MESH)
    assert (gather.kind, gather.axes, gather.group_size, gather.bytes) == ("all-gather", ("fsdp",), 4, 64 * 64 * 2)
    assert (gather.count, gather.overlapped) == (5, True), "a loop from 1 to 6, a product between start and end"
    assert (scatter.kind, scatter.axes, scatter.bytes) == ("reduce-scatter", ("fsdp",), 64 * 64 * 2)
    assert (scatter.count, scatter.overlapped) == (5, False)
    assert (permute.kind, permute.axes, permute.group_size) == ("collective-permute", ("tensor",), 2)
    assert not permute.overlapped, "its end follows its start"
    assert (reduce.kind, reduce.axes, reduce.group_size) == ("all-reduce", ("fsdp", "tensor"), 8)
    assert reduce.source == "gradient/dot_general"
    assert not any(item.crosses_slices for item in (gather, scatter, permute, reduce))


def test_what_each_sends() -> None:
    def sent(kind: str, size: int) -> float:
        return Collective(kind, ("fsdp",), size, 1000, 1, False, False, tuple(range(size)), "").moved

    assert sent("all-gather", 4) == sent("reduce-scatter", 4) == sent("all-to-all", 4) == 750
    assert sent("all-reduce", 4) == 1500 and sent("collective-permute", 4) == 1000
    assert sent("all-reduce", 1) == 0


def test_a_slice_of_several_sends_over_the_network() -> None:
    """As libtpu prints what passes between slices; groups across them are told by the devices' slices too."""
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",'
        '_xla_megascale_target="{1,2}x{0:4}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    hlo = f"""
ENTRY %main (w: bf16[16,64]) -> bf16[16,64] {{
  %w = bf16[16,64]{{1,0}} parameter(0)
  %after = token[] after-all()
  %send = (bf16[16,64]{{1,0}}, u32[], token[]) send(%w, %after), channel_id=1, {attributes}
  %recv = (bf16[16,64]{{1,0}}, u32[], token[]) recv(%after), channel_id=2, {attributes}
  %product = bf16[16,64]{{1,0}} convolution(%w, %w), dim_labels=bf_io->bf
  %recv-done = (bf16[16,64]{{1,0}}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  %send-done = token[] send-done(%send), channel_id=1, is_host_transfer=true
  ROOT %sum = bf16[16,64]{{1,0}} all-reduce(%product), channel_id=3, replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}
}}
"""
    mesh = MeshShape({**SIZES, "replica": 2, "tensor": 1}, (0, 0, 0, 0, 1, 1, 1, 1))
    for item in collectives_of(hlo, mesh):
        assert (item.kind, item.axes, item.group_size, item.bytes) == ("all-reduce", ("replica",), 2, 16 * 64 * 2)
        assert item.crosses_slices
    assert [item.overlapped for item in collectives_of(hlo, mesh)] == [True, False]


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%sum", [(0, 1), (2, 3)]),
        ("replica_groups={}, to_apply=%sum", [(0, 1, 2, 3)]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, dimensions={0}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}", [(0, 2), (1, 3)]),
        ("source_target_pairs={{0,1},{1,0}}, metadata={}", [(0, 1), (1, 0)]),
    ],
)
def test_every_way_to_write_groups(attributes: str, groups: list[tuple[int, ...]]) -> None:
    assert groups_of(f", channel_id=1, {attributes}", 4) == groups


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown way"):
        groups_of(", replica_groups=all", 4)


def test_turns_that_xla_knows() -> None:
    computations, entry = parse(
        CHAIN.replace('op_name="jit(train_step)/jvp()/while"}', '}, backend_config={"known_trip_count":{"n":"9"}}')
    )
    loop = next(i for i in computations[entry] if i.opcode == "while")
    assert trip_count(loop, computations, computations[entry]) == 9
    without = [i for i in computations["condition"] if i.opcode != "compare"]
    loop = next(i for i in parse(CHAIN)[0][entry] if i.opcode == "while")
    assert trip_count(loop, computations | {"condition": without}, computations[entry]) is None


def test_stacks_of_the_backward_loop() -> None:
    """Two layers of one matrix: its gradient, its copy in 16 bits, which is neither, and what the forward pass kept."""
    hlo = """
ENTRY %main (w: f32[2,8,16]) -> f32[2,8,16] {
  %w = f32[2,8,16]{2,1,0} parameter(0)
  %loop = (s32[], f32[2,8,16]{2,1,0:T(8,128)}, bf16[2,8,16]{2,1,0}, bf16[2,1,32,64]{3,2,1,0}) while(%w), condition=%c, body=%b, metadata={op_name="jit(train_step)/transpose(jvp())/while"}
  ROOT %r = f32[2,8,16]{2,1,0} get-tuple-element(%loop), index=1
}

%b (p: s32[]) -> s32[] {
  ROOT %p = s32[] parameter(0)
}
"""
    assert stacked_bytes(hlo, {(2, 8, 16): 1}) == {"gradients": 2 * 8 * 16 * 4, "activations": 2 * 32 * 64 * 2}

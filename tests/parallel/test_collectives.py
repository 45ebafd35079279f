import jax
import jax.numpy as jnp

from eabf_jax.parallel.collectives import collective_bytes

# Shortened instructions of the kinds that the TPU compiler writes, for sixteen devices.
TEXT = """\
HloModule step, is_scheduled=true

%condition (arg: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %arg = (s32[], f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (p: f32[32]) -> f32[2] {
  %p = f32[32]{0} parameter(0)
  %all-reduce.9 = f32[32]{0} all-reduce(%p), channel_id=4, replica_groups=[1,16]<=[16], to_apply=%sum
  ROOT %own = f32[2]{0} dynamic-slice(%all-reduce.9, %offset), dynamic_slice_sizes={2}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]) parameter(0)
  %w = bf16[4096,32]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=mesh['a'=4,'b'=4] {'b'}, \
dimensions={0}
  %r = (bf16[16,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, \
source_target_pairs={{0,1},{1,0}}
  %d = bf16[16,8]{1,0} collective-permute-done(%r)
  %own = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %dk = bf16[8,2]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=mesh['a'=4,'b'=4] {'b'}, dimensions={0}, \
metadata={op_name="jit(run)/while/body/transpose(jvp())/shard_map/key_value_gradients/reduce_scatter"}
  %dv = bf16[8,2]{1,0} reduce-scatter(%y), channel_id=1, replica_groups=mesh['a'=4,'b'=4] {'b'}, dimensions={0}, \
metadata={op_name="jit(run)/while/body/parameters/shard_map/key_value_gradients/reduce_scatter"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %d)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%init), condition=%condition, body=%body
  %both = (f32[8,4]{1,0}, f32[8]{0}) all-reduce(%a, %b), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_every_kind_counts_what_a_device_sends_as_often_as_its_loop_runs():
    assert collective_bytes(TEXT) == {
        "all-gather": 5 * 4096 * 32 * 2 * 3 / 4,  # over the four devices of axis b
        "collective-permute": 5 * 16 * 8 * 2,
        # An all-reduce of which each device keeps a part, and two that share one channel.
        "reduce-scatter": 5 * 32 * 4 * 15 / 16 + 2 * 5 * 8 * 2 * 2 * 3,
        "all-reduce": 2 * (8 * 4 + 8) * 4 * 1 / 2,  # over two devices, both arrays
    }


def test_what_is_carried_is_told_by_the_innermost_scope():
    sent = collective_bytes(TEXT, by="carries")
    assert sent["key_value_gradients"] == 2 * 5 * 8 * 2 * 2 * 3
    assert sum(sent.values()) == sum(collective_bytes(TEXT).values())


def test_a_program_without_collectives_sends_nothing():
    assert collective_bytes(jax.jit(jnp.sin).lower(jnp.ones(8)).compile().as_text()) == {}

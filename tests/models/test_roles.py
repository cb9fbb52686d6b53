"""What a role promises about its gradients' reduction."""

import pytest

from megatron_safe.config import ModelConfig, OptimizerConfig
from megatron_safe.models.roles import Role


def test_a_backward_that_fails_without_reduction_leaves_none_behind(runtime):
    model = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, max_sequence_length=8, vocab_multiple=8)
    role = Role("actor", model, runtime, 16, "fp32", 0, OptimizerConfig(overlap_grad_reduce=True))
    (chunk,) = role.trainable
    assert chunk.config.no_sync_func == chunk.no_sync
    with pytest.raises(ZeroDivisionError), role.without_reduction():
        assert chunk.config.no_sync_func is None
        assert not any(group.is_last_microbatch for group in chunk.bucket_groups)
        raise ZeroDivisionError
    assert chunk.config.no_sync_func == chunk.no_sync
    assert all(group.is_last_microbatch for group in chunk.bucket_groups)

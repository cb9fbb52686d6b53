"""A machine with round numbers."""

import pytest

from megatron_safe.planning.machine import Link, Machine, Overheads


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine(
        name="round", basis="measured", source="made up", device="gpu", devices_per_node=4, memory_bytes=1e9,
        reserved_bytes=1e8, memory_bandwidth=1e9, elementwise_bandwidth=2e9,
        flops={"fp32": [(10, 1e9), (1000, 4e9)], "bf16": [(10, 2e9), (1000, 8e9)]},
        decode_flops={"fp32": [(10, 5e8), (1000, 4e9)], "bf16": [(10, 1e9), (1000, 8e9)]},
        attention_flops={"fp32": 1e9, "bf16": 2e9}, optimizer=1e-9,
        overheads=Overheads(1e-3, 1e-4, 1e-5, 2e-5, 3e-5, 1e-4, 1e-5), inside=Link(1e-5, 1e9), between=Link(1e-4, 1e8),
    )  # fmt: skip

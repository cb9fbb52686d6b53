"""Safe RLHF (Dai et al., 2023) at Megatron scale."""

import warnings

__version__ = "0.1.0"

# At import Megatron-Core warns of each optional package (apex, Transformer Engine) that is missing, on every rank.
warnings.filterwarnings("ignore", module=r"megatron\.core.*")
# dist_checkpointing goes through torch's ShardedTensor, which warns of its deprecation.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")

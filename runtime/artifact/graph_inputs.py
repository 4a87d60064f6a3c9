"""Names of graph inputs that say what a run is to give, beside tensors of the model."""

from __future__ import annotations

LOGITS_TO_KEEP = "logits_to_keep"
"""int64 scalar: so many of the last positions; 0 means all."""

LOGITS_START = "logits_start"
"""int64 [1]: ``-logits_to_keep``; 0 means all here too."""

POOLING = "pooling"
"""Name of the vision graph's input: int64 [tokens, pooled], patches that each token averages."""

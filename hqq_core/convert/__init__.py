"""The one loop: read a tensor, solve it, write it; then the files that make a folder a checkpoint.

A job has a plan for each of its recipes. `write_folding` and `finish_checkpoint` see to one plan's folder, before and after
`quantize_shard`, which reads each tensor of a shard once for all plans. A service runs these steps apart; `quantize_checkpoint`
runs them in a row. Each may run twice with the same result, and a folder's manifest is written last: its presence means complete.
"""

from __future__ import annotations

from hqq_core.convert._folder import describe_part, finish_checkpoint, finished
from hqq_core.convert._job import quantize_checkpoint
from hqq_core.convert._shard import quantize_shard
from hqq_core.folding import write_folding

__all__ = ["describe_part", "finish_checkpoint", "finished", "quantize_checkpoint", "quantize_shard", "write_folding"]

"""A result read again, from its files alone, by readers that share no code with what wrote it.

Three questions: are the files those of the manifest; does a reader of the format find what was solved, tensor by tensor, to the
last stored bit; and, with the source, is the error of each tensor the reported one and each copy a copy? A thread looks at one
tensor, a few rows at a time, so that memory does not grow with the model. `verify_part` asks the last two of one shard as soon as
it is written, while its source is at hand.
"""

from __future__ import annotations

from hqq_core.verify._expected import read_manifest
from hqq_core.verify._folder import Verified, verify_folder
from hqq_core.verify._part import verify_part

__all__ = ["Verified", "read_manifest", "verify_folder", "verify_part"]

"""Everything is killed and every fault of a Hub happens, at moments that a seed draws: what holds afterwards (invariants.py)."""

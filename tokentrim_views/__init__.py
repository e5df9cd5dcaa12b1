"""Which past frames a pass reads, and at which positions in time; this room knows no cache."""

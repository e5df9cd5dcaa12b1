"""Which past frames a pass reads, and where they stand in time; this room knows no cache."""

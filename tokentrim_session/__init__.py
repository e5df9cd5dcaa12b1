"""One call, from its arguments to finished chunks."""

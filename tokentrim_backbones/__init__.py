"""A transformer and its past, as a rollout sees them."""

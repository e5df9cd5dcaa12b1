"""What later chunks may read, one video at a time: the contract of a policy, its methods, their formulas."""

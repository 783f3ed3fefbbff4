"""Ways to store numbers in few bits: transforms, codes, and the chains that tiers are made of. Pure functions on tensors."""

"""Numbers in few bits: the quantizer, its packing, the balancer. Pure functions on tensors."""

"""Integer weights as the library compressed-tensors keeps them."""

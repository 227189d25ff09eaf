"""One-shot pruning: calibration statistics of any function, and methods written for [I, O] weights and [I, I] Grams."""

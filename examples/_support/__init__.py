"""What the examples share: data, options, checkpoints, progress, figures."""

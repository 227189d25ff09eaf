"""A width for each group of channels: what each costs the loss, what it takes, and which are best within budgets."""

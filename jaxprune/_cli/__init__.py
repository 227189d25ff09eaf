"""The command ``jaxprune``. Private."""

"""What trains here does so by Flax and optax, which need JAX's standard promotion of dtypes."""

from tests.support.promotion import standard_promotion as standard_promotion

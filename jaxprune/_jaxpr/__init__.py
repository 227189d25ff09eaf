"""The one place that looks inside the equations of a jaxpr, and names primitives. Private."""

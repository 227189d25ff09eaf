"""All networks of the structured zoo by name."""

from tests.support import structured_zoo, structured_zoo_sequences

CASES = {case.__name__: case for case in (*structured_zoo.NETWORKS, *structured_zoo_sequences.NETWORKS)}
